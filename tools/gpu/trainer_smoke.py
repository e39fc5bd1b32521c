#!/usr/bin/env python3
"""One Megatron rank on a GPU, in BF16 and in TransformerEngine's FP8: log-probabilities and one update. usage: trainer_smoke.py MODEL"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from fp8slurm.config import parse  # noqa: E402
from fp8slurm.data.prompts import SftExample  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402
from fp8slurm.rl.loss import sft_loss  # noqa: E402
from fp8slurm.rl.packing import pack_sft  # noqa: E402


def main(model: str) -> None:
    from fp8slurm.trainer.start import start, stop

    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(0, 256, (n,), generator=generator).tolist())  # noqa: E731
    examples = [SftExample(draw(40 + i), draw(30 + i)) for i in range(16)]
    seen = {}
    for number, backend in enumerate(("off", "transformer_engine")):
        config = parse(None, ["--model.hf-checkpoint", model, "--fp8.backend", backend])
        start(config, 0, 1, dist.FileStore(f"/tmp/smoke_store_{number}", 1))
        from fp8slurm.trainer.trainer import Trainer

        trainer = Trainer(config, ModelSpec.from_hf_dir(Path(model)))
        trainer.load_hf(Path(model))
        batches = pack_sft(
            examples, data_parallel_size=1, tokens_per_micro_batch=1024, pad_multiple=trainer.pad_multiple
        )[0]
        seen[backend] = torch.cat([lp[b.loss_mask.to(lp.device)] for lp, b in zip(trainer.logprobs(batches), batches)])
        losses = [trainer.train_step(batches, sft_loss, 1e-3) for _ in range(5)]
        print(
            backend,
            "losses",
            [round(r.loss, 4) for r in losses],
            "grad norm",
            round(losses[0].grad_norm, 4),
            "ok",
            losses[0].ok,
            flush=True,
        )
        stop()
    gap = (seen["off"] - seen["transformer_engine"]).abs()
    print(f"|logprob bf16 - fp8|: mean {gap.mean():.3e} max {gap.max():.3e} (0 would mean that FP8 was ignored)")
    assert gap.max() > 0


if __name__ == "__main__":
    main(sys.argv[1])
