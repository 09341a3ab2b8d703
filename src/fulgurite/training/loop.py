"""What every training stage shares: a learning rate over time, averaged weights, checkpoints that resume, a log.

``accelerate launch``, or ``torchrun`` where there is no GPU, runs a stage as several processes: each draws batches of
its own, and all make the same update with their gradients' mean. Each keeps the optimizer's state of its share of the
weights, updates these, and tells the others (``sharding.py``).
"""

import json
import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from fulgurite.training.files import whole
from fulgurite.training.sharding import ShardedAdamW


class TimeIsUpError(Exception):
    """A run's time is up; what it has done is kept, and the same command goes on there."""


@dataclass(frozen=True)
class Run:
    """What a run may use."""

    device: str = "cpu"
    until: float = math.inf  # by time.monotonic: then it stops, at a checkpoint

    @property
    def kind(self) -> str:
        """Of the device: cpu or cuda."""
        return torch.device(self.device).type

    def over(self) -> bool:
        """Whether the time is up in any of the processes, the same answer in all."""
        late = torch.tensor(float(time.monotonic() > self.until), device=self.device)
        return bool(reduce(late, "sum") > 0)


HERE = Run()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Zero before step 0; rises over ``warmup`` steps, then falls to zero as a cosine."""
    if step < 0:
        return 0.0
    rise = min(1.0, (step + 1) / warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_network(network: nn.Module, path: Path, coarse: str | None = None) -> None:
    """Writes float16 safetensors in the published layout: whole, or not at all.

    Convolutions whose names begin with ``coarse`` are written in 8 bits (float8, arXiv 2209.05433).
    """
    tensors = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in network.state_dict().items()}
    for name, tensor in tensors.items():
        if coarse and name.startswith(coarse) and tensor.ndim == 4:
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    with whole(path) as new:
        save_file(tensors, new, metadata={"format": "pt"})


@dataclass(frozen=True)
class Adam:
    """The optimizer's numbers (arXiv 1412.6980; decay as in arXiv 1711.05101)."""

    momentum: float = 0.9
    squares: float = 0.99  # of their running mean
    decay: float = 0.01  # of weights


ADAM = Adam()


@dataclass(frozen=True)
class Part:
    """How a part of a stage's networks learns."""

    peak: float  # learning rate
    after: int = 0  # steps, before which it stays as it is


class Stage:
    """One stage's networks, optimizer and averaged weights, kept in ``folder`` so that a run can go on.

    The average (EMA) is what ships: it is a few points better than the last step's weights. ``peak`` is the highest
    learning rate, or where not all learns alike a part of its own for each network, or what is in one, by its name.
    ``gathered`` batches make an update together. ``averaged`` names the networks of which there is an average, where
    not all ship. Files are written by the first process alone.
    """

    def __init__(
        self,
        folder: Path,
        networks: nn.ModuleDict,
        peak: float | dict[str, Part],
        steps: int,
        decay: float,
        save_every: int = 500,
        adam: Adam = ADAM,
        run: Run = HERE,
        gathered: int = 1,
        averaged: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.networks, self.steps, self.decay = folder, networks, steps, decay
        self.save_every, self.run, self.processes = save_every, run, PartialState()
        self.gathered, self._batches = gathered, 0  # since the last update
        self._source = nn.ModuleDict({name: networks[name] for name in averaged or networks})
        self.average = deepcopy(self._source).requires_grad_(False)
        self.parameters = [parameter for parameter in networks.parameters() if parameter.requires_grad]
        self.parts = peak if isinstance(peak, dict) else {"": Part(peak)}
        groups = [{"params": list(networks.get_submodule(name).parameters())} for name in self.parts]
        numbers: dict[str, Any] = {"betas": (adam.momentum, adam.squares), "weight_decay": adam.decay, "fused": True}
        several = self.processes.num_processes > 1
        self.optimizer = ShardedAdamW(groups, **numbers) if several else torch.optim.AdamW(groups, **numbers)
        self.step, self.started, self.losses = 0, time.perf_counter(), dict[str, float]()
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            # A file's pages, not memory: on a GPU there is no room for all of it beside what it is loaded into.
            self._load(torch.load(self.checkpoint, map_location="cpu", mmap=True, weights_only=True))
        self.bar = progress_bar()
        self.task = self.bar.add_task(folder.name, total=steps, completed=self.step, losses="")

    @property
    def number(self) -> int:
        """Of this process's next batch: no two batches of a stage have the same."""
        batch = self.step * self.gathered + self._batches
        return batch * self.processes.num_processes + self.processes.process_index

    def update(self, losses: dict[str, torch.Tensor]) -> None:
        """One batch's losses; with as many as an update takes one optimizer step on the sum of them.

        Logs every 50 steps, saves now and then and at the end. Raises TimeIsUpError once the run's time is over.
        """
        (sum(losses.values()) / self.gathered).backward()  # type: ignore[union-attr]
        for name, loss in losses.items():
            self.losses[name] = 0.95 * self.losses.get(name, loss.item()) + 0.05 * loss.item()
        self._batches += 1
        if self._batches < self.gathered:
            return
        self._batches = 0
        if self.processes.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = reduce(parameter.grad, "mean")
        for part, group in zip(self.parts.values(), self.optimizer.param_groups, strict=True):
            group["lr"] = learning_rate(self.step - part.after, self.steps - part.after, part.peak)
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages: list[torch.Tensor] = list(self.average.parameters())
            torch._foreach_lerp_(averages, list(self._source.parameters()), 1 - decay)
        self.step += 1
        self._tell()
        over = self.run.over()
        if over or self.step % self.save_every == 0 or self.step == self.steps:
            self.save()
        if over and self.step < self.steps:
            self.bar.stop()
            raise TimeIsUpError(f"The time is up, at step {self.step} of {self.steps} of the stage {self.folder.name}.")

    def due(self, every: int) -> bool:
        """Whether this process is the one to do what is done every so many steps."""
        return self._batches == 0 and self.step % every == 0 and self.processes.is_main_process

    def _tell(self) -> None:
        if not self.processes.is_main_process:
            return
        losses = {name: round(loss, 5) for name, loss in self.losses.items()}
        self.bar.start()
        self.bar.update(self.task, completed=self.step, losses=" ".join(f"{n} {x:.4f}" for n, x in losses.items()))
        if self.step == self.steps:
            self.bar.stop()
        if self.step % 50 == 0:
            row = {"step": self.step, "seconds": round(time.perf_counter() - self.started, 1)} | losses
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            if self.bar.disable:
                print(self.folder.name, row, flush=True)

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then over it: a crash leaves one of them whole.

        All processes call it; any number of them can go on from it.
        """
        optimizer = self.optimizer.state_dict()
        if not self.processes.is_main_process:
            return
        state = {
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer,
            "step": self.step,
        }
        with whole(self.checkpoint) as new:
            torch.save(state, new)

    def _load(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def progress_bar() -> Progress:
    """Shown on a terminal alone; elsewhere the log's lines are printed."""
    console = Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)
