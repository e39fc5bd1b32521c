"""A Python tool that runs apart from everything else (docs/agents.md, Tools that run apart)."""

from functools import cache

from fp8slurm.agents.sandbox import Limits, Sandbox


@cache
def sandbox() -> Sandbox:
    """Made at the first call: it tries what the kernel allows. `hidden` would be the folder with the labels."""
    return Sandbox(Limits(timeout_s=5, memory_mib=256, output_bytes=2000), at_once=32)


async def python(code: str) -> str:
    """What the model is told: the output, and why there is no more of it."""
    return (await sandbox().run(code)).text
