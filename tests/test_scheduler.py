"""The scheduler's properties: no torch, no thread, a clock of its own."""

import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.engine.scheduler import AMORTIZED, KNOWN_GROUPS, Group, Scheduler, Task, Work

GROUPS = [Group("m", 0, (4, 8, 8)), Group("m", 0, (4, 8, 16)), Group("n", 4, (4, 8, 8))]
STEP, DECODE = 0.01, 0.005
TASKS = st.tuples(st.sampled_from(GROUPS), st.sampled_from("abc"), st.sampled_from((1, 2)), st.integers(1, 8))


def run(scheduler: Scheduler, now: float) -> tuple[Work, float]:
    """One round, by a device that takes a fixed time."""
    work = scheduler.next(now)
    assert work
    seconds = {"encode": 0.001, "step": STEP, "decode": DECODE}[work.stage]
    scheduler.ran(work, work.tasks, seconds, scheduler._rows)
    if work.stage == "decode":
        scheduler.remove(work.tasks[0])
    return work, now + seconds


@settings(deadline=None)
@given(st.lists(TASKS, max_size=40))
def test_everything_ends_and_every_batch_is_one_that_can_be(asked: list[tuple[Group, str, int, int]]) -> None:
    scheduler, now, ended = Scheduler(rows=4), 0.0, 0
    tasks = [Task(group, key, rows, steps, 0.0) for group, key, rows, steps in asked]
    for task in tasks:
        scheduler.add(task)
    while scheduler.tasks():
        work, now = run(scheduler, now)
        assert work.tasks
        assert {task.group for task in work.tasks} == {work.group}
        assert sum(task.rows for task in work.tasks) <= 4
        ended += work.stage == "decode"
    assert ended == len(tasks)
    assert all(task.steps_left == 0 for task in tasks)
    assert scheduler.next(now) is None


@given(st.lists(TASKS, min_size=1, max_size=20))
def test_positions_are_those_of_a_queue(asked: list[tuple[Group, str, int, int]]) -> None:
    scheduler = Scheduler()
    tasks = [Task(group, key, rows, steps, 0.0) for group, key, rows, steps in asked]
    for task in tasks:
        scheduler.add(task)
    positions = [scheduler.position(task) for task in tasks]
    assert min(positions) == 0
    assert max(positions) < len(tasks)
    assert all(scheduler.seconds_until_begun(task) >= 0 for task in tasks)
    assert scheduler.seconds_until_a_place() >= 1


@pytest.mark.parametrize("of_one_group", [True, False])
@pytest.mark.parametrize("per_second", [10, 16, 80])  # within what one at a time can do, all of it, and far too many
def test_who_is_told_when_it_begins_is_told_about_the_truth(per_second: int, of_one_group: bool) -> None:
    """On average within a factor of three, by a device that takes a fixed time a step and more for each row."""
    chance, scheduler, now, begun = random.Random(0), Scheduler(), 0.0, dict[Task, float]()
    due = list(accumulate(chance.expovariate(per_second) for _ in range(400)))
    told: dict[Task, float] = {}
    while due or scheduler.tasks():
        if not scheduler.tasks():
            now = max(now, due[0])
        while due and due[0] <= now:
            task = Task(GROUPS[0] if of_one_group else chance.choice(GROUPS), "a", 1, chance.choice((1, 2, 4, 8)), now)
            scheduler.add(task)
            told[task] = scheduler.seconds_until_begun(task)
            due.pop(0)
        work = scheduler.next(now)
        assert work
        if work.stage == "encode":
            begun |= dict.fromkeys(work.tasks, now)
        seconds = {"encode": 0.002, "step": 0.008 + 0.003 * len(work.tasks), "decode": 0.025}[work.stage]
        now += seconds
        scheduler.ran(work, work.tasks, seconds, 16)
        if work.stage == "decode":
            scheduler.remove(work.tasks[0])
    learned = list(told)[50:]
    waited = sum(begun[task] - task.arrived for task in learned)
    assert waited / 3 < sum(told[task] for task in learned) < 3 * waited


def test_keys_share_a_batch_evenly_however_much_one_asks() -> None:
    scheduler, now = Scheduler(rows=4), 0.0
    for _ in range(100):
        scheduler.add(Task(GROUPS[0], "greedy", 1, 4, now))
    for _ in range(4):
        _, now = run(scheduler, now)
    modest = Task(GROUPS[0], "modest", 1, 4, now)
    scheduler.add(modest)
    rounds = 0
    while modest in scheduler.tasks():
        _, now = run(scheduler, now)
        rounds += 1
    assert rounds <= 30  # its 4 steps, and what was begun beside it; not the greedy one's hundred


@pytest.mark.parametrize("in_own_group", [True, False])
def test_who_asks_for_many_sizes_gets_no_more_of_the_device(in_own_group: bool) -> None:
    """One key's jobs are of three groups, the other's of one, which the first is in too, or not."""
    scheduler, now, had = Scheduler(rows=1), 0.0, {"varied": 0.0, "plain": 0.0}
    for _ in range(1000):
        for group in GROUPS[in_own_group:]:
            scheduler.add(Task(group, "varied", 1, 4, now))
        scheduler.add(Task(GROUPS[0], "plain", 1, 4, now))
    while now < 20:
        before = now
        work, now = run(scheduler, now)
        had[work.tasks[0].key] += now - before
    assert 0.8 < had["varied"] / had["plain"] < 1.25


def test_a_long_job_does_not_starve_behind_a_stream_of_short_ones() -> None:
    scheduler, now = Scheduler(rows=1), 0.0
    long = Task(GROUPS[0], "a", 1, 8, now)
    scheduler.add(long)
    while long in scheduler.tasks() and now < 60:
        while len(scheduler.tasks()) < 3:
            scheduler.add(Task(GROUPS[0], "a", 1, 1, now))
        _, now = run(scheduler, now)
    assert long not in scheduler.tasks()


def test_short_jobs_go_before_long_ones() -> None:
    scheduler = Scheduler(rows=1)
    long, short = Task(GROUPS[0], "a", 1, 8, 0.0), Task(GROUPS[0], "a", 1, 1, 0.0)
    for task in (long, short):
        scheduler.add(task)
    work = scheduler.next(0.0)
    assert work
    assert work.tasks == [short]


def test_no_group_starves_and_switching_is_paid_for_first() -> None:
    """Only one group has its weights here: fetching takes a fifth of the time at most, and each has its turn."""
    fetching, here = 0.1, GROUPS[0]
    scheduler, now, fetched = Scheduler(rows=4, switch_seconds=lambda group: fetching * (group != here)), 0.0, 0.0
    for _ in range(2000):
        for group in GROUPS:
            scheduler.add(Task(group, "a", 1, 4, now))
    served, waited = dict.fromkeys(GROUPS, 0.0), 0.0
    while now < 20:
        began, work = now, scheduler.next(now)
        assert work
        if work.group != here:
            here, now, fetched = work.group, now + fetching, fetched + fetching
        now += {"encode": 0.001, "step": STEP, "decode": DECODE}[work.stage]
        scheduler.ran(work, work.tasks, now - began, 4)
        if work.stage == "decode":
            scheduler.remove(work.tasks[0])
        waited = max(waited, *(now - last for last in served.values()))
        served[work.group] = now
    assert 0 < fetched < now / (1 + AMORTIZED)
    assert waited < 2 * AMORTIZED * fetching * len(GROUPS)


def test_of_groups_that_went_only_so_many_are_remembered() -> None:
    scheduler = Scheduler()
    for width in range(2 * KNOWN_GROUPS):
        task = Task(Group("m", 0, (4, 8, width)), "a", 1, 1, 0.0)
        scheduler.add(task)
        scheduler.remove(task)
    assert not scheduler.tasks()
    assert len(scheduler._empty) == KNOWN_GROUPS
