"""Everything that can be found wrong before a job is queued."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.fp8.environment import set_fp32_scales
from fp8slurm.models.qwen3 import ModelSpec, check_layout
from fp8slurm.slurm.placement import place

ROWS_CHECKED = 20_000
"""Rows of each data file that are read before a job is queued; the job itself reads all of them."""


def preflight(config: RunConfig) -> list[str]:
    """Check a configuration against files and installed packages; returns warnings.

    Raises:
        ValueError: names the key, the value, what is allowed and the flag.
    """
    set_fp32_scales()
    spec = _model(config)
    _fp8(config)
    _parallel(config, spec)
    _algorithm(config)
    _data(config)
    return _warnings(config)


def _folder(path: Path | None, flag: str, what: str) -> Path:
    if path is None:
        raise ValueError(f"{flag} is not set: give the {what}")
    if not path.exists():
        raise ValueError(f"{flag} {path}: there is no such path; give the {what}")
    return path


def _model(config: RunConfig) -> ModelSpec:
    folder = _folder(config.model.hf_checkpoint, "--model.hf-checkpoint", "folder of a Hugging Face checkpoint")
    spec = ModelSpec.from_hf_dir(folder)
    if spec.quantization is not None:
        raise ValueError(
            f"--model.hf-checkpoint {folder} is quantized: the trainer starts from BF16 or FP32 weights "
            f"(fp8slurm convert fp8-to-hf makes them); an FP8 checkpoint for the engine goes to --model.rollout-checkpoint"
        )
    if config.model.rollout_checkpoint is not None:
        rollout = _folder(config.model.rollout_checkpoint, "--model.rollout-checkpoint", "folder that the engine loads")
        ModelSpec.from_hf_dir(rollout)  # refuses block sizes and scale formats that we cannot make
    return spec


def _fp8(config: RunConfig) -> None:
    fp8 = config.fp8
    if fp8.param_gather:
        raise ValueError(
            "--fp8.param-gather: FP8 primary weights are not supported yet, and silently training with BF16 ones would be worse; "
            "leave it off (--fp8.no-param-gather). Upstream, blockwise FP8 parameters and CPU-offloaded Adam exclude each other."
        )
    if fp8.backend == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "--fp8.backend transformer_engine: TransformerEngine is not installed, and without it Megatron would ignore FP8 silently; "
            "install it (requirements/gpu.txt), or ask for --fp8.backend emulated (CPU) or --fp8.backend off (no FP8)"
        )
    if config.optim.cpu_offload:
        raise ValueError("--optim.cpu-offload: not there yet; leave it off (--optim.no-cpu-offload)")


def _parallel(config: RunConfig, spec: ModelSpec) -> None:
    p = config.parallel
    if p.expert_parallel_size > 1 or p.expert_tensor_parallel_size > 1:
        raise ValueError(
            f"--parallel.expert-parallel-size {p.expert_parallel_size}, --parallel.expert-tensor-parallel-size "
            f"{p.expert_tensor_parallel_size}: expert parallelism is not there yet; allowed: 1"
        )
    if spec.is_moe:
        raise ValueError(
            f"--model.hf-checkpoint {config.model.hf_checkpoint}: training mixture-of-experts models is not there yet"
        )
    if config.slurm.nodes > 1 and config.slurm.executor == "local":
        raise ValueError(
            f"--slurm.nodes {config.slurm.nodes} with --slurm.executor local: one machine is one node; allowed: 1"
        )
    if config.slurm.executor == "slurm":
        raise ValueError("--slurm.executor slurm: not there yet; allowed: local")
    if config.engine.per_node != 1:
        raise ValueError(
            f"--engine.per-node {config.engine.per_node}: several engines a node are not there yet; allowed: 1"
        )
    check_layout(spec, p, config.fp8.backend != "off", place(config).world_size)
    check_engine_layout(config, spec)


def check_engine_layout(config: RunConfig, spec: ModelSpec) -> None:
    """SGLang's block FP8 wants every tensor-parallel piece of q, k, v, gate and up to be whole 128 blocks."""
    from fp8slurm.rl.precision import engine_in_fp8

    tp = config.engine.tensor_parallel_size
    if not engine_in_fp8(config):
        return
    sizes = {
        "query heads": spec.num_heads * spec.head_dim,
        "key-value heads": spec.num_kv_heads * spec.head_dim,
        "FFN": spec.moe_ffn_hidden_size if spec.is_moe else spec.ffn_hidden_size,
    }
    for what, size in sizes.items():
        if size % (128 * tp):
            raise ValueError(
                f"--engine.tensor-parallel-size {tp}: the {what} ({size} rows) are cut inside a 128 block of FP8; "
                f"the size must be a multiple of {128 * tp}"
            )


def _algorithm(config: RunConfig) -> None:
    from fp8slurm.rl.loss import make_policy_loss

    make_policy_loss(config.algorithm)  # refuses what it cannot do
    if config.run.steps and config.rollout.n_samples < 2:
        raise ValueError(
            "--rollout.n-samples 1: advantages are relative to the group, and one sample has none; allowed: 2 or more"
        )
    if config.run.steps and config.rollout.temperature == 0:
        raise ValueError(
            "--rollout.temperature 0: greedy samples of a prompt are all the same; allowed: above 0 (evaluation has its own)"
        )
    if config.sft.data is not None and not config.sft.max_steps:
        raise ValueError(
            "--sft.data without --sft.max-steps: the supervised phase would have 0 steps; set both or neither"
        )


def _data(config: RunConfig) -> None:
    from fp8slurm.rl.data import load_prompts, load_sft, load_tokenizer
    from fp8slurm.rl.rewards import RewardPool

    assert config.model.hf_checkpoint is not None
    tokenizer = load_tokenizer(config.model.hf_checkpoint)
    if config.run.steps:
        path = _folder(config.data.train, "--data.train", "JSONL or parquet file with the training prompts")
        load_prompts(config.data, tokenizer, path, limit=ROWS_CHECKED)
        RewardPool(config.reward, workers=1).close()
    if config.data.eval is not None:
        path = _folder(config.data.eval, "--data.eval", "JSONL or parquet file with the held-out prompts")
        load_prompts(config.data, tokenizer, path, limit=ROWS_CHECKED)
    if config.sft.data is not None:
        path = _folder(config.sft.data, "--sft.data", "JSONL or parquet file with prompts and responses")
        load_sft(config.data, config.sft, tokenizer, path, limit=ROWS_CHECKED)
        if config.sft.eval_every and config.data.eval is None:
            raise ValueError(
                f"--sft.eval-every {config.sft.eval_every} needs --data.eval: there is nothing to evaluate on"
            )
    if not config.run.steps and config.sft.data is None:
        raise ValueError("--run.steps 0 without --sft.data: there is nothing to do")


def _warnings(config: RunConfig) -> list[str]:
    warnings = []
    s, samples = config.sft, config.rollout.prompts_per_step * config.rollout.n_samples
    if config.run.deterministic and samples > config.engine.max_running_requests:
        warnings.append(
            f"run.deterministic: {samples} samples a step are more than engine.max_running_requests "
            f"{config.engine.max_running_requests}; the batch is split, and its composition is not fixed"
        )
    if s.data is not None and s.stop_accuracy < 1 and not s.eval_every:
        warnings.append(
            f"sft.stop_accuracy {s.stop_accuracy:g} without sft.eval_every: nothing is evaluated, so the supervised phase "
            f"takes all of sft.max_steps"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        warnings.append(
            "rollout.top_p or rollout.top_k cut the sampling distribution: log-probabilities of engine and trainer then differ by construction"
        )
    if config.run.deterministic and config.slurm.nodes > 1:
        warnings.append(
            "run.deterministic over several nodes fixes the deal of prompts to nodes: the slowest node sets the pace"
        )
    return warnings
