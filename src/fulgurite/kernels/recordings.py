"""A network's evaluations on a CPU, written down once and replayed: what CUDA graphs are to a GPU.

A replay is the same calls of the same functions without the Python between them, and in memory that was planned: what
a layer gives is written to where something is no longer needed, which most often is in the cache still. What Python
does with numbers is no part of it: an evaluation that reads any is not replayed. Only of ``tolist`` and ``numpy`` torch
tells nobody, so no network may use them.
"""

import logging
import math
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fulgurite.kernels import compiled, cpu

log = logging.getLogger("fulgurite")
Output = TypeVar("Output", Tensor, tuple[Tensor, Tensor])
Operation = tuple[Callable[..., object], Sequence[Any], dict[str, Any]]  # what is called, and with what
COMPOSITE = DispatchKey.CompositeImplicitAutograd
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = torch.ops.aten.clone.default, torch.ops.aten._to_copy.default
ALIGNED = 64  # bytes, as torch's own memory is
# Bytes that a replay may copy: what a function gives that cannot be told where to put it. With more, and more than this
# share of what an evaluation writes, nothing is gained: it is large layers of oneDNN's.
FEW_COPIED, SHARE_COPIED = 1 << 20, 1 / 16
LARGE = 1 << 26  # bytes of a recording: it takes a while to give back what less needs
MOST_CONSTANT = 1 << 24  # bytes that depend on no input, which a recording keeps
MOST_BYTES = 1 << 29  # of a recording: what needs more hardly feels Python, and is in no cache


@dataclass(eq=False)
class Span:
    """A tensor's memory while an evaluation is written down, and the operations from which to which it is needed."""

    storage: StorageWeakRef
    start: int  # the address that it had then
    size: int  # bytes
    first: int
    last: float
    constant: bool = False  # what it holds depends on no input
    place: int = 0  # planned: bytes from the workspace's start


@dataclass(frozen=True)
class Pointer:
    span: Span
    offset: int  # bytes

    def within(self, workspace: Tensor) -> int:
        return workspace.data_ptr() + self.span.place + self.offset


@dataclass(frozen=True)
class View:
    """A tensor in a span."""

    span: Span
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # numbers

    def within(self, workspace: Tensor) -> Tensor:
        offset = self.span.place // self.dtype.itemsize + self.offset
        return workspace.view(self.dtype).as_strided(self.shape, self.stride, offset)


def within(workspace: Tensor, value: Any) -> Any:
    """What a value is in a workspace, if it is in one."""
    return value.within(workspace) if isinstance(value, Pointer | View) else value


class Recorder(TorchDispatchMode):
    """Writes down what is called while it is active, by torch and by ``compiled.call``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.spans: list[Span] = []
        self.why_not = ""  # it cannot be replayed: nothing is written down any more
        self._copied = self._constant = 0  # bytes
        self._at: dict[int, Span] = {}  # what is where now, by its start
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
            view.span.last = math.inf
        return view

    def view(self, value: Any) -> Any:
        """A tensor as a place in memory that can be planned; anything else, weights and constants, as it is."""
        if is_strided(value):
            span = self._span(start_of(value))
            if span and not span.constant:
                return View(span, value.dtype, value.shape, value.stride(), value.storage_offset())
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
        if func._overloadpacket.__name__ in EMPTY:
            self._appears(found)
            return
        outputs, changes = leaves_of(found), func._schema.is_mutable
        starts = {start_of(leaf) for leaf in leaves_of((args, kwargs)) if is_strided(leaf)}
        new = [each for each in outputs if not (is_strided(each) and start_of(each) in starts)]
        if not (new or changes):  # views of its inputs
            return
        kept, keywords = mapped(self.view, args), mapped(self.view, kwargs)
        if not any(isinstance(leaf, View) for leaf in leaves_of((kept, keywords))):
            if changes or torch.Tag.nondeterministic_seeded in func.tags:
                self._give_up(f"{func} gives other constants each time")
            for output in filter(is_strided, new):
                self._appears(output, constant=True)
                self._constant += output.nbytes
            if self._constant > MOST_CONSTANT:
                self._give_up("it would keep much that it is quicker to compute anew")
        elif shaped_by_numbers(func, args) or not all(map(is_strided, outputs)):
            self._give_up(f"what is done next may depend on what {func} gives")
        elif changes and not isinstance(self.view(outputs[0]), View):
            self._give_up(f"{func} changes a constant")
        elif changes:
            self.operations.append((func, kept, keywords))
        else:
            self._write_new(func, kept, keywords, outputs)

    def _write_new(self, func: OpOverload, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Writes a function down that gives new tensors."""
        for output in outputs:
            self._appears(output)
        into, named = [self.view(output) for output in outputs], with_outputs_named(func)
        if func in COPIES:
            self.operations.append((Tensor.copy_, (into[0], args[0]), {}))
        elif named and len(named[1]) == len(into):
            self.operations.append((named[0], args, {**kwargs, **dict(zip(named[1], into, strict=True))}))
        else:
            self._copied += sum(output.nbytes for output in outputs)
            self.operations.append((call_and_copy, (func, into, args, kwargs), {}))

    def copies_too_much(self) -> bool:
        written = sum(span.size for span in self.spans)
        return self._copied > max(FEW_COPIED, SHARE_COPIED * written)

    def _give_up(self, why_not: str) -> None:
        self.why_not = why_not
        self.operations.clear()  # and what they keep

    def _appears(self, tensor: Tensor, constant: bool = False) -> None:
        """A tensor's memory is new: what was there before is gone."""
        storage, start, now = tensor.untyped_storage(), start_of(tensor), len(self.operations)
        low, high = bisect_left(self._starts, start), bisect_left(self._starts, start + storage.nbytes())
        for gone in self._starts[low:high]:
            del self._at[gone]
        self._starts[low:high] = [start]
        self._at[start] = span = Span(StorageWeakRef(storage), start, storage.nbytes(), now, now, constant)
        if not constant:
            self.spans.append(span)

    def _span(self, address: int) -> Span | None:
        """What an address lies in, needed now; None if nobody was told of it: it is a weight's, or a constant's."""
        place = bisect_right(self._starts, address) - 1
        span = self._at[self._starts[place]] if place >= 0 else None
        if span is None or address >= span.start + span.size or span.storage.expired():
            return None
        span.last = max(span.last, len(self.operations))
        return span

    def _pointer(self, address: int) -> Pointer | int:
        span = self._span(address)
        if span and span.constant:
            self._give_up("a kernel in C takes or changes a constant")
        return Pointer(span, address - span.start) if span else address


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with everything in its lists, tuples and dictionaries changed: as torch's ``tree_map``, and quicker."""
    if type(value) in (list, tuple):
        return type(value)([mapped(change, each) for each in value])
    return {key: mapped(change, each) for key, each in value.items()} if type(value) is dict else change(value)


def leaves_of(value: Any) -> list[Any]:
    """Everything in a value's lists, tuples and dictionaries."""
    if type(value) is dict:
        value = list(value.values())
    return [leaf for each in value for leaf in leaves_of(each)] if type(value) in (list, tuple) else [value]


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
        return any(each.dtype in (torch.bool, torch.uint8) for each in leaves_of(args) if isinstance(each, Tensor))
    return torch.Tag.dynamic_output_shape in func.tags


@cache
def with_outputs_named(func: OpOverload) -> tuple[OpOverload, list[str]] | None:
    """The same function for which its caller says where its output goes, and the names of these arguments."""

    def inputs(of: OpOverload) -> list[tuple[str, str]]:
        return [(each.name, str(each.type)) for each in of._schema.arguments if not each.is_out]

    for name in func._overloadpacket.overloads():
        other = getattr(func._overloadpacket, name)
        names = [each.name for each in other._schema.arguments if each.is_out]
        # One that torch has generated calls the function and copies what that gives.
        if names and inputs(other) == inputs(func) and torch.Tag.generated not in other.tags:
            return other, names
    return None


def call_and_copy(func: Callable[..., Any], into: Sequence[Tensor], args: Sequence[Any], kwargs: Any) -> None:
    for place, output in zip(into, leaves_of(func(*args, **kwargs)), strict=True):
        place.copy_(output)


def plan(spans: Iterable[Span]) -> int:
    """Gives each span the first place where none that is needed at the same time lies; returns the bytes in all."""
    there: list[Span] = []  # in order of their places
    total = 0
    for span in spans:  # in the order in which they are needed
        there = [other for other in there if other.last >= span.first]
        for other in there:
            if other.place - span.place >= span.size:
                break
            span.place = other.place + whole(other.size)
        insort(there, span, key=lambda each: each.place)
        total = max(total, span.place + whole(span.size))
    return total


def whole(size: int) -> int:
    """The bytes that a span takes."""
    return -(-size // ALIGNED) * ALIGNED


class Recording(Generic[Output]):
    """A function of tensors as it was at one call: shapes, and whatever is no tensor, are part of it."""

    def __init__(self, recorder: Recorder, inputs: Sequence[View], output: Any, workspace: "Workspace") -> None:
        """``output``: views, or constants."""
        self._written = recorder.operations, inputs, output
        self._workspace, self.size = workspace, plan(recorder.spans)  # bytes
        self._bound: Any = None
        self.tried = False

    def __call__(self, *inputs: Tensor) -> Output:
        """The function of other tensors of these shapes; the output is the caller's own."""
        if not self._bound:
            memory = self._workspace.room_for(self)
            with torch.inference_mode(False):  # else it could be replayed in that mode alone
                self._bound = mapped(partial(within, memory), self._written)
        operations, mine, output = self._bound
        for one, theirs in zip(mine, inputs, strict=True):
            one.copy_(theirs)
        for function, arguments, keywords in operations:
            function(*arguments, **keywords)
        found: Output = mapped(Tensor.clone, output)
        return found

    def unbind(self) -> None:
        """Lets go of the workspace."""
        self._bound = None


class Workspace:
    """The memory that recordings share, one of which runs at a time: they keep all cores busy anyway."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._memory, self._recordings = torch.empty(0, dtype=torch.uint8), WeakSet[Recording]()

    def room_for(self, recording: Recording) -> Tensor:
        """Its bytes, whatever is in them."""
        if len(self._memory) < recording.size:
            self.renew()
            with torch.inference_mode(False):
                self._memory = torch.empty(recording.size, dtype=torch.uint8)
        self._recordings.add(recording)
        return self._memory

    def renew(self) -> None:
        """Gives the memory up; recordings get other when they run again."""
        with self.lock:
            for recording in self._recordings:
                recording.unbind()
            self._memory = torch.empty(0, dtype=torch.uint8)

    def capture(
        self, call: Callable[..., Output], inputs: Sequence[Tensor]
    ) -> tuple[Callable[..., Output] | None, Output]:
        """A call's recording, and what it gives now. There is none where it cannot be replayed or nothing is gained."""
        recorder = Recorder()
        inputs = [tensor.clone() for tensor in inputs]
        views = [recorder.input(tensor) for tensor in inputs]
        with recorder, compiled.written_down_by(recorder.call):
            found = call(*inputs)
        if recorder.why_not or recorder.copies_too_much():
            return None, found
        recording: Recording[Output] = Recording(recorder, views, mapped(recorder.output, found), self)
        if recording.size > MOST_BYTES:
            return None, found
        if recording.size > LARGE:
            cpu.give_back_memory()  # what the layers took is not needed for them again
        return recording, found

    def replay(
        self, graph: Recording[Output], call: Callable[..., Output], inputs: Sequence[Tensor]
    ) -> tuple[Callable[..., Output] | None, Output]:
        """The first time beside the call itself: the recording is kept if it gives the same bits."""
        if graph.tried:
            return graph, graph(*inputs)
        found, graph.tried = call(*inputs), True
        return graph if self._gives(graph, inputs, found) else None, found

    def _gives(self, recording: Recording, inputs: Sequence[Tensor], wanted: Any) -> bool:
        """Whether a replay gives this, in memory full of what is no number."""
        self.room_for(recording)[: recording.size].fill_(255)
        try:
            found = recording(*inputs)
        except Exception as error:  # whatever it is, the call itself has just gone well
            log.warning("An evaluation is not replayed: %s", error)
            return False
        pairs = zip(leaves_of(found), leaves_of(wanted), strict=True)
        right = all(torch.equal(one, other) for one, other in pairs)
        if not right:
            log.warning("An evaluation is not replayed: it would differ from the one that was written down.")
        return right
