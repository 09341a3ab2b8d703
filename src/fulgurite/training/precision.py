"""The numbers that networks compute in where half the bits will do: in training, and when they are scored."""

import torch

from fulgurite.kernels.cpu import has_bfloat16


def half(kind: str) -> torch.dtype:
    """What a kind of device, cpu or cuda, is quick in. A CPU without instructions for bfloat16 is not."""
    return torch.bfloat16 if kind != "cpu" or has_bfloat16() else torch.float32


def autocast(kind: str) -> torch.autocast:
    """Has layers compute in ``half``, whatever their weights are in."""
    return torch.autocast(kind, torch.bfloat16, enabled=half(kind) == torch.bfloat16)
