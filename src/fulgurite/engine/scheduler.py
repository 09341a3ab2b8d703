"""Which jobs the device serves next, a step at a time. It knows no torch, and no clock but the one it is told.

Device time is shared evenly among keys: among groups (what can be in one batch) by the keys in each, where a key in
several counts in each for less, and a batch's rows among its keys, by start-time fair queueing (Goyal et al., SIGCOMM
1996). Of one key's jobs the one with the fewest steps left goes first, unless another has waited long: nobody starves.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["encode", "step", "decode"]
AMORTIZED = 4  # so many times what fetching weights costs is first spent without: a fifth of all time at most
KNOWN_GROUPS = 1000  # whose costs are remembered while none of their tasks is here
PATIENCE = 10  # waiting for so many steps' time counts as one step less to go
LEARNING = 0.2  # how much a new time counts in a moving average
FIRST_GUESS = 0.05  # seconds of anything that was never timed


@dataclass(frozen=True)
class Group:
    """What jobs of one batch have in common."""

    model: str
    steps: int  # the schedule whose checkpoint draws them; 0 where one checkpoint draws any number of steps
    latent_shape: tuple[int, int, int]


@dataclass(eq=False)
class Task:
    """One job, as far as its turn is concerned."""

    group: Group
    key: str  # whose it is
    rows: int  # of the network's batch
    steps_left: int
    arrived: float  # seconds, by the clock of all times here
    begun: bool = False  # its prompt is encoded


@dataclass(frozen=True)
class Work:
    """What the device does next: one stage for some tasks of a group."""

    stage: Stage
    group: Group
    tasks: list[Task]


class Shares:
    """Virtual time of start-time fair queueing: device seconds used by each key or group, divided by its weight.

    A newcomer starts level with whoever was served last, so idling earns no credit.
    """

    def __init__(self) -> None:
        self.had: dict[Hashable, float] = {}
        self._floor = 0.0

    def join(self, who: Hashable) -> None:
        self.had.setdefault(who, self._floor)

    def leave(self, who: Hashable) -> None:
        self.had.pop(who, None)

    def charge(self, who: Hashable, seconds: float) -> None:
        if who in self.had:
            self._floor = max(self._floor, self.had[who])
            self.had[who] += seconds


@dataclass
class Queue:
    """A group's jobs and what is known of its costs."""

    capacity: int  # rows of a step
    tasks: list[Task] = field(default_factory=list)
    keys: Shares = field(default_factory=Shares)
    row_seconds: float = FIRST_GUESS  # of a step, each row's share
    step_seconds: float = FIRST_GUESS
    decode_seconds: float = FIRST_GUESS

    def rank(self, task: Task, now: float) -> float:
        """Who is lower goes first among one key's."""
        return task.steps_left - (now - task.arrived) / (PATIENCE * self.step_seconds)

    def work(self, task: Task) -> float:
        """Seconds of the device that a task still takes."""
        return task.rows * task.steps_left * self.row_seconds + self.decode_seconds


class Scheduler:
    """Holds the tasks, says what is next, and learns from what was done.

    ``switch_seconds`` says what it costs to get a group's weights ready; AMORTIZED times as much is first spent on the
    groups whose weights are there.
    """

    def __init__(self, rows: int = 16, switch_seconds: Callable[[Group], float] = lambda group: 0.0) -> None:
        self._rows, self.switch_seconds = rows, switch_seconds
        self._queues: dict[Group, Queue] = {}  # of groups with tasks
        self._empty: dict[Group, Queue] = {}  # of groups that had some, the latest last
        self._groups = Shares()
        self._now = 0.0

    def tasks(self) -> list[Task]:
        return [task for queue in self._queues.values() for task in queue.tasks]

    def waiting(self) -> list[Task]:
        """Tasks that were not begun."""
        return [task for task in self.tasks() if not task.begun]

    def add(self, task: Task) -> None:
        queue = self._queues.get(task.group) or self._empty.pop(task.group, Queue(self._rows))
        self._queues[task.group] = queue
        queue.tasks.append(task)
        queue.keys.join(task.key)
        self._groups.join(task.group)

    def remove(self, task: Task) -> None:
        """Forgets a task: it is done, failed, or not wanted any more."""
        queue = self._queues.get(task.group)
        if queue is None or task not in queue.tasks:
            return
        queue.tasks.remove(task)
        if not any(other.key == task.key for other in queue.tasks):
            queue.keys.leave(task.key)
        if not queue.tasks:
            self._groups.leave(task.group)
            self._empty[task.group] = self._queues.pop(task.group)
            if len(self._empty) > KNOWN_GROUPS:
                del self._empty[next(iter(self._empty))]

    def next(self, now: float) -> Work | None:
        """What to do now: a decode, which ends a job; else a step, before which prompts are encoded."""
        self._now = now
        ready = [task for task in self.tasks() if task.begun and not task.steps_left]
        if ready:
            first = min(ready, key=lambda task: task.arrived)
            return Work("decode", first.group, [first])
        if not self._queues:
            return None
        # A second of the device counts for an average group as this: weights of keys come to one each in all.
        second = len(self._queues) / len({key for queue in self._queues.values() for key in queue.keys.had})
        group = min(
            self._queues,
            key=lambda group: self._groups.had[group] + AMORTIZED * self.switch_seconds(group) * second,
        )
        chosen = self._choose(self._queues[group])
        new = [task for task in chosen if not task.begun]
        return Work("encode", group, new) if new else Work("step", group, chosen)

    def _choose(self, queue: Queue) -> list[Task]:
        """Rows for a step: by turns of the keys, each key's by rank."""
        of_key: dict[Hashable, list[Task]] = {}
        for task in sorted(queue.tasks, key=lambda task: queue.rank(task, self._now)):
            of_key.setdefault(task.key, []).append(task)
        had, room, chosen = dict(queue.keys.had), queue.capacity, list[Task]()
        while of_key:
            key = min(of_key, key=had.__getitem__)
            task = of_key[key].pop(0)
            if task.rows > room and chosen:
                break
            chosen.append(task)
            room -= task.rows
            had[key] += task.rows * queue.row_seconds / self._weight(key)
            if not of_key[key]:
                del of_key[key]
        return chosen

    def ran(self, work: Work, moved: list[Task], seconds: float, capacity: int) -> None:
        """Tells what was done: which tasks a stage moved on, how long it took, and the rows a step may have.

        An encoded one is begun, a stepped one has a step less.
        """
        queue = self._queues.get(work.group) or self._empty.get(work.group)
        if queue is None:
            return
        queue.capacity = capacity
        weights = {key: self._weight(key) for key in queue.keys.had}
        self._groups.charge(work.group, seconds / (sum(weights.values()) or 1))
        if work.stage == "encode":
            for task in moved:
                task.begun = True
        elif work.stage == "step" and moved:
            rows = sum(task.rows for task in moved)
            queue.row_seconds += LEARNING * (seconds / rows - queue.row_seconds)
            queue.step_seconds += LEARNING * (seconds - queue.step_seconds)
            for task in moved:
                task.steps_left -= 1
                queue.keys.charge(task.key, seconds * task.rows / rows / weights.get(task.key, 1))
        elif work.stage == "decode" and moved:
            queue.decode_seconds += LEARNING * (seconds / len(moved) - queue.decode_seconds)
            for task in moved:
                queue.keys.charge(task.key, seconds / len(moved) / weights.get(task.key, 1))

    def _weight(self, key: Hashable) -> float:
        """What a key counts for in each of the groups that it has tasks in."""
        return 1 / max(1, sum(key in queue.keys.had for queue in self._queues.values()))

    def position(self, task: Task) -> int:
        """How many waiting tasks are begun before this one, as the keys take their turns; 0 once it is begun."""
        return 0 if task.begun else len(self._before(task))

    def _before(self, task: Task) -> list[Task]:
        waiting = sorted(self.waiting(), key=lambda other: self._queues[other.group].rank(other, self._now))
        of_key: dict[str, list[Task]] = {}
        for other in waiting:
            of_key.setdefault(other.key, []).append(other)
        turn = of_key[task.key].index(task)
        return [other for tasks in of_key.values() for other in tasks[:turn]]

    def seconds_until_begun(self, task: Task) -> float:
        """About how long a task still waits: until its group's turn, if a step has room for it then; or for all the
        work of what runs and of what goes before it.
        """
        if task.begun:
            return 0.0
        ahead = [other for other in self.tasks() if other.begun] + self._before(task)
        queue = self._queues[task.group]
        if sum(other.rows for other in ahead if other.group == task.group) + task.rows <= queue.capacity:
            decodes = sum(self._queues[other.group].decode_seconds for other in ahead if not other.steps_left)
            steps = {other.group: self._queues[other.group].step_seconds for other in ahead if other.steps_left}
            return decodes + sum(steps.values())
        return sum(self._queues[other.group].work(other) for other in ahead)

    def seconds_of_work(self) -> float:
        """Of everything that is here."""
        return sum(self._queues[task.group].work(task) for task in self.tasks())

    def seconds_until_a_place(self) -> int:
        """When a waiting task will have been begun: about the time between two pictures. Whole, and at least 1."""
        return max(1, math.ceil(self.seconds_of_work() / max(1, len(self.tasks()))))
