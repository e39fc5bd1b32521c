"""Settings of the objective that contradict each other, and functions of the user's that cannot be called."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.rewards.pool import GENERATE
from fp8slurm.rl.advantages import advantages_of, try_advantages
from fp8slurm.rl.loss import loss_of, try_loss
from fp8slurm.sessions.runner import FLAG, load_generate


def check_objective(config: RunConfig) -> None:
    """InputError: names the flags, what contradicts what, and what is allowed."""
    a, r = config.algorithm, config.rollout
    loss_of(a)
    advantages_of(a)
    if 0 < a.dual_clip <= 1:
        raise InputError(f"--algorithm.dual-clip {a.dual_clip:g}: allowed: above 1, or 0 to switch it off")
    if a.dual_clip and a.loss in ("gspo", "cispo"):
        raise InputError(
            f"--algorithm.dual-clip {a.dual_clip:g} with --algorithm.loss {a.loss}, which has no such bound; allowed: "
            f"0, or --algorithm.loss ppo_clip"
        )
    if a.loss == "gspo" and a.loss_mean != "sequence":
        raise InputError(
            f"--algorithm.loss gspo with --algorithm.loss-mean {a.loss_mean}: its objective is a mean over sequences; "
            f"allowed: --algorithm.loss-mean sequence"
        )
    if a.advantage == "rloo" and a.divide_by_std:
        raise InputError(
            "--algorithm.advantage rloo with --algorithm.divide-by-std: a leave-one-out advantage has no such scale; "
            "allowed: --algorithm.no-divide-by-std, or --algorithm.advantage grpo"
        )
    if a.advantage == "reinforce_pp" and r.drop_no_signal and config.run.steps:
        raise InputError(
            "--algorithm.advantage reinforce_pp with --rollout.drop-no-signal: against a global baseline groups of "
            "equal rewards have a signal; allowed: --rollout.no-drop-no-signal"
        )
    if a.advantage in ("grpo", "rloo") and config.run.steps and r.n_samples < 2:
        raise InputError(
            f"--rollout.n-samples 1 with --algorithm.advantage {a.advantage}: advantages are relative to the group; "
            f"allowed: 2 or more"
        )
    for flag, value, default in (("level", a.tis_level, "token"), ("excess", a.tis_excess, "truncate")):
        if value != default and not a.tis_cap:
            raise InputError(
                f"--algorithm.tis-{flag} {value} with --algorithm.tis-cap 0, which switches importance weights off; "
                f"allowed: a cap above 0, or leave --algorithm.tis-{flag} out"
            )
    if a.advantage == "none" and config.teacher.checkpoint is None:
        raise InputError(
            "--algorithm.advantage none without --teacher.checkpoint: there is nothing to learn from; allowed: give a "
            "teacher, or another advantage"
        )
    try_loss(a)
    try_advantages(a)


def check_generate(config: RunConfig) -> None:
    """InputError: rollout.generate cannot be called, or other settings need it."""
    if config.rollout.generate is not None:
        load_generate(config.rollout.generate)
        return
    kinds = {"--reward.kind": config.reward.kind}
    kinds |= {f"--data.sources {name}.reward": s.reward or "" for name, s in config.data.sources.items()}
    for flag in (flag for flag, kind in kinds.items() if kind == GENERATE):
        raise InputError(f"{flag} {GENERATE} without {FLAG}: nothing gives samples a reward; allowed: another kind")


def check_teacher(config: RunConfig) -> None:
    """InputError: the teacher cannot score this run's samples. It has to have the student's tokens, one for one."""
    from fp8slurm.data.prompts import load_tokenizer

    folder, r = config.teacher.checkpoint, config.rollout
    if folder is None:
        return
    flag = f"--teacher.checkpoint {folder}"
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag}: there is no config.json in it; give a Hugging Face folder")
    if r.drop_no_signal:
        raise InputError(
            f"{flag} with --rollout.drop-no-signal: groups of equal rewards have a signal, the teacher's; allowed: "
            f"--rollout.no-drop-no-signal"
        )
    if r.temperature != 1:
        raise InputError(
            f"{flag} with --rollout.temperature {r.temperature:g}: an engine scores at temperature 1, and the KL would "
            f"be of two different policies; allowed: 1"
        )
    if config.slurm.gpus_per_node and config.engine.placement == "shared":
        raise InputError(
            f"{flag} with --engine.placement shared: the teacher keeps its memory while the trainer works; allowed: "
            f"--engine.placement split with --engine.gpus"
        )
    assert config.model.hf_checkpoint is not None
    own, its = load_tokenizer(config.model.hf_checkpoint).get_vocab(), load_tokenizer(folder).get_vocab()
    if own != its:
        other = min(t for t in {**own, **its} if own.get(t) != its.get(t))
        raise InputError(
            f"{flag}: its tokens are not those of --model.hf-checkpoint: {other!r} is {its.get(other)} there and "
            f"{own.get(other)} here; allowed: a teacher with the same tokenizer"
        )
