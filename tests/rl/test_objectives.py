"""Losses and advantages: each formula against a few lines of torch by hand, values and gradients; the user's own."""

from __future__ import annotations

import itertools
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fp8slurm.check.objective import check_objective
from fp8slurm.config import RunConfig
from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import PackedBatch, Prompt, Sample, SampleGroup
from fp8slurm.core.user_code import load_user_function
from fp8slurm.rl.advantages import advantages_of, reinforce_pp, rloo
from fp8slurm.rl.loss import importance_weights, loss_of, make_policy_loss
from fp8slurm.rl.objectives import LossInput
from fp8slurm.rl.packing import pack
from fp8slurm.rollout.serialization import decode_groups, encode_groups

NUMBERS = itertools.count()
LENGTHS = (5, 2, 7)  # predictions that count, in three sequences with two prompt positions before and one behind


def example(seed: int = 0) -> tuple[torch.Tensor, PackedBatch]:
    """Log-probabilities and a micro-batch of three sequences and padding; absurd numbers where nothing counts."""
    g = torch.Generator().manual_seed(seed)
    cu, mask, advantages = [0], [], []
    for i, n in enumerate(LENGTHS):
        mask += [False] * 2 + [True] * n + [False]
        advantages += [0.0] * 2 + [(1.0, -1.5, 0.5)[i]] * n + [0.0]
        cu.append(len(mask))
    mask, advantages = torch.tensor(mask + [False] * 3), torch.tensor(advantages + [0.0] * 3)
    cu = torch.tensor([*cu, len(mask)], dtype=torch.int32)
    absurd = torch.where(mask, 0.0, 5e3)

    def logprobs(spread: float, of: torch.Tensor) -> torch.Tensor:
        return of + spread * torch.randn(len(mask), generator=g)

    old = logprobs(0.0, -1 - torch.rand(len(mask), generator=g))
    weights = torch.where(mask, 1 / sum(LENGTHS), 0.0)
    ids = torch.zeros(len(mask), dtype=torch.int64)
    batch = PackedBatch(
        ids, ids, ids, cu, weights, logprobs(0.2, old) - absurd, advantages, mask, logprobs(0.0, old) - absurd
    )
    return (logprobs(0.3, old) + absurd).requires_grad_(), batch


def by_hand(logprobs: torch.Tensor, batch: PackedBatch) -> list[tuple[torch.Tensor, ...]]:
    """(log-probs, old, engine's, advantage, weights) of every sequence, cut out."""
    out = []
    for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:]):
        m = batch.loss_mask[start:end]
        if m.any():
            parts = (logprobs, batch.trainer_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_weights)
            out.append(tuple(x[start:end][m] for x in parts))
    return out


def compare(algorithm: AlgorithmSection, formula, seed: int = 0) -> dict[str, float]:
    """Loss and gradient of the function that the trainer is given, against those of `formula`; its metrics."""
    logprobs, batch = example(seed)
    loss, metrics = make_policy_loss(algorithm)(logprobs, None, batch)
    loss.backward()
    again = logprobs.detach().clone().requires_grad_()
    expected = sum(formula(*sequence) for sequence in by_hand(again, batch))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logprobs.grad, again.grad)
    assert torch.count_nonzero(logprobs.grad) > 0
    return {k: v.item() for k, v in metrics.items()}


@pytest.mark.parametrize("seed", range(3))
def test_ppo_clip(seed):
    def formula(new, old, engine, a, w):
        r = torch.exp(new - old)
        return (w * torch.max(-r * a, -torch.clip(r, 0.9, 1.1) * a)).sum()

    compare(AlgorithmSection(clip_low=0.1, clip_high=0.1, tis_cap=0), formula, seed)


@pytest.mark.parametrize("seed", range(3))
def test_gspo_is_the_clipped_surrogate_of_whole_sequences(seed):
    """Eq. 5 as it stands, with the gradient through the sequence's ratio; our form by token must have the same."""

    def formula(new, old, engine, a, w):
        s = torch.exp((new - old).sum() / len(new))
        return w.sum() * torch.max(-s * a[0], -torch.clip(s, 0.95, 1.1) * a[0])

    metrics = compare(AlgorithmSection(loss="gspo", clip_low=0.05, clip_high=0.1, tis_cap=0), formula, seed)
    cut = sum(LENGTHS) * (metrics["ratio/clipped_low"] + metrics["ratio/clipped_high"])
    assert round(cut, 3) in {sum(c) for n in range(4) for c in itertools.combinations(LENGTHS, n)}, "whole sequences"


def test_cispo_weighs_every_token_and_lets_none_go():
    def formula(new, old, engine, a, w):
        r = torch.exp(new - old).detach().clip(0.9, 1.1)
        return -(w * r * a * new).sum()

    compare(AlgorithmSection(loss="cispo", clip_low=0.1, clip_high=0.1, tis_cap=0), formula)


@pytest.mark.parametrize(
    "level, excess", [("token", "truncate"), ("token", "mask"), ("sequence", "truncate"), ("sequence", "mask")]
)
def test_importance_weights_by_token_and_sequence_truncated_and_masked(level, excess):
    cap, seen = 1.1, []

    def formula(new, old, engine, a, w):
        ratio = torch.exp(old - engine) if level == "token" else torch.exp((old - engine).sum()).expand(len(new))
        seen.append(ratio)
        weights = ratio.clip(max=cap) if excess == "truncate" else torch.where(ratio > cap, 0.0, ratio)
        return (w * weights * torch.max(-torch.exp(new - old) * a, -torch.exp(new - old).clip(0.8, 1.28) * a)).sum()

    metrics = compare(AlgorithmSection(tis_cap=cap, tis_level=level, tis_excess=excess), formula)
    above = torch.cat(seen) > cap
    assert metrics["tis/capped"] == pytest.approx(above.float().mean().item(), rel=1e-5) and 0 < above.sum() < len(
        above
    )


def test_sums_by_sequence_do_not_depend_on_the_packing():
    logprobs, batch = example()
    x = LossInput.of(logprobs.detach(), batch, AlgorithmSection(tis_level="sequence", tis_cap=100.0))
    weights, _ = importance_weights(x)
    assert x.sequences == 4 and x.sequence_ids[batch.loss_mask].unique().tolist() == [0, 1, 2]
    alone = [torch.exp((old - engine).sum()) for _, old, engine, _, _ in by_hand(logprobs, batch)]
    for number, expected in enumerate(alone):
        torch.testing.assert_close(weights[(x.sequence_ids == number) & x.mask].unique(), expected[None])


def groups_of(*rewards: list[float]) -> list[SampleGroup]:
    return [
        SampleGroup(Prompt(i, (1, 2), ""), [Sample([1] * (k + 1), [0.0] * (k + 1), [0] * (k + 1), "stop", reward=r) for k, r in enumerate(rs)])
        for i, rs in enumerate(rewards)
    ]  # fmt: skip


def test_leave_one_out_by_hand():
    assert rloo([[1, 0, 0, 1], [3.0], []], False) == [pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3]), [0.0], []]


def test_a_global_baseline_by_hand():
    groups = groups_of([1, 1], [0, 0], [1, 0])
    groups[2].samples.append(Sample([1], [0.0], [0], "length", reward=9.0, train=False))
    std = (6 * 0.25 / 5) ** 0.5 + 1e-6
    whole = AlgorithmSection(advantage="reinforce_pp")
    expected = [pytest.approx([s * 0.5 / std for s in signs]) for signs in ((1, 1), (-1, -1), (1, -1, 0))]
    assert advantages_of(whole)(groups) == expected, "the sample that is not trained on has no part in it"
    assert reinforce_pp([[1, 1], [0, 0]], False) == [[0.5, 0.5], [-0.5, -0.5]]


def test_the_constant_of_dr_grpo():
    """Sum over tokens / (sequences x constant): a token weighs the same in a short and a long response of any update."""
    values, how = [[1.0, -1.0], [0.5, 0.0, 0.0]], {"data_parallel_size": 1, "tokens_per_micro_batch": 9}
    groups = groups_of([1, 0], [1, 0, 0])
    (((*batches,),),) = pack(groups, values, updates=1, loss_mean="constant", constant=10, **how)
    weights = torch.cat([b.loss_weights for b in batches])
    mask = torch.cat([b.loss_mask for b in batches])
    assert weights[mask].unique().tolist() == pytest.approx([1 / 50]) and not weights[~mask].any() and len(batches) > 1
    assert [b.weight_sum for b in batches] == pytest.approx([9 / 50] * len(batches)) and mask.sum() == 9
    loss = make_policy_loss(AlgorithmSection(tis_cap=0, loss_mean="constant"))
    made = [loss(torch.full((len(b.tokens),), -1.0), torch.ones(len(b.tokens)), b) for b in batches]
    advantages = torch.cat([b.advantages for b in batches])[mask]
    assert sum(value for value, _ in made).item() == pytest.approx(-advantages.sum().item() / 50)
    assert sum(m["entropy"] for _, m in made).item() == pytest.approx(1), "metrics stay means over tokens"


# -- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"algorithm": {"loss": "ppo"}}, "'ppo' is not one of ppo_clip, gspo, cispo, module:function"),
        ({"algorithm": {"advantage": ":x"}}, "':x' is not one of grpo, rloo, reinforce_pp, none, module"),
        ({"algorithm": {"dual_clip": 0.5}}, "dual-clip 0.5: allowed: above 1"),
        ({"algorithm": {"loss": "cispo", "dual_clip": 3.0}}, "dual-clip 3 with --algorithm.loss cispo"),
        ({"algorithm": {"loss": "gspo"}}, "gspo with --algorithm.loss-mean token"),
        ({"algorithm": {"loss": "gspo", "loss_mean": "constant"}}, "gspo with --algorithm.loss-mean constant"),
        ({"algorithm": {"advantage": "rloo"}}, "rloo with --algorithm.divide-by-std"),
        ({"algorithm": {"advantage": "reinforce_pp"}}, "reinforce_pp with --rollout.drop-no-signal"),
        ({"rollout": {"n_samples": 1}}, "n-samples 1 with --algorithm.advantage grpo"),
        ({"algorithm": {"advantage": "none"}}, "none without --teacher.checkpoint"),
        ({"algorithm": {"tis_cap": 0, "tis_level": "sequence"}}, "tis-level sequence with --algorithm.tis-cap 0"),
        ({"algorithm": {"tis_cap": 0, "tis_excess": "mask"}}, "tis-excess mask with --algorithm.tis-cap 0"),
    ],
)
def test_contradictions_are_refused(sections, said):
    with pytest.raises(InputError) as error:
        check_objective(RunConfig.model_validate(sections))
    assert said in str(error.value) and "--" in str(error.value)


def test_what_goes_together_is_taken():
    for algorithm, rollout in [
        ({}, {}),
        ({"loss": "gspo", "loss_mean": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}, {}),
        ({"loss": "cispo", "advantage": "rloo", "divide_by_std": False, "loss_mean": "constant"}, {}),
        ({"advantage": "reinforce_pp"}, {"drop_no_signal": False, "n_samples": 1}),
    ]:
        check_objective(RunConfig.model_validate({"algorithm": algorithm, "rollout": rollout}))


# -- the user's own -------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, monkeypatch):
    """write(source) -> "module:f": a file in the working folder, with a name of its own."""
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> str:
        name = f"own_module_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return f"{name}:f"

    return write


def test_a_loss_of_the_users(written):
    name = written(
        """
        def f(x):
            return -x.logprobs * x.advantages * x.settings.clip_low, {"length": x.sequence_sum(x.mask.float())}
        """
    )
    algorithm = AlgorithmSection(loss=name, tis_cap=0, clip_low=0.5)
    check_objective(RunConfig(algorithm=algorithm))
    metrics = compare(algorithm, lambda new, old, engine, a, w: -(w * new * a * 0.5).sum())
    assert metrics["custom/length"] == pytest.approx(sum(n * n for n in LENGTHS) / sum(LENGTHS))


@pytest.mark.parametrize(
    "source, said",
    [
        ("g = 1", "has no attribute 'f'"),
        ("f = 1", "a int, which cannot be called"),
        ("def f(x, y): pass", "is called as f(loss_input): missing a required argument: 'y'"),
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("def f(x): return x.logprobs.sum(), {}", "the loss is []; needed: a tensor [8]"),
        ("def f(x): return x.logprobs", "returned Tensor"),
        ("def f(x): return x.logprobs, {'a': 1.0}", "custom/a is float"),
        ("def f(x): return x.logprobz, {}", "AttributeError"),
        ("def f(x): return x.logprobs.detach(), {}", "does not require grad"),
        ("def f(x): return (x.logprobs * 0).sqrt(), {}", "gradient to logprobs is not finite"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_before_a_start(written, source, said):
    with pytest.raises(InputError) as error:
        check_objective(RunConfig(algorithm=AlgorithmSection(loss=written(source))))
    assert said in str(error.value) and "--algorithm.loss" in str(error.value)


@pytest.mark.parametrize(
    "source, said",
    [
        ("def f(): pass", "is called as f(groups)"),
        ("def f(groups): return [[0.0]]", "one advantage for every sample of every group"),
        ("def f(groups): return [[float('nan')] * len(g.samples) for g in groups]", "NaN or infinity"),
        ("def f(groups): return groups[9]", "IndexError"),
    ],
)
def test_an_advantage_that_cannot_work_is_refused_before_a_start(written, source, said):
    with pytest.raises(InputError) as error:
        check_objective(RunConfig(algorithm=AlgorithmSection(advantage=written(source))))
    assert said in str(error.value) and "--algorithm.advantage" in str(error.value)


def test_the_working_folder_is_searched_only_while_the_module_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_helper_of_a_loss.py").write_text("VALUE = 3\n")
    (tmp_path / "own_loss_with_helper.py").write_text(
        "import own_helper_of_a_loss as h\n\ndef f(x):\n    return h.VALUE\n"
    )
    before = list(sys.path)
    assert load_user_function("own_loss_with_helper:f", "--flag", "x")(None) == 3 and sys.path == before
    (tmp_path / "own_unreadable.py").write_text("open('there is none')\n")
    with pytest.raises(FileNotFoundError):
        load_user_function("own_unreadable:f", "--flag", "x")
    assert sys.path == before


def test_the_examples(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    algorithm = AlgorithmSection(
        loss="examples.loss:two_sided", advantage="examples.advantage:against_median", tis_cap=0
    )
    check_objective(RunConfig(algorithm=algorithm))
    assert advantages_of(algorithm)(groups_of([1, 0, 0], [0.5])) == [[1, 0, 0], [0]]

    def formula(new, old, engine, a, w):
        kept = ((old - engine).exp() > 0.5) & ((old - engine).exp() < 2)
        return (kept * w * torch.max(-torch.exp(new - old) * a, -torch.exp(new - old).clip(0.8, 1.28) * a)).sum()

    metrics = compare(algorithm, formula)
    assert 0 <= metrics["custom/masked"] < 1 and callable(loss_of(algorithm))


# -- a teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_the_reverse_kl_of_each_token_is_taken_from_its_advantage(coef):
    logprobs, batch = example()
    g = torch.Generator().manual_seed(5)
    batch.teacher_logprobs = torch.where(batch.loss_mask, -torch.rand(len(batch.tokens), generator=g), 1e4)
    loss, metrics = make_policy_loss(AlgorithmSection(tis_cap=0), coef)(logprobs, None, batch)
    loss.backward()
    m, again = batch.loss_mask, logprobs.detach().clone().requires_grad_()
    kl = (batch.trainer_logprobs - batch.teacher_logprobs)[m]
    a, r = batch.advantages[m] - coef * kl, torch.exp(again[m] - batch.trainer_logprobs[m])
    expected = torch.max(-r * a, -r.clip(0.8, 1.28) * a).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logprobs.grad, again.grad)
    torch.testing.assert_close(metrics["teacher/kl"], kl.mean())


def test_on_average_distillation_descends_the_reverse_kl():
    """With no reward, the gradient of the loss over all samples of a policy is that of KL(student || teacher)."""
    student = torch.tensor([0.3, -0.2, 0.8, 0.1], requires_grad=True)
    teacher = torch.tensor([1.0, 0.2, -0.5, 0.0]).log_softmax(0)
    p = student.log_softmax(0)
    exact = (p.exp() * (p - teacher)).sum()
    (wanted,) = torch.autograd.grad(exact, student, retain_graph=True)
    ids, mask = torch.arange(5), torch.tensor([True] * 4 + [False])
    nothing = torch.zeros(5)
    weights = torch.cat([p.exp().detach(), torch.zeros(1)])  # as often as the student samples them
    batch = PackedBatch(ids, ids, ids, torch.tensor([0, 5], dtype=torch.int32), weights, nothing, nothing, mask)
    batch.teacher_logprobs = torch.cat([teacher, torch.zeros(1)])
    loss, metrics = make_policy_loss(AlgorithmSection(tis_cap=0), 1.0)(torch.cat([p, torch.zeros(1)]), None, batch)
    (got,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(metrics["teacher/kl"], exact.detach())


def test_a_teachers_scores_go_from_the_wire_to_their_tokens():
    groups = groups_of([1, 0], [1])
    for number, sample in enumerate(s for g in groups for s in g.samples):
        sample.response_ids = [7] * len(sample.response_ids)
        sample.teacher_logprobs = [-float(10 * number + k) for k in range(len(sample.response_ids))]
    assert (decoded := decode_groups(encode_groups(groups))) == groups
    (((batch,),),) = pack(decoded, [[0.0, 0.0], [0.0]], updates=1, data_parallel_size=1, tokens_per_micro_batch=99)
    scores, mask = batch.teacher_logprobs, batch.loss_mask
    assert sorted(scores[mask].tolist()) == [-20, -11, -10, 0] and not scores[~mask].any()
    groups[1].samples[0].teacher_logprobs = None
    assert all(s.teacher_logprobs is None for g in decode_groups(encode_groups(groups)) for s in g.samples)
