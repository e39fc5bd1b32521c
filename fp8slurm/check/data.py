"""The rows of a run's data files, and what they contradict, before anything is queued."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import Prompt

if TYPE_CHECKING:
    from fp8slurm.data.prompts import Doubts
    from fp8slurm.data.sources import Source

ROWS_CHECKED = 20_000
"""Rows of each data file that are read before a job is queued; the job itself reads all of them."""


def check_data(config: RunConfig, begun: RunConfig | None, warnings: list[str]) -> None:
    """The rows of the data files, which are there, and the tokens that end responses.

    begun: the settings that the run was begun with; with the same data it goes on, whatever cannot be meant.

    Raises:
        InputError: names file and row, or the flag, and what is allowed.
    """
    from fp8slurm.data.chat_template import unused_arguments
    from fp8slurm.data.prompts import load_prompts, load_sft, load_tokenizer
    from fp8slurm.data.sources import cycle_of, training_sources
    from fp8slurm.rewards.graders import label_error
    from fp8slurm.rewards.pools import RewardPools

    assert config.model.hf_checkpoint is not None
    unmeant: list[str] = []
    tokenizer = load_tokenizer(config.model.hf_checkpoint)
    _end_tokens(config.model.hf_checkpoint, tokenizer, warnings)
    if unused := unused_arguments(tokenizer, config.data.chat_template_kwargs):
        unmeant.append(f"--data.chat-template-kwargs {unused}")
    prompts: dict[str, list[Prompt]] = {}
    learned: set[tuple[int, ...]] = set()
    if config.run.steps:
        sources = training_sources(config.data, config.reward.kind)
        cycle_of([source.weight for source in sources])
        prompts = {source.flag: list(source.load(tokenizer, label_error, ROWS_CHECKED)) for source in sources}
        RewardPools(config.reward, {source.name: source.reward for source in sources}, workers=1).close()
        warnings += _repeated(config.rollout.prompts_per_step, sources, prompts)
        learned = {tuple(p.token_ids) for found in prompts.values() for p in found}
    if config.data.eval is not None:
        unanswerable = partial(label_error, config.reward.kind)
        prompts["--data.eval"] = load_prompts(config.data, tokenizer, config.data.eval, ROWS_CHECKED, unanswerable)
    warnings += _plain_prompts(prompts, tokenizer)
    for flag, found in prompts.items():
        _last_turns(flag, found, unmeant, warnings)
    doubts = check_eval_tasks(config, tokenizer)
    unmeant += doubts.unmeant
    warnings += doubts.unusual
    if config.sft.data is not None:
        examples = load_sft(config.data, config.sft, tokenizer, config.sft.data, limit=ROWS_CHECKED)
        learned |= {example.prompt_ids for example in examples}
        if len(examples) < config.sft.batch_size:
            warnings.append(
                f"sft.batch_size {config.sft.batch_size} with {len(examples)} examples in --sft.data: a step takes "
                f"examples more than once"
            )
        if config.sft.eval_every and config.data.eval is None:
            raise InputError(f"--sft.eval-every {config.sft.eval_every} needs --data.eval to evaluate on")
    warnings += _not_held_out(prompts.get("--data.eval", []), learned)
    if not config.run.steps and config.sft.data is None:
        raise InputError("--run.steps 0 without --sft.data: there is nothing to do")
    if unmeant and (begun is None or (begun.data, begun.eval.tasks) != (config.data, config.eval.tasks)):
        raise InputError("\n".join(unmeant))
    warnings += unmeant


def _repeated(per_step: int, sources: Sequence[Source], prompts: dict[str, list[Prompt]]) -> list[str]:
    """Sources that have fewer prompts than a step takes of them."""
    from fp8slurm.data.sources import LOOKED_AT

    warnings = []
    for source in sources:
        needed = round(per_step * source.weight / sum(s.weight for s in sources))
        there = prompts[source.flag]
        if len(there) < min(needed, LOOKED_AT) and there[-1].index + 1 < ROWS_CHECKED:
            share = f", {needed} of them of this source," if len(sources) > 1 else ""
            warnings.append(
                f"rollout.prompts_per_step {per_step}{share} with {len(there)} prompts in {source.flag} {source.path}: "
                f"a step takes prompts more than once"
            )
    return warnings


def _last_turns(flag: str, prompts: Iterable[Prompt], unmeant: list[str], warnings: list[str]) -> None:
    from fp8slurm.data.prompts import last_turns

    odd = last_turns([(f"row {p.index + 1}", p.content) for p in prompts])
    unmeant += [f"{flag}: {text}" for text in odd.unmeant]
    warnings += [f"{flag}: {text}" for text in odd.unusual]


def _not_held_out(held_out: Sequence[Prompt], learned: set[tuple[int, ...]]) -> list[str]:
    """Held-out prompts that are trained on."""
    known = [p for p in held_out if p.token_ids in learned]
    if not known:
        return []
    return [
        f"{len(known)} of {len(held_out)} prompts of --data.eval are trained on too (the first in row "
        f"{known[0].index + 1}): the accuracy on them says nothing of others"
    ]


def _plain_prompts(prompts: dict[str, list[Prompt]], tokenizer: Any) -> list[str]:
    """One warning for all text prompts: a model tuned to chat is asked as no user would ask it."""
    plain = {flag: sum(isinstance(p.content, str) for p in found) for flag, found in prompts.items()}
    if not tokenizer.chat_template or not any(plain.values()):
        return []
    shares = ", ".join(f"{n} of {len(prompts[flag])} of {flag}" for flag, n in plain.items() if n)
    return [
        f"prompts that are text ({shares}) are tokenized as they stand, without the tokenizer's chat template; "
        f"messages, a list of objects with role and content, go through it"
    ]


def _end_tokens(folder: Path, tokenizer: Any, warnings: list[str]) -> None:
    from fp8slurm.data.prompts import end_token_ids, unlisted_ends

    end_token_ids(folder, tokenizer)
    for token, why in unlisted_ends(folder, tokenizer).items():
        warnings.append(
            f"token {token} ({tokenizer.convert_ids_to_tokens(token)}) ends responses too: {why}, and eos_token_id of "
            f"{folder}/generation_config.json and config.json leaves it out"
        )


def check_eval_tasks(config: RunConfig, tokenizer: Any) -> Doubts:
    """The questions and graders of eval.tasks. InputError: they cannot be read, asked or graded."""
    from fp8slurm.data.prompts import Doubts
    from fp8slurm.eval.questions import load_questions, task_doubts
    from fp8slurm.eval.tasks import HELD_OUT, OF_A_RUN, grader_section, run_tasks
    from fp8slurm.rewards.pool import RewardPool

    if config.eval.n_samples > 1 and config.eval.temperature == 0:
        raise InputError(
            f"--eval.n-samples {config.eval.n_samples} with --eval.temperature 0: greedy samples of a question "
            f"are all the same; set a temperature, or --eval.n-samples 1"
        )
    doubts = Doubts([], [])
    for task in run_tasks(config) if config.eval.tasks else []:
        questions, left_out = load_questions(task, tokenizer, config.data, rows=ROWS_CHECKED)
        RewardPool(grader_section(task, config.reward), workers=1).close()
        if task.name != HELD_OUT:  # its prompts are --data.eval's
            of_task = task_doubts(task, questions, len(questions) + left_out)
            doubts.unmeant.extend(f"{OF_A_RUN} {text}" for text in of_task.unmeant)
            doubts.unusual.extend(f"{OF_A_RUN} {text}" for text in of_task.unusual)
    return doubts
