"""Tensors into a network, strictly: none missing, none left over, none of another shape."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fulgurite.errors import WeightsError
from fulgurite.weights.original import HARMLESS, KeyMap

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)


def several(names: list[str], what: str) -> str:
    """A count and the first few names, for people."""
    names = sorted(names)
    return f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def fitted(tensors: dict[str, Tensor], network: nn.Module, keys: KeyMap, path: Path) -> dict[str, Tensor]:
    """The network's tensors under its own names: views of those of the file, not copies.

    Raises WeightsError that names the file and the first few tensors that are missing, unexpected or mis-shaped.
    """
    found, wrong = {}, []
    missing = {theirs for theirs, _ in keys.values()} - tensors.keys()
    for name, parameter in network.state_dict().items():
        theirs, change = keys[name]
        if theirs in missing:
            continue
        tensor = tensors[theirs]
        try:
            found[name] = change(tensor)
        except (RuntimeError, IndexError):
            wrong.append(f"{theirs} {list(tensor.shape)}")
            continue
        if found[name].shape != parameter.shape:
            wrong.append(f"{theirs} {list(tensor.shape)} where {list(parameter.shape)} is wanted")
        elif tensor.dtype not in FLOATS:
            wrong.append(f"{theirs} of {tensor.dtype}")
    known = {theirs for theirs, _ in keys.values()}
    unexpected = [name for name in tensors.keys() - known if not name.startswith(HARMLESS)]
    problems = [
        several(names, what)
        for names, what in (
            (list(missing), "missing tensor(s)"),
            (unexpected, "unexpected tensor(s)"),
            (wrong, "tensor(s) of another shape or kind"),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{path} does not fit the {type(network).__name__}: {'; '.join(problems)}.")
    return found


def filled(network: nn.Module, tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> None:
    """Gives a network that was built on the meta device its tensors; those that are right already are not copied."""
    network.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    network.requires_grad_(False).eval()
