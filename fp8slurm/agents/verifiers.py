"""An environment of the package verifiers: its data set as a data file, its rollout and rubric as rollout.generate.

# my_env.py
from fp8slurm.agents.verifiers import Environment
generate = Environment("my-env", difficulty=3)

python -m fp8slurm.agents.verifiers my_env:generate data/my-env.jsonl
--rollout.generate my_env:generate --reward.kind generate --data.train data/my-env.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.extras import require
from fp8slurm.core.files import write_atomic
from fp8slurm.core.types import Prompt, Sample
from fp8slurm.core.user_code import load_user_function
from fp8slurm.sessions.endpoint import MODEL
from fp8slurm.sessions.session import Session

VERSION = "0.1.8.post2"
"""The newest that was run beside the openai client that SGLang pins; 0.4.0 asks for a newer one."""
_OF_A_ROW = ("example_id", "task", "info")


class Environment:
    """Called as rollout.generate is; the reward and its parts are the rubric's, with reward.kind generate."""

    def __init__(self, name: str, /, **arguments: Any) -> None:
        """name, arguments: as verifiers.load_environment takes them. InputError: there is no such environment, it does
        not load, it is not one of chat messages, or its rubric scores groups; or the package is not there."""
        require("verifiers", VERSION)
        import verifiers

        try:
            self.environment: Any = verifiers.load_environment(name, **arguments)
        except Exception as error:  # whatever the environment raises
            raise InputError(f"verifiers has no environment {name!r} that loads with {arguments}: {error}") from None
        if self.environment.message_type != "chat":
            raise InputError(f"environment {name!r} completes text; allowed: one of chat messages")
        rubric = self.environment.rubric
        if rubric._get_group_reward_funcs() or not rubric._get_individual_reward_funcs():
            raise InputError(
                f"environment {name!r}: its rubric scores groups, or nothing; allowed: one of single rollouts"
            )
        self.name = name

    async def __call__(self, session: Session, prompt: Prompt) -> list[Sample]:
        """One rollout of the environment, scored."""
        from fp8slurm.agents.openai_client import openai_client

        row = {key: prompt.row[key] for key in _OF_A_ROW if key in prompt.row}
        given = {"prompt": prompt.content, "answer": prompt.label, "example_id": prompt.index, **row}
        async with openai_client(session.base_url, session.api_key) as client:
            state = await self.environment.rollout(given, client, MODEL, {})
            await self.environment.rubric.score_rollout(state, score_sem=asyncio.Semaphore())
        reward = float(state["reward"])
        if not math.isfinite(reward):
            raise ValueError(f"the rubric of {self.name!r} gave {reward}")
        samples = session.samples()
        for sample in samples:
            sample.reward = reward
            sample.parts = {name: float(value) for name, value in (state["metrics"] or {}).items()}
        return samples

    def rows(self, held_out: bool = False) -> list[dict[str, Any]]:
        """The data set, or the one for evaluation, as rows of a data file. InputError: there is none."""
        found = self.environment.eval_dataset if held_out else self.environment.dataset
        if found is None:
            raise InputError(
                f"environment {self.name!r} has no data set for {'evaluation' if held_out else 'training'}"
            )
        return [
            {"prompt": row["prompt"], "label": str(row.get("answer", "")), **{k: row[k] for k in _OF_A_ROW if k in row}}
            for row in found
        ]


def main(argv: list[str] | None = None) -> int:
    """Write a data set."""
    parser = argparse.ArgumentParser(description="Write the data set of an environment as a data file.")
    parser.add_argument("generate", help="module:name of the Environment, as for --rollout.generate")
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--held-out", action="store_true", help="the data set for evaluation")
    args = parser.parse_args(argv)
    try:
        environment = load_user_function(args.generate, "generate", "session", "prompt")
        if not isinstance(environment, Environment):
            raise InputError(f"{args.generate} is no fp8slurm.agents.verifiers.Environment")
        rows = environment.rows(args.held_out)
    except InputError as error:
        parser.exit(2, f"verifiers: {error}\n")
    write_atomic(args.out, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    main()
