"""What every training stage shares: a learning rate over time, averaged weights, checkpoints that resume, a log."""

import json
import math
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Rises over ``warmup`` steps, then falls to zero as a cosine."""
    rise = min(1.0, (step + 1) / warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Stage:
    """One stage's networks, optimizer and averaged weights, kept in ``folder`` so that a run can go on.

    The average (EMA) is what ships: it is a few points better than the last step's weights. ``shares`` are the
    networks' own parts of the learning rate, where they differ.
    """

    def __init__(
        self,
        folder: Path,
        networks: nn.ModuleDict,
        peak: float,
        steps: int,
        decay: float,
        save_every: int = 500,
        shares: dict[str, float] | None = None,
    ) -> None:
        self.folder, self.networks, self.peak, self.steps, self.decay = folder, networks, peak, steps, decay
        self.save_every = save_every
        self.average = deepcopy(networks).requires_grad_(False)
        groups = [{"params": networks[name].parameters(), "share": share} for name, share in (shares or {}).items()]
        self.optimizer = torch.optim.AdamW(
            groups or networks.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.step, self.started, self.losses = 0, time.perf_counter(), dict[str, float]()
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, weights_only=True))

    def update(self, losses: dict[str, torch.Tensor]) -> None:
        """One optimizer step on the sum of the losses; logs every 50 steps, saves now and then and at the end."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.peak) * group.get("share", 1.0)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages: list[torch.Tensor] = list(self.average.parameters())
            torch._foreach_lerp_(averages, list(self.networks.parameters()), 1 - decay)
        self.step += 1
        for name, loss in losses.items():
            self.losses[name] = 0.95 * self.losses.get(name, loss.item()) + 0.05 * loss.item()
        if self.step % 50 == 0:
            self._log()
        if self.step % self.save_every == 0 or self.step == self.steps:
            self.save()

    def _log(self) -> None:
        row = {"step": self.step, "seconds": round(time.perf_counter() - self.started, 1)}
        row |= {name: round(loss, 5) for name, loss in self.losses.items()}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then over it: a crash leaves one of them whole."""
        state = {
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
