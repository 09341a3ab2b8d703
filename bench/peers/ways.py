"""The ways of drawing a picture that are compared. Only a way's own process imports what it needs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image

from fulgurite import Pipeline
from fulgurite.benchmark import draw_in_parts
from fulgurite.kernels import compiled, cpu
from fulgurite.pipeline import kept_dtype, usual_dtype
from peers.works import Work


class Way(Protocol):
    def draw(self) -> tuple[Image.Image, dict[str, float]]:
        """The work's picture, and the seconds of each of fulgurite.benchmark.PARTS and of all together."""
        ...


class Ours:
    def __init__(self, work: Work, eight_bits: bool = False, **changes: Any) -> None:
        """With ``changes`` to the work's request; ``eight_bits``: large layers of UNet and decoder are in 8 bits."""
        cpu.keep_memory()  # as `fulgurite serve` does, and
        compiled.keep_apart()
        dtype = usual_dtype("cpu")
        self._pipeline = Pipeline(work.card, work.networks(kept_dtype(work.card, "cpu", dtype)), "cpu", dtype)
        self._pipeline.accelerate(eight_bits)
        cpu.give_back_memory()
        self._request = replace(work.request, **changes)

    def draw(self) -> tuple[Image.Image, dict[str, float]]:
        picture, seconds = draw_in_parts(self._pipeline, self._request)
        return picture.image, seconds


def diffusers(dtype: torch.dtype, **options: bool) -> Callable[[Work], Way]:
    def build(work: Work) -> Way:
        from peers.diffusers_way import DiffusersWay

        return DiffusersWay(work, dtype, **options)

    return build


def openvino(work: Work) -> Way:
    from peers.openvino_way import OpenVINOWay

    return OpenVINOWay(work)


WAYS: dict[str, Callable[[Work], Way]] = {
    "ours": Ours,
    "ours-int8": partial(Ours, eight_bits=True),
    "ours-fast-decoder": partial(Ours, decoder="fast"),
    "ours-int8-fast-decoder": partial(Ours, eight_bits=True, decoder="fast"),
    "diffusers-float32": diffusers(torch.float32),
    "diffusers-bfloat16": diffusers(torch.bfloat16, channels_last=True),
    "diffusers-compiled": diffusers(usual_dtype("cpu"), channels_last=True, compiled=True),
    "openvino": openvino,
}
