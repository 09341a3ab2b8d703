"""The Triton kernels against the plain torch that they equal, in Triton's interpreter (conftest.py asks for it)."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fulgurite.models.layers import GroupNormSiLU

pytest.importorskip("triton", reason="it is only made for Linux")

from fulgurite.kernels import cuda
from fulgurite.kernels.cuda import FUSED, PIXELS, accelerate, geglu, group_norm_silu

# Against float64: the rounding of sums in float32; in half precision that of the output beside it: half a unit in the
# last place of float16, and a whole one of bfloat16, which Triton's interpreter cuts off where a GPU rounds.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 1e-3, "rtol": 2**-7},
    torch.float16: {"atol": 1e-4, "rtol": 2**-11 + 2e-4},
}
DTYPES = st.sampled_from(list(TOLERANCE))
# exp may become infinite, which SiLU makes 0 of; only numpy, which the interpreter computes with, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
# The interpreter takes its time, above all at the first example.
quickly = settings(max_examples=20, deadline=None)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, lost: float = 0.0) -> None:
    """``lost``: what float32 loses before the output is rounded."""
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, atol=tolerance["atol"] + lost, rtol=tolerance["rtol"])


def lost_beside_the_mean(x: Tensor, layer: GroupNormSiLU) -> float:
    """A mean in float32 is off by its rounding, which the norm divides by the deviation: at most, over all groups."""
    deviation = x.double().view(len(x), layer.num_groups, -1).var(-1, correction=0).add(layer.eps).sqrt()
    return float(2**-23 * x.abs().max() / deviation.min() * layer.weight.abs().max())


def plain_norm(x: Tensor, layer: GroupNormSiLU) -> Tensor:
    """The plain lines in float64, on the same rounded numbers."""
    exact = GroupNormSiLU(layer.num_groups, layer.num_channels, layer.eps).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    with torch.inference_mode():
        return exact(x.double())


def norm_layer(groups: int, channels: int, dtype: torch.dtype) -> GroupNormSiLU:
    layer = GroupNormSiLU(groups, channels, eps=1e-5)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


@quickly
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 8]),
    in_group=st.sampled_from([1, 2, 3, 5]),
    height=st.integers(2, 40),  # one value has no deviation: plain torch refuses it
    width=st.integers(1, 40),
    channels_last=st.booleans(),
    dtype=DTYPES,
    mean=st.sampled_from([0.0, 3.0, -100.0]),
)
def test_group_norm_silu_is_the_plain_one(batch, groups, in_group, height, width, channels_last, dtype, mean):
    torch.manual_seed(0)
    x = (torch.randn(batch, groups * in_group, height, width) + mean).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer = norm_layer(groups, groups * in_group, dtype)
    found = group_norm_silu(x, groups, layer.weight, layer.bias, layer.eps)
    assert found.stride() == x.stride()
    close(found, plain_norm(x, layer), dtype, lost_beside_the_mean(x.contiguous(), layer))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_channel_that_several_programs_sum(channels_last):
    torch.manual_seed(1)
    x = torch.randn(2, 8, 67, 2 * PIXELS // 67 + 5) + 1000  # a mean far above the deviation
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer = norm_layer(4, 8, torch.float32)
    found = group_norm_silu(x, 4, layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(found.double(), plain_norm(x, layer), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rows_bits_do_not_depend_on_its_batch(channels_last):
    torch.manual_seed(2)
    x = torch.randn(3, 12, 9, 31)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer = norm_layer(4, 12, torch.float32)
    together = group_norm_silu(x, 4, layer.weight, layer.bias, layer.eps)
    for i in range(3):
        alone = group_norm_silu(x[i : i + 1].clone(), 4, layer.weight, layer.bias, layer.eps)
        assert torch.equal(alone[0], together[i])


def test_a_view_that_is_neither_contiguous_nor_channels_last():
    x = torch.randn(2, 8, 12, 10)[:, :, ::2, 1:]
    layer = norm_layer(2, 8, torch.float32)
    found = group_norm_silu(x, 2, layer.weight, layer.bias, layer.eps)
    close(found, plain_norm(x, layer), torch.float32)


@quickly
@given(
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    inner=st.integers(1, 2500),
    dtype=DTYPES,
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_geglu_is_the_plain_one(rows, inner, dtype, scale):
    torch.manual_seed(0)
    both = (torch.randn(*rows, 2 * inner) * scale).to(dtype)
    value, gate = both.double().chunk(2, dim=-1)
    wanted = value * torch.nn.functional.gelu(gate)
    close(geglu(both), wanted, dtype)


def test_the_largest_pictures_fit_the_grid(monkeypatch):
    """Of a launch's three axes CUDA gives the second and the third 65,535 places."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **sizes: None

    for name in ("_sums_kernel", "_norm_silu_kernel"):
        monkeypatch.setattr(cuda, name, Kernel())
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(16, 512, 2048, 2048, device="meta", dtype=torch.float16).to(memory_format=form)
        cuda.group_norm_silu(x, 32, x, x, 1e-6)
    assert len(grids) == 4
    assert all(max(y, z) <= 65_535 for _, y, z in grids)
    assert max(x for x, _, _ in grids) == 2048 * 2048 // 64


def test_geglu_of_nothing():
    assert geglu(torch.empty(0, 8)).shape == (0, 4)


@torch.inference_mode()
def test_networks_give_the_same_on_the_kernels(tiny):
    unet, vae = deepcopy(tiny.networks.unet), deepcopy(tiny.networks.vae)
    torch.manual_seed(3)
    x, context, pooled = torch.randn(1, 4, 4, 6), torch.randn(1, 5, 32), torch.randn(1, 16)
    inputs = x, torch.tensor([999]), context, pooled, torch.full((1, 6), 64.0)
    wanted = unet(*inputs), vae.decode(x)
    accelerate(unet)
    accelerate(vae)
    kinds = {type(layer) for network in (unet, vae) for layer in network.modules()}
    assert set(FUSED.values()) <= kinds
    assert not set(FUSED) & kinds
    torch.testing.assert_close(unet(*inputs), wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(x), wanted[1], atol=1e-4, rtol=1e-4)
