"""Many matrices quantized by one launch: the bytes of each alone, wherever it lies."""

from __future__ import annotations

import pytest
import torch

from fp8slurm.fp8.block import E4M3, BlockFP8, scale_shape
from fp8slurm.fp8.quantize import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def room(n: int, k: int) -> BlockFP8:
    data = torch.full((n, k), 7.0, dtype=torch.float32, device="cuda").to(E4M3)
    return BlockFP8(data, torch.full(scale_shape((n, k)), -1.0, device="cuda"))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_group_has_the_bytes_of_its_matrices(power_of_two: bool) -> None:
    from fp8slurm.fp8.triton_quantize import GroupedLaunch, fits_group

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        size = torch.rand(shape, generator=generator, device="cuda") * 8 - 4
        return (torch.randn(shape, generator=generator, device="cuda") * size.exp()).to(dtype)

    fused = draw(4, 384 + 256, 640)  # query groups: 384 rows of q, 128 of k, 128 of v
    wide = torch.zeros(256, 1024, dtype=torch.uint8, device="cuda")
    payload = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    odd = BlockFP8(payload[5 : 5 + 256 * 384].view(E4M3).view(256, 384), torch.zeros(2, 3, device="cuda"))
    cases = [
        (draw(512, 384), room(512, 384)), (draw(200, 130), room(200, 130)), (draw(1, 1), room(1, 1)),
        (fused[:, :384], room(1536, 640)), (fused[:, 384:512], room(512, 640)), (fused[:, 512:], room(512, 640)),
        (draw(256, 1024)[:, 256:640], room(256, 384)), (draw(128, 256, dtype=torch.float32), room(128, 256)),
        (draw(300, 256, dtype=torch.float16), room(300, 256)), (torch.zeros(128, 128, device="cuda").bfloat16(), room(128, 128)),
        (draw(256, 384), BlockFP8(wide.view(E4M3)[:, 512:896], torch.zeros(2, 3, device="cuda"))), (draw(256, 384), odd),
    ]  # fmt: skip
    assert all(fits_group(source, out.data) for source, out in cases)
    group = GroupedLaunch(cases, power_of_two)
    for _ in range(2):
        group.launch()
        assert group.first_bad() is None
        for number, (source, out) in enumerate(cases):
            alone = quantize(source.reshape(out.data.shape).contiguous(), power_of_two=power_of_two)
            assert torch.equal(out.data.contiguous().view(torch.uint8), alone.data.view(torch.uint8)), number
            assert torch.equal(out.scale_inv, alone.scale_inv), number
            source.mul_(1.7)
    assert wide[:, :512].count_nonzero() == wide[:, 896:].count_nonzero() == 0, "written beside the matrix"
    assert payload[:5].count_nonzero() == payload[5 + 256 * 384 :].count_nonzero() == 0
    cases[6][0][3, 7] = float("inf")
    group.launch()
    assert group.first_bad() == 6
    cases[6][0][3, 7] = 1.0
    group.launch()
    assert group.first_bad() is None


def test_what_a_group_does_not_take() -> None:
    from fp8slurm.fp8.triton_quantize import GroupedLaunch, fits_group

    parts = torch.zeros(2, 64, 128, dtype=torch.bfloat16, device="cuda")  # heads of 64: a tile would be of two parts
    assert not fits_group(parts, room(128, 128).data)
    assert not fits_group(torch.zeros(128, 128, device="cuda").t(), room(128, 128).data)
    with pytest.raises(ValueError, match="multiples of 128"):
        GroupedLaunch([(parts, room(128, 128))])
