"""A plan in tables, for a terminal; and in a few lines, for --dry-run."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fp8slurm.plan.plan import Fit, Plan, Stage

COLUMNS = 4
LONG = 16_384
"""Tokens of a sequence from which context parallelism is worth a thought (docs/context.md)."""
"""Pipeline stages that the memory table shows; of more the first, the second and the last."""


def gb(n: float) -> str:
    """Bytes in units of 10^9, three digits."""
    n /= 1e9
    return f"{n:.1f}" if n >= 10 else f"{n:.2f}" if n >= 0.01 else f"{n:.4f}" if n else "0"


def count(n: int) -> str:
    """A number of parameters: 4.022 G, 1.6 M."""
    return f"{n / 1e9:.3f} G" if n >= 1e8 else f"{n / 1e6:.1f} M"


def show(plan: Plan, console: Console | None = None) -> None:
    """Print everything."""
    console = console or Console(highlight=False)
    for part in parts(plan):
        console.print(part)


def parts(plan: Plan) -> Iterator[RenderableType]:
    """The tables, in the order of interest."""
    yield _head(plan)
    yield _ranks(plan)
    yield _phases(plan)
    yield _engine(plan)
    yield _host(plan)
    yield _update(plan)
    yield _alignment(plan)
    yield _pipeline(plan)
    yield Text(
        "GB are 10^9 bytes, on one rank unless it says otherwise. exact: counted, and compared with a built trainer, "
        "the converter or SGLang in the tests; estimate: by formula or from a few runs on GPUs; assumed: a round "
        "number. docs/plan.md explains.",
        style="dim",
    )


def summary(plan: Plan) -> str:
    """The plan in a few lines."""
    shown = [f"model        {count(plan.parameters)} parameters ({plan.model_source})"]
    if not plan.gpus_per_node:
        most = max(s.memory.state_bytes + s.memory.working_bytes for s in plan.stages)
        shown.append(f"GB a rank    {gb(most)} while training, without GPUs")
    for fit in plan.fits if plan.gpus_per_node else ():
        phases = ", ".join(f"{p.name} {gb(p.bytes)}" for p in fit.phases)
        shown.append(f"GB a GPU     {fit.gpu} ({gb(fit.gpu_bytes)}): {phases}: {_verdict(fit)}")
    shown.append(
        f"host memory  {gb(sum(i.bytes for i in plan.host))} GB a node; "
        f"a checkpoint takes {gb(plan.checkpoint_bytes)} GB on disk"
    )
    t = plan.traffic
    shown.append(f"an update    {gb(t.payload)} GB in {t.buckets} bucket(s), {t.ratio:.3f}x of its BF16 bytes")
    return "\n".join(shown)


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return "fits"
    if not fit.engine.kv_tokens:
        return "no room for a KV cache"
    if fit.teacher is not None and not fit.teacher.kv_tokens:
        return "no room for the teacher's KV cache"
    return "does not fit"


def _head(plan: Plan) -> RenderableType:
    spec, layout = plan.spec, plan.layout
    shape = f"{spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_heads} heads and "
    shape += f"{spec.num_kv_heads} key-value heads of {spec.head_dim}, "
    if spec.is_moe:
        shape += f"{spec.num_experts} experts of {spec.moe_ffn_hidden_size}, {spec.experts_per_token} a token"
    else:
        shape += f"FFN {spec.ffn_hidden_size}"
    tied = "tied" if spec.tie_word_embeddings else "untied"
    rows = {
        "run": plan.name,
        "model": f"{count(plan.parameters)} parameters: {shape}, vocabulary {spec.vocab_size} ({tied})",
        "shape from": plan.model_source,
        "layout": f"{layout.world} ranks: {layout}",
        "placement": f"{plan.placement}: "
        + (
            "trainer and engines take turns on the same GPUs"
            if plan.placement == "shared"
            else "trainer and engines have GPUs of their own"
        ),
    }
    if not plan.gpus_per_node:
        rows["note"] = "the run asks for no GPU (slurm.gpus_per_node is 0): the figures are what it would take on one"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        grid.add_row(key, value)
    return grid


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """A table whose first column and last `text` columns are text, and the others numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for i, name in enumerate(columns):
        number = 0 < i < len(columns) - text
        table.add_column(name, justify="right" if number else "left", no_wrap=number or i == 0)
    return table


def _shown(plan: Plan) -> list[Stage]:
    if len(plan.stages) <= COLUMNS:
        return list(plan.stages)
    return [plan.stages[0], plan.stages[1], plan.stages[-1]]


def _ranks(plan: Plan) -> RenderableType:
    stages = _shown(plan)
    names = [f"stage {s.stage}" for s in stages] if len(plan.stages) > 1 else ["a rank"]
    table = _table("Trainer: memory of a rank (GB)", "", *names, "", "", text=2)
    table.add_row("layers", *(str(s.layers) for s in stages))
    table.add_row("parameters", *(count(s.parameters) for s in stages), "exact")
    if plan.spec.is_moe:
        table.add_row("  of them experts", *(count(s.expert_parameters) for s in stages), "exact")
    for group in ("state", "working", "host"):
        kinds: dict[str, None] = {}
        for s in stages:
            kinds.update(dict.fromkeys(i.name for i in getattr(s.memory, group)))
        for kind in kinds:
            items = [next((i for i in getattr(s.memory, group) if i.name == kind), None) for s in stages]
            known = next(i for i in items if i is not None)
            where = "host: " if group == "host" else ""
            table.add_row(kind, *(gb(i.bytes) if i else "-" for i in items), known.basis, where + known.note)
    total = [gb(s.memory.state_bytes + s.memory.working_bytes) for s in stages]
    table.add_row("on the GPU, most", *total, style="bold")
    return _spaced(table)


def _phases(plan: Plan) -> RenderableType:
    table = _table(
        "A GPU in each phase (GB)", "", *(f"{f.gpu} of {gb(f.gpu_bytes)}" for f in plan.fits), "what is there"
    )
    for i, phase in enumerate(plan.fits[0].phases):
        cells = []
        for fit in plan.fits:
            p = fit.phases[i]
            cells.append(Text(gb(p.bytes), style="" if p.bytes <= fit.gpu_bytes else "bold red"))
        there = ", ".join(f"{name} {gb(n)}" for name, n in phase.parts.items())
        table.add_row(phase.name, *cells, f"{plan.fits[0].gpu}: {there}" if "KV cache" in phase.parts else there)
    verdicts = [Text(_verdict(f), style="green" if f.fits else "bold red") for f in plan.fits]
    table.add_row("", *verdicts, "")
    return _spaced(table)


def _engine(plan: Plan) -> RenderableType:
    table = _table("Engine: a GPU", "", *(f.gpu for f in plan.fits), "")
    form = "block FP8" if plan.quantization else "unquantized"
    table.add_row("weights (GB)", *(gb(f.engine.weights) for f in plan.fits), f"exact; {form}")
    table.add_row(
        "KV cache, bytes a token",
        *(str(f.engine.kv_bytes_per_token) for f in plan.fits),
        "exact; key and value of all layers",
    )
    table.add_row(
        "KV cache, tokens",
        *(f"{f.engine.kv_tokens:,}" for f in plan.fits),
        "room in engine.mem_fraction, or engine.max_total_tokens",
    )
    note = f"of {plan.longest_sequence} tokens, the longest prompt and response; "
    note += f"the step has {plan.samples_per_engine} an engine"
    table.add_row("whole sequences", *(str(f.engine.kv_tokens // plan.longest_sequence) for f in plan.fits), note)
    return _spaced(table)


def _host(plan: Plan) -> RenderableType:
    table = _table("Host memory of a node (GB)", "", "", "", "", text=2)
    table.show_header = False
    for item in plan.host:
        table.add_row(item.name, gb(item.bytes), item.basis, item.note)
    table.add_row("together", gb(sum(i.bytes for i in plan.host)), style="bold")
    return _spaced(table)


def _update(plan: Plan) -> RenderableType:
    t = plan.traffic
    sizes = _table("A weight update (GB)", "", "FP8" if plan.quantization else "sent", "BF16", "ratio", "")
    sizes.add_row(
        "whole model",
        gb(t.payload),
        gb(t.bf16),
        f"{t.ratio:.4f}",
        f"{t.buckets} bucket(s) of at most {gb(t.largest_bucket)}",
    )
    if plan.matrices:
        note = f"{plan.matrices:,} matrices: codes and scales"
        sizes.add_row("quantized", gb(t.quantized), gb(t.quantized_bf16), f"{t.quantized / t.quantized_bf16:.4f}", note)
    gathered = sum(r.gathered for r in t.ranks)
    if t.gather_bf16:
        note = f"{t.gathers} messages to the ranks that send; BF16: if everything that is cut were gathered first"
        sizes.add_row("gathered", gb(gathered), gb(t.gather_bf16), f"{gathered / t.gather_bf16:.4f}", note)
    sizes.add_row("loaded", gb(t.loaded), "", "", "by each engine GPU, which keeps its slice")
    ranks = _table(
        "Ranks in it (GB)", "stage", "ranks of the stage", "gathered", "messages", "broadcast", "buckets", "", text=1
    )
    groups: dict[tuple[int, ...], list[int]] = {}
    for r in t.ranks:
        groups.setdefault((r.stage, r.gathered, r.gathers, r.broadcast, r.buckets), []).append(r.position)
    for (stage, sent, messages, broadcast, buckets), positions in groups.items():
        ranks.add_row(str(stage), _ranges(positions), gb(sent), str(messages), gb(broadcast), str(buckets), "")
    ranks.add_row("", "others", "0", "0", "0", "0", "")
    disk = Text(f"A checkpoint takes about {gb(plan.checkpoint_bytes)} GB on disk.")
    return _spaced(Group(sizes, "", ranks, "", disk))


def _ranges(values: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2 5."""
    runs: list[list[int]] = []
    for v in values:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return " ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _alignment(plan: Plan) -> RenderableType:
    def sizes(values: tuple[int, ...]) -> str:
        return " ".join(map(str, values)) or "-"

    table = _table(
        "Tensor-parallel sizes of the trainer whose cuts are boundaries of 128 blocks",
        "",
        "number",
        "cut side",
        "yes",
        "inside a block",
        "not divisible",
        text=3,
    )
    for a in plan.alignment:
        inside = a.cut_by in a.not_aligned
        state = Text(
            sizes(a.not_aligned) + (" <- here: gathered before it is quantized" if inside else ""),
            style="yellow" if inside else "",
        )
        table.add_row(
            f"{a.matrix}", str(a.matrices), f"{a.size} {a.along}", sizes(a.aligned), state, sizes(a.impossible)
        )
    return _spaced(table)


def _pipeline(plan: Plan) -> RenderableType:
    lines = [
        f"{p.micro_batches} micro-batches a rank in an update if responses have {p.response_tokens} tokens"
        + (f": {p.bubble:.0%} of the time a stage waits" if plan.layout.pipeline > 1 else "")
        for p in plan.pipeline
    ]
    if plan.layout.pipeline == 1:
        lines.append("one stage: no pipeline bubble")
    if plan.context_traffic:
        lines.append(
            f"context parallelism moves {gb(plan.context_traffic)} GB of keys, values and their gradients to a rank "
            f"in a micro-batch"
        )
    if plan.tensor_traffic:
        line = f"tensor parallelism moves {gb(plan.tensor_traffic)} GB of hidden states to a rank in a micro-batch"
        instead = f"--parallel.context-parallel-size {plan.layout.context * plan.layout.tensor}"
        together = plan.tensor_traffic + plan.context_traffic
        if plan.longest_sequence >= LONG and plan.context_instead < together:
            line += (
                f"; {instead} in its place would move {gb(plan.context_instead)} GB in all, if weights and gradients "
                f"fit uncut (docs/context.md)"
            )
        lines.append(line)
    return _spaced(Group(Text("Pipeline", style="bold"), *map(Text, lines)))


def _spaced(renderable: RenderableType) -> RenderableType:
    return Padding(renderable, (1, 0, 0, 0))


def row(plan: Plan, label: str) -> str:
    """The plan as a row of a Markdown table, for comparing layouts; GB, for the longest responses."""
    head = max((i.bytes for s in plan.stages for i in s.memory.working if i.name == "output layer"), default=0)
    phases = {p.name.split()[0]: p.bytes for p in plan.fits[0].phases}
    t, longest = plan.traffic, plan.pipeline[0]
    cells = [
        label, count(max(s.parameters for s in plan.stages)), gb(phases["train"]),
        gb(head) if head else "less than a layer",
        gb(phases["sync"]), gb(sum(i.bytes for i in plan.host)), str(longest.micro_batches), f"{longest.bubble:.0%}",
        gb(max(r.broadcast for r in t.ranks)), gb(sum(r.gathered for r in t.ranks)),
        ", ".join(f.gpu for f in plan.fits if f.fits) or "neither",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"
