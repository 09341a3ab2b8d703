"""The kernels in C against torch's own functions in double precision, on random shapes, and what does without them."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite.kernels import compiled, cpu
from fulgurite.kernels.tiled import TiledConv2d, TiledLinear
from fulgurite.kernels.winograd import WinogradConv2d, WinogradUpsample
from fulgurite.models.layers import GEGLU, DotProductAttention, GroupNormSiLU, Upsample, VectorLinear

needs_library = pytest.mark.skipif(compiled.library() is None, reason="the package was installed without a C compiler")
needs_floats = pytest.mark.skipif(
    compiled.floats() is None, reason="this processor has no AVX2, or there is no compiler"
)
in_all_numbers = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=needs_library), pytest.param(torch.float32, marks=needs_floats)]
)
# Of a number itself: half bfloat16's last place; two of float32's, in which functions round more than once. And what
# adding up in float32 leaves of numbers about one.
ROUNDING, LEFT = {torch.bfloat16: 2**-8, torch.float32: 2**-22}, {torch.bfloat16: 1e-4, torch.float32: 5e-5}
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from((3, 8, 12, 32, 96, 160, 320, 640)), *[st.integers(1, 40)] * 2)


@pytest.fixture(scope="session")
def emulated_tiles(tmp_path_factory):
    """The products for tiles, compiled with tiles in plain C: where they run on vectors otherwise."""
    library, folder = compiled.library(), Path(compiled.__file__).parent
    if library is None or not library.has_vectors() or not compiled.opened("_vectors", {}) or not shutil.which("cc"):
        pytest.skip("this processor cannot emulate tiles, or there is no compiler, or it does not know the vectors")
    file, sources = tmp_path_factory.mktemp("tiles") / "tiles.so", [folder / "attention.c", folder / "products.c"]
    flags = ["-shared", "-fPIC", "-O2", "-fopenmp", "-Wno-psabi", "-march=cooperlake", "-include"]
    subprocess.run(["cc", *flags, Path(__file__).parent / "emulated_tiles.h", *sources, "-o", file], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
        found = compiled.opened("_tiles", compiled.PRODUCTS)
    assert found
    return found


@pytest.fixture(scope="module", params=["tiles", "vectors", "emulated_tiles", "floats"])
def dtype(request):
    """The numbers that products are of, by each of the processor's units that has some."""
    if request.param == "floats":
        found = compiled.floats()
    elif request.param == "emulated_tiles":
        found = request.getfixturevalue("emulated_tiles")
    else:
        library = compiled.library()
        there = library is not None and getattr(library, f"has_{request.param}")()
        found = compiled.opened(f"_{request.param}", compiled.PRODUCTS) if there else None
    if found is None:
        pytest.skip(f"this processor has no {request.param}, or the compiler did not know them")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "floats":
            patch.setattr(compiled, "products", lambda: found)
        yield torch.float32 if request.param == "floats" else torch.bfloat16


def groups_of(channels: int) -> int:
    return next(groups for groups in (32, 8, 4, 3) if channels % groups == 0)


def pictures(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def scale_and_shift(channels: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 1.5, channels), torch.linspace(-1, 1, channels)


def normed(x: Tensor, silu: bool = True) -> Tensor:
    weight, bias = scale_and_shift(x.shape[1])
    return compiled.group_norm(x, groups_of(x.shape[1]), weight, bias, 1e-5, silu)


def wanted(x: Tensor, silu: bool = True) -> Tensor:
    weight, bias = scale_and_shift(x.shape[1])
    y = torch.group_norm(x.double(), groups_of(x.shape[1]), weight.double(), bias.double(), 1e-5)
    return F.silu(y) if silu else y


@in_all_numbers
@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from((0.0, 1.0, 100.0)), st.booleans())
def test_a_norm_is_exact_but_for_one_rounding(dtype, shape, mean, silu):
    """And half of float32's last place of what the spread is divided out of."""
    x = pictures(shape, dtype, mean)
    found, exact = normed(x, silu), wanted(x, silu)
    spread = (x.double().reshape(shape[0], groups_of(shape[1]), -1).var(2, correction=0) + 1e-5).sqrt().min()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == dtype
    most = ROUNDING[dtype] * exact.abs() + LEFT[dtype] + 2**-22 * x.abs().max() / spread
    assert ((found - exact).abs() <= most).all()


@in_all_numbers
def test_silu_over_the_whole_range_of_numbers(dtype):
    """At a norm's size there are none this large, but what overflows in between must not come out as something."""
    x = torch.tensor([-1e4, -500.0, -89.0, -20.0, -7.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 7.0, 20, 89, 500, 1e4, 3e38])
    # Of zeros nothing is left but the bias.
    zeros = torch.zeros(1, 16, 1, 1, dtype=dtype)
    found, exact = compiled.group_norm(zeros, 16, torch.ones(16), x, 1e-5, True).flatten(), F.silu(x.double())
    assert ((found - exact).abs() <= ROUNDING[dtype] * exact.abs() + 1e-33).all()


@in_all_numbers
@settings(max_examples=30, deadline=None)
@given(SHAPES, st.booleans())
def test_a_rows_bits_depend_neither_on_the_rows_beside_it_nor_on_threads(dtype, shape, silu):
    x, threads = pictures(shape, dtype), torch.get_num_threads()
    together = normed(x, silu)
    assert all(torch.equal(normed(x[i : i + 1], silu), together[i : i + 1]) for i in range(len(x)))
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(normed(x, silu), together)
    finally:
        torch.set_num_threads(threads)


@in_all_numbers
def test_any_order_in_memory_will_do_and_the_input_stays(dtype):
    x = pictures((2, 32, 12, 10), dtype)
    planes, cut = x.contiguous(), F.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]
    before = x.clone()
    assert all(torch.equal(normed(other), normed(x)) for other in (planes, cut))
    assert torch.equal(x, before)


@in_all_numbers
def test_what_is_no_number_stays_none_in_its_group_alone(dtype):
    x = pictures((2, 32, 5, 5), dtype)
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
    x = pictures((1, 12, 9, 7), torch.bfloat16)
    silu = isinstance(layer, GroupNormSiLU)
    exact = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), 1e-5)
    torch.testing.assert_close(network(x).double(), F.silu(exact) if silu else exact, atol=0.05, rtol=0.02)


@in_all_numbers
def test_with_one_they_are_the_packages(dtype):
    network = nn.Sequential(
        nn.GroupNorm(4, 12), GroupNormSiLU(4, 12), nn.LayerNorm(32), nn.LayerNorm(33), nn.GroupNorm(4, 12).double()
    )
    network[:4].to(dtype)
    cpu.accelerate(network)
    assert [type(layer) for layer in network] == [
        cpu.CompiledGroupNorm,
        cpu.CompiledGroupNorm,
        cpu.CompiledLayerNorm,
        nn.LayerNorm,
        cpu.QuickGroupNorm,
    ]
    assert [layer.silu for layer in network[:2]] == [False, True]


@in_all_numbers
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.sampled_from((32, 160, 768, 2048)), st.sampled_from((0.0, 1.0, 100.0)))
def test_a_layers_norm_is_exact_but_for_one_rounding(dtype, tokens, wide, mean):
    torch.manual_seed(0)
    x, layer = (torch.randn(2, tokens, wide) * 3 + mean).to(dtype), nn.LayerNorm(wide).requires_grad_(False)
    layer.weight.data, layer.bias.data = (vector.to(dtype) for vector in scale_and_shift(wide))
    exact = F.layer_norm(x.double(), (wide,), layer.weight.double(), layer.bias.double())
    normed = cpu.CompiledLayerNorm(layer)
    layer.weight.data = layer.bias.data = torch.empty(0)  # it has its own
    found = normed(x)
    most = ROUNDING[dtype] * exact.abs() + LEFT[dtype] + 2**-22 * x.abs().max()
    assert ((found - exact).abs() <= most).all()
    assert torch.equal(normed(x[:1]), found[:1])
    x[1, 0, 3] = torch.inf
    assert normed(x).isfinite().all(dim=-1).sum() == 2 * tokens - 1


@needs_floats
def test_weights_may_lie_anywhere_in_memory_as_they_do_in_files():
    apart = torch.randn(1 + 64 + 64 * 64)  # their first numbers are on no 8 bytes
    norm, x = nn.LayerNorm(64).requires_grad_(False), torch.randn(1, 3, 64)
    norm.weight.data, norm.bias.data = apart[1:65], apart[1:65]
    exact = norm(x)
    torch.testing.assert_close(cpu.CompiledLayerNorm(norm)(x), exact)
    weight = apart[65:].view(64, 64)
    torch.testing.assert_close(
        compiled.linear(x, compiled.tiled(weight), apart[1:65]), F.linear(x, weight, apart[1:65])
    )


def test_a_file_that_cannot_be_loaded_is_as_none(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    broken = SimpleNamespace(origin=str(tmp_path / "broken.so"))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: broken)
    assert compiled.library.__wrapped__() is None
    assert compiled.opened("_vectors", compiled.PRODUCTS) is None


def rounded_once(found: Tensor, exact: Tensor) -> bool:
    return bool(((found - exact).abs() <= ROUNDING[found.dtype] * exact.abs() + LEFT[found.dtype]).all())


def weights(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * shape[1] ** -0.5).to(dtype), torch.randn(shape[0])


LAYERS = st.tuples(st.integers(1, 5), st.integers(1, 5))  # sixteens of outputs, thirty-twos of inputs
ATTENDED = {torch.bfloat16: 2**-7, torch.float32: 1e-5}  # of the largest value


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), LAYERS, st.booleans(), st.booleans())
def test_a_linear_layer_is_exact_but_for_one_rounding(dtype, tokens, layer, gelu, scaled):
    torch.manual_seed(0)
    (weight, bias), x = weights(dtype, 16 * layer[0], 32 * layer[1]), torch.randn(1, tokens, 32 * layer[1]).to(dtype)
    factor = torch.randn(1, tokens, len(bias)).to(dtype) if scaled else None
    exact = x.double() @ weight.double().T + bias
    exact = (F.gelu(exact) if gelu else exact) * (1 if factor is None else factor)
    found = compiled.linear(x, compiled.tiled(weight), bias, gelu, factor)
    assert found.dtype == dtype
    assert rounded_once(found, exact)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), LAYERS, st.integers(0, 31), st.integers(1, 2))
def test_a_convolution_is_exact_but_for_one_rounding(dtype, rows, height, width, layer, fewer, stride):
    torch.manual_seed(0)
    outer, inner = 16 * layer[0], 32 * layer[1] - fewer
    (weight, bias), x = weights(dtype, outer, inner, 3, 3), torch.randn(rows, inner, height, width).to(dtype)
    found = compiled.convolve(x, compiled.tiled(weight), bias, stride)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert rounded_once(found, exact)
    last = compiled.convolve(x.contiguous(memory_format=torch.channels_last), compiled.tiled(weight), bias, stride)
    assert torch.equal(last, found)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 9), st.integers(1, 9), LAYERS)
def test_bits_of_products_depend_neither_on_the_rows_beside_nor_on_threads(dtype, rows, height, width, layer):
    torch.manual_seed(0)
    (weight, bias), (conv, _) = (
        weights(dtype, 16 * layer[0], 32 * layer[1]),
        weights(dtype, 16 * layer[0], 32 * layer[1], 3, 3),
    )
    pictures_of = torch.randn(rows, 32 * layer[1], height, width).to(dtype)
    tokens = pictures_of.flatten(2).transpose(1, 2)

    def both(i: slice) -> tuple[Tensor, Tensor]:
        linear = compiled.linear(tokens[i], compiled.tiled(weight), bias)
        return linear, compiled.convolve(pictures_of[i], compiled.tiled(conv), bias)

    together, threads = both(slice(None)), torch.get_num_threads()
    try:
        for i in range(rows):
            torch.set_num_threads(1 + i % 3)
            for alone, found in zip(both(slice(i, i + 1)), together, strict=True):
                assert torch.equal(alone[0], found[i])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 600), st.integers(1, 3), st.sampled_from((32, 64, 512)))
def test_attention(dtype, rows, queries, keys, heads, head_dim):
    """Queries beside their keys and values, as one layer makes them; weights are rounded besides."""
    torch.manual_seed(0)
    wide, together = heads * head_dim, torch.randn(rows, max(queries, keys), 3 * heads * head_dim).to(dtype)
    q, (k, v) = together[:, :queries, :wide], together[:, :keys, wide:].chunk(2, dim=-1)
    exact = DotProductAttention(head_dim)(q.double(), k.double(), v.double())
    found = compiled.attend(q, k, v, head_dim)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= ATTENDED[dtype] * v.abs().max()
    beside = k.contiguous(), torch.cat([v, v], dim=-1)[..., :wide]  # keys and values that lie differently
    assert torch.equal(compiled.attend(q.contiguous(), *beside, head_dim), found)
    alone = [compiled.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], head_dim) for i in range(rows)]
    assert torch.equal(torch.cat(alone), found)


@pytest.mark.parametrize("last", [3, -3], ids=["rising", "falling"])
def test_attention_where_scores_go_far_up_or_down_from_key_to_key(dtype, last):
    """Keys are gone through some hundred at a time: what was summed before a higher score must count for less."""
    torch.manual_seed(0)
    k = torch.linspace(-last, last, 700)[:, None].expand(1, 700, 32).to(dtype)
    q, v = torch.ones(1, 40, 32).to(dtype), torch.randn(1, 700, 32).to(dtype)
    exact = DotProductAttention(32)(q.double(), k.double(), v.double())
    assert (compiled.attend(q, k, v, 32) - exact).abs().max() <= ATTENDED[dtype] * v.abs().max()


def test_attention_to_scores_far_apart_and_to_what_is_no_number(dtype):
    q, k, v = torch.randn(1, 20, 32).to(dtype), *(torch.randn(1, 400, 32).to(dtype) for _ in range(2))
    q *= 256
    exact = DotProductAttention(32)(q.double(), k.double(), v.double())
    assert (compiled.attend(q, k, v, 32) - exact).abs().max() <= ATTENDED[dtype] * v.abs().max()
    for key, number in ((3, torch.nan), (390, torch.nan), (3, torch.inf)):
        spoiled = k.clone()
        spoiled[0, key, 5] = number
        assert not compiled.attend(q, spoiled, v, 32).isfinite().all()
    k[0, 3, 5] = torch.nan
    assert compiled.attend(q, k, v, 32).isnan().all()


def test_infinities_and_what_is_no_number_are_seen_after_a_layer(dtype):
    """What the network cannot compute must not come out as a picture."""
    (weight, bias), x = weights(dtype, 32, 64), torch.randn(3, 64).to(dtype)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    finite = compiled.linear(x, compiled.tiled(weight), bias).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False]


@needs_floats
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from((None, 0, 1)),
)
def test_a_convolution_by_minimal_filtering_is_nearly_as_exact(rows, height, width, sixteens, inner, less):
    """Also of pictures that are enlarged first, to twice their size or one less. What is in between is larger."""
    torch.manual_seed(0)
    (weight, bias), x = (
        weights(torch.float32, 16 * sixteens, 16 * inner, 3, 3),
        torch.randn(rows, 16 * inner, height, width),
    )
    size = None if less is None else torch.Size((max(1, 2 * height - less), max(1, 2 * width - less)))
    found = compiled.convolve_large(x, compiled.filters(weight), bias, size)
    enlarged = x if size is None else F.interpolate(x, size=size, mode="nearest")
    exact = F.conv2d(enlarged.double(), weight.double(), bias.double(), padding=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - exact).abs().max() <= 2e-5 * exact.abs().max()
    last = compiled.convolve_large(
        x.contiguous(memory_format=torch.channels_last), compiled.filters(weight), bias, size
    )
    assert torch.equal(last, found)


@needs_floats
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 40), st.integers(1, 40))
def test_its_bits_depend_neither_on_the_pictures_beside_nor_on_threads(rows, height, width):
    torch.manual_seed(0)
    (weight, bias), x = weights(torch.float32, 48, 32, 3, 3), torch.randn(rows, 32, height, width)
    together, threads = compiled.convolve_large(x, compiled.filters(weight), bias), torch.get_num_threads()
    try:
        for i in range(rows):
            torch.set_num_threads(1 + i % 3)
            alone = compiled.convolve_large(x[i : i + 1], compiled.filters(weight), bias)
            assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)


@needs_floats
def test_a_pixel_that_is_no_number_is_seen_around_it_alone():
    (weight, bias), x = weights(torch.float32, 16, 16, 3, 3), torch.randn(1, 16, 40, 40)
    x[0, 3, 20, 20] = torch.nan
    lost = compiled.convolve_large(x, compiled.filters(weight), bias).isnan().any(dim=1)[0]
    assert lost[19:22, 19:22].all()
    assert lost.sum() <= 12 * 12  # of the squares that it is behind


def layers_of(layer: nn.Module, dtype: torch.dtype) -> set[type[nn.Module]]:
    network = nn.Sequential(layer).to(dtype)
    cpu.accelerate(network)
    return {type(part) for part in network.modules()} - {nn.Sequential}


def test_small_layers_are_ours_and_large_ones_onednns(dtype):
    assert layers_of(nn.Linear(320, 640), dtype) == layers_of(VectorLinear(320, 2048), dtype) == {TiledLinear}
    assert layers_of(nn.Linear(640, 640), dtype) == layers_of(nn.Linear(320, 24), dtype) == {cpu.PackedLinear}
    assert layers_of(GEGLU(192, 768), dtype) == {cpu.PackedGEGLU, TiledLinear}
    assert layers_of(nn.Conv2d(352, 192, 1), dtype) == {cpu.PointwiseConv2d, TiledLinear}
    assert layers_of(nn.Conv2d(64, 64, 3, 2, 1), dtype) == {cpu.PackedConv2d, TiledConv2d}
    if dtype == torch.float32:
        assert layers_of(nn.Conv2d(352, 192, 3, padding=1), dtype) == {WinogradConv2d, TiledConv2d}
        assert layers_of(nn.Conv2d(640, 640, 3, padding=1), dtype) == {WinogradConv2d}
        assert layers_of(nn.Conv2d(640, 1280, 3, padding=1), dtype) == {cpu.PackedConv2d}
        assert layers_of(Upsample(192), dtype) == {WinogradUpsample}
    else:
        assert layers_of(nn.Conv2d(352, 192, 3, padding=1), dtype) == {cpu.PackedConv2d, TiledConv2d}
        assert layers_of(nn.Conv2d(16, 64, 3, padding=1), dtype) == {cpu.PackedConv2d, TiledConv2d}
        assert layers_of(Upsample(192), dtype) == {cpu.PackedUpsample, cpu.PackedConv2d, TiledConv2d}
    for other in (nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, (1, 2), 1), nn.Conv2d(64, 24, 3, padding=1)):
        assert layers_of(other, dtype) == {cpu.PackedConv2d}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_products_small_layers_are_onednns(dtype, monkeypatch):
    monkeypatch.setattr(compiled, "where", lambda name, dtype: None)
    assert layers_of(nn.Linear(320, 640), dtype) == {cpu.PackedLinear}
    assert layers_of(nn.Conv2d(64, 64, 3, padding=1), dtype) == {cpu.PackedConv2d}
    assert layers_of(VectorLinear(320, 640), dtype) == {VectorLinear}
