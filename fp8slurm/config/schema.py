"""The typed configuration of a run. Every setting's help is the docstring under its field."""

from __future__ import annotations

import re
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from tyro.constructors import PrimitiveConstructorSpec

from fp8slurm.config.sources import from_words, to_words
from fp8slurm.config.template import TemplateArguments, check_values
from fp8slurm.core.errors import InputError

FROM_FLAGS: ContextVar[bool] = ContextVar("FROM_FLAGS", default=False)
"""Whether tyro builds the sections: it would put a ValueError into a box that names no flag."""


class OutOfRange(Exception):
    """Values of flags that a section refuses; no ValueError, so that tyro lets it through."""

    def __init__(self, section: type[BaseModel], error: ValidationError) -> None:
        self.section, self.error = section, error


NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)


class Section(BaseModel):
    """A frozen group of settings; a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant: pydantic takes them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in NUMBERS:
            raise InputError("a number is needed")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _let_through(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            if FROM_FLAGS.get():
                raise OutOfRange(cls, error) from None
            raise


class RunSection(Section):
    """The run itself."""

    name: str = "run"
    """Name of the run; its directory is ROOT/NAME."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name.strip("/ ") in ("", ".", ".."):  # the run directory would be the shared folder of all runs
            raise InputError(f"--run.name {name!r} names no folder of its own; allowed: a name such as qwen3-4b-fp8")
        if any(ord(c) < 32 for c in name) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"--run.name {name!r} leads out of --run.root, or names no folder; allowed: a name like qwen3-4b"
            )
        if "/" in name:  # status looks for runs in run.root, not in folders of it
            path = Path("ROOT") / name
            raise InputError(f"--run.name {name!r} is a path; allowed: --run.root {path.parent} --run.name {path.name}")
        if len(name.encode()) > 200:
            raise InputError(f"--run.name of {len(name)} characters; allowed: at most 200")
        return name

    root: Path = Path("runs")
    """Folder that holds the run directories."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of the data order, the sampling and the initialisation."""
    steps: int = Field(100, ge=0)
    """Reinforcement-learning steps (0 with a warm start is plain SFT)."""
    deterministic: bool = False
    """Seeded sampling in one fixed batch: a resumed run equals an uninterrupted one to the last bit (CPU)."""
    max_bad_steps: int = Field(3, ge=1)
    """Steps in a row with a NaN or infinite loss or gradient after which the job ends."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level of rank 0 and of the rollout workers."""
    rank_log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Log level of the other ranks."""


class ModelSection(Section):
    """What is trained."""

    hf_checkpoint: Path | None = None
    """Hugging Face checkpoint folder in BF16 or FP32; the trainer starts from it."""
    rollout_checkpoint: Path | None = None
    """Folder that the engine loads, in the precision of its config.json; left out: made from hf_checkpoint."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the trainer's parameters outside FP8 GEMMs."""
    exact: bool = False
    """Trainer and engine compute the same bits: the gap is 0 on every token, and a token with any other log-probability
    stops the run before it is trained on. Qwen3 in FP8 on both sides, mixtures without GPUs only (docs/exact.md)."""


class Fp8Section(Section):
    """FP8 in the trainer."""

    format: Literal["e4m3"] = "e4m3"
    """FP8 number format of weights, activations and gradients."""
    recipe: Literal["blockwise"] = "blockwise"
    """Scaling recipe: 128x128 blocks for weights, 1x128 for activations and gradients."""
    backend: Literal["transformer_engine", "emulated", "off"] = "transformer_engine"
    """Who multiplies in FP8: TransformerEngine (GPU), its formula emulated (CPU), or nobody (plain BF16 or FP32)."""
    param_gather: bool = False
    """Keep the Linear weights themselves in FP8, with FP32 masters in the optimizer; updates send their codes and
    scales as they are. TransformerEngine's on a GPU; without one emulated, as fp8.backend is."""
    grouped: Literal["transformer_engine", "deep_gemm"] = "transformer_engine"
    """Who multiplies a mixture's experts: TransformerEngine, a launch or more an expert, or DeepGEMM, one launch for
    all, with quantizers of this project (Hopper GPUs; docs/moe.md)."""
    engine: Literal["auto", "fp8", "bf16"] = "auto"
    """Precision of the engine's checkpoint where it is made from hf_checkpoint; auto follows backend."""


class ParallelSection(Section):
    """Megatron's parallel layout; the data-parallel size follows from the number of ranks."""

    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share every layer's matrices."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Stages that share the layers."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share the tokens of every sequence; each gathers the others' keys and values (docs/context.md)."""
    expert_parallel_size: int = Field(1, ge=1)
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share each expert's matrices."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence among the tensor-parallel ranks."""


class MoeSection(Section):
    """Mixture-of-experts training."""

    aux_loss_coef: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of Switch Transformer (0: off, as Qwen3 is commonly fine-tuned)."""
    dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach their experts' ranks: plain all-to-all, or DeepEP's kernels (flex; needs a GPU and deep_ep)."""


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of the RL steps."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the schedule after the warm-up, over run.steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = Field(0.98, ge=0, lt=1)
    """AdamW beta2."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down (0: never)."""
    distributed: bool = True
    """Shard optimizer state and FP32 master weights over the data-parallel ranks."""
    cpu_offload: bool = False
    """Keep Adam's state and FP32 master weights in host memory and step there (Megatron's HybridDeviceOptimizer; with
    fp8.param_gather trainer/host_adam.py, which has not run on a GPU yet)."""
    sleep: bool = False
    """Keep Adam's state and the FP32 master weights in pinned host memory while engines work on the same GPU: more room
    for their KV cache, for two copies a step. Needs GPUs that trainer and engines share."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's two moments; bfloat16 needs TransformerEngine's FusedAdam, on the GPU."""


class TrainSection(Section):
    """How a batch goes through the trainer."""

    tokens_per_micro_batch: int = Field(4096, ge=8)
    """Token budget of one packed micro-batch; a longer sequence gets one of its own."""
    balance: Literal["tokens", "cost"] = "tokens"
    """What is evened out between data-parallel ranks when they are dealt micro-batches: tokens, or tokens and
    attention's square, which pays for long sequences (docs/perf.md)."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer updates that the samples of one step are split into."""
    epochs_per_step: int = Field(1, ge=1)
    """Times that a step goes over its samples: updates_per_step updates each time."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation in the backward pass."""
    recompute_logprobs: Literal["auto", "always"] = "auto"
    """Whether old log-probabilities take a forward pass of their own. auto: not where a step has one update and one
    epoch, whose own forward gives them."""
    quantize_kv: bool = False
    """With engine.kv_cache = "fp8": attention gets queries, keys and values rounded as the engine's cache rounds them;
    gradients pass straight through."""


class SourceSection(Section):
    """One of several sources of training prompts."""

    file: Path
    """JSONL or parquet file."""
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts that are taken, relative to those of the others."""
    reward: str | None = None
    """Kind of its reward; left out: reward.kind."""
    prompt_key: str | None = None
    """Left out: data.prompt_key."""
    label_key: str | None = None
    """Left out: data.label_key."""


Sources = Annotated[
    dict[str, SourceSection],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="JSON",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=to_words,
    ),
]


class DataSection(Section):
    """Prompts."""

    train: Path | None = None
    """JSONL or parquet file with the training prompts."""
    sources: Sources = Field(default_factory=dict)
    """Several of them in place of data.train, by name: file, weight, reward, prompt_key and label_key of each. In a
    recipe [data.sources.NAME], as a flag one JSON object."""

    @field_validator("sources")
    @classmethod
    def _have_names(cls, sources: dict[str, SourceSection]) -> dict[str, SourceSection]:
        for name in sources:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise InputError(f"--data.sources {name!r}: allowed in a name: letters, digits, '_', '.' and '-'")
        return sources

    eval: Path | None = None
    """JSONL or parquet file with the held-out prompts."""
    prompt_key: str = "prompt"
    """Key of the prompt: text, or a list of messages with role and content. Dots lead into objects."""
    label_key: str = "label"
    """Key of the reference answer, such as reward_model.ground_truth; "": the rows have none, and a reward of your own
    needs none."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments for the chat template, in rollout and evaluation. Qwen3 without thinking: enable_thinking False, or
    '{"enable_thinking": false}'."""

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _are_plain(cls, values: Any) -> Any:
        check_values(values)
        return values

    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are left out and counted."""
    on_changed_file: Literal["error", "warn"] = "error"
    """What a resume does where a data file has other content than at the run's start: a checkpoint counts rows of it,
    and the held-out accuracy is another figure."""
    shuffle: bool = True
    """Shuffle the prompts, anew in every epoch, from run.seed."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with a line that cannot be used: stop with file and line number, or skip and count it."""


class RolloutSection(Section):
    """Generation."""

    prompts_per_step: int = Field(32, ge=1)
    """Prompts (groups) that each RL step trains on."""
    n_samples: int = Field(8, ge=1)
    """Samples per prompt."""
    max_tokens: int = Field(1024, ge=1)
    """Longest response in tokens; with rollout.generate what the model may say in all turns of a conversation."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; keep 1 to train: below it the engine's log-probabilities are not the trainer's."""
    top_k: int = Field(-1, ge=-1)
    """Top-k sampling: 1 or more; -1 is off."""

    @field_validator("top_k")
    @classmethod
    def _not_none_of_them(cls, top_k: int) -> int:
        if top_k == 0:
            raise InputError("0 tokens to choose from; allowed: 1 or more, or -1 (off)")
        return top_k

    max_staleness: int = Field(0, ge=0, le=16)
    """Steps that the weights behind a sample's oldest token may be older than those that train on it. 1 and more:
    engines generate the samples of as many steps ahead while the trainer works, on GPUs of their own; where they share
    GPUs with it, how old what a step leaves unfinished may get (oversample). docs/async.md."""
    oversample: float = Field(1.0, ge=1, le=8)
    """Groups that a step begins, as a multiple of those that it takes: when enough are ready the others are stopped,
    and go on in the next step from the tokens that they have. 1: off."""
    partial: Literal["continue", "mask"] = "continue"
    """With oversample, tokens of older weights than the step's: trained on, with their own log-probabilities, or left
    out of the loss."""
    truncated: Literal["mask", "penalize", "soft", "keep"] = "mask"
    """A sample that hits max_tokens: left out of the loss, given reward 0, or treated like any other. soft: its reward,
    and that of the last overlong_buffer tokens before it, falls with the length by up to 1 (DAPO)."""
    overlong_buffer: int | None = Field(None, ge=1)
    """For truncated = soft: tokens before max_tokens over which the penalty grows from 0 to 1."""
    drop_no_signal: bool = True
    """Drop groups whose rewards are all equal; max_replacements says how often others are drawn for them."""
    max_replacements: int = Field(0, ge=0)
    """Rounds of replacement for dropped groups (0: none); after that the step goes on with what it has."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Further end tokens; those of the checkpoint's generation_config.json and config.json always stop a sample."""
    routing_replay: bool = False
    """Mixture of experts: route every token in the trainer to the experts that the engine chose for it."""
    max_gap: float | None = Field(None, ge=0)
    """Mean |trainer - engine| of a step's log-probabilities, in nats, above which the run ends before it trains on them
    (0: never). Left out: 0.5 with FP8 on either side, 0.3 in BF16, far above what any run of one policy has shown."""
    generate: str | None = None
    """A function of your own that holds the conversation about a prompt, with tools or in several turns:
    module:function(session, prompt) -> samples (docs/agents.md). Left out: one response."""
    on_error: Literal["error", "leave_out"] = "error"
    """Where rollout.generate raises or takes too long: end the run, or leave the conversation out and count it."""
    tool_timeout_s: float = Field(60.0, gt=0)
    """Longest time that rollout.generate may take between two turns: an engine's work does not count."""
    save_every: int = Field(0, ge=0)
    """Steps between files rollouts/step_N.jsonl, with the trainer's log-probabilities for the report (0: none)."""


class RewardSection(Section):
    """Rewards."""

    kind: str = "exact"
    """exact, digits, numeric, choice, math, or a function of your own, module:function (docs/customize.md)."""
    digits_weight: float = Field(0.5, ge=0, le=1)
    """For digits: the share of the per-digit part; the rest is the exact match."""
    workers: int | None = Field(None, ge=1)
    """Processes on each node that call math or a function of your own; left out: as many as the cores that the node's
    tasks leave, 2 to 32. An async function has one."""
    concurrency: int = Field(64, ge=1)
    """Calls of an async function at a time, on each node."""
    timeout_s: float = Field(5.0, gt=0)
    """Time limit of one call; each runs in a process of its own kind, not in the rollout worker."""
    on_error: Literal["error", "zero"] = "error"
    """A function of your own that raises, hangs or returns NaN ends the run, or counts as 0. An answer that math cannot
    digest always counts as 0."""
    memory_mib: int | None = Field(None, ge=0)
    """Address space in MiB of each process that calls math or a function of your own (0: no limit); left out: 2048 for
    math, no limit otherwise."""


class AlgorithmSection(Section):
    """The policy-gradient objective (GRPO and its relatives)."""

    loss: str = "ppo_clip"
    """ppo_clip (a clipped ratio for every token), gspo (one for every sequence), cispo (clipped importance weights), or
    a function of your own, module:function(LossInput) -> (values, metrics) (docs/customize.md)."""
    advantage: str = "grpo"
    """grpo (relative to the group), rloo (to the group's others), reinforce_pp (to all samples of the step), none (only
    the teacher counts), or a function of your own, module:function(groups) -> a number for every sample."""
    divide_by_std: bool = True
    """grpo: divide group-centred rewards by the group's standard deviation; reinforce_pp: by that of all samples."""
    clip_low: float = Field(0.2, ge=0)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float = Field(0.0, ge=0)
    """Bound on the loss where the advantage is negative, as a multiple of it (above 1; 0: off)."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL loss against the reference model; at 0 no reference is loaded."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    tis_cap: float = Field(2.0, ge=0)
    """Truncated importance sampling: cap on exp(trainer - rollout log-probability) (0: off)."""
    tis_level: Literal["token", "sequence"] = "token"
    """Importance weights of tokens, or of sequences: the product over their tokens."""
    tis_excess: Literal["truncate", "mask"] = "truncate"
    """What becomes of weights above tis_cap: the cap, or 0, which leaves the token or sequence out."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of an update, over sequences of their token means, or the sum over tokens divided by the
    update's sequences times rollout.max_tokens, which no response's length changes (Dr. GRPO)."""


class TeacherSection(Section):
    """On-policy distillation: a teacher scores what the student samples."""

    checkpoint: Path | None = None
    """Hugging Face folder of the teacher, in BF16 or block FP8, with the student's tokens; left out: no teacher. An
    engine on every node serves it and gives the log-probability of every token that was sampled."""
    kl_coef: float = Field(1.0, gt=0)
    """Weight of the reverse KL in each token's advantage: that of the rewards + kl_coef * log(teacher / student)."""
    mem_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of the memory of the GPUs of the node's first engine, for the teacher's weights and KV cache."""


class SftSection(Section):
    """Supervised fine-tuning: a run of its own, or the warm start before RL."""

    data: Path | None = None
    """JSONL or parquet with prompt and response; left out: no supervised phase."""
    prompt_key: str | None = None
    """Key of the prompt; left out: data.prompt_key."""
    response_key: str = "response"
    """Key of the response: text, or a list with one message of the assistant. In rows without it the last message of
    the prompt is the response, if it is the assistant's."""
    max_steps: int = Field(0, ge=0)
    """Most supervised steps."""
    batch_size: int = Field(64, ge=1)
    """Sequences a step."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate (constant after sft.warmup_steps)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    stop_accuracy: float = Field(1.0, ge=0, le=1)
    """Stop once the held-out accuracy (at eval.temperature) reaches this."""
    eval_every: int = Field(0, ge=0)
    """Steps between those evaluations (0: none)."""
    eval_from: int = Field(0, ge=0)
    """First step that may be evaluated."""


class EngineSection(Section):
    """SGLang engines."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine."""
    expert_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine that share the experts; the rest of tensor_parallel_size cuts each expert."""
    per_node: int = Field(1, ge=1)
    """Engines on each node; they share its work, and one that fails leaves its own to the others."""
    placement: Literal["shared", "split"] = "shared"
    """shared: trainer and engines take turns on the same GPUs; split: engine.gpus a node serve, the others train."""
    gpus: int = Field(0, ge=0)
    """For split: GPUs of each node that serve (engine.per_node times engine.tensor_parallel_size)."""
    max_running_requests: int = Field(256, ge=1, le=4096)
    """Sequences generated at once."""
    max_total_tokens: int | None = Field(None, ge=1)
    """Size of the KV cache in tokens; left out: SGLang decides from mem_fraction."""
    mem_fraction: float = Field(0.8, gt=0, lt=1)
    """Share of the GPU's memory for weights and KV cache."""
    context_length: int | None = Field(None, ge=1)
    """Longest prompt plus response; left out: the model's."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype outside the FP8 layers."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """Cached keys and values: in engine.dtype, or in e4m3 with a scale for keys and one for values by layer, which come
    with every weight update (docs/context.md). fp8 has not run on a GPU yet."""
    kv_scales: Literal["calibrated", "fixed", "unit"] = "calibrated"
    """Those scales: from the largest keys and values of the step before, as the trainer sees them; from
    model.rollout_checkpoint (k_scale, v_scale); or 1, to compare with."""
    sleep: bool | None = None
    """Engines give their GPU memory back while the trainer works; left out: yes on GPUs that both share."""
    ready_timeout_s: float = Field(600.0, gt=0)
    """Deadline for the server to come up. On GPUs the first start compiles kernels, which can take half an hour."""
    request_timeout_s: float = Field(3600.0, gt=0)
    """Deadline of one generation request."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of one engine in a row after which the job ends."""
    extra_args: list[str] = Field(default_factory=list)
    """Further arguments of SGLang's server; the first after a =: --engine.extra-args=--page-size 64."""


class SyncSection(Section):
    """Weights from the trainer to the engines."""

    bucket_bytes: int = Field(512 * 2**20, ge=2**16)
    """Size of one bucket."""
    verify: Literal["off", "first", "always"] = "first"
    """Compare a digest of the bytes in the engine with what was sent: never, after the first two updates, after all."""
    pause_mode: Literal["retract", "abort", "in_place"] = "retract"
    """What an update does to running requests: back to the queue (they go on under the new weights), end now, or go on
    with the old weights' KV cache. Requests run then only with rollout.max_staleness above 1."""
    transport: Literal["auto", "gloo", "cuda-ipc", "nccl", "shared-memory", "gloo-direct"] = "auto"
    """How weights reach the engines: through the host (gloo), mapped on the GPU that trainer and engine share
    (cuda-ipc), or broadcast from GPU to GPU where each have their own (nccl). shared-memory and gloo-direct stand in
    for the last two without GPUs. auto: gloo without GPUs, else cuda-ipc or nccl by engine.placement."""
    keep_last_update: bool | None = None
    """Keep the last update in the host memory of every node, for an engine that restarts; without it the trainer sends
    it again. Left out: yes with gloo; the other transports cannot."""
    delta: bool = False
    """Send only the bytes that changed since the last update, where all engines have that one and less than a quarter
    would be sent (gloo, nccl, gloo-direct). The ranks that send keep what they sent: plan counts it. Pays where the
    network is slow. Not run on a GPU yet."""


class CheckpointSection(Section):
    """Checkpoints."""

    every: int = Field(10, ge=1)
    """Steps between checkpoints; the last step always gets one."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this are kept for good (0: none)."""
    asynchronous: bool = True
    """Write checkpoints while the next step runs: a step waits only for the plan and a copy of each rank's own share to
    host memory, which needs the room there (fp8slurm plan says how much)."""


class EvalSection(Section):
    """Evaluation on data.eval and on further tasks while training."""

    every: int = Field(10, ge=0)
    """Steps between evaluations (0: only at the start and the end)."""
    tasks: list[str] = Field(default_factory=list)
    """Further tasks: NAME=FILE of a shipped definition, FILE.jsonl, FILE.parquet, or MY.toml[=FILE] (docs/eval.md)."""
    n_samples: int = Field(1, ge=1)
    """Samples a question, of data.eval and of every task; above 1 needs a temperature."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest response; left out: rollout.max_tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    save_samples: bool = True
    """Write every answer to eval/STEP-PRECISION-training/samples.jsonl; the summary is always written."""


class ObserveSection(Section):
    """What is written and shown."""

    tensorboard: bool = True
    """Write TensorBoard files to tb/."""
    wandb: bool = False
    """Send the metrics to Weights & Biases, too (without the package wandb or a key the run says so and goes on)."""
    wandb_project: str = "fp8slurm"
    """Its project; the run there has the name of run.name."""
    plot: bool = True
    """Draw plot.png at the end of `fp8slurm train`; of a run that Slurm starts, `fp8slurm plot` draws it."""


class WatchdogSection(Section):
    """Hangs."""

    timeout_s: float = Field(1800.0, gt=0)
    """Longest time without any progress before every task dumps its stacks and the job step ends. Engines that compute
    are progress, however long a rollout takes; one that has work and computes nothing for half of this is restarted."""


class SlurmSection(Section):
    """Where the tasks run, and what is asked of Slurm. None leaves a parameter to the site's default."""

    executor: Literal["local", "slurm", "debug"] = "local"
    """local: on this machine; slurm: as a Slurm job; debug: on this machine with every task's log on the terminal."""
    nodes: int = Field(1, ge=1)
    """Nodes."""
    ranks_per_node: int = Field(1, ge=1)
    """Megatron ranks a node, one a GPU."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs to ask for on each node (0: none, the ranks run on the CPU)."""
    gpu_type: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Type of those GPUs, as the site's Slurm names it (sinfo --format=%G shows gpu:TYPE:N). None: any."""
    share_gpus: bool = False
    """Start on this machine although other processes hold memory of its GPUs (otherwise that is refused)."""
    cpu_threads: int = Field(0, ge=0)
    """OMP_NUM_THREADS of a rank (0: cores / ranks)."""
    engine_threads: int = Field(0, ge=0)
    """OMP_NUM_THREADS of an engine on the CPU (0: all cores, shared by the node's engines)."""
    partition: str | None = None
    """Partition of the job."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    reservation: str | None = None
    """Reservation."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes that must not be used."""
    time: str = "240"
    """Time limit: minutes, HH:MM:SS or D-HH:MM:SS. A run that needs longer is requeued and goes on."""
    memory: str | None = None
    """Memory of a node, as sbatch takes it (0: all of it)."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each task (every rank and every rollout worker is a task)."""
    container_image: str | None = None
    """Image that pyxis starts every task in (srun --container-image)."""
    container_mounts: list[str] = Field(default_factory=list)
    """Mounts of that container, each SOURCE:TARGET (srun --container-mounts)."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that the job script runs before it starts the tasks, such as module loads."""
    sbatch: dict[str, bool | str | int] = Field(default_factory=dict)
    """Any other sbatch parameter by its long name, such as mail-type END; True for a flag: exclusive True."""
    srun: list[str] = Field(default_factory=list)
    """Further arguments of srun; the first after an equals sign: --slurm.srun=--mpi=none."""
    signal_delay_s: int = Field(300, ge=1)
    """Seconds before the time limit at which Slurm sends SIGUSR2: time to finish a step and to save."""
    requeue: bool = True
    """Go on by itself: requeue the job after a notice, at the time limit and when a task died."""
    max_attempts_without_progress: int = Field(3, ge=1)
    """Attempts in a row without a new checkpoint after which the run ends with the reason."""
    max_bad_nodes: int = Field(2, ge=0)
    """Nodes that a run may leave out because two attempts in a row ended by a fault of theirs (0: none is left out)."""


class ControlSection(Section):
    """Experiments that must fail: they show that the figures measure what they say."""

    shuffle_rewards: bool = False
    """Hand the rewards of a step to the wrong samples."""
    freeze_engine: bool = False
    """Never send weights to the engine after the first update of the RL phase."""
    negate_advantage: bool = False
    """Turn the advantage's sign."""


class RunConfig(Section):
    """Everything about a run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    fp8: Fp8Section = Fp8Section()
    parallel: ParallelSection = ParallelSection()
    moe: MoeSection = MoeSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    teacher: TeacherSection = TeacherSection()
    sft: SftSection = SftSection()
    engine: EngineSection = EngineSection()
    sync: SyncSection = SyncSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    observe: ObserveSection = ObserveSection()
    watchdog: WatchdogSection = WatchdogSection()
    slurm: SlurmSection = SlurmSection()
    control: ControlSection = ControlSection()
