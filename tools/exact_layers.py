"""Trainer and engine, module by module: where their hidden states first differ (docs/exact.md).

    python tools/exact_layers.py OUT --model FOLDER [--no-exact] [--tokens 24] [--temperature 1.0]

FOLDER is a Hugging Face checkpoint in BF16. The engine generates one response, token by token, and SGLang writes down
what every module gives out (--debug-tensor-dump-output-folder); then the trainer goes over the whole sequence at once.
One line a module: elements that differ, and the first of them. Status 1 if anything differs. On a machine with a GPU
both use it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.attn": "self_attention.core_attention",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate_up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.experts": "mlp",
}
"""Modules of a layer whose outputs mean the same: the engine's name, the trainer's. Those that one side fuses are left
out of the comparison. A dense model has no experts, a mixture (its weighted sum is compared) none of the two above."""
DENSE, MIXTURE = {"mlp.gate_up_proj", "mlp.down_proj"}, {"mlp.experts"}


def config(model: Path, exact: bool) -> Any:
    """A run of this model on one rank."""
    from fp8slurm.config import RunConfig

    return RunConfig.model_validate(
        {
            "model": {"hf_checkpoint": model, "exact": exact},
            "fp8": {"backend": "transformer_engine" if CUDA else "emulated"},
            "slurm": {"gpus_per_node": int(CUDA)},
        }
    )


def generate(out: Path, model: Path, exact: bool, tokens: int, temperature: float) -> None:
    """The engine's part: OUT/sample.json and OUT/dump."""
    from dataclasses import replace

    from fp8slurm.checkpoint import hf_to_fp8
    from fp8slurm.engine.client import EngineClient, GenerateRequest
    from fp8slurm.engine.server import Engine
    from fp8slurm.engine.settings import engine_settings

    if not (out / "fp8").exists():
        hf_to_fp8(model, out / "fp8")
    settings = engine_settings(config(model, exact))
    arguments = ["--debug-tensor-dump-output-folder", str(out / "dump")]
    section = settings.section.model_copy(
        update={"max_total_tokens": 8192, "max_running_requests": 4, "extra_args": arguments, "mem_fraction": 0.5}
    )
    engine = Engine(out / "fp8", out / "logs", replace(settings, section=section))
    engine.start()
    try:
        engine.wait_ready()
        prompt = list(range(1, 12))
        request = GenerateRequest(prompt, tokens, temperature, stop_token_ids=(), seed=1)
        (answer,) = EngineClient(engine.url, engine.api_key).generate([request], one_batch=True)
    finally:
        engine.stop()
    sample = {"prompt": prompt, "ids": answer.token_ids, "logprobs": answer.logprobs, "temperature": temperature}
    (out / "sample.json").write_text(json.dumps(sample))


def engine_states(folder: Path, tokens: int) -> dict[str, torch.Tensor]:
    """What every module gave out for the first `tokens` tokens, [tokens, ...] each, in the order of the passes."""
    passes = [torch.load(file, weights_only=True) for file in sorted(folder.glob("*/Pass*.pt"))]
    states = {}
    for name in passes[-1]:
        if not name.startswith(("model.embed_tokens", "model.layers.", "model.norm")):
            continue
        parts = [p[name][0] if isinstance(p[name], list) else p[name] for p in passes]
        rows = [len(p["model.embed_tokens"]) for p in passes]
        states[name] = torch.cat([part.reshape(n, -1) for part, n in zip(parts, rows)])[-tokens:]
    return states


def trainer_states(model: Path, exact: bool, sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what every module gives out for the whole sequence, by the trainer's names; the response's log-probabilities)."""
    import torch.distributed as dist

    from fp8slurm.data.prompts import SftExample
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.rl.packing import pack_sft
    from fp8slurm.trainer import start
    from fp8slurm.trainer.trainer import Trainer

    c = config(model, exact)
    start.start(c, 0, 1, dist.HashStore())
    trainer = Trainer(c, ModelSpec.from_hf_dir(model))
    trainer.load_hf(model)
    states: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            states[name] = out.detach().cpu().clone().reshape(-1, out.shape[-1])  # Megatron adds residuals in place

        return hook

    ends = ("embedding.word_embeddings", "decoder.final_layernorm", *LAYER.values())
    for name, module in trainer.module.named_modules():
        if name.endswith(ends):
            module.register_forward_hook(keep(name))
    example = SftExample(tuple(sample["prompt"]), tuple(sample["ids"]))
    sizes = {"data_parallel_size": 1, "tokens_per_micro_batch": 4096, "pad_multiple": trainer.pad_multiple}
    ((batch,),) = pack_sft([example], **sizes)  # type: ignore[arg-type]
    batch.temperature = sample["temperature"] or 1.0
    (logprobs,) = trainer.logprobs([batch])
    return states, logprobs.cpu()[batch.loss_mask]


def compare(out: Path, model: Path, exact: bool) -> bool:
    """Print a line a module; whether all are equal."""
    sample = json.loads((out / "sample.json").read_text())
    tokens = len(sample["prompt"]) + len(sample["ids"]) - 1
    engine = engine_states(out / "dump", tokens)
    trainer, logprobs = trainer_states(model, exact, sample)
    layers = 1 + max(int(name.split(".")[2]) for name in engine if name.startswith("model.layers."))
    absent = DENSE if any(name.endswith(".mlp.experts") for name in engine) else MIXTURE
    modules = [(a, b) for a, b in LAYER.items() if a not in absent]
    pairs = [("model.embed_tokens", "embedding.word_embeddings")]
    pairs += [(f"model.layers.{i}.{a}", f"decoder.layers.{i}.{b}") for i in range(layers) for a, b in modules]
    pairs += [("model.norm", "decoder.final_layernorm")]
    equal = True
    for ours, theirs in pairs:
        if ours not in engine or theirs not in trainer:
            print(f"{ours:45} not compared: one side has no such module")
            continue
        a = engine[ours].flatten()
        b = trainer[theirs].flatten()[: a.numel()]
        equal &= _line(ours, a, b, engine[ours].shape[1])
    reported = torch.tensor(sample["logprobs"])
    return _line("log-probabilities of the response", reported, logprobs, 1) and equal


def _line(name: str, a: torch.Tensor, b: torch.Tensor, width: int) -> bool:
    differ = (a != b).nonzero().flatten()
    if not len(differ):
        print(f"{name:45} equal ({a.numel()} elements)")
        return True
    first = int(differ[0])
    where = f"token {first // width}, element {first % width}: engine {a[first]:.9g}, trainer {b[first]:.9g}"
    print(f"{name:45} {len(differ)} of {a.numel()} differ; first: {where}")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--stage", choices=("generate", "compare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    exact = not args.no_exact
    if args.stage == "generate":
        generate(args.out, args.model, exact, args.tokens, args.temperature)
    elif args.stage == "compare":
        sys.exit(not compare(args.out, args.model, exact))
    else:  # a process for each side: Megatron's and SGLang's set-up exclude one another
        for stage in ("generate", "compare"):
            done = subprocess.run([sys.executable, *sys.argv, "--stage", stage])
            if done.returncode:
                sys.exit(done.returncode)


if __name__ == "__main__":
    main()
