"""Linear layers in 8 bits against the exact ones, on random shapes; the same bits alone and in a batch."""

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
from fulgurite.models.layers import GEGLU
from fulgurite.models.unet import SpatialTransformer

pytestmark = needs_vnni

TOLERANCE = 0.02  # of what random products of such vectors come to; rounding to 8 bits gives about 0.01
DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
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
    wanted = int8.Int8Linear(value, value_bias)(x) * F.gelu(int8.Int8Linear(gate, gate_bias)(x))
    assert torch.equal(int8.Int8GEGLU(layer)(x), wanted)


@quickly
@given(DTYPES, st.integers(2, 9), TOKENS, CHANNELS, CHANNELS, st.integers(0, 1000))
def test_the_same_bits_alone_and_in_a_batch(dtype, rows, length, inner, outer, seed):
    torch.manual_seed(seed)
    plain, x = random_linear(inner, outer, True, dtype), tokens(rows, length, inner, dtype)
    layer = int8.Int8Linear(plain.weight, plain.bias)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([layer(token) for token in x.split(1, dim=1)], dim=1))


def test_zeros_come_to_the_bias_and_what_is_no_number_stays_in_its_token():
    layer = nn.Linear(64, 96)
    x = torch.randn(1, 4, 64)
    x[0, 1], x[0, 2, 5], x[0, 3, 5] = 0, torch.nan, torch.inf
    found = int8.Int8Linear(layer.weight, layer.bias)(x)
    assert torch.equal(found[0, 1], layer.bias)
    assert not found[0, 2].isfinite().any()
    assert not found[0, 3].isfinite().any()
    assert torch.equal(found[:, :1], int8.Int8Linear(layer.weight, layer.bias)(x[:, :1]))


def test_which_layers_of_a_network_are_replaced(monkeypatch):
    """Those of the transformers that are large, but for what takes the prompt; the rest of the network is as it was."""
    unet = UNet(small.UNET)
    plain = copy.deepcopy(unet)
    int8.accelerate(unet)
    assert not any(isinstance(layer, int8.Int8Linear) for layer in unet.modules())  # all of them are small

    monkeypatch.setattr(int8, "LEAST", 0)
    int8.accelerate(unet)
    within = [layer for part in unet.modules() if isinstance(part, SpatialTransformer) for layer in part.modules()]
    left = {layer for layer in within if isinstance(layer, nn.Linear | GEGLU)}
    assert left
    assert {layer.in_features for layer in left} == {small.UNET.cross_attention_dim}
    outside = [name for name, layer in plain.named_modules() if type(layer) is nn.Linear and "attentions" not in name]
    assert all(type(unet.get_submodule(name)) is nn.Linear for name in outside)

    inputs = torch.randn(2, 4, 9, 14), torch.tensor([999, 3]), torch.randn(2, 77, 80), torch.randn(2, 48)
    wanted = plain(*inputs, torch.full((2, 6), 512.0))
    cpu.accelerate(unet)  # takes what is left
    found = unet(*inputs, torch.full((2, 6), 512.0))
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()
