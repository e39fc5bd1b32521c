"""Log-probabilities at the temperature that the samples were drawn at."""

import torch

from fp8slurm.trainer.forward import _logprobs_of
from fp8slurm.trainer.logprobs import vocab_parallel_logprobs


def test_temperature_divides_the_logits():
    logits = torch.tensor([[[2.0, 0.0, -1.0]], [[0.5, 1.5, 0.0]]])  # [T, 1, V]
    labels = torch.tensor([0, 2])

    def logprobs(temperature: float) -> torch.Tensor:
        context = (labels, temperature, None, False, False)
        return _logprobs_of(
            hidden_states=logits, output_layer=lambda h, weight: (h, None), output_weight=None, context=context
        )[0]

    for temperature in (1.0, 0.5, 2.0):
        want = (logits[:, 0] / temperature).log_softmax(-1)[[0, 1], labels]
        torch.testing.assert_close(logprobs(temperature), want)
    assert (logprobs(1.0) - logprobs(0.5)).abs().min() > 0.1


def test_temperature_divides_in_fp32_as_the_engine_does():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 512, generator=generator)).bfloat16()
    labels = torch.randint(0, 512, (64,), generator=generator)
    wanted = logits.float().requires_grad_()
    distribution = (wanted / 0.7).log_softmax(-1)
    surprise = -(distribution.exp() * distribution).sum(-1)
    want = distribution[torch.arange(64), labels]
    (want.sum() + surprise.sum()).backward()
    given = logits.clone().requires_grad_()
    got, entropy = vocab_parallel_logprobs(given, labels, None, True, 0.7)
    (got.sum() + entropy.sum()).backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # a BF16 quotient is 2e-2 away
    torch.testing.assert_close(entropy, surprise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.grad.float(), wanted.grad, atol=1e-5, rtol=2**-8)  # the gradient is BF16


def test_exact_ones_are_the_engines_formula():
    """With model.exact on a GPU: torch's log_softmax of logits that were divided on the device, to the bit."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 512, generator=generator)).bfloat16()
    labels = torch.randint(0, 512, (64,), generator=generator)
    for temperature in (1.0, 0.7):
        every = (logits.float() / torch.tensor([[temperature]])).log_softmax(-1)
        got, entropy = vocab_parallel_logprobs(logits, labels, None, True, temperature, exact=True)
        assert torch.equal(got, every[torch.arange(64), labels])
        torch.testing.assert_close(entropy, -(every.exp() * every).sum(-1))
