"""The bytes in which two states of a bucket differ: what sync.delta sends in a bucket's place (sync/delta.py).

    encoded   int32 [chunks]  how many bytes change in each chunk of 65,536 bytes of the bucket
              int16 [n]       where in its chunk each of them is, less 32,768
              uint8 [n]       what it is now

Three bytes a changed byte. Bytes, not tensors: a code is one byte, a scale four, a BF16 weight two of which mostly the
lower one changes. Below 6% of changed bytes it is smaller than a bitmap of the bucket and the new bytes. Gaps of one
byte would be a third smaller at 3% and larger below 0.3% (tools/bench/bench_delta.py compares them), and none of them
can be read without all before it. Ops of torch alone, the same on CPUs and GPUs.
"""

from __future__ import annotations

import torch

CHUNK = 2**16
HALF = CHUNK // 2
WORD = 8
WINDOW = 2**22
"""Words of a bucket that are compared, and changed bytes that are put into place, at a time: bounds what is allocated
meanwhile to some 64 MB."""


def encoded_bytes(whole: int, changed: int) -> int:
    """Length of what `encode` makes where `changed` bytes of `whole` differ; a multiple of four."""
    return -(-(4 * _chunks(whole) + 3 * changed) // 4) * 4


def positions(old: torch.Tensor, new: torch.Tensor, most: int) -> torch.Tensor | None:
    """Where two uint8 [n] of one length differ: int64 [changed], ascending; None if that is at more than `most`.

    Both begin at an address that is a multiple of eight: most words are equal, and only the others are looked into."""
    assert old.shape == new.shape and old.dtype == new.dtype == torch.uint8, (old.shape, new.shape)
    end = old.numel() // WORD * WORD
    words_old, words_new = old[:end].view(torch.int64), new[:end].view(torch.int64)
    found, left = [], most
    for begin in range(0, words_old.numel(), WINDOW):
        window = slice(begin, begin + WINDOW)
        words = (words_old[window] != words_new[window]).nonzero().flatten() + begin
        if words.numel() > left:
            return None
        inside = (_bytes(words_old, words) != _bytes(words_new, words)).nonzero()
        found.append(words[inside[:, 0]] * WORD + inside[:, 1])
        left -= found[-1].numel()
        if left < 0:
            return None
    tail = (old[end:] != new[end:]).nonzero().flatten() + end
    return None if tail.numel() > left else torch.cat([*found, tail])


def encode(at: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """uint8 [encoded_bytes]: the bytes of `new` (uint8 [n]) at the positions `at` (int64, ascending)."""
    chunks, changed = _chunks(new.numel()), at.numel()
    out = torch.zeros(encoded_bytes(new.numel(), changed), dtype=torch.uint8, device=new.device)
    counts, where, values = _parts(out, chunks, changed)
    ends = torch.searchsorted(at, torch.arange(1, chunks + 1, device=at.device) * CHUNK)
    counts.copy_(ends.diff(prepend=ends.new_zeros(1)))
    where.copy_((at % CHUNK) - HALF)
    torch.index_select(new, 0, at, out=values)
    return out


def apply(encoded: torch.Tensor, changed: int, target: torch.Tensor) -> None:
    """Put the bytes of an `encode` of `changed` bytes into `target`, uint8 [n] as it was before. Raises ValueError for
    a length that cannot be."""
    if encoded.numel() != encoded_bytes(target.numel(), changed):
        raise ValueError(
            f"a delta of {changed} changed bytes of {target.numel()} has {encoded_bytes(target.numel(), changed)} "
            f"bytes, not {encoded.numel()}"
        )
    counts, where, values = _parts(encoded, _chunks(target.numel()), changed)
    ends = counts.cumsum(0)
    for begin in range(0, changed, WINDOW):
        some = slice(begin, min(begin + WINDOW, changed))
        chunk = torch.searchsorted(ends, torch.arange(some.start, some.stop, device=ends.device), right=True)
        target.index_copy_(0, chunk * CHUNK + HALF + where[some], values[some])


def checksum(encoded: torch.Tensor) -> int:
    """Of what `encode` made: the sum of its int32 words, each times its number, modulo 2^64. Any one word that is not
    what it was changes it; the same on CPUs and GPUs, since integers are summed."""
    words = encoded.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=encoded.device)
    for begin in range(0, words.numel(), WINDOW):
        some = words[begin : begin + WINDOW].to(torch.int64)
        total += (some * torch.arange(begin + 1, begin + 1 + some.numel(), device=encoded.device)).sum()
    return int(total)


def _chunks(whole: int) -> int:
    return -(-whole // CHUNK)


def _bytes(words: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """uint8 [len(at), 8]: the bytes of these words."""
    return words[at].view(torch.uint8).view(-1, WORD)


def _parts(encoded: torch.Tensor, chunks: int, changed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = 4 * chunks, 4 * chunks + 2 * changed
    return encoded[:a].view(torch.int32), encoded[a:b].view(torch.int16), encoded[b : b + changed]
