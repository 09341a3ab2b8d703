"""An optimizer shared by several processes: each keeps the state of its share of the weights.

ZeRO's first stage (Rajbhandari et al., arXiv 1910.02054). torch's ZeroRedundancyOptimizer does as much, but gathers the
state for a checkpoint through pickled objects: 67 ns a byte, so half an hour for SDXL's 30 GB, and a copy on every GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def shares(sizes: Sequence[int], processes: int) -> list[int]:
    """Whose each is, so that all have about as much: the largest first, to who has least."""
    owners, loads = [0] * len(sizes), [0] * processes
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


class ShardedAdamW:
    """AdamW over all parameters, as far as its users see, of which each process updates its own and tells the others.

    What it saves is what one AdamW over all would save, so that any number of processes can go on from it.
    """

    def __init__(self, groups: list[dict[str, Any]], **numbers: Any) -> None:
        """``groups`` of ``params``; ``numbers`` as AdamW's. All processes have the same, and the same weights."""
        self.param_groups = groups
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._owners = shares([parameter.numel() for parameter in self._parameters], dist.get_world_size())
        mine = {p for p, owner in zip(self._parameters, self._owners, strict=True) if owner == dist.get_rank()}
        own = [{"params": [p for p in group["params"] if p in mine]} for group in groups]
        self.own = torch.optim.AdamW(own, **numbers)
        self._begun: set[int] = set()  # numbers of parameters that were ever updated, and so have a state somewhere

    def step(self) -> None:
        for group, own in zip(self.param_groups, self.own.param_groups, strict=True):
            own["lr"] = group["lr"]
        self._begun |= {i for i, parameter in enumerate(self._parameters) if parameter.grad is not None}
        self.own.step()
        for parameter, owner in zip(self._parameters, self._owners, strict=True):
            dist.broadcast(parameter.detach(), owner)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """On the first process, of all, on the CPU. All processes call it, and send their share a tensor at a time."""
        state = {}
        for index in sorted(self._begun):
            sent = self._sent(self._parameters[index], self._owners[index])
            if dist.get_rank() == 0:
                state[index] = {name: tensor.to("cpu", copy=True) for name, tensor in sent.items()}
        return {"state": state, "param_groups": self._numbered(self.own.state_dict()["param_groups"])}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._begun = set(saved["state"])
        own = [p for group in self.own.param_groups for p in group["params"]]  # in the order that its own numbers have
        index = {parameter: i for i, parameter in enumerate(self._parameters)}
        state = {i: saved["state"][index[p]] for i, p in enumerate(own) if index[p] in saved["state"]}
        groups = [
            {**group, "params": now["params"]}
            for group, now in zip(saved["param_groups"], self.own.state_dict()["param_groups"], strict=True)
        ]
        self.own.load_state_dict({"state": state, "param_groups": groups})

    def _sent(self, parameter: Tensor, owner: int) -> dict[str, Tensor]:
        """A parameter's state, from who has it to all."""
        if owner == dist.get_rank():
            sent = dict(self.own.state[parameter])
        else:
            sent = {"step": torch.zeros((), device=parameter.device)}
            sent |= {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        for name in sorted(sent):
            sent[name] = sent[name].to(parameter.device)
            dist.broadcast(sent[name], owner)
        return sent

    def _numbered(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With all parameters' numbers in the place of this process's."""
        numbers = iter(range(len(self._parameters)))
        return [
            {**own, "params": [next(numbers) for _ in group["params"]]}
            for group, own in zip(self.param_groups, groups, strict=True)
        ]
