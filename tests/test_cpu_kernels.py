"""A CPU's faster layers against the plain ones that they stand for, on random shapes, and whole pictures by PSNR."""

import copy
import platform
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import small_sdxl as small
import torch
from conftest import DTYPES, PRECISIONS, SPARK, needs_weights
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fulgurite import Pipeline, Request
from fulgurite.cards import card
from fulgurite.engine import Loader
from fulgurite.kernels import compiled, cpu, int8
from fulgurite.kernels.winograd import WinogradConv2d
from fulgurite.models import VAE, CLIPTextEncoder, UNet
from fulgurite.models.layers import GEGLU, DotProductAttention, GroupNormSiLU, Upsample
from fulgurite.weights import load_networks

# Of the largest value. Both paths round to bfloat16, in different places.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NUMBERS = st.sampled_from([torch.float32, torch.bfloat16] if cpu.has_bfloat16() else [torch.float32])
ROWS, SIDES, CHANNELS = st.integers(1, 3), st.integers(1, 20), st.sampled_from((4, 12, 32, 64))
quickly = settings(max_examples=30, deadline=None)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def accelerated(layer: nn.Module) -> nn.Module:
    """A copy, accelerated; inside another layer, since what is replaced are a network's children."""
    network = nn.Sequential(copy.deepcopy(layer))
    cpu.accelerate(network)
    assert type(network[0]) is not type(layer)
    return network[0]


def random_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return small.roughened(layer).to(dtype).requires_grad_(False)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    error = (found.float() - wanted.float()).abs().max()
    assert error <= TOLERANCE[wanted.dtype] * wanted.float().abs().max()


@quickly
@given(NUMBERS, ROWS, SIDES, CHANNELS, CHANNELS, st.booleans())
def test_linear_layers(dtype, rows, length, inner, outer, bias):
    layer, x = random_layer(nn.Linear(inner, outer, bias=bias), dtype), torch.randn(rows, length, inner).to(dtype)
    assert_close(accelerated(layer)(x), layer(x))


@quickly
@given(NUMBERS, ROWS, SIDES, CHANNELS, CHANNELS)
def test_gated_layers(dtype, rows, length, dim, inner):
    layer, x = random_layer(GEGLU(dim, inner), dtype), torch.randn(rows, length, dim).to(dtype)
    assert_close(accelerated(layer)(x), layer(x))


@quickly
@given(
    NUMBERS, ROWS, SIDES, SIDES, CHANNELS, CHANNELS, st.sampled_from(((3, 1, 1), (3, 2, 1), (1, 1, 0))), st.booleans()
)
def test_convolutions(dtype, rows, height, width, inner, outer, shape, last):
    kernel, stride, padding = shape
    # Where a processor has matrix tiles, oneDNN's convolution in steps of 2 reads what is not there of narrower ones.
    assume(stride == 1 or width > 2)
    layer = random_layer(nn.Conv2d(inner, outer, kernel, stride=stride, padding=padding), dtype)
    x = torch.randn(rows, inner, height, width).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    assert_close(accelerated(layer)(x), layer(x))


@quickly
@given(NUMBERS, ROWS, SIDES, SIDES, CHANNELS, st.sampled_from((None, 0, 1)))
def test_upsampling(dtype, rows, height, width, channels, less):
    """``less``: the rows and columns that an odd latent's way back is short of twice the size."""
    layer, x = random_layer(Upsample(channels), dtype), torch.randn(rows, channels, height, width).to(dtype)
    size = None if less is None else torch.Size((2 * height - less, 2 * width - less))
    assert_close(accelerated(layer)(x, size), layer(x, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [Upsample(96), nn.Conv2d(192, 192, 3, padding=1)])
def test_sizes_that_want_a_layout_of_their_own_get_it_and_others_share_one(dtype, layer, monkeypatch):
    monkeypatch.setattr(WinogradConv2d, "fits", lambda plain: False)  # whose weights have one for all
    layer = random_layer(layer, dtype)
    quick = accelerated(layer)
    sides = (4, 8, 16, 32, 64, 4)
    for side in sides:
        x = torch.randn(1, next(layer.parameters()).shape[1], side, side).to(dtype)
        assert_close(quick(x), layer(x))
        assert cpu.layout(quick.weight_for(x)) == cpu.layout(quick.pack(quick.usual.to_dense(), x.shape[2:]))
    weights = {id(weight): weight for weight in (quick.usual, *quick.packed.values())}
    assert len({cpu.layout(weight) for weight in weights.values()}) == len(weights) < len(sides)


@quickly
@given(NUMBERS, ROWS, st.integers(1, 400), st.integers(1, 400), st.integers(1, 3), st.sampled_from((8, 32, 64)))
def test_attention(dtype, rows, queries, keys, heads, head_dim):
    plain = DotProductAttention(head_dim)
    q, k, v = (torch.randn(rows, n, heads * head_dim).to(dtype) for n in (queries, keys, keys))
    assert_close(accelerated(plain)(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("most", [1, 1000, 5000, 20_000, 50_000])
def test_attention_cut_into_heads_and_queries(monkeypatch, most):
    """However little the cache has room for: some queries of a head, one head, several heads, or all."""
    monkeypatch.setattr(cpu, "SCORES", most)
    plain, (q, k, v) = DotProductAttention(8), (torch.randn(2, n, 40) for n in (150, 130, 130))
    assert_close(accelerated(plain)(q, k, v), plain(q, k, v))


@quickly
@given(NUMBERS, ROWS, SIDES, SIDES)
def test_norms(dtype, rows, height, width):
    layer, x = random_layer(GroupNormSiLU(4, 12), dtype), torch.randn(rows, 12, height, width).to(dtype)
    before = x.clone()
    assert_close(accelerated(layer)(x), layer(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (
            UNet(small.UNET),
            [
                torch.randn(2, 4, 9, 14),
                torch.tensor([999, 3]),
                torch.randn(2, 77, 80),
                torch.randn(2, 48),
                torch.full((2, 6), 512.0),
            ],
        ),
        (CLIPTextEncoder(small.SECOND), [torch.randint(0, 500, (2, 77))]),
    ],
    ids=["unet", "text_encoder"],
)
def test_whole_networks(network, inputs):
    network = random_layer(network, torch.float32)
    wanted = network(*inputs)
    cpu.accelerate(network)
    found = network(*inputs)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for one, other in pairs:
        assert_close(one, other)
    assert not any(type(layer) in (nn.Linear, nn.Conv2d, DotProductAttention) for layer in network.modules())


def test_layers_for_training_have_the_plain_ones_gradients():
    with torch.inference_mode(False):
        plain = small.roughened(UNet(small.UNET))
        quick = copy.deepcopy(plain)
        cpu.accelerate_training(quick)
        assert {type(layer) for layer in quick.modules()} > {cpu.ProductAttention, cpu.QuickGroupNormSiLU}
        inputs = (
            torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 9, small.UNET.cross_attention_dim),
            torch.randn(2, small.UNET.pooled_dim), torch.full((2, 6), 64.0),
        )  # fmt: skip
        outputs, weights = [unet(*inputs) for unet in (quick, plain)], torch.randn(2, 4, 16, 16)
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
        wanted = dict(plain.named_parameters())
        for name, parameter in quick.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-3, rtol=1e-3)


def test_a_norms_picture_and_its_gradient_have_their_channels_last():
    """Though it is normalized as planes: else what stands before and behind goes through two orders at once."""
    with torch.inference_mode(False):
        norm = nn.Sequential(GroupNormSiLU(8, 32))
        cpu.accelerate_training(norm)
        x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        found = norm(x)
        found.backward(torch.randn_like(found))
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (found, x.grad))


def test_the_decoder():
    network = random_layer(VAE(small.VAE), torch.float32)
    latents, pixels = torch.randn(2, 4, 7, 9), torch.randn(1, 3, 32, 24)
    wanted = network.decode(latents), *network.encode(pixels)
    cpu.accelerate(network)
    for one, other in zip((network.decode(latents), *network.encode(pixels)), wanted, strict=True):
        assert_close(one, other)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """The peak signal's ratio to the noise between two pictures' bytes, in dB."""
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


REQUESTS = [
    Request(prompt, width=256, height=256, num_steps=4, seed=seed)
    for seed, prompt in enumerate(("a red rocket", "a cat on a green background", "pizza"))
]
# dB, of the worst picture against the plain networks in float32. int8: with the small layers too.
FLOORS = {"float32": 80.0, "bfloat16": 45.0, "int8": 42.0}


@needs_weights
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_embedded_models_pictures_are_the_plain_networks(precision, monkeypatch):
    """Of both models, undistilled and distilled: after four steps and the decoder."""
    monkeypatch.setattr(int8, "LEAST_LINEAR", 0)
    monkeypatch.setattr(int8, "LEAST_CONV", 0)
    for model in (SPARK, "fulgurite/spark-lightning"):
        plain = Pipeline(card(model), load_networks(card(model), 4, "cpu", torch.float32))
        fast = Loader("cpu", precision=precision)(model, 4)
        worst = min(psnr(np.array(plain.draw(r).image), np.array(fast.draw(r).image)) for r in REQUESTS)
        assert worst >= FLOORS[precision]


@needs_weights
def test_a_first_picture_needs_no_compiler():
    """torch imports its compiler at need, which takes longer than torch itself."""
    draw = f"Pipeline.load({SPARK!r}, steps=1)('a cat', width=256, height=256, num_steps=1, seed=1)"
    told = "print([name for name in sys.modules if name in ('torch._dynamo', 'torch._inductor', 'sympy')])"
    code = f"import sys; from fulgurite import Pipeline; {draw}; {told}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_what_large_tensors_leave_is_there_for_the_next_ones_in_every_thread_until_given_back():
    """Else the system clears each page anew: a fifth of the time of SDXL's decoder."""
    code = """
import resource, threading, torch
from fulgurite.kernels import cpu
cpu.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(300 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
thread = threading.Thread(target=lambda: [faults() for _ in range(3)] or print(faults()))
thread.start(), thread.join(), print(faults())
held = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = held()
cpu.give_back_memory()
print(before - held())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    *faults, given_back = map(int, told)
    assert max(faults) < 1000  # of 76,800 pages of 4 kB, or 150 of 2 MB
    assert given_back > 250 << 20


@pytest.mark.skipif(sys.platform != "linux" or compiled.library() is None, reason="Linux's cores, by a kernel in C")
def test_two_threads_that_compute_on_two_cores_stay_on_one_each():
    """And others go where they will: those that serve must not wait for the one that draws."""
    code = """
import os, sys, threading, torch
from fulgurite.kernels import compiled
if len(os.sched_getaffinity(0)) < 2:
    sys.exit(print("one core"))
two = set(sorted(os.sched_getaffinity(0))[-2:])
os.sched_setaffinity(0, two)
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
for threads in (1, 3):
    torch.set_num_threads(threads)
    print(not compiled.keep_apart() and os.sched_getaffinity(0) == two)
torch.set_num_threads(2)
print(compiled.keep_apart())
held = {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
print(held.pop(threading.get_native_id()) == {min(two)}, {max(two)} in held.values(), held[other.native_id] == two)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout
    if told.startswith("one"):
        pytest.skip("there is one core")
    assert told.split() == ["True"] * 6
