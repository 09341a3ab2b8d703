"""What a kept result was made of, in its file's name, so that one of other data or weights is not taken for it."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

PIECE = 1 << 20  # bytes


def fingerprint(*parts: object) -> str:
    """Eight digits, others where a part is: a file by what is in it, a network by its weights, an array by its numbers.

    Anything else by its ``repr``.
    """
    told = hashlib.sha256()
    for part in parts:
        match part:
            case Path():
                with part.open("rb") as file:  # a piece at a time: SDXL's are larger than some machines' memory
                    while piece := file.read(PIECE):
                        told.update(piece)
            case nn.Module():
                for name, tensor in part.state_dict().items():
                    told.update(name.encode())
                    told.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            case np.ndarray():
                told.update(part.tobytes())
            case _:
                told.update(repr(part).encode())
        told.update(b"\0")
    return told.hexdigest()[:8]
