"""The verifiers of reasoning-gym as a reward, for the rows of its tasks (data/reasoning_gym.py)."""

from __future__ import annotations

from typing import Any

from fp8slurm.data.reasoning_gym import dataset, entry_of, package

package()  # its import takes seconds, and a call's time limit does not run yet


def score(response: str, row: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The reward of the task's own verifier (--reward.kind fp8slurm.agents.reasoning_gym:score).

    It is handed what stands in the last <answer></answer>, or else all that follows the thinking. A verifier that fails
    on an answer gives 0, and 1 as the part `failed`. ValueError: the row is not of such a file.
    """
    if "reasoning_gym" not in row:
        raise ValueError("the row is of no reasoning-gym task: data.train is a .toml file that names one")
    of = row["reasoning_gym"]
    key = (of["task"], of["settings"], of["seed"])
    entry = entry_of(*key, of["number"])
    try:
        value = float(dataset(*key).score_answer(answer_of(response), entry))
    except Exception:  # what a model says can be anything
        return 0.0, {"failed": 1.0}
    return value, {"failed": 0.0}


def answer_of(response: str) -> str:
    """What of a response a verifier is handed."""
    shown = response.rpartition("</think>")[2]
    _, opened, last = shown.rpartition("<answer>")
    return (last.partition("</answer>")[0] if opened else shown).strip()
