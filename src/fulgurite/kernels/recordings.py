"""A network's evaluations on a CPU, written down once and replayed: what CUDA graphs are to a GPU.

A replay is the same calls of the same functions without the Python between them, and in memory that was planned: what
a layer gives is written to where something is no longer needed, which most often is in the cache still.
"""

import math
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fulgurite.kernels import compiled, cpu

Output = TypeVar("Output", Tensor, tuple[Tensor, Tensor])
Operation = tuple[Callable[..., object], Sequence[Any], dict[str, Any]]  # what is called, and with what
COMPOSITE = DispatchKey.CompositeImplicitAutograd
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ALIGNED = 64  # bytes, as torch's own memory is
# Bytes that a replay may copy: what a function gives that cannot be told where to put it. With more, and more than this
# share of what an evaluation writes, nothing is gained: it is large layers of oneDNN's.
FEW_COPIED, SHARE_COPIED = 1 << 20, 1 / 16


@dataclass(eq=False)
class Memory:
    """A tensor's memory while an evaluation is written down, and the operations from which to which it is needed."""

    start: int  # the address that it had then
    size: int  # bytes
    first: int
    last: float
    constant: bool = False  # what it holds depends on no input
    place: int = 0  # planned: bytes from the workspace's start


@dataclass(frozen=True)
class Pointer:
    memory: Memory
    offset: int  # bytes

    def within(self, workspace: Tensor) -> int:
        return workspace.data_ptr() + self.memory.place + self.offset


@dataclass(frozen=True)
class View:
    """A tensor in a memory."""

    memory: Memory
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # numbers

    def within(self, workspace: Tensor) -> Tensor:
        offset = self.memory.place // self.dtype.itemsize + self.offset
        return workspace.view(self.dtype).as_strided(self.shape, self.stride, offset)


class Recorder(TorchDispatchMode):
    """Writes down what is called while it is active, by torch and by ``compiled.call``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.memories: list[Memory] = []
        self.why_not = ""  # it cannot be replayed: nothing is written down any more
        self._copied = 0
        self._at: dict[int, Memory] = {}  # what is where now, by its start
        self._starts: list[int] = []  # its keys in order

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep this class out of what is compiled

    def input(self, tensor: Tensor) -> View:
        """A tensor that other values will be in."""
        self._appears(tensor)
        return self.view(tensor)

    def output(self, tensor: Tensor) -> View | Tensor:
        """A tensor that is needed afterwards."""
        view = self.view(tensor)
        if isinstance(view, View):
            view.memory.last = math.inf
        return view

    def view(self, value: Any) -> Any:
        """A tensor as a place in memory that can be planned; anything else, weights and constants, as it is."""
        if is_strided(value):
            memory = self._memory(start_of(value))
            if memory and not memory.constant:
                return View(memory, value.dtype, value.shape, value.stride(), value.storage_offset())
        return value

    def call(self, function: Any, arguments: Sequence[Any]) -> None:
        """Writes a call of a kernel in C down."""
        pairs = zip(arguments, function.argtypes, strict=True)
        kept = [self._pointer(a) if a and kind is compiled.POINTER else a for a, kind in pairs]
        if not self.why_not:
            self.operations.append((function, kept, {}))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not self.why_not and of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        if not self.why_not:
            self._write(func, args, kwargs, found)
        return found

    def _write(self, func: OpOverload, args: tuple, kwargs: dict, found: Any) -> None:
        outputs = tree_leaves(found)
        if func._overloadpacket.__name__ in EMPTY:
            self._appears(found)
            return
        kept, keywords = tree_map(self.view, (args, kwargs))
        constant = not any(isinstance(leaf, View) for leaf in tree_leaves((kept, keywords)))
        starts = {start_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_strided(leaf)}
        if not constant and (shaped_by_numbers(func, args) or not all(map(is_strided, outputs))):
            self._give_up(f"what is done next depends on what {func} gives")
        elif func._schema.is_mutable and isinstance(self.view(outputs[0]), View):
            self.operations.append((func, kept, keywords))
        elif func._schema.is_mutable or (constant and torch.Tag.nondeterministic_seeded in func.tags):
            self._give_up(f"{func} gives other constants each time")
        elif constant:
            for output in filter(is_strided, outputs):
                self._appears(output, constant=True)
        elif not any(start_of(output) in starts for output in outputs):  # they are no views of its inputs
            self._write_new(func, kept, keywords, outputs)

    def _write_new(self, func: OpOverload, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Writes a function down that gives new tensors."""
        for output in outputs:
            self._appears(output)
        into = [self.view(output) for output in outputs]
        if told := told_where(func):
            function, names = told
            self.operations.append((function, args, {**kwargs, **dict(zip(names, into, strict=True))}))
            return
        self._copied += sum(output.nbytes for output in outputs)
        self.operations.append((call_and_copy, (func, into, args, kwargs), {}))

    def copies_too_much(self) -> bool:
        written = sum(memory.size for memory in self.memories)
        return self._copied > max(FEW_COPIED, SHARE_COPIED * written)

    def _give_up(self, why: str) -> None:
        self.why_not = why
        self.operations.clear()

    def _appears(self, tensor: Tensor, constant: bool = False) -> None:
        """A tensor's memory is new: what was there before is gone."""
        start, size, now = start_of(tensor), tensor.untyped_storage().nbytes(), len(self.operations)
        low, high = bisect_left(self._starts, start), bisect_left(self._starts, start + size)
        for gone in self._starts[low:high]:
            del self._at[gone]
        self._starts[low:high] = [start]
        self._at[start] = memory = Memory(start, size, now, now, constant)
        if not constant:
            self.memories.append(memory)

    def _memory(self, address: int) -> Memory | None:
        """What an address lies in, needed now; None if it was there before, as a weight is."""
        place = bisect_right(self._starts, address) - 1
        memory = self._at[self._starts[place]] if place >= 0 else None
        if memory is None or address >= memory.start + memory.size:
            return None
        memory.last = max(memory.last, len(self.operations))
        return memory

    def _pointer(self, address: int) -> Pointer | int:
        memory = self._memory(address)
        if memory and memory.constant:
            self._give_up("a kernel in C takes or changes a constant")
        return Pointer(memory, address - memory.start) if memory else address


def is_strided(value: Any) -> bool:
    """Whether it is a tensor whose memory is known, which those that oneDNN has packed are not."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def start_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@cache
def of_others(func: OpOverload) -> bool:
    """Whether a function is made of others, by torch itself: not by Python, which may make it of other ones."""
    return COMPOSITE not in func.py_kernels and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


def shaped_by_numbers(func: OpOverload, args: tuple) -> bool:
    """Whether the shape of what a function gives depends on the numbers that it is given."""
    if func is torch.ops.aten.index.Tensor:
        return any(each.dtype in (torch.bool, torch.uint8) for each in tree_leaves(args) if isinstance(each, Tensor))
    return torch.Tag.dynamic_output_shape in func.tags


@cache
def told_where(func: OpOverload) -> tuple[OpOverload, list[str]] | None:
    """The same function for which its caller says where its output goes, and the names of these arguments."""

    def inputs(of: OpOverload) -> list[tuple[str, str]]:
        return [(each.name, str(each.type)) for each in of._schema.arguments if not each.is_out]

    for name in func._overloadpacket.overloads():
        other = getattr(func._overloadpacket, name)
        names = [each.name for each in other._schema.arguments if each.is_out]
        if torch.Tag.generated in other.tags:  # it calls the function and copies what that gives
            continue
        if len(names) == len(func._schema.returns) and inputs(other) == inputs(func):
            return other, names
    return None


def call_and_copy(func: Callable[..., Any], into: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> None:
    for place, output in zip(into, tree_leaves(func(*args, **kwargs)), strict=True):
        place.copy_(output)


def plan(memories: Iterable[Memory]) -> int:
    """Gives each memory the first place where none that is needed at the same time lies; returns the bytes in all."""
    there: list[Memory] = []  # in order of their places
    total = 0
    for memory in memories:  # in the order in which they are needed
        there = [other for other in there if other.last >= memory.first]
        for other in there:
            if other.place - memory.place >= memory.size:
                break
            memory.place = other.place + whole(other.size)
        insort(there, memory, key=lambda each: each.place)
        total = max(total, memory.place + whole(memory.size))
    return total


def whole(size: int) -> int:
    """The bytes that a memory takes."""
    return -(-size // ALIGNED) * ALIGNED


class Recording(Generic[Output]):
    """A function of tensors as it was at one call: shapes, and whatever is no tensor, are part of it."""

    def __init__(self, recorder: Recorder, inputs: Sequence[View], output: Any, workspace: "Workspace") -> None:
        """``output``: views, or constants."""
        self._written = recorder.operations, inputs, output
        self._workspace, self._size = workspace, plan(recorder.memories)
        self._bound: Any = None

    def __call__(self, *inputs: Tensor) -> Output:
        """The function of other tensors of these shapes; the output is the caller's own."""
        if not self._bound:
            memory = self._workspace.room_for(self, self._size)
            self._bound = tree_map_only((Pointer, View), lambda each: each.within(memory), self._written)
        operations, mine, output = self._bound
        for one, theirs in zip(mine, inputs, strict=True):
            one.copy_(theirs)
        for function, arguments, keywords in operations:
            function(*arguments, **keywords)
        found: Output = tree_map(Tensor.clone, output)
        return found

    def unbind(self) -> None:
        """Lets go of the workspace."""
        self._bound = None


class Workspace:
    """The memory that recordings share, one of which runs at a time: they keep all cores busy anyway."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory, self._recordings = torch.empty(0, dtype=torch.uint8), WeakSet[Recording]()

    def room_for(self, recording: Recording, size: int) -> Tensor:
        """So many bytes."""
        if len(self._memory) < size:
            self.renew()
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._recordings.add(recording)
        return self._memory

    def renew(self) -> None:
        """Gives the memory up; recordings get other when they run again."""
        for recording in self._recordings:
            recording.unbind()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def capture(self, call: Callable[..., Output], inputs: Sequence[Tensor]) -> tuple[Callable[..., Output], Output]:
        """A call's recording, or itself where that cannot be replayed or gains nothing; and what it gives now."""
        recorder = Recorder()
        inputs = [tensor.clone() for tensor in inputs]
        views = [recorder.input(tensor) for tensor in inputs]
        with recorder, compiled.written_down_by(recorder.call):
            found = call(*inputs)
        if recorder.why_not or recorder.copies_too_much():
            return call, found
        recording: Recording[Output] = Recording(recorder, views, tree_map(recorder.output, found), self)
        cpu.give_back_memory()  # what the layers took is not needed for them again
        return recording, found


WORKSPACE = Workspace()  # this process's
