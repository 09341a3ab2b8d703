"""The kernels in C against torch's own functions in double precision, on random shapes, and what does without them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite.kernels import compiled, cpu
from fulgurite.models.layers import GroupNormSiLU

needs_library = pytest.mark.skipif(compiled.library() is None, reason="the package was installed without a C compiler")
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from((3, 8, 12, 32, 96, 160, 320, 640)), *[st.integers(1, 40)] * 2)


def groups_of(channels: int) -> int:
    return next(groups for groups in (32, 8, 4, 3) if channels % groups == 0)


def pictures(shape: tuple[int, ...], mean: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + mean).bfloat16()
    return x.contiguous(memory_format=torch.channels_last)


def normed(x: Tensor, silu: bool = True) -> Tensor:
    weight, bias = torch.linspace(0.5, 1.5, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    return compiled.group_norm(x, groups_of(x.shape[1]), weight, bias, 1e-5, silu)


def wanted(x: Tensor, silu: bool = True) -> Tensor:
    weight, bias = torch.linspace(0.5, 1.5, x.shape[1]), torch.linspace(-1, 1, x.shape[1])
    y = torch.group_norm(x.double(), groups_of(x.shape[1]), weight.double(), bias.double(), 1e-5)
    return F.silu(y) if silu else y


@needs_library
@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from((0.0, 1.0, 100.0)), st.booleans())
def test_a_norm_is_exact_but_for_one_rounding(shape, mean, silu):
    """Half of bfloat16's last place, and of float32's where a mean is far larger than the spread."""
    x = pictures(shape, mean)
    found, exact = normed(x, silu), wanted(x, silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == torch.bfloat16
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-4 + 1e-5 * mean).all()


@needs_library
def test_silu_over_the_whole_range_of_numbers():
    """At a norm's size there are none this large, but what overflows in between must not come out as something."""
    x = torch.tensor([-1e4, -500.0, -89.0, -20.0, -7.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 7.0, 20, 89, 500, 1e4, 3e38])
    # Of zeros nothing is left but the bias.
    zeros = torch.zeros(1, 16, 1, 1, dtype=torch.bfloat16)
    found, exact = compiled.group_norm(zeros, 16, torch.ones(16), x, 1e-5, True).flatten(), F.silu(x.double())
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-33).all()


@needs_library
@settings(max_examples=30, deadline=None)
@given(SHAPES, st.booleans())
def test_a_rows_bits_depend_neither_on_the_rows_beside_it_nor_on_threads(shape, silu):
    x, threads = pictures(shape), torch.get_num_threads()
    together = normed(x, silu)
    assert all(torch.equal(normed(x[i : i + 1], silu), together[i : i + 1]) for i in range(len(x)))
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(normed(x, silu), together)
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_any_order_in_memory_will_do_and_the_input_stays():
    x = pictures((2, 32, 12, 10))
    planes, cut = x.contiguous(), F.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]
    before = x.clone()
    assert all(torch.equal(normed(other), normed(x)) for other in (planes, cut))
    assert torch.equal(x, before)


@needs_library
def test_what_is_no_number_stays_none_in_its_group_alone():
    x = pictures((2, 32, 5, 5))
    x[1, 0, 2, 3] = torch.nan
    found = normed(x).isnan()
    assert found[1, 0].all()
    assert found.sum() == 25


@pytest.mark.parametrize("layer", [nn.GroupNorm(4, 12), GroupNormSiLU(4, 12)], ids=["plain", "silu"])
def test_without_a_compiler_norms_are_torchs(layer, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    network = nn.Sequential(layer).bfloat16()
    cpu.accelerate(network)
    assert type(network[0]) in (cpu.QuickGroupNorm, cpu.QuickGroupNormSiLU)
    x = pictures((1, 12, 9, 7))
    silu = isinstance(layer, GroupNormSiLU)
    exact = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), 1e-5)
    torch.testing.assert_close(network(x).double(), F.silu(exact) if silu else exact, atol=0.05, rtol=0.02)


@needs_library
def test_with_one_they_are_the_packages():
    network = nn.Sequential(nn.GroupNorm(4, 12), GroupNormSiLU(4, 12), nn.GroupNorm(4, 12).float())
    network[:2].bfloat16()
    cpu.accelerate(network)
    assert [type(layer) for layer in network] == [cpu.CompiledGroupNorm, cpu.CompiledGroupNorm, cpu.QuickGroupNorm]
    assert [layer.silu for layer in network[:2]] == [False, True]


def test_a_file_that_cannot_be_loaded_is_as_none(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")

    class Spec:
        origin = str(tmp_path / "broken.so")

    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: Spec)
    assert compiled.library.__wrapped__() is None
