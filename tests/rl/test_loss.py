from math import exp, log

import pytest
import torch

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import PackedBatch
from fp8slurm.rl.loss import kl_estimate, make_policy_loss, sft_loss
from fp8slurm.rl.objectives import clipped_surrogate, dual_clipped


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def close(tensor, values):
    torch.testing.assert_close(tensor, t(*values), rtol=1e-6, atol=1e-6)


def test_clipped_surrogate_by_hand():
    ratio = t(0.5, 0.9, 1.2, 1.5, 0.5, 1.2, 1.5)
    advantage = t(2, 2, 2, 2, -2, -2, -2)
    # A > 0: only the upper bound 1.28 cuts; A < 0: only the lower bound 0.8 does
    close(clipped_surrogate(ratio, advantage, 0.2, 0.28), [-1.0, -1.8, -2.4, -2.56, 1.6, 2.4, 3.0])


def test_dual_clip_by_hand():
    close(dual_clipped(t(10, 5, -4, -9), t(-2, -2, 2, -1), 3.0), [6, 5, -4, -9])


def test_kl_by_hand():
    p, q = t(log(0.5)), t(log(0.25))  # p - q = log 2
    close(kl_estimate(p, q, "k1"), [log(2)])
    close(kl_estimate(p, q, "k2"), [log(2) ** 2 / 2])
    close(kl_estimate(p, q, "k3"), [0.5 + log(2) - 1])
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(p, q, "k4")


def test_k3_and_k1_estimate_the_same_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum(), exact)


def batch(**changes):
    """Three predictions that count, of weights 1/4, 1/4, 1/2, between two that do not and hold absurd numbers."""
    fields = {
        "tokens": torch.zeros(5, dtype=torch.int64),
        "labels": torch.zeros(5, dtype=torch.int64),
        "position_ids": torch.arange(5),
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "loss_weights": t(0, 0.25, 0.25, 0.5, 0),
        "rollout_logprobs": t(0, log(0.25), log(0.5), log(0.5), 0),
        "advantages": t(0, 1, 1, -2, 0),
        "loss_mask": torch.tensor([False, True, True, True, False]),
        "trainer_logprobs": t(-1e4, log(0.5), log(0.5), log(0.5), 1e4),
        "reference_logprobs": t(1e4, log(0.25), log(0.5), log(0.5), -1e4),
    }
    return PackedBatch(**(fields | changes))


LOGPROBS = (5e3, log(0.75), log(0.5), log(0.2), -5e3)  # ratios 1.5, 1, 0.4


def run(algorithm, entropy=None, **changes):
    logprobs = t(*LOGPROBS).requires_grad_()
    loss, metrics = make_policy_loss(algorithm)(logprobs, entropy, batch(**changes))
    loss.backward()
    return loss.item(), {k: v.item() for k, v in metrics.items()}, logprobs.grad


def test_policy_loss_by_hand():
    loss, metrics, grad = run(AlgorithmSection(tis_cap=0))
    # surrogates: -1.28 (cut at the upper bound), -1, and 1.6 (cut at the lower bound)
    assert loss == pytest.approx(0.25 * -1.28 + 0.25 * -1 + 0.5 * 1.6)
    assert metrics["loss/policy"] == pytest.approx(loss)
    assert metrics["ratio/mean"] == pytest.approx(0.25 * 1.5 + 0.25 * 1 + 0.5 * 0.4)
    assert metrics["ratio/clipped_high"] == pytest.approx(0.25)
    assert metrics["ratio/clipped_low"] == pytest.approx(0.5)
    assert metrics["ratio/kl"] == pytest.approx(0.25 * (1.5 - log(1.5) - 1) + 0.5 * (0.4 - log(0.4) - 1))
    close(grad, [0, 0, -0.25, 0, 0])  # clipped tokens give none; the other -A * ratio * weight


def test_only_tokens_whose_gradient_is_cut_are_counted_as_clipped():
    # ratios 0.4, 1.5, 0.4: outside the bounds, but on the side where the advantage's sign lets the gradient through, or 0
    outside = {"trainer_logprobs": t(0, log(0.75 / 0.4), log(0.5 / 1.5), log(0.2 / 0.4), 0)}
    for advantages in (t(0, 1, -1, 1, 0), t(0, 0, 0, 0, 0)):
        _, metrics, _ = run(AlgorithmSection(tis_cap=0), advantages=advantages, **outside)
        assert metrics["ratio/mean"] == pytest.approx(0.25 * 0.4 + 0.25 * 1.5 + 0.5 * 0.4)
        assert metrics["ratio/clipped_low"] == metrics["ratio/clipped_high"] == 0


def test_micro_batches_of_one_update_add_up():
    """The weights sum to 1 over an update: a micro-batch, which has only some of them, must not be made a mean of its own."""
    algorithm = AlgorithmSection(kl_coef=0.1, entropy_coef=0.1)
    entropy = t(0, 1, 2, 3, 0)
    whole, metrics, grad = run(algorithm, entropy=entropy)
    parts = [run(algorithm, entropy=entropy, loss_weights=w) for w in (t(0, 0.25, 0, 0, 0), t(0, 0, 0.25, 0.5, 0))]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole)
    assert {k: sum(m[k] for _, m, _ in parts) for k in metrics} == pytest.approx(metrics)
    torch.testing.assert_close(parts[0][2] + parts[1][2], grad)
    weights = (t(0, 0.25, 0, 0, 0), t(0, 0, 0.25, 0.5, 0))
    parts = [sft_loss(t(0, -1, -2, -3, 0), None, batch(loss_weights=w)) for w in weights]
    assert [loss.item() for loss, _ in parts] == [m["loss/sft"].item() for _, m in parts] == [0.25, 2.0]


def test_importance_weights_by_hand():
    loss, metrics, grad = run(AlgorithmSection(tis_cap=1.5))
    # trainer / rollout: 0.5 / 0.25 cut to 1.5, 1, 1
    assert loss == pytest.approx(0.25 * 1.5 * -1.28 + 0.25 * -1 + 0.5 * 1.6)
    assert metrics["tis/mean"] == pytest.approx(0.25 * 1.5 + 0.25 + 0.5)
    assert metrics["tis/capped"] == pytest.approx(0.25)
    close(grad, [0, 0, -0.25, 0, 0])


def test_dual_clip_in_the_loss():
    logprobs = {"trainer_logprobs": t(0, log(0.75), log(0.5), log(0.05), 0)}  # ratios 1, 1, 4
    loss, metrics, grad = run(AlgorithmSection(tis_cap=0, dual_clip=3.0), **logprobs)
    assert loss == pytest.approx(0.25 * -1 + 0.25 * -1 + 0.5 * 6)
    assert metrics["ratio/dual_clipped"] == pytest.approx(0.5)
    close(grad, [0, -0.25, -0.25, 0, 0])


def test_importance_weights_scale_what_the_dual_clip_left():
    # the last token: ratio 4, A = -2, so 8, cut to 6; only then times trainer / rollout = 0.05 / 0.1
    logprobs = {"trainer_logprobs": t(0, log(0.75), log(0.5), log(0.05), 0)}
    rollout = {"rollout_logprobs": t(0, log(0.75), log(0.5), log(0.1), 0)}
    loss, metrics, _ = run(AlgorithmSection(tis_cap=2, dual_clip=3.0), **logprobs, **rollout)
    assert loss == pytest.approx(0.25 * -1 + 0.25 * -1 + 0.5 * 6 * 0.5) == pytest.approx(metrics["loss/policy"])


@pytest.mark.parametrize(
    "kind, value, slope", [("k1", log(3), 1), ("k2", log(3) ** 2 / 2, log(3)), ("k3", 1 / 3 + log(3) - 1, 1 - 1 / 3)]
)
def test_kl_loss_by_hand(kind, value, slope):
    reference = t(1e4, log(0.25), log(0.5), log(0.2), -1e4)  # only the first token differs: 0.75 against 0.25
    algorithm = AlgorithmSection(tis_cap=0, kl_coef=0.1, kl_kind=kind)
    loss, metrics, grad = run(algorithm, advantages=t(0, 0, 0, 0, 0), reference_logprobs=reference)
    assert metrics["loss/kl"] == pytest.approx(0.25 * value)
    assert loss == pytest.approx(0.1 * 0.25 * value)
    rest = 0.1 if kind == "k1" else 0  # k1 pulls at every token alike
    close(grad, [0, 0.1 * 0.25 * slope, 0.25 * rest, 0.5 * rest, 0])


def test_entropy_bonus():
    entropy = t(1e30, 1, 2, 3, 1e30).requires_grad_()
    plain, _, _ = run(AlgorithmSection())
    loss, metrics, _ = run(AlgorithmSection(entropy_coef=0.5), entropy=entropy)
    assert metrics["entropy"] == pytest.approx(0.25 + 0.5 + 1.5)
    assert loss == pytest.approx(plain - 0.5 * metrics["entropy"])
    close(entropy.grad, [0, -0.125, -0.125, -0.25, 0])
    observed, metrics, _ = run(AlgorithmSection(), entropy=entropy.detach())
    assert observed == pytest.approx(plain) and "entropy" in metrics


def test_without_recomputed_logprobs_the_ratio_is_one():
    loss, metrics, grad = run(AlgorithmSection(tis_cap=0), trainer_logprobs=None)
    assert loss == pytest.approx(0.25 * -1 + 0.25 * -1 + 0.5 * 2)
    assert not [key for key in metrics if key.startswith("ratio/")], "it is not shown"
    close(grad, [0, -0.25, -0.25, 1.0, 0])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="kl_coef 0.1 needs"):
        run(AlgorithmSection(kl_coef=0.1), reference_logprobs=None)
    with pytest.raises(ValueError, match="entropy_coef 0.1 needs"):
        run(AlgorithmSection(entropy_coef=0.1))


def test_a_padding_micro_batch_gives_zero_and_a_zero_gradient():
    nothing = {
        "loss_weights": torch.zeros(5),
        "loss_mask": torch.zeros(5, dtype=torch.bool),
        "advantages": torch.zeros(5),
    }
    loss, metrics, grad = run(AlgorithmSection(kl_coef=0.1, entropy_coef=0.1), entropy=t(1, 1, 1, 1, 1), **nothing)
    assert loss == 0 and not any(metrics.values())
    close(grad, [0] * 5)


def test_sft_loss_by_hand():
    logprobs = t(-1e30, -1, -2, -3, -1e30).requires_grad_()
    loss, metrics = sft_loss(logprobs, None, batch())
    loss.backward()
    assert loss.item() == metrics["loss/sft"].item() == pytest.approx(0.25 + 0.5 + 1.5)
    close(logprobs.grad, [0, -0.25, -0.25, -0.5, 0])


def test_gap_by_hand():
    # d = 0, log 2, -log 2, 0
    gap = gap_metrics(t(-1, log(0.5), log(0.25), -3), t(-1, log(0.25), log(0.5), -3))
    assert gap == pytest.approx(
        {
            "gap/mean_abs": log(2) / 2,
            "gap/p99": log(2),
            "gap/max": log(2),
            "gap/k1": 0.0,
            "gap/k3": ((2 - log(2) - 1) + (0.5 + log(2) - 1)) / 4,
        },
        abs=1e-6,
    )
    gap = gap_metrics(torch.arange(1, 101).flip(0) / 100.0, torch.zeros(100))
    assert gap["gap/p99"] == pytest.approx(0.99) and gap["gap/max"] == pytest.approx(1)
    assert gap["gap/k1"] == pytest.approx(-0.505)
    assert gap_metrics(torch.zeros(0), torch.zeros(0)) == {}
    one = gap_metrics(t(0), t(-1))
    assert one["gap/p99"] == one["gap/max"] == pytest.approx(1) and one["gap/k3"] == pytest.approx(exp(1) - 2)
    few = gap_metrics(t(*(i / 150 for i in range(150, 0, -1))), torch.zeros(150))
    assert few["gap/p99"] == pytest.approx(149 / 150)  # the nearest rank of 148.5 is 149


def test_a_small_gap_is_not_lost_in_rounding():
    # exp(d) - d - 1 is d^2 / 2: of terms near 1, whose last bit in fp32 is 6e-8, nothing would be left
    gap = gap_metrics(torch.full((8,), -1.0) + 2**-14, torch.full((8,), -1.0))
    assert gap["gap/k3"] == pytest.approx(2**-29, rel=1e-3)
