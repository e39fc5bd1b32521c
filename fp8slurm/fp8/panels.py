"""What the CPU quantizers share: cache-sized panels, reused scratch, and amax by integer comparison."""

from __future__ import annotations

import threading

import torch

from fp8slurm.core.errors import TransientInputError
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import FLOAT_DTYPES, scale_from_amax

PANEL_ELEMENTS = 1 << 19
_INT = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_MAGNITUDE = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float32: 0x7FFFFFFF}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_scratch = threading.local()


class NotFinite(Exception):
    """A block holds NaN or infinity."""


def buffer(role: str, dtype: torch.dtype, n: int, k: int) -> torch.Tensor:
    """A reused [n, k] scratch matrix of this thread: fresh pages would cost more than the arithmetic."""
    held = getattr(_scratch, role, None)
    if held is None or held.dtype != dtype or held.numel() < n * k:
        held = torch.empty(max(n * k, PANEL_ELEMENTS), dtype=dtype)
        setattr(_scratch, role, held)
    return held[: n * k].view(n, k)


def panels(n: int, k: int) -> list[tuple[slice, slice]]:
    """Cut [n, k] into panels of whole 128x128 blocks (fewer at the edges), at most PANEL_ELEMENTS elements each."""
    width = min(max(k, 1), PANEL_ELEMENTS // BLOCK)
    height = max(BLOCK, PANEL_ELEMENTS // width // BLOCK * BLOCK)
    return [
        (slice(r, min(r + height, n)), slice(c, min(c + width, k)))
        for r in range(0, n, height)
        for c in range(0, k, width)
    ]


def _magnitude(w: torch.Tensor) -> torch.Tensor:
    """|w| as integers (scratch): magnitudes order like the bits they are made of, which a CPU compares fastest."""
    ints = _INT[w.dtype]
    return torch.bitwise_and(w.view(ints), _MAGNITUDE[w.dtype], out=buffer("magnitude", ints, *w.shape))


def _groups_of_columns(bits: torch.Tensor) -> torch.Tensor:
    rows, k = bits.shape
    if k % BLOCK:
        bits = torch.nn.functional.pad(bits, (0, -k % BLOCK))
    return bits.view(rows, -1, BLOCK).amax(2)


def _groups_of_rows(bits: torch.Tensor) -> torch.Tensor:
    n, k = bits.shape
    whole = n // BLOCK * BLOCK
    parts = [bits[:whole].view(-1, BLOCK, k).amax(1)] if whole else []
    if whole < n:
        parts.append(bits[whole:].amax(0, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scales(w: torch.Tensor, rows: bool, columns: bool, power_of_two: bool = False) -> torch.Tensor:
    """fp32 scales of w [n, k] in blocks of 128 along the rows axis, the columns axis, or both.

    Shape: [ceil(n / 128) or n, ceil(k / 128) or k]. Raises NotFinite if w holds a NaN or an infinity.
    """
    bits = _magnitude(w)
    if rows:
        bits = _groups_of_rows(bits)
    if columns:
        bits = _groups_of_columns(bits)
    if int(bits.max()) >= _INFINITY[w.dtype]:
        raise NotFinite
    return scale_from_amax(bits.view(w.dtype).to(torch.float32), w.dtype, power_of_two)


def times(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out [n, k] fp32 = values (fp32) * scale, each scale serving 128 rows if scale has fewer rows than values has,
    and 128 columns if it has fewer columns."""
    n, k = values.shape
    if scale.shape[1] != k:
        if scale.shape[0] == n and k % BLOCK == 0:  # one scale for 128 neighbours in a row
            shape = (n, -1, BLOCK)
            torch.mul(values.unflatten(1, (-1, BLOCK)), scale[:, :, None], out=out.view(shape))
            return out
        scale = scale.repeat_interleave(BLOCK, dim=1)[:, :k]
    if scale.shape[0] == n or n <= BLOCK:
        return torch.mul(values, scale, out=out)
    whole = n // BLOCK * BLOCK
    torch.mul(
        values[:whole].unflatten(0, (-1, BLOCK)),
        scale[: whole // BLOCK, None],
        out=out[:whole].unflatten(0, (-1, BLOCK)),
    )
    if whole < n:
        torch.mul(values[whole:], scale[-1], out=out[whole:])
    return out


def scaled(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32(w) * scale in scratch, ready for the cast to e4m3; no product exceeds 448 by more than a rounding."""
    out = buffer("scaled", torch.float32, *w.shape)
    return times(w if w.dtype == torch.float32 else out.copy_(w), scale, out)


def checked(w: torch.Tensor, name: str) -> torch.Tensor:
    """w itself, contiguous and without its graph; ValueError unless it is [N, K] in bf16, fp16 or fp32."""
    if w.dim() != 2 or w.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise ValueError(
            f"{name or 'tensor'}: {w.dtype} {list(w.shape)} cannot be quantized; allowed: [N, K] in {allowed}"
        )
    return w.detach().contiguous()


def not_finite_error(w: torch.Tensor, name: str, first_row: int = 0) -> TransientInputError:
    """The error for w [N, K] that holds a NaN or an infinity, naming the first one.

    first_row: number of w's row 0 in the tensor that it was cut from.
    """
    # In a running step this is a divergence or a fault of the hardware: from the checkpoint before, another attempt may
    # come past it; where it does not, slurm.max_attempts_without_progress ends the run.
    row, column = (~w.isfinite()).nonzero()[0].tolist()
    return TransientInputError(
        f"{name or 'weight'} holds {float(w[row, column])} at [{first_row + row}, {column}], its first element that "
        f"is not finite: block FP8 has no code for it"
    )
