"""fp8slurm: reinforcement learning in FP8 on a Slurm cluster, with Megatron-core and SGLang and no Ray."""

__version__ = "0.1.0"
