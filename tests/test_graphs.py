"""Networks as CUDA graphs, simulated on the CPU: each operation of a capture is written down, and replayed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import small_sdxl as small
import torch
from conftest import SPARK, needs_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulgurite import Request
from fulgurite.engine import Loader
from fulgurite.kernels import compiled, graphs
from fulgurite.kernels.fused import fuse
from fulgurite.kernels.graphs import Graph, GraphedEncoder, GraphedUNet, GraphedVAE, Pool
from fulgurite.models import AttentionGuidance, CLIPTextEncoder, UNet


class Simulated(TorchDispatchMode):
    """A graph as CUDA's: a replay runs the same operations on the same memory, and no Python of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            for then, now in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(then, Tensor) and then.data_ptr() != now.data_ptr():
                    then.copy_(now)


class Stream:
    def __init__(self, device: int = 0) -> None: ...

    def wait_stream(self, other: "Stream") -> None: ...


POOLS: list[object] = []  # of the captures


@contextmanager
def capture(graph: Simulated, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
    POOLS.append(pool)
    with graph:
        yield


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_ins = {
        "CUDAGraph": Simulated, "Stream": Stream, "current_stream": Stream, "graph": capture,
        "current_device": lambda: 0,
        "graph_pool_handle": object, "stream": lambda stream: torch.inference_mode(),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    graphs.side_stream.cache_clear()
    POOLS.clear()
    with torch.inference_mode():
        yield
    graphs.side_stream.cache_clear()


def test_a_graph_knows_what_its_inputs_hold_and_nothing_else() -> None:
    """Of the simulation too: what Python decides at the capture stays decided."""
    factor = 2.0
    graph = Graph(lambda x: (x * factor).flip(0), [torch.ones(3)])
    factor = 3.0
    assert graph(torch.arange(3.0)).tolist() == [4, 2, 0]
    kept = graph(torch.ones(3))
    assert graph(torch.zeros(3)).tolist() == [0, 0, 0]
    assert kept.tolist() == [2, 2, 2]  # the caller's own, though the graph writes to one place


def test_a_text_encoder_reads_other_prompts_by_its_graph() -> None:
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(small.SECOND).requires_grad_(False).eval()
    graphed = GraphedEncoder(encoder, Pool())
    end = small.SECOND.eos_token_id
    for prompts in ([[0, 5, end]], [[0, end, end]], [[0, 7, end], [0, end, end]]):
        ids = torch.tensor(prompts)
        for found, wanted in zip(graphed(ids), encoder(ids), strict=True):
            assert torch.equal(found, wanted)
    assert len(graphed.graphs.kept) == 2


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    network = small.roughened(UNet(small.UNET)).requires_grad_(False).eval()
    fuse(network)
    return network


def inputs(unet: UNet, rows: int, side: int, seed: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=numbers)

    config = unet.config
    x, context, pooled = drawn(config.in_channels, side, side), drawn(9, config.cross_attention_dim), config.pooled_dim
    timesteps = torch.randint(1000, (rows,), generator=numbers)
    return [x, timesteps, unet.read(context), drawn(pooled), 512 + drawn(6)]


def guidance(unet: UNet, rows: int, seed: int, tau: float = 2.5) -> AttentionGuidance:
    numbers = torch.Generator().manual_seed(seed + 1000)
    context = torch.randn(rows, 9, unet.config.cross_attention_dim, generator=numbers)
    return AttentionGuidance(unet.read(context), 1 + (torch.arange(rows) + seed) % 3, tau)


@pytest.mark.parametrize("guided", [False, True])
def test_replays_have_the_networks_bits(unet: UNet, guided: bool) -> None:
    """Other numbers, timesteps, prompts, sizes and strengths than those that were captured."""
    graphed = GraphedUNet(unet, Pool())
    for seed in range(3):
        for rows, side in ((1, 8), (2, 8), (1, 12)):
            given = inputs(unet, rows, side, seed)
            away = guidance(unet, rows, seed) if guided else None
            assert torch.equal(graphed(*given, away), unet(*given, away))
    assert len(graphed.graphs.kept) == 3


def test_a_capture_that_fails_leaves_the_others_other_memory(unet: UNet) -> None:
    pool = Pool()
    first, second = GraphedUNet(unet, pool), GraphedUNet(unet, pool)
    first(*inputs(unet, 1, 8, 0))
    second(*inputs(unet, 1, 8, 0))
    with pytest.raises(RuntimeError):
        first(*inputs(unet, 1, 8, 0)[:4], torch.ones(1, 5))
    second(*inputs(unet, 2, 8, 0))
    shared, again, other = POOLS
    assert shared is again is not other
    assert len(first.graphs.kept) == 1


def test_tau_is_part_of_a_graph(unet: UNet) -> None:
    graphed, given = GraphedUNet(unet, Pool()), inputs(unet, 1, 8, 2)
    for tau in (1.0, 2.5, 1.0):
        away = guidance(unet, 1, 2, tau)
        assert torch.equal(graphed(*given, away), unet(*given, away))


def test_the_oldest_graph_goes(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    graphed = GraphedUNet(unet, Pool())
    for rows in (1, 2, 1, 3, 1):
        given = inputs(unet, rows, 8, rows)
        assert torch.equal(graphed(*given), unet(*given))
    assert [key[0][0][0] for key in graphed.graphs.kept] == [3, 1]  # rows


@needs_weights
def test_pictures_by_graphs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loader; without the kernels in C, since what these do the simulation does not see."""
    monkeypatch.setattr(compiled, "where", lambda name, dtype: None)
    plain, graphed = (
        Loader("cpu", precision="float32", cuda_graphs=wanted)(f"{SPARK}-lightning", 2) for wanted in (False, True)
    )
    assert isinstance(graphed.networks.unet, GraphedUNet)
    assert isinstance(graphed.networks.vae, GraphedVAE)
    assert {type(encoder) for encoder in graphed.networks.text_encoders} == {GraphedEncoder}
    for request in (
        Request("a red fox", num_steps=2, seed=1),
        Request("a blue rocket", num_steps=2, seed=2, negative_prompt="fire", width=512),
    ):
        alike = graphed.draw(request).image.tobytes() == plain.draw(request).image.tobytes()
        assert alike  # pytest would compare megabytes for minutes
    assert len(set(map(id, POOLS))) == 1  # of all networks
    known = len(POOLS)
    assert graphed.agrees((32, 32), [1, 1])
    assert len(POOLS) == known
