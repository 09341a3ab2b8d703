"""Linear layers in 8-bit floating point against the exact ones, on random shapes and in pictures."""

from collections.abc import Iterator

import numpy as np
import pytest
import small_sdxl as small
import torch
import torch.nn.functional as F
from conftest import SPARK, needs_bfloat16, needs_weights
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


def found_and_wanted(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in 8 bits and exactly, and how far it is off beside what random products of such vectors come to."""
    found, weight = Float8Linear(layer.weight, layer.bias)(x), layer.weight.float()
    wanted = F.linear(x.float(), weight, None if layer.bias is None else layer.bias.float())
    off = (found.float() - wanted) / (x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=1) / x.shape[-1] ** 0.5)
    return found, wanted, off


def size_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows' numbers: their sizes, and the most that rounding each to three bits behind the first takes or adds.

    Below the least normal number, 2**-6 of a scale's 448, it is half of the least there is.
    """
    size, scale = rows.float().abs(), float8.rounded(rows)[1]
    return size, size / 16 + scale * 2**-10


@quickly
@given(ROWS, TOKENS, CHANNELS, CHANNELS, st.booleans(), st.integers(0, 1000))
def test_every_token_and_output_is_near_the_exact_product(rows, length, inner, outer, bias, seed):
    torch.manual_seed(seed)
    layer, x = random_layer(inner, outer, bias), tokens(rows, length, inner)
    found, wanted, off = found_and_wanted(layer, x)
    assert (found.shape, found.dtype) == (wanted.shape, torch.bfloat16)
    assert off.square().mean(-1).sqrt().max() <= 3 * TOLERANCE  # each token, of maybe few outputs
    (x_size, x_error), (w_size, w_error) = size_and_error(x.flatten(0, 1)), size_and_error(layer.weight)
    most = F.linear(x_error, w_size) + F.linear(x_size, w_error) + F.linear(x_error, w_error)
    most = most.view_as(wanted)
    assert ((found.float() - wanted).abs() <= most + 2**-8 * (wanted.abs() + most)).all()  # and rounding to bfloat16


@pytest.mark.parametrize("seed", range(20))
def test_what_is_off_is_what_rounding_to_three_bits_takes(seed: int) -> None:
    """Over enough products for a mean."""
    torch.manual_seed(seed)
    _, _, off = found_and_wanted(random_layer(320, 320), tokens(2, 5, 320))
    assert TOLERANCE / 2 <= off.square().mean().sqrt() <= TOLERANCE


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


@needs_bfloat16  # else it takes minutes
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
