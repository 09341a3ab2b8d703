"""The Triton kernels against the plain torch that they equal, in Triton's interpreter (conftest.py asks for it)."""

from copy import deepcopy

import pytest
import small_sdxl as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite.kernels import float8
from fulgurite.kernels.fused import Columns, fuse
from fulgurite.models import UNet
from fulgurite.models.layers import DotProductAttention, GroupNormSiLU, Upsample

pytest.importorskip("triton", reason="it is only made for Linux")

from triton import language as tl
from triton.runtime import interpreter

from fulgurite.kernels import cuda, cuda_norm, cuda_rows
from fulgurite.kernels.cuda import (
    FUSED,
    FusedDotProductAttention,
    FusedFloat8Linear,
    FusedUpsample,
    accelerate,
    geglu,
    group_norm,
    interleaved,
    total,
)
from fulgurite.kernels.cuda_rows import layer_norm, rounded, softmax

# Against float64: the rounding of sums in float32; in half precision that of the output beside it: half a unit in the
# last place of float16, and a whole one of bfloat16, which Triton's interpreter cuts off where a GPU rounds.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 1e-3, "rtol": 2**-7},
    torch.float16: {"atol": 1e-4, "rtol": 2**-11 + 2e-4},
}
DTYPES = st.sampled_from(list(TOLERANCE))
FORMATS = [torch.contiguous_format, torch.channels_last]
MEANS = st.sampled_from([0.0, 3.0, -100.0])
# exp may become infinite, which SiLU makes 0 of; only numpy, which the interpreter computes with, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
# The interpreter takes its time, above all at the first example.
quickly = settings(max_examples=20, deadline=None)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])


def plain_norm(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """The plain lines in float64, on the same rounded numbers."""
    exact = type(norm)(norm.num_groups, norm.num_channels, norm.eps).double()
    exact.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    x = x.double()
    for added in (bias, vectors):
        x = x if added is None else x + added.double()[..., None, None]
    with torch.inference_mode():
        return exact(x)


def norm_layer(
    groups: int, channels: int, dtype: torch.dtype, kind: type[nn.GroupNorm] = GroupNormSiLU
) -> nn.GroupNorm:
    layer = kind(groups, channels, eps=1e-5)
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
    form=st.sampled_from(FORMATS),
    dtype=DTYPES,
    mean=MEANS,
    kind=st.sampled_from([nn.GroupNorm, GroupNormSiLU]),
    bias_mean=MEANS | st.none(),
    vectors_mean=MEANS | st.none(),
)
def test_a_group_norm_is_the_plain_one(
    batch, groups, in_group, height, width, form, dtype, mean, kind, bias_mean, vectors_mean
):
    torch.manual_seed(0)
    channels = groups * in_group
    x = (torch.randn(batch, channels, height, width) + mean).to(dtype).to(memory_format=form)
    layer = norm_layer(groups, channels, dtype, kind)
    bias = None if bias_mean is None else (torch.randn(channels) + bias_mean).to(dtype)
    # Of a wider layer's output, as those of the timestep are.
    shared = None if vectors_mean is None else (torch.randn(batch, channels + 9) + vectors_mean).to(dtype)
    vectors = None if shared is None else Columns(4, channels + 4)(shared)
    found = group_norm(x, layer, silu=kind is GroupNormSiLU, bias=bias, vectors=vectors)
    assert found.stride() == x.stride()
    close(found, plain_norm(x, layer, bias, vectors), dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bias_mean", [0, 7000, -1000])
def test_a_channel_that_several_programs_sum(form, bias_mean):
    """With a mean far above the deviation, or two that leave none of each other."""
    torch.manual_seed(1)
    x = (torch.randn(2, 8, 67, 2 * cuda_norm.PIXELS // 67 + 5) + 1000).to(memory_format=form)
    layer, bias, vectors = norm_layer(4, 8, torch.float32), torch.randn(8) + bias_mean, torch.randn(2, 8)
    found = group_norm(x, layer, silu=True, bias=bias, vectors=vectors)
    close(found, plain_norm(x, layer, bias, vectors), torch.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_channels_whose_means_what_is_added_takes_away(form):
    """They lie far apart before, and close after."""
    torch.manual_seed(4)
    bias = 300 * torch.randn(8)
    x = (torch.randn(2, 8, 20, 20) - bias[:, None, None]).to(memory_format=form)
    layer = norm_layer(2, 8, torch.float32)
    found = group_norm(x, layer, silu=True, bias=bias)
    # float32 holds such numbers to 2**-16 at best.
    torch.testing.assert_close(found.double(), plain_norm(x, layer, bias), atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_where_nothing_deviates_but_one_pixel(form):
    """Its variance is next to nothing beside the squares, and is not rounded to less than nothing."""
    x = torch.full((1, 4, 64, 64), 3.0).to(memory_format=form)
    x[0, ::2, 0, 0] = -4000.0
    layer = norm_layer(2, 4, torch.float32)
    assert group_norm(x, layer, silu=True).isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_rows_bits_do_not_depend_on_its_batch(form):
    torch.manual_seed(2)
    x = torch.randn(3, 12, 9, 31).to(memory_format=form)
    other, bias, vectors = torch.randn_like(x), torch.randn(12), torch.randn(3, 12)
    layer = norm_layer(4, 12, torch.float32)

    def computed(rows: slice) -> list[Tensor]:
        own = x[rows].clone()
        added = group_norm(own, layer, silu=True, bias=bias, vectors=vectors[rows].clone())
        return [group_norm(own, layer, silu=False), added, total(own, other[rows].clone(), bias)]

    together = computed(slice(0, 3))
    for i in range(3):
        for alone, with_others in zip(computed(slice(i, i + 1)), together, strict=True):
            assert torch.equal(alone[0], with_others[i])


def test_a_view_that_is_neither_contiguous_nor_channels_last():
    x = torch.randn(2, 8, 12, 10)[:, :, ::2, 1:]
    layer, bias = norm_layer(2, 8, torch.float32), torch.randn(8)
    close(group_norm(x, layer, silu=True), plain_norm(x, layer), torch.float32)
    close(total(x, 2 * x, bias), (3 * x + bias[:, None, None]).double(), torch.float32)


def test_a_picture_one_pixel_wide_whose_stride_is_another():
    """torch calls it contiguous: of a size of 1 it looks at no stride."""
    x = torch.randn(2, 8, 1, 40).transpose(2, 3)
    assert x.is_contiguous()
    assert x.stride(3) == 40
    layer = norm_layer(2, 8, torch.float32)
    close(group_norm(x, layer, silu=True), plain_norm(x, layer), torch.float32)


@quickly
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    form=st.sampled_from(FORMATS),
    others=st.sampled_from(FORMATS),
    dtype=DTYPES,
    biases=st.integers(1, 2),
)
def test_the_total_is_the_plain_one(batch, channels, height, width, form, others, dtype, biases):
    torch.manual_seed(0)
    one = torch.randn(batch, channels, height, width).to(dtype).to(memory_format=form)
    other = torch.randn(batch, channels, height, width).to(dtype).to(memory_format=others)
    added = torch.randn(biases, channels).to(dtype)
    found = total(one, other, *added)
    assert found.stride() == one.stride()
    close(found, one.double() + other.double() + added.double().sum(0)[:, None, None], dtype)


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


@quickly
@given(
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    width=st.integers(1, 3000) | st.sampled_from([640, 1280]),
    dtype=DTYPES,
    mean=MEANS,
    adds=st.booleans(),
)
def test_a_layer_norm_with_the_sum_before_it_is_the_plain_lines(rows, width, dtype, mean, adds):
    torch.manual_seed(0)
    norm = nn.LayerNorm(width).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.to(dtype)
    x, more = (torch.randn(*rows, width) + mean).to(dtype), torch.randn(*rows, width).to(dtype)
    summed, normed = layer_norm(x, norm, more if adds else None)
    wanted = (x.double() + more.double()) if adds else x.double()
    close(summed, wanted, dtype)
    exact = nn.functional.layer_norm(summed.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    # Numbers that float32 holds to 1e-5, less their mean, and divided by what may be a small deviation.
    torch.testing.assert_close(normed.double(), exact, atol=4e-3 if dtype == torch.bfloat16 else 1e-3, rtol=2**-7)


@pytest.mark.parametrize("side", [1, 100, 4096, 9000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("mean", [0, -1e6])
def test_softmax_is_the_plain_one(side, scale, mean):
    torch.manual_seed(0)
    scores = torch.randn(3, 2, side) * scale + mean
    wanted = (scores.double() * 0.3).softmax(-1)
    for dtype in TOLERANCE:
        close(softmax(scores, 0.3, dtype), wanted, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_with_a_wide_head_is_the_plain_one(dtype, monkeypatch):
    """A few queries at a time, which need not be a divisor of theirs."""
    monkeypatch.setattr(cuda, "SCORES", 2 * 70 * 9)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 264).to(dtype) for length in (50, 70, 70))
    attend, plain = FusedDotProductAttention(264), DotProductAttention(264)
    found, wanted = attend(q, k, v), plain(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(found.double(), wanted, atol=1e-2 if dtype == torch.bfloat16 else 1e-3, rtol=1e-2)
    heads = DotProductAttention(32), FusedDotProductAttention(32)
    few = [x[..., :96].float() for x in (q, k, v)]
    assert torch.equal(heads[0](*few), heads[1](*few))


@quickly
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 16, 70]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    form=st.sampled_from(FORMATS),
    odd=st.sampled_from([None, (0, 0), (0, 1), (1, 0)]),
)
def test_an_upsampling_folded_into_its_convolution(batch, channels, height, width, form, odd):
    torch.manual_seed(0)
    layer = Upsample(channels).requires_grad_(False)
    x = torch.randn(batch, channels, height, width).to(memory_format=form)
    size = odd and torch.Size((2 * height - odd[0], 2 * width - odd[1]))
    wanted = deepcopy(layer).double()(x.double(), size)
    accelerate(layer)
    assert type(layer) is FusedUpsample
    assert "four" not in layer.state_dict()
    found = layer(x, size)
    assert found.shape == wanted.shape
    close(found, wanted, torch.float32)


@pytest.fixture
def rounds_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own rounding to 8 bits is wrong (it forgets to carry); a GPU's is torch's, to nearest even."""
    its_own = interpreter._convert_float

    def convert(numbers, kind, to, rounding_mode):
        if to is not tl.float8e4nv:
            return its_own(numbers, kind, to, rounding_mode)
        assert rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
        return torch.from_numpy(numbers).to(float8.KIND).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def assert_rounded_alike(rows: Tensor) -> None:
    (found, scales), (wanted, wanted_scales) = rounded(rows), float8.rounded(rows)
    assert (found.dtype, found.stride(), scales.shape) == (wanted.dtype, wanted.stride(), wanted_scales.shape)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


@pytest.mark.usefixtures("rounds_as_a_gpu_does")
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    width=st.integers(1, 3000) | st.sampled_from([640, 5120, 10240]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_rows_are_rounded_to_8_bits_as_the_plain_lines_do_it(count, width, dtype, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(count, width) * 10 ** (4 * torch.rand(count, 1) - 3)).to(dtype)
    rows[0, torch.rand(width) < 0.5] /= 1000  # to numbers below the least normal one
    assert_rounded_alike(rows)


@pytest.mark.usefixtures("rounds_as_a_gpu_does")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # numpy's
def test_special_rows_are_rounded_as_the_plain_lines_do_it():
    rows = torch.randn(4, 32)
    rows[1], rows[2] = 0.0, -7.0
    rows[3, 4] = torch.inf
    assert_rounded_alike(rows)
    assert_rounded_alike(torch.randn(1, 32, 64).transpose(1, 2).flatten(0, -2))  # turned around
    assert_rounded_alike(torch.empty(0, 32))
    rows[3, 4] = torch.nan
    found, _ = rounded(rows)
    assert found.float().isnan().nonzero().tolist() == [[3, 4]]


def test_the_largest_pictures_fit_the_grid(monkeypatch):
    """Of a launch's three axes CUDA gives the second and the third 65,535 places."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **sizes: None

    rows = [(cuda_rows, "_softmax_kernel"), (cuda_rows, "_layer_norm_kernel")]
    kernels = [*rows, (cuda_norm, "_sums_kernel"), (cuda_norm, "_lines_kernel"), (cuda_norm, "_norm_kernel")]
    for module, name in [*kernels, (cuda, "_total_kernel"), (cuda, "_interleaved_kernel")]:
        monkeypatch.setattr(module, name, Kernel())
    layer = nn.GroupNorm(32, 512, device="meta")
    for form in FORMATS:
        x = torch.empty(16, 512, 2048, 2048, device="meta", dtype=torch.float16).to(memory_format=form)
        group_norm(x, layer, silu=True)
        total(x, x, layer.bias)
        four = torch.empty(16, 2048, 1025, 1025, device="meta", dtype=torch.float16).to(memory_format=form)
        interleaved(four, layer.bias)
    assert len(grids) == 10
    assert all(max(others) <= 65_535 for _, *others in grids)
    assert max(x for x, *_ in grids) == 2048 * 2048 // 64
    softmax(torch.empty(65_536, 65_536, device="meta"), 1.0, torch.float16)
    layer_norm(torch.empty(16, 16_384, 640, device="meta"), nn.LayerNorm(640, device="meta"))
    assert grids[10:] == [(65_536,), (16 * 16_384,)]


def test_geglu_of_nothing():
    assert geglu(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(("joined", "form"), zip([False, True], FORMATS, strict=True))
@torch.inference_mode()
def test_networks_give_the_same_on_the_kernels(tiny, joined, form, monkeypatch):
    for module, name in ((cuda, "TILE"), (cuda_norm, "TILE"), (cuda_norm, "SUMMED"), (cuda_norm, "PIXELS")):
        monkeypatch.setattr(module, name, 1 << 16)  # the interpreter takes as long for few numbers as for many
    unet, vae = deepcopy(tiny.networks.unet), deepcopy(tiny.networks.vae)
    torch.manual_seed(3)
    for parameter in (*unet.parameters(), *vae.parameters()):
        if parameter.dim() == 1:
            parameter.normal_()  # biases that are to be seen, each of them once
    x, context, pooled = torch.randn(2, 4, 4, 6), torch.randn(2, 5, 32), torch.randn(2, 16)
    x = x.to(memory_format=form)
    if joined:
        fuse(unet)
    for network in (unet, vae):
        network.to(memory_format=form)
    inputs = x, torch.tensor([999, 3]), unet.read(context), pooled, torch.full((2, 6), 64.0)
    wanted = unet(*inputs), vae.decode(x[:1])
    accelerate(unet)
    accelerate(vae)
    kinds = {type(layer) for network in (unet, vae) for layer in network.modules()}
    assert set(FUSED.values()) - kinds == {FusedFloat8Linear}
    assert not set(FUSED) & kinds
    found = unet(*inputs), vae.decode(x[:1])
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_weights_stay_where_graphs_found_them(tiny):
    """When another checkpoint is loaded beside them, which has the same decoder prepared once more."""
    vae = deepcopy(tiny.networks.vae)

    def places() -> list[int]:
        return [tensor.data_ptr() for tensor in (*vae.parameters(), *vae.buffers())]

    accelerate(vae)
    assert list(vae.buffers())
    known = places()
    accelerate(vae)
    vae.to(memory_format=torch.channels_last)
    assert places() == known


@pytest.mark.usefixtures("rounds_as_a_gpu_does")
@torch.inference_mode()
def test_layers_in_8_bits_give_the_same_on_the_kernels(monkeypatch):
    monkeypatch.setattr(float8, "LEAST", 64 * 64)
    unet = UNet(small.UNET).bfloat16()
    float8.accelerate(unet)
    layer, x = unet.mid_block.attentions[0].proj_in, torch.randn(2, 3, 64).bfloat16()
    wanted = layer(x)
    accelerate(unet)
    assert type(layer) is FusedFloat8Linear
    assert layer.rounded is rounded
    assert torch.equal(layer(x), wanted)
