"""Seconds of a call on a device, as rows of a report."""

import statistics
from collections.abc import Callable

from torch import Tensor

from fulgurite.benchmark import Laps
from fulgurite.kernels.graphs import Graph
from report import Report

REPEATS = 7  # on a GPU, of what its median is taken of
OFTEN = 50  # calls of a kernel that are timed together: alone it is over before the next is launched


class Timer:
    """Times calls: on a GPU each some times over, after two that are not timed and warm it; on a CPU once."""

    def __init__(self, report: Report, device: str) -> None:
        self.report, self.device, self.cuda = report, device, device == "cuda"

    def __call__(
        self, name: str, call: Callable[[], object], *, flops: float = 0, repeats: int = REPEATS, calls: int = 1
    ) -> float:
        """The median seconds of what ``call`` does, ``calls`` times over, as a row.

        ``flops``: what it computes, for the share of the measured ceiling that it reaches.
        """
        for _ in range(2 if self.cuda else 0):
            call()
        times = []
        for _ in range(repeats if self.cuda else 1):
            laps = Laps(self.device)
            call()
            laps.lap(name, calls)
            times.append(laps.seconds[name])
        middle, extra = statistics.median(times), {}
        if flops and "flops" in (ceiling := self.report.results.get("ceiling", {})):
            extra["of_ceiling"] = flops / middle / ceiling["flops"]
        self.report.row(name, ms=1000 * middle, lowest=1000 * min(times), highest=1000 * max(times), **extra)
        return middle

    def captured(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The call as a graph, whose kernels wait for no launch; where there is no GPU, itself."""
        return Graph(call, []) if self.cuda else call

    def often(self, name: str, call: Callable[[], Tensor]) -> float:
        """The median seconds of one of many calls in a row, captured."""
        calls = OFTEN if self.cuda else 1

        def many() -> Tensor:
            for _ in range(calls):
                out = call()
            return out[:1, :1]

        return self(name, self.captured(many), calls=calls)
