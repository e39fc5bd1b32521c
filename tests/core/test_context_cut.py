"""The cut of context parallelism, against TransformerEngine's rule written out."""

from __future__ import annotations

import pytest
import torch

from fp8slurm.core.context_cut import ContextCut, own_positions


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 6, 128])
def test_every_token_is_on_one_rank_and_comes_back_to_its_place(size: int, multiple: int) -> None:
    """Sequences shorter than one chunk, of whole chunks, and with a rest; one is empty."""
    lengths = [1, 7, 2 * size, 0, 64, 2, 5 * size]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    pack = 100 + torch.arange(int(ends[-1]))
    cuts = [ContextCut.of(ends, rank, size, multiple) for rank in range(size)]
    assert {len(c.source) for c in cuts} == {len(cuts[0].source)} and len(cuts[0].source) % multiple == 0
    assert torch.equal(torch.cat([pack[c.source] for c in cuts])[cuts[0].gathered], pack)
    padded = cuts[0].cu_seqlens.tolist()
    assert all(torch.equal(c.gathered, cuts[0].gathered) and c.cu_seqlens.tolist() == padded for c in cuts)
    assert padded[-1] == size * len(cuts[0].source) and padded[-1] - sum(lengths) < 2 * size * (len(lengths) + multiple)
    for rank, cut in enumerate(cuts):
        tokens, positions = [], []
        for number, (start, end) in enumerate(zip(padded, padded[1:])):
            first, n = (int(ends[number]), lengths[number]) if number < len(lengths) else (int(ends[-1]), 0)
            chunk = (end - start) // (2 * size)
            assert chunk * 2 * size == end - start
            for piece in (rank, 2 * size - 1 - rank):
                for p in range(piece * chunk, (piece + 1) * chunk):
                    positions.append(p)
                    tokens.append(int(pack[first + min(p, n - 1)]))
        assert pack[cut.source].tolist() == tokens and cut.position_ids.tolist() == positions
        assert torch.equal(
            own_positions(cut.cu_seqlens, rank, size) - cut.cu_seqlens[:-1].repeat_interleave(
                (cut.cu_seqlens[1:] - cut.cu_seqlens[:-1]) // size
            ),
            cut.position_ids,
        )  # fmt: skip
