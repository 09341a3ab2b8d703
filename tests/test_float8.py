"""Linear layers in 8-bit floating point against the exact ones, on random shapes and in pictures."""

from collections.abc import Iterator

import numpy as np
import pytest
import small_sdxl as small
import torch
import torch.nn.functional as F
from conftest import SPARK, needs_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite import Pipeline, Request
from fulgurite.cards import card
from fulgurite.kernels import float8
from fulgurite.kernels.float8 import Float8Linear
from fulgurite.kernels.fused import fuse
from fulgurite.models import UNet
from fulgurite.models.layers import VectorLinear
from fulgurite.weights import load_networks

FLOOR = 36.0  # dB, of the worst picture
TOLERANCE = 0.05  # of what random products of such vectors come to; rounding to three bits gives about 0.04
CHANNELS = st.sampled_from((16, 64, 96, 160, 320))
ROWS, TOKENS = st.integers(1, 3), st.integers(1, 20)
quickly = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_layer(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    """Some of its outputs a hundred times larger than others."""
    layer = nn.Linear(inner, outer, bias=bias)
    layer.weight *= 10 ** (2 * torch.rand(outer, 1))
    return layer.bfloat16()


def tokens(*shape: int) -> Tensor:
    """Some of them a thousand times larger than others."""
    return (torch.randn(shape) * 10 ** (3 * torch.rand(*shape[:-1], 1))).bfloat16()


@quickly
@given(ROWS, TOKENS, CHANNELS, CHANNELS, st.booleans(), st.integers(0, 1000))
def test_every_token_and_output_is_near_the_exact_product(rows, length, inner, outer, bias, seed):
    torch.manual_seed(seed)
    layer, x = random_layer(inner, outer, bias), tokens(rows, length, inner)
    found, weight = Float8Linear(layer.weight, layer.bias)(x), layer.weight.float()
    wanted = F.linear(x.float(), weight, layer.bias.float() if bias else None)
    assert (found.shape, found.dtype) == (wanted.shape, torch.bfloat16)
    error = (found.float() - wanted) / (x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=1) / inner**0.5)
    assert error.square().mean().sqrt() <= TOLERANCE
    assert error.square().mean(-1).sqrt().max() <= 3 * TOLERANCE  # each token, of maybe few outputs


@quickly
@given(st.integers(2, 9), CHANNELS, st.integers(0, 1000))
def test_a_row_is_rounded_as_it_is_alone(rows, dim, seed):
    torch.manual_seed(seed)
    x = tokens(rows, dim)
    values, scale = float8.rounded(x)
    alone = [float8.rounded(row) for row in x.split(1)]
    assert torch.equal(values.float(), torch.cat([value for value, _ in alone]).float())
    assert torch.equal(scale, torch.cat([each for _, each in alone]))


def test_what_comes_turned_around_is_rounded_to_rows() -> None:
    """As one picture's channels come, which are its tokens' numbers: a GPU multiplies rows alone."""
    values, _ = float8.rounded(torch.randn(1, 32, 64).transpose(1, 2).flatten(0, -2))
    assert values.stride() == (32, 1)


def test_zeros_are_zeros_and_what_is_no_number_stays_in_its_token() -> None:
    layer = Float8Linear(random_layer(32, 48, bias=False).weight, None)
    x = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    x[0, 1, 5] = torch.nan
    found = layer(x)
    assert not found[0, ::2].any()
    assert found[0, 1].isnan().all()


def test_of_a_network_large_linear_layers_alone_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "LEAST", 64 * 64)
    network = UNet(small.UNET).bfloat16()
    fuse(network)
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    large = {n for n, x in linear.items() if not isinstance(x, VectorLinear) and float8.fits(x.weight)}
    float8.accelerate(network)
    assert {name for name, layer in network.named_modules() if isinstance(layer, Float8Linear)} == large
    left = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert all(isinstance(layer, VectorLinear) or layer.weight.numel() < 64 * 64 for layer in left)
    assert len(large) > 10


@needs_weights
@pytest.mark.parametrize("model", [SPARK, f"{SPARK}-lightning"])
def test_the_embedded_models_pictures_are_near_the_plain_ones(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small layers too, of whole sixteens; decoded alike."""
    monkeypatch.setattr(float8, "LEAST", 0)
    of_model = card(model)
    plain = Pipeline(of_model, load_networks(of_model, 4, "cpu", torch.bfloat16), dtype=torch.bfloat16)
    rounded = Pipeline(of_model, load_networks(of_model, 4, "cpu", torch.bfloat16), dtype=torch.bfloat16)
    fuse(rounded.networks.unet)
    float8.accelerate(rounded.networks.unet)
    for seed, prompt in enumerate(("a red rocket", "a cat on a green background", "pizza")):
        request = Request(prompt, num_steps=4, seed=seed, width=256, height=256)
        one, other = (np.asarray(pipeline.draw(request).image, float) for pipeline in (rounded, plain))
        assert 10 * np.log10(255**2 / np.square(one - other).mean()) >= FLOOR
