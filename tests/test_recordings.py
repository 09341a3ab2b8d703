"""Evaluations on a CPU, written down and replayed: the same bits as without, for whatever is asked next."""

import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import small_sdxl as small
import torch
import torch.nn.functional as F
from conftest import DTYPES, SPARK, needs_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphs import guidance, inputs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fulgurite import Pipeline, Request
from fulgurite.kernels import compiled, cpu, recordings
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.graphs import GraphedUNet, GraphedVAE, Graphs
from fulgurite.kernels.recordings import ALIGNED, Recording, Span, Workspace, plan
from fulgurite.models import VAE, UNet

needs_kernels = pytest.mark.skipif(not compiled.floats(), reason="the kernels in C are not compiled for this processor")
FEW = settings(max_examples=40, deadline=None)
NOWHERE = StorageWeakRef(torch.empty(0).untyped_storage())
sizes_and_uses = st.tuples(st.integers(1, 900), st.integers(0, 9))  # bytes, operations that it is needed for


@pytest.fixture(autouse=True)
def _drawing():
    with torch.inference_mode():
        yield


def of(graphs: Graphs) -> set[type]:
    return {type(graph) for graph in graphs.kept.values()}


@FEW
@given(st.lists(sizes_and_uses, max_size=40), st.integers(1, 5))
def test_what_is_needed_at_the_same_time_does_not_overlap(asked, at_once):
    spans = [
        Span(NOWHERE, 0, size, i // at_once, math.inf if longer == 9 else i // at_once + longer)
        for i, (size, longer) in enumerate(asked)
    ]
    total = plan(spans)
    for i, one in enumerate(spans):
        assert one.place % ALIGNED == 0
        assert one.place + one.size <= total
        for other in spans[:i]:
            apart = one.place + one.size <= other.place or other.place + other.size <= one.place
            assert apart or other.last < one.first
    assert total % ALIGNED == 0


def test_memory_is_used_again():
    spans = [Span(NOWHERE, 0, 1000, i, i + 1) for i in range(50)]  # each is read by who writes the next
    assert plan(spans) <= 2 * 1024 + 1024


def copied_into_part(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0] + 2, x.shape[1])
    y[1:-1].copy_(x)
    return y[1:-1] - y[:-2]


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x.flip(0),
    "in place": lambda x: x.clone().mul_(2).relu_(),
    "a view": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
    "beside": lambda x: torch.cat([x[:, :3], x[:, 3:] * 0.5], dim=1),
    "softmax": lambda x: x.softmax(-1),
    "product": lambda x: x @ x.T @ x,
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
    "turned": lambda x: x.T.contiguous().T,
    "constants": lambda x: x * torch.arange(x.shape[1]).sin(),
    "padded": lambda x: F.pad(x, (1, 1))[:, 1:-1] + 1,
    "into part": copied_into_part,
    "two at once": lambda x: sum(x.split(x.shape[1] // 2, dim=1), start=torch.zeros(())).repeat(1, 2),
    "halved": lambda x: x.double().half().float(),
    "masked": lambda x: torch.where(x > 0, x, x.exp()),
}


@FEW
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12), st.integers(0, 1000))
def test_a_function_replayed_is_that_function(names, seed):
    """Whatever torch's functions it is made of: of views, in place, or with an output whose place nobody can name."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x
        for name in names:
            x = STEPS[name](x)
        return x, first + x

    numbers = torch.Generator().manual_seed(seed)
    kept: Graphs[tuple[Tensor, Tensor]] = Graphs(Workspace())
    numbers_alone = True
    for _ in range(3):
        x = torch.randn(5, 6, generator=numbers)
        given = x.clone()
        for found, wanted in zip(kept(call, x), call(x), strict=True):
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
            numbers_alone = numbers_alone and not wanted.isnan().any()
        assert torch.equal(x, given)
    assert of(kept) == {Recording} or not numbers_alone


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + 1 if x.sum() > 0 else x - 1,
        lambda x: x * float(x.max()),
        lambda x: x[x > 0].sum(),
        lambda x: torch.zeros(3).add_(x),
        lambda x: (x.exp() + 1) * torch.tensor([1.0, 2, 3]),
        lambda x: x + torch.zeros(3)[1:].fill_(1).sum(),
    ],
)
def test_what_depends_on_numbers_in_another_way_is_not_replayed(call):
    kept: Graphs[Tensor] = Graphs(Workspace())
    for x in (torch.tensor([1.0, 2, 3]), torch.tensor([-1.0, -2, 1]), torch.tensor([5.0, 5, 5])):
        for _ in range(2):
            assert torch.equal(kept(call, x), call(x))
    assert Recording not in of(kept)


def test_random_numbers_are_drawn_anew():
    kept: Graphs[Tensor] = Graphs(Workspace())
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found = kept(lambda x: x + torch.rand(3), torch.ones(3))
        torch.manual_seed(seed)
        assert torch.equal(found, torch.ones(3) + torch.rand(3))


@needs_kernels
def test_a_constant_that_a_kernel_in_c_may_change_is_not_replayed():
    def call(x: Tensor) -> Tensor:
        bias = torch.ones(32) * 2  # gone when this ends
        return compiled.layer_norm(x, torch.ones(32) / 2, bias, 1e-5)

    kept: Graphs[Tensor] = Graphs(Workspace())
    for seed in range(3):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(kept(call, x), call(x))
    assert Recording not in of(kept)


def test_what_mostly_would_be_copied_is_not_replayed():
    def call(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.convolution(x, torch.ones(1, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        return x

    small_ones: Graphs[Tensor] = Graphs(Workspace())
    large_ones: Graphs[Tensor] = Graphs(Workspace())
    for _ in range(2):
        for kept, side in ((small_ones, 32), (large_ones, 512)):
            x = torch.randn(1, 1, side, side)
            assert torch.equal(kept(call, x), call(x))
    assert of(small_ones) == {Recording}
    assert Recording not in of(large_ones)


@pytest.mark.parametrize("wrong", ["in the same memory", "in too little"])
def test_a_recording_that_would_draw_something_else_is_not_kept(monkeypatch, caplog, wrong):
    """As where torch does on another machine what it does not do here."""

    def badly(spans: list[Span]) -> int:
        return 64 if wrong == "in too little" else plan(spans[:1])

    monkeypatch.setattr(recordings, "plan", badly)
    kept: Graphs[Tensor] = Graphs(Workspace())
    for seed in range(3):
        x = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(kept(lambda x: x.exp() * x.cos() + x, x), x.exp() * x.cos() + x)
    assert of(kept) == {type(None)}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("read", [lambda x: x.tolist()[0], lambda x: float(x.numpy()[0])])
def test_numbers_that_python_reads_unseen_are_noticed_by_the_second_call(read):
    kept: Graphs[Tensor] = Graphs(Workspace())
    for first in (1.0, 2.0, 3.0):
        x = torch.full((2,), first)
        assert torch.equal(kept(lambda x: x * read(x) + 1, x), x * first + 1)
    assert of(kept) == {type(None)}


def test_what_needs_much_memory_is_not_replayed(monkeypatch):
    monkeypatch.setattr(recordings, "MOST_BYTES", 4096)
    kept: Graphs[Tensor] = Graphs(Workspace())
    for size in (10, 10_000):
        kept(lambda x: x.exp() * 2, torch.ones(size))
    assert [type(graph) for graph in kept.kept.values()] == [Recording, type(None)]


def test_what_is_made_of_weights_alone_is_not_kept_where_it_is_large(monkeypatch):
    """As weights in half precision are, widened at each call."""
    monkeypatch.setattr(recordings, "MOST_CONSTANT", 1000)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.float()

    for size, kind in ((10, Recording), (30, type(None))):
        kept: Graphs[Tensor] = Graphs(Workspace())
        weight = torch.randn(size, size).half()
        for _ in range(2):
            x = torch.randn(2, size)
            assert torch.equal(kept(partial(call, weight=weight), x), call(x, weight))
        assert of(kept) == {kind}


def test_a_recording_is_replayed_in_any_mode():
    kept: Graphs[Tensor] = Graphs(Workspace())
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.enable_grad):
        with torch.inference_mode(False), mode():
            for size in (3, 100):
                assert kept(lambda x: x.exp() * 2, torch.zeros(size)).tolist() == [2] * size
    assert of(kept) == {Recording}


def test_numbers_of_another_kind_are_another_evaluation():
    kept: Graphs[Tensor] = Graphs(Workspace())
    for x in (torch.tensor([1, 2]), torch.tensor([2.5, 1.5]), torch.tensor([3, 4])):
        assert torch.equal(kept(lambda x: x * 2, x), x * 2)
    assert len(kept.kept) == 2


def test_a_network_that_is_dropped_is_gone_at_once():
    """Whether it is replayed or not, as where memory has to be made for another."""
    for most_bytes in (recordings.MOST_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recordings, "MOST_BYTES", most_bytes)
            network = UNet(small.UNET).requires_grad_(False).eval()
            graphed = GraphedUNet(network, Workspace())
            given = inputs(network, 1, 8, 0)
            for away in (None, guidance(network, 1, 0)) * 2:
                graphed(*given, away)
        gone = weakref.ref(network)
        gc.disable()
        try:
            del network, graphed
            assert gone() is None
        finally:
            gc.enable()


def test_outputs_are_the_callers_own_and_the_memory_is_everybodys():
    workspace = Workspace()
    first: Graphs[Tensor] = Graphs(workspace)
    second: Graphs[Tensor] = Graphs(workspace)
    doubled = [first(lambda x: (x + x).contiguous(), torch.full((4,), float(i))) for i in range(3)]
    second(lambda x: x * 3, torch.ones(100_000))
    tripled = second(lambda x: x * 3, torch.ones(100_000))  # in larger memory
    doubled.append(first(lambda x: (x + x).contiguous(), torch.full((4,), 3.0)))
    workspace.renew()
    doubled.append(first(lambda x: (x + x).contiguous(), torch.full((4,), 4.0)))
    assert [row.tolist() for row in doubled] == [[2.0 * i] * 4 for i in range(5)]
    assert (tripled == 3).all()


@pytest.fixture(scope="module", params=DTYPES)
def unet(request: Any) -> tuple[UNet, torch.dtype]:
    torch.manual_seed(0)
    network = small.roughened(UNet(small.UNET)).requires_grad_(False).eval().to(request.param)
    fuse(network)
    cpu.accelerate(network)
    return network, request.param


def in_dtype(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The latents, the prompt and its pooled state."""
    return [value.to(dtype) if i in (0, 2, 3) else value for i, value in enumerate(values)]


@pytest.mark.parametrize("guided", [False, True])
def test_a_networks_replays_have_its_bits(unet, guided):
    """Other numbers, timesteps, prompts, sizes and strengths than what was written down; odd sides among them."""
    network, dtype = unet
    graphed = GraphedUNet(network, Workspace())
    for seed in range(3):
        for rows, side in ((1, 8), (3, 8), (1, 11)):
            given = in_dtype(inputs(PlainRead(network, dtype), rows, side, seed), dtype)
            away = guidance(PlainRead(network, dtype), rows, seed) if guided else None
            assert torch.equal(graphed(*given, away), network(*given, away))
    assert len(graphed.graphs.kept) == 3
    if dtype == torch.float32 and compiled.floats():
        assert of(graphed.graphs) == {Recording}


class PlainRead:
    """A network whose ``read`` takes float32, as these tests draw their prompts."""

    def __init__(self, network: UNet, dtype: torch.dtype) -> None:
        self.config, self.read = network.config, lambda context: network.read(context.to(dtype))


def test_a_decoders_replays_have_its_bits():
    torch.manual_seed(0)
    vae = VAE(small.VAE).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    cpu.accelerate(vae)
    graphed = GraphedVAE(vae, Workspace())
    for side in (8, 11, 8, 8):
        latents = torch.randn(1, small.VAE.latent_channels, side, side)
        assert torch.equal(graphed.decode(latents), vae.decode(latents))


def test_threads_have_recordings_of_their_own_number_and_do_not_disturb_each_other():
    """Kernels in C have a place to write to for each thread."""
    torch.manual_seed(0)
    network = UNet(small.UNET).requires_grad_(False).eval()
    fuse(network)
    cpu.accelerate(network)
    graphed = GraphedUNet(network, Workspace())
    asked = [inputs(network, 1, 8 + 4 * (i % 2), i) for i in range(24)]
    before = torch.get_num_threads()
    wanted = [network(*each) for each in asked]

    def draw(each: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return graphed(*each)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(draw, asked))
    assert all(map(torch.equal, found, wanted))
    try:
        torch.set_num_threads(before + 2)
        for each in asked[:4]:
            torch.testing.assert_close(graphed(*each), network(*each))
    finally:
        torch.set_num_threads(before)
    assert len(graphed.graphs.kept) == 4


@needs_weights
def test_the_embedded_models_pictures_are_the_same(monkeypatch):
    drawn = Pipeline.load(f"{SPARK}-lightning", steps=2)
    networks = (*drawn.networks.text_encoders, drawn.networks.unet, drawn.networks.vae)
    requests = [
        Request("a red fox", num_steps=2, seed=1),
        Request("a blue rocket", num_steps=2, seed=2, negative_prompt="fire", guidance=9),
    ] * 2
    found = [drawn.draw(request).image.tobytes() for request in requests]
    if compiled.floats() and drawn.dtype == torch.float32:
        assert [of(network.graphs) for network in networks] == [{Recording}] * 4
        assert [len(network.graphs.kept) for network in networks] == [1, 1, 2, 1]
    for network in networks:
        monkeypatch.setattr(network, "graphs", lambda call, *inputs, of=None: call(*inputs))
    assert found == [drawn.draw(request).image.tobytes() for request in requests]


@needs_weights
def test_an_error_leaves_nothing_behind():
    drawn = Pipeline.load(f"{SPARK}-lightning", steps=1)
    request = Request("a red fox", num_steps=1, seed=1)
    wanted = drawn.draw(request).image.tobytes()
    unet = drawn.networks.unet
    for shape in ((1, 3, 16, 16), (1, 16, 8, 8)):
        with pytest.raises((RuntimeError, AssertionError, IndexError)):
            unet(torch.zeros(shape), *(torch.zeros(1, 5) for _ in range(4)))
    assert compiled.WRITER.get() is None
    assert drawn.draw(request).image.tobytes() == wanted
