"""Log-probabilities at the temperature that the samples were drawn at."""

import torch
from fp8slurm.trainer.forward import _logprobs_of


def test_temperature_divides_the_logits():
    logits = torch.tensor([[[2.0, 0.0, -1.0]], [[0.5, 1.5, 0.0]]])  # [T, 1, V]
    labels = torch.tensor([0, 2])

    def logprobs(temperature: float) -> torch.Tensor:
        context = (labels, temperature, None, False)
        return _logprobs_of(
            hidden_states=logits, output_layer=lambda h, weight: (h, None), output_weight=None, context=context
        )[0]

    for temperature in (1.0, 0.5, 2.0):
        want = (logits[:, 0] / temperature).log_softmax(-1)[[0, 1], labels]
        torch.testing.assert_close(logprobs(temperature), want)
    assert (logprobs(1.0) - logprobs(0.5)).abs().min() > 0.1
