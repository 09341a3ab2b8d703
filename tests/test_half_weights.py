"""Large models on a CPU that computes in float32: large layers keep their weights in half precision."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import small_sdxl as small
import torch
from conftest import LIGHTNING, SPARK, needs_weights
from test_cpu_kernels import psnr
from torch import Tensor, nn

from fulgurite import Request, pipeline
from fulgurite.cards import card
from fulgurite.engine import Loader
from fulgurite.engine.loading import held_bytes
from fulgurite.kernels import cpu
from fulgurite.models import UNet
from fulgurite.models.layers import GEGLU, Upsample, VectorLinear
from fulgurite.pipeline import kept_dtype

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN")
REQUESTS = [Request(prompt, num_steps=4, seed=1) for prompt in ("a red rocket", "a cat on a green background")]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be kept in half precision is, on a processor without instructions for bfloat16."""
    monkeypatch.setattr(cpu, "LARGE", 0)
    monkeypatch.setattr(cpu, "MOST_WEIGHTS", 0)
    monkeypatch.setattr(pipeline, "MANY", 0)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(48, 20), (2, 7, 48)),
    (nn.Linear(48, 20, bias=False), (3, 48)),
    (GEGLU(32, 40), (2, 5, 32)),
    (VectorLinear(16, 30), (3, 16)),
    (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (1, 6, 9, 8)),
    (nn.Conv2d(6, 8, 1), (1, 6, 5, 5)),
    (Upsample(6), (2, 6, 5, 4)),
    (nn.LayerNorm(32), (2, 32)),
    (nn.GroupNorm(2, 6), (2, 6, 4, 4)),
]


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_a_layer_computes_in_float32(
    layer: nn.Module, shape: tuple[int, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its weights as they are in half precision; made so again, as a shared network is, it stays as it is."""
    if large:
        monkeypatch.setattr(cpu, "LARGE", 0)
        monkeypatch.setattr(cpu, "MOST_WEIGHTS", 0)
    torch.manual_seed(0)
    network = nn.Sequential(small.roughened(deepcopy(layer))).requires_grad_(False).half()
    plain, x = deepcopy(network).float(), torch.randn(shape)
    for _ in range(2):
        cpu.accelerate(network)
        torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-5)
    kept = [value for part in network.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    may_stay = isinstance(layer, nn.Linear | nn.Conv2d | GEGLU | Upsample) and not isinstance(layer, VectorLinear)
    assert any(value.dtype == torch.float16 for value in kept) == (large and may_stay)
    assert {own.dtype for own in network.parameters()} <= {torch.float32}


def test_an_enlarged_picture_may_have_an_odd_side(all_large: None) -> None:
    network = nn.ModuleList([small.roughened(Upsample(6))]).requires_grad_(False).half()
    plain, x = deepcopy(network).float(), torch.randn(1, 6, 4, 5)
    cpu.accelerate(network)
    size = torch.Size((7, 10))
    torch.testing.assert_close(network[0](x, size), plain[0](x, size), rtol=1e-5, atol=1e-5)


def test_a_network_takes_half_the_memory(all_large: None) -> None:
    halves, whole = (UNet(small.UNET).requires_grad_(False).to(dtype) for dtype in (torch.float16, torch.float32))
    cpu.accelerate(halves)
    assert held_bytes(halves) < 0.6 * held_bytes(whole)


def test_which_models_are_kept_so(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small_one = card(LIGHTNING), card(SPARK)
    assert kept_dtype(large, "cpu", torch.float32) == torch.float16
    assert kept_dtype(small_one, "cpu", torch.float32) == torch.float32
    for device, dtype in (("cpu", torch.bfloat16), ("mps", torch.float32), ("cuda", torch.float16)):
        assert kept_dtype(large, device, dtype) == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert kept_dtype(large, "cpu", torch.float32) == torch.float32


@needs_weights
def test_pictures_are_those_of_float32(all_large: None) -> None:
    """Of a checkpoint, and of another that shares its text encoders and decoder; unless float32 is asked for."""
    halves, whole = Loader("cpu"), Loader("cpu", precision="float32")
    for steps in (4, 1):
        drawn = halves(f"{SPARK}-lightning", steps), whole(f"{SPARK}-lightning", steps)
        kinds = [{type(layer) for layer in each.networks.unet.modules()} for each in drawn]
        assert cpu.HalfLinear in kinds[0]
        assert cpu.HalfConv2d in kinds[0]
        assert not kinds[1] & {cpu.HalfLinear, cpu.HalfConv2d}
        for request in REQUESTS:
            pictures = [np.array(each.draw(request).image) for each in drawn]
            assert psnr(*pictures) > 50
            again = np.array(drawn[0].draw(request).image)
            assert np.array_equal(again, pictures[0])
    assert halves.precision == whole.precision == "float32"
