"""Owns the device: runs one stage for some jobs, and finds out whose fault it is if that fails."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from fulgurite.engine.batches import Batches, most_rows
from fulgurite.engine.cache import PromptCache
from fulgurite.engine.scheduler import Group, Stage
from fulgurite.errors import DeviceError, FulguriteError, OutOfMemoryError
from fulgurite.pipeline import Encoded, Row, smallest_batch
from fulgurite.request import OnStep, Picture, Preview, Request

Done = TypeVar("Done")
CACHE_BYTES = 256 << 20  # of encoded prompts: about 400 of SDXL's in half precision


class Stages(Protocol):
    """What the runner needs of a pipeline; fulgurite.pipeline.Pipeline says what each does."""

    card: Any
    device: torch.device

    def encode(self, prompt: str) -> Encoded: ...
    def start(self, request: Request, encode: Callable[[str], Encoded]) -> Row: ...
    def step(self, rows: Sequence[Row], batch: int) -> None: ...
    def finish(self, row: Row) -> Picture: ...
    def preview(self, row: Row) -> Preview: ...
    def agrees(self, latent_size: tuple[int, int], parts: Sequence[int]) -> bool: ...


class Load(Protocol):
    """What the runner needs of a loader."""

    def __call__(self, model: str, steps: int) -> Stages: ...
    def switch_seconds(self, model: str, steps: int) -> float: ...
    def drop_others(self, model: str, steps: int) -> None: ...


@dataclass(eq=False)
class Drawing:
    """A job as the device knows it."""

    request: Request
    on_step: OnStep | None
    row: Row | None = None


@dataclass
class StageOutcome:
    """What a stage did.

    A drawing in none of ``moved``, ``pictures`` and ``failed`` did not fit into the batch and is run later.
    """

    moved: list[Drawing] = field(default_factory=list)
    pictures: dict[Drawing, Picture] = field(default_factory=dict)
    failed: dict[Drawing, Exception] = field(default_factory=dict)
    capacity: int = 0  # the rows that the group's next step may have
    ran: int = 0  # rows of the network's batch


def broken(error: BaseException) -> Exception:
    """The exception that ends a job.

    A FulguriteError as it is, a failed device as DeviceError, a bug wrapped in RuntimeError, since a future does not
    take every exception (StopIteration).
    """
    if isinstance(error, FulguriteError):
        return error
    if isinstance(error, torch.AcceleratorError):
        failure: Exception = DeviceError("The device failed, so this picture is lost.")
    else:
        failure = RuntimeError("drawing failed")
    failure.__cause__ = error
    return failure


def out_of_memory(error: BaseException) -> bool:
    # On a CPU and on Apple's GPUs torch has no exception of its own for it.
    told = "can't allocate memory" in str(error) or "MPS backend out of memory" in str(error)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


class Runner:
    """One thread's. ``exact``: pictures do not depend on their neighbours in a batch, see engine/batches.py."""

    def __init__(self, load: Load, *, exact: bool = True, cache_bytes: int = CACHE_BYTES) -> None:
        self._load, self._exact = load, exact
        self._cache = PromptCache(cache_bytes)
        self._batches: dict[tuple[str, tuple[int, int, int]], Batches] = {}  # of each model and latent shape

    def switch_seconds(self, group: Group) -> float:
        return self._load.switch_seconds(group.model, group.steps)

    def run(self, stage: Stage, group: Group, drawings: Sequence[Drawing]) -> StageOutcome:
        """Runs a stage. What goes wrong with one drawing is its alone; nothing is raised."""
        outcome = StageOutcome(capacity=1)
        try:
            steps = group.steps or drawings[0].request.num_steps
            pipeline = self._with_room(group, partial(self._load, group.model, steps))
            batches = self._batches_of(group, pipeline)
            outcome.capacity = batches.capacity
            if stage == "step":
                self._step(pipeline, batches, group, drawings, outcome)
            for drawing in drawings if stage != "step" else ():
                self._alone(stage, pipeline, group, drawing, outcome)
        except BaseException as error:
            outcome.failed |= {drawing: broken(error) for drawing in drawings if drawing not in outcome.moved}
        return outcome

    def _alone(self, stage: Stage, pipeline: Stages, group: Group, drawing: Drawing, outcome: StageOutcome) -> None:
        """Encodes a prompt or decodes a picture."""
        try:
            if stage == "encode":
                encode = partial(self._cache.get, group.model, pipeline.encode)
                drawing.row = self._with_room(group, lambda: pipeline.start(drawing.request, encode))
            else:
                assert drawing.row
                row = drawing.row
                outcome.pictures[drawing] = self._with_room(group, lambda: pipeline.finish(row))
            outcome.moved.append(drawing)
        except BaseException as error:
            outcome.failed[drawing] = broken(error)

    def _step(
        self, pipeline: Stages, batches: Batches, group: Group, drawings: Sequence[Drawing], outcome: StageOutcome
    ) -> None:
        """A step for as many as fit into one batch; if that fails, for each alone."""
        agrees = partial(agrees_within_memory, pipeline, group.latent_shape[1:])
        size = batches.size_for(sum(rows_of(drawing) for drawing in drawings), agrees)
        # The two rows of one picture are tried, also where two pictures were too much.
        size = max(size, rows_of(drawings[0]))
        together = fitting(drawings, size)
        rows = [drawing.row for drawing in together if drawing.row]
        failure, no_memory = None, False
        try:
            pipeline.step(rows, size)
        except BaseException as error:
            # Nothing is tried again in here: the error holds what the step had in memory.
            no_memory = out_of_memory(error)
            failure = None if no_memory else error
        if no_memory and size > max(map(rows_of, together)) and batches.smaller(size):
            torch.cuda.empty_cache()
            self._step(pipeline, batches, group, together, outcome)
        elif len(together) == 1 and (failure or no_memory):
            self._last_try(pipeline, size, group, together[0], failure, outcome)
        elif failure or no_memory:
            for drawing in together:
                self._step(pipeline, batches, group, [drawing], outcome)
        else:
            outcome.ran += size
            for drawing in together:
                self._moved(pipeline, drawing, outcome)
        outcome.capacity = batches.capacity

    def _last_try(
        self,
        pipeline: Stages,
        size: int,
        group: Group,
        drawing: Drawing,
        failure: BaseException | None,
        outcome: StageOutcome,
    ) -> None:
        """A step failed for one drawing alone. It fails, unless memory ran out and dropping other checkpoints helps."""
        try:
            if failure:
                raise failure
            assert drawing.row
            row = drawing.row
            self._with_room(group, lambda: pipeline.step([row], size))
            self._moved(pipeline, drawing, outcome)
        except BaseException as final:
            outcome.failed[drawing] = broken(final)

    def _moved(self, pipeline: Stages, drawing: Drawing, outcome: StageOutcome) -> None:
        try:
            if drawing.on_step and drawing.row:
                drawing.on_step(drawing.row.done, drawing.row.plan.steps, pipeline.preview(drawing.row))
            outcome.moved.append(drawing)
        except BaseException as error:
            outcome.failed[drawing] = broken(error)

    def _with_room(self, group: Group, call: Callable[[], Done]) -> Done:
        """Calls, and out of memory once more without the other checkpoints. Raises OutOfMemoryError."""
        try:
            return call()
        except BaseException as error:
            if not out_of_memory(error):
                raise
        # Not in the handlers: there the error still holds what the call had in memory.
        self._load.drop_others(group.model, group.steps)
        torch.cuda.empty_cache()
        try:
            return call()
        except BaseException as again:
            if not out_of_memory(again):
                raise
        raise OutOfMemoryError

    def _batches_of(self, group: Group, pipeline: Stages) -> Batches:
        shape = group.latent_shape
        if (group.model, shape) not in self._batches:
            smallest = smallest_batch(pipeline.card, pipeline.device, shape)
            most = most_rows(pipeline.device.type == "cuda", shape)
            self._batches[group.model, shape] = Batches(smallest, most, self._exact)
        return self._batches[group.model, shape]


def agrees_within_memory(pipeline: Stages, latent_size: tuple[int, int], parts: Sequence[int]) -> bool:
    """Whether a batch has the bits of its parts, and there is memory for it."""
    try:
        return pipeline.agrees(latent_size, parts)
    except BaseException as error:
        if not out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False


def rows_of(drawing: Drawing) -> int:
    return drawing.row.plan.network_rows if drawing.row else 0


def fitting(drawings: Sequence[Drawing], size: int) -> list[Drawing]:
    """The first drawings whose rows are at most ``size``."""
    chosen: list[Drawing] = []
    for drawing in drawings:
        size -= rows_of(drawing)
        if size < 0:
            break
        chosen.append(drawing)
    return chosen
