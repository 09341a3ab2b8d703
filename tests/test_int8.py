"""Layers in 8 bits against the exact ones, on random shapes; the same bits alone and in a batch."""

import copy
from collections.abc import Iterator

import pytest
import small_sdxl as small
import torch
import torch.nn.functional as F
from conftest import needs_vnni
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite.kernels import cpu, int8
from fulgurite.models import UNet
from fulgurite.models.layers import GEGLU, Upsample, VectorLinear

pytestmark = needs_vnni

TOLERANCE = 0.02  # of what random products of such vectors come to; rounding to 8 bits gives about 0.01
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
SIDES = st.integers(3, 12)
ROWS, TOKENS, CHANNELS = st.integers(1, 3), st.integers(1, 20), st.sampled_from((64, 96, 160, 320))
quickly = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tokens(rows: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Some of them a thousand times larger than others."""
    return (torch.randn(rows, length, dim) * 10 ** (3 * torch.rand(rows, length, 1))).to(dtype)


def random_linear(inner: int, outer: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """Some of its channels a hundred times larger than others."""
    layer = nn.Linear(inner, outer, bias=bias)
    layer.weight *= 10 ** (2 * torch.rand(outer, 1))
    return layer.to(dtype)


@quickly
@given(DTYPES, ROWS, TOKENS, CHANNELS, CHANNELS, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_every_token_and_channel_is_near_the_exact_product(dtype, rows, length, inner, outer, bias, across, seed):
    torch.manual_seed(seed)
    layer, x = random_linear(inner, outer, bias, dtype), tokens(rows, length, inner, dtype)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if across else x  # as channels-last pictures come
    found, weight = int8.Int8Linear(layer.weight, layer.bias)(x), layer.weight.float()
    wanted = F.linear(x.float(), weight, layer.bias.float() if bias else None)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    error = (found.float() - wanted) / (x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=1) / inner**0.5)
    assert error.square().mean(-1).sqrt().max() <= TOLERANCE  # each token over its channels
    assert error.square().mean((0, 1)).sqrt().max() <= 3 * TOLERANCE  # each channel, of maybe a single token


@quickly
@given(DTYPES, ROWS, TOKENS, CHANNELS, CHANNELS, st.integers(0, 1000))
def test_gated_layers_are_their_two_halves(dtype, rows, length, dim, inner, seed):
    torch.manual_seed(seed)
    layer, x = GEGLU(dim, inner).to(dtype), tokens(rows, length, dim, dtype)
    (value, gate), (value_bias, gate_bias) = layer.proj.weight.chunk(2), layer.proj.bias.chunk(2)
    value, gate = int8.Int8Linear(value, value_bias)(x), int8.Int8Linear(gate, gate_bias)(x)
    found, wanted = int8.Int8GEGLU(layer)(x), value * F.gelu(gate)
    if dtype == torch.float32:
        assert torch.equal(found, wanted)
    else:  # where there are kernels in C, rounded to half precision once instead of four times
        most = value.double().abs() * gate.double().abs() * 2**-6
        assert ((found - wanted).abs() <= most + 1e-6).all()


@quickly
@given(DTYPES, st.integers(2, 9), TOKENS, CHANNELS, CHANNELS, st.integers(0, 1000))
def test_the_same_bits_alone_and_in_a_batch(dtype, rows, length, inner, outer, seed):
    torch.manual_seed(seed)
    plain, x = random_linear(inner, outer, True, dtype), tokens(rows, length, inner, dtype)
    layer = int8.Int8Linear(plain.weight, plain.bias)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([layer(token) for token in x.split(1, dim=1)], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_come_to_the_bias_and_what_is_no_number_stays_in_its_token(dtype):
    layer = nn.Linear(64, 96).to(dtype)
    x = torch.randn(1, 4, 64).to(dtype)
    x[0, 1], x[0, 2, 5], x[0, 3, 5] = 0, torch.nan, torch.inf
    found = int8.Int8Linear(layer.weight, layer.bias)(x)
    assert torch.equal(found[0, 1], layer.bias)
    assert not found[0, 2].isfinite().any()
    assert not found[0, 3].isfinite().any()
    assert torch.equal(found[:, :1], int8.Int8Linear(layer.weight, layer.bias)(x[:, :1]))


def pictures(rows: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """As SiLU leaves them, some a thousand times larger than others; channels last."""
    x = F.silu(torch.randn(rows, channels, height, width)) * 10 ** (3 * torch.rand(rows, 1, 1, 1))
    return x.to(dtype, memory_format=torch.channels_last)


def random_conv(inner: int, outer: int, stride: int, bias: bool, dtype: torch.dtype) -> nn.Conv2d:
    """Some of its channels a hundred times larger than others."""
    layer = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=bias)
    layer.weight *= 10 ** (2 * torch.rand(outer, 1, 1, 1))
    return layer.to(dtype)


def int8_conv(plain: nn.Conv2d) -> int8.Int8Conv2d:
    return int8.Int8Conv2d(plain.weight, plain.bias, plain.stride)


@quickly
@given(DTYPES, st.sampled_from((8, 32, 96)), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_every_number_of_a_picture_is_within_a_step(dtype, channels, middle, spread, seed):
    """Wherever they lie: one that left its 8 bits would come back at their other end."""
    torch.manual_seed(seed)
    x = (middle + spread * torch.randn(1, channels, 9, 7)).to(dtype, memory_format=torch.channels_last)
    picture = int8.Picture(x)
    found = (picture.values.float() - picture.zero) * picture.scale
    assert picture.values.dtype == torch.uint8
    assert (found - F.pad(x.float(), [1, 1, 1, 1])).abs().max() <= 0.8 * picture.scale  # half, and bfloat16's own
    assert picture.scale <= 1.01 * (max(x.max(), 0) - min(x.min(), 0)) / int8.STEPS


@quickly
@given(DTYPES, ROWS, SIDES, SIDES, CHANNELS, CHANNELS, st.sampled_from((1, 2)), st.booleans(), st.integers(0, 1000))
def test_every_picture_and_channel_is_near_the_exact_convolution(
    dtype, rows, height, width, inner, outer, stride, bias, seed
):
    torch.manual_seed(seed)
    layer, x = random_conv(inner, outer, stride, bias, dtype), pictures(rows, inner, height, width, dtype)
    found, exact = int8_conv(layer)(x), layer.float()
    wanted = exact(x.float())
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    size = x.float().square().mean((1, 2, 3)).sqrt()[:, None] * exact.weight.flatten(1).norm(dim=1)  # of a product
    error = (found.float() - wanted).square().mean((2, 3)).sqrt() / size
    assert error.max() <= 2 * TOLERANCE


@quickly
@given(DTYPES, ROWS, SIDES, SIDES, CHANNELS, st.sampled_from((0, 1)), st.sampled_from((0, 1)), st.integers(0, 1000))
def test_upsampling_is_near_the_exact_one_also_to_odd_sizes(dtype, rows, height, width, channels, less, narrower, seed):
    torch.manual_seed(seed)
    layer, x = Upsample(channels).to(dtype), pictures(rows, channels, height, width, dtype)
    size = torch.Size((2 * height - less, 2 * width - narrower))
    found, wanted = int8.Int8Upsample(layer)(x, size), layer.float()(x.float(), size)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    assert (found.float() - wanted).norm() <= TOLERANCE * wanted.norm()


@quickly
@given(DTYPES, st.integers(2, 5), SIDES, SIDES, CHANNELS, CHANNELS, st.integers(0, 1000))
def test_convolutions_have_the_same_bits_alone_and_in_a_batch(dtype, rows, height, width, inner, outer, seed):
    torch.manual_seed(seed)
    x = pictures(rows, inner, height, width, dtype)
    for layer in (int8_conv(random_conv(inner, outer, 1, True, dtype)), int8.Int8Upsample(Upsample(inner).to(dtype))):
        assert torch.equal(layer(x), torch.cat([layer(picture) for picture in x.split(1)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_of_zeros_comes_to_the_bias_and_what_is_no_number_stays_in_its_picture(dtype):
    plain = nn.Conv2d(64, 96, 3, padding=1).to(dtype)
    layer = int8_conv(plain)
    x = pictures(4, 64, 6, 5, dtype)
    x[1], x[2, 3, 2, 2], x[3, 3, 2, 2] = 0, torch.nan, torch.inf
    found = layer(x)
    assert torch.equal(found[1], plain.bias[:, None, None].expand(96, 6, 5))
    assert not found[2, :, 2, 2].isfinite().any()
    assert not found[3, :, 2, 2].isfinite().any()
    assert torch.equal(found[:1], layer(x[:1]))


def test_which_layers_of_a_network_are_replaced(monkeypatch):
    """Large linear layers, and large convolutions that see around them; what a vector a row goes through is left."""
    unet = UNet(small.UNET)
    plain = copy.deepcopy(unet)
    int8.accelerate(unet)
    assert {type(layer) for layer in unet.modules()} == {type(layer) for layer in plain.modules()}  # all are small

    monkeypatch.setattr(int8, "LEAST_LINEAR", 0)
    int8.accelerate(linear := copy.deepcopy(plain))
    monkeypatch.setattr(int8, "LEAST_CONV", 0)
    int8.accelerate(unet)
    left = {layer for layer in unet.modules() if isinstance(layer, nn.Linear | nn.Conv2d | GEGLU | Upsample)}
    assert {type(layer) for layer in left} == {VectorLinear, nn.Conv2d}
    assert {layer.kernel_size for layer in left if isinstance(layer, nn.Conv2d)} == {(1, 1)}

    inputs = torch.randn(2, 4, 9, 14), torch.tensor([999, 3]), torch.randn(2, 77, 80), torch.randn(2, 48)
    wanted = plain(*inputs, torch.full((2, 6), 512.0))
    for network, within in ((linear, TOLERANCE), (unet, 2 * TOLERANCE)):  # linear layers alone; convolutions too
        cpu.accelerate(network)  # takes what is left
        found = network(*inputs, torch.full((2, 6), 512.0))
        assert (found - wanted).norm() <= within * wanted.norm()
