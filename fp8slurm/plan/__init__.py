"""What a run will hold and move, computed from its configuration: no GPU, no checkpoint, no Megatron."""

from fp8slurm.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
