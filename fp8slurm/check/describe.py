"""What a configuration would start, in words: for --dry-run."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
from fp8slurm.models.precision import engine_in_fp8
from fp8slurm.plan import make_plan
from fp8slurm.plan.parameters import Layout
from fp8slurm.plan.report import summary


def describe(config: RunConfig) -> str:
    """A few lines: tasks, layout, precisions, batch, what `fp8slurm plan` says, and the job script where there is one.

    InputError for a layout that cannot be.
    """
    placement = place(config)
    p, r = config.parallel, config.rollout
    layout = Layout.of(p, placement.world_size)
    trainer = (
        config.model.dtype
        if config.fp8.backend == "off"
        else f"FP8 {config.fp8.format} {config.fp8.recipe} ({config.fp8.backend})"
    )
    lines = [
        f"tasks        {placement.nodes} node(s) x ({placement.ranks_per_node} ranks + 1 rollout worker), "
        f"executor {config.slurm.executor}",
        f"layout       {layout}",
        f"precision    trainer {trainer}, engine {'block FP8' if engine_in_fp8(config) else config.engine.dtype}",
        f"a step       {r.prompts_per_step} prompts x {r.n_samples} samples of at most {r.max_tokens} tokens, "
        f"{config.train.updates_per_step} update(s) of micro-batches of {config.train.tokens_per_micro_batch} tokens",
        f"run folder   {config.run.root / config.run.name}",
        summary(make_plan(config)),
    ]
    if config.slurm.executor == "slurm":
        from fp8slurm.slurm.script import script

        run_dir = (config.run.root / config.run.name).resolve()
        lines += [
            "job script, as submitit writes it:",
            *(f"    {line}".rstrip() for line in script(config, run_dir).splitlines()),
        ]
    lines.append("nothing was started (--dry-run)")
    return "\n".join(lines)
