"""How SGLang cuts a model over tensor- and expert-parallel ranks, and which cuts block FP8 allows.

The one place that says so: the digests of the engine's weights, the plan's memory and the preflight ask here. SGLang's
own processes import it, so it needs neither torch nor the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK
from fp8slurm.models.precision import engine_in_fp8
from fp8slurm.models.spec import ModelSpec

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig

VOCAB_MULTIPLE = 64
"""SGLang pads embeddings to this many rows (vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE)."""
_VOCABULARY = re.compile(r"(?:.*\.)?(?:embed_tokens|lm_head)\.weight")
_PROJECTION = re.compile(r".*\b(q|k|v|o|gate|up|down)_proj\.")


@dataclass(frozen=True)
class EngineCut:
    """`pieces` equal pieces along dimension `dim` (None: all of it everywhere); `copies` neighbours share a piece."""

    dim: int | None = None
    pieces: int = 1
    copies: int = 1
    multiple: int = 1
    """Rows are filled up with zeros to a multiple of this first."""

    def piece(self, rank: int) -> int:
        """The number of the piece that the engine's rank `rank` holds."""
        return rank // self.copies % self.pieces

    def rows(self, rows: int) -> int:
        """Rows with the filling."""
        return -(-rows // self.multiple) * self.multiple

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a piece of a tensor of `shape`."""
        whole = (self.rows(shape[0]), *shape[1:])
        return tuple(-(-n // self.pieces) if d == self.dim else n for d, n in enumerate(whole))


@dataclass(frozen=True)
class EngineLayout:
    """An engine of `tensor` ranks, of which `expert` groups of neighbours hold different experts."""

    num_kv_heads: int
    tensor: int = 1
    expert: int = 1

    def cut(self, name: str) -> EngineCut:
        """How the tensor with this Hugging Face name is cut; blocks of scales like the codes that they belong to.

        Embedding and head, gate and up are cut along their rows, o and down along their columns, q, k and v by heads.
        With more ranks than key-value heads neighbours hold the same one. Norms and routers are everywhere. An expert
        is cut over the ranks of its group."""
        if _VOCABULARY.fullmatch(name):
            return EngineCut(0, self.tensor, multiple=VOCAB_MULTIPLE)
        projection = _PROJECTION.match(name)
        if projection is None:
            return EngineCut()
        size = self.tensor // self.expert if ".experts." in name else self.tensor
        if projection[1] in "kv" and size % self.num_kv_heads == 0:
            return EngineCut(0, self.num_kv_heads, size // self.num_kv_heads)
        return EngineCut(1 if projection[1] in ("o", "down") else 0, size)

    def experts(self, rank: int, num_experts: int) -> range:
        """The experts of which a rank holds a piece."""
        share = num_experts // self.expert
        first = rank // (self.tensor // self.expert) * share
        return range(first, first + share)


def check_engine_layout(config: RunConfig, spec: ModelSpec) -> None:
    """SGLang's block FP8 wants every tensor-parallel piece of q, k, v, gate and up to be whole 128 blocks."""
    tp, ep = config.engine.tensor_parallel_size, config.engine.expert_parallel_size
    if ep > 1 and (not spec.is_moe or tp % ep or spec.num_experts % ep):
        what = f"{spec.num_experts} experts" if spec.is_moe else "a model without experts"
        raise InputError(
            f"--engine.expert-parallel-size {ep} with --engine.tensor-parallel-size {tp} and {what}: "
            f"it must divide both"
        )
    if not engine_in_fp8(config):
        return
    layout = EngineLayout(spec.num_kv_heads, tp, ep)
    matrices = [
        ("query heads", "q_proj.", spec.num_heads * spec.head_dim),
        ("key-value heads", "k_proj.", spec.num_kv_heads * spec.head_dim),
        ("experts' FFN", ".experts.up_proj.", spec.moe_ffn_hidden_size)
        if spec.is_moe
        else ("FFN", "up_proj.", spec.ffn_hidden_size),
    ]
    for what, name, size in matrices:
        multiple = BLOCK * layout.cut(name).pieces
        if size % multiple:
            more = " or --engine.expert-parallel-size above 1" if what.startswith("experts") else ""
            raise InputError(
                f"--engine.tensor-parallel-size {tp}: the {what} ({size} rows) are cut inside a {BLOCK} block of FP8; "
                f"the size must be a multiple of {multiple}{more}"
            )
