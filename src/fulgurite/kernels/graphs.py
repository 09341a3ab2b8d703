"""A network's evaluations as graphs: all of a step's kernels launched at once, none waits for Python.

On a CPU they are recordings (fulgurite.kernels.recordings), on a GPU CUDA graphs: the tests run a simulation of these
on a CPU; bench/gpu.py runs and measures them on a GPU.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fulgurite.models import VAE, AttentionGuidance, CLIPTextEncoder, UNet

Output = TypeVar("Output", Tensor, tuple[Tensor, Tensor])
MOST = 32  # graphs of a network: of each number of rows and size, guided and not
REHEARSALS = 3  # of a call before it is captured


@cache
def side_stream(device: int, thread: int) -> torch.cuda.Stream:
    """The one that a thread captures graphs on: for each that it knows cuBLAS keeps memory."""
    return torch.cuda.Stream(device)


class Memory(Protocol):
    """What graphs share which never run at once, in any order: what each gives is copied at once."""

    @property
    def lock(self) -> AbstractContextManager: ...

    def capture(
        self, call: Callable[..., Output], inputs: Sequence[Tensor]
    ) -> tuple[Callable[..., Output] | None, Output]:
        """A call's graph, where there can be one, and what it gives for these inputs."""
        ...

    def replay(
        self, graph: Any, call: Callable[..., Output], inputs: Sequence[Tensor]
    ) -> tuple[Callable[..., Output] | None, Output]:
        """The call's graph, if it is to be kept, and what it gives for other inputs."""
        ...

    def renew(self) -> None:
        """Takes other memory from now on."""
        ...


class Graph(Generic[Output]):
    """A function of tensors as it was at one call: shapes, and whatever is no tensor, are part of it."""

    def __init__(self, call: Callable[..., Output], inputs: Sequence[Tensor], pool: Any = None) -> None:
        """``pool``: torch's handle of memory, which graphs share that never run at once."""
        self._graph, self._inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        # Libraries choose their kernels, and kernels are compiled, before the capture: in it they could not be.
        side = side_stream(torch.cuda.current_device(), threading.get_ident())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        # What other threads do meanwhile, such as drawing a preview, is no part of it and does not end it.
        with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._output: Output = call(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Output:
        """The function of other tensors of these shapes; the output is the caller's own."""
        for mine, theirs in zip(self._inputs, inputs, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        output = self._output
        return output.clone() if isinstance(output, Tensor) else (output[0].clone(), output[1].clone())


class Pool:
    """The memory of CUDA graphs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.renew()

    def renew(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[..., Output], inputs: Sequence[Tensor]) -> tuple[Callable[..., Output], Output]:
        try:
            graph = Graph(call, inputs, self.handle)
        except BaseException:
            self.renew()  # it may leave torch's account of this memory wrong
            raise
        return graph, graph(*inputs)

    def replay(
        self, graph: Graph[Output], call: Callable[..., Output], inputs: Sequence[Tensor]
    ) -> tuple[Callable[..., Output], Output]:
        return graph, graph(*inputs)


class Graphs(Generic[Output]):
    """A network's graphs, each captured when what it is of first comes; the least recently used goes."""

    def __init__(self, memory: Memory) -> None:
        self.kept: OrderedDict[tuple[object, ...], Callable[..., Output] | None] = OrderedDict()  # None: no graph
        self._memory = memory

    def __call__(self, call: Callable[..., Output], *inputs: Tensor, of: object = None) -> Output:
        """The network's call. ``of``: what it depends on besides its inputs."""
        key = *((tensor.shape, tensor.dtype) for tensor in inputs), of, torch.get_num_threads()
        # Streams are the current device's, whichever the tensors are on.
        with self._memory.lock, torch.cuda.device_of(inputs[0]):
            if key not in self.kept:
                if len(self.kept) == MOST:
                    self.kept.popitem(last=False)
                self.kept[key], found = self._memory.capture(call, inputs)
                return found
            self.kept.move_to_end(key)
            if graph := self.kept[key]:
                self.kept[key], found = self._memory.replay(graph, call, inputs)
                return found
        return call(*inputs)


class GraphedEncoder(nn.Module):
    """A text encoder that reads prompts by graphs."""

    def __init__(self, encoder: CLIPTextEncoder, memory: Memory) -> None:
        super().__init__()
        self.encoder = encoder
        self.graphs: Graphs[tuple[Tensor, Tensor]] = Graphs(memory)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's own ``forward``."""
        return self.graphs(self.encoder, input_ids)


class GraphedVAE(nn.Module):
    """A VAE that decodes by graphs: one for each size."""

    def __init__(self, vae: VAE, memory: Memory) -> None:
        super().__init__()
        self.vae, self.config = vae, vae.config
        self.graphs: Graphs[Tensor] = Graphs(memory)

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's own ``decode``."""
        return self.graphs(self.vae.decode, latents)


class GraphedUNet(nn.Module):
    """A UNet that draws by graphs: one for each number of rows, size and guidance.

    It runs the kernels that the network runs at such a call, so a row's bits stay what they are.
    """

    def __init__(self, unet: UNet, memory: Memory) -> None:
        super().__init__()
        self.unet, self.read = unet, unet.read
        self.graphs: Graphs[Tensor] = Graphs(memory)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        sizes: Tensor,
        guidance: AttentionGuidance | None = None,
    ) -> Tensor:
        """The network's own ``forward``."""
        inputs = x, timestep, context, pooled, sizes
        if not guidance:
            return self.graphs(self.unet, *inputs)
        guided = partial(self._guided, guidance.tau)
        return self.graphs(guided, *inputs, guidance.context, guidance.strength, of=guidance.tau)

    def _guided(self, tau: float, *inputs: Tensor) -> Tensor:
        *told, avoided, strength = inputs
        return self.unet(*told, AttentionGuidance(avoided, strength, tau))


GRAPHED = GraphedUNet, GraphedVAE, GraphedEncoder
