"""Pipelines as the engine loads them: on this machine's device, as many UNets as its memory is to hold."""

import logging
import os
import time
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import nn

from fulgurite.cards import Card, card
from fulgurite.errors import FulguriteError, SettingError
from fulgurite.kernels import cpu
from fulgurite.kernels.graphs import GRAPHED, Memory, Pool
from fulgurite.kernels.nvidia import is_nvidia, why_not_triton
from fulgurite.kernels.recordings import Workspace
from fulgurite.models import UNetConfig
from fulgurite.models.unet import weights_in
from fulgurite.pipeline import Pipeline, kept_dtype, usual_dtype
from fulgurite.settings import Settings

log = logging.getLogger("fulgurite")
FLOAT8 = 8, 9  # the compute capability from which GPUs multiply such numbers: Ada's


def usable_device(name: str) -> str:
    """The device that a setting names, "auto" a GPU where there is one. Raises SettingError."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        if why.startswith("Expected one of"):  # all types of devices that torch has names for, anywhere
            why = "that is no device's name"
        there_are = ", ".join(devices_here())
        raise SettingError("device", f"cannot compute on {device!r} here: {why}. There are: {there_are}.") from None
    return device


def devices_here() -> list[str]:
    """Those that this machine can compute on, as the setting names them."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_gpu_settings(settings: Settings, device: str) -> None:
    """Raises SettingError where something is wanted that this device does not have."""
    if settings.triton_kernels and (why := why_not_triton(device)):
        raise SettingError("triton_kernels", f"{why}.")
    if settings.cuda_graphs and not is_nvidia(device):
        raise SettingError("cuda_graphs", f"they need an NVIDIA GPU; the device is {device!r}.")


def usable_precision(name: str, device: str) -> tuple[torch.dtype, bool]:
    """The numbers that a setting names, and whether large layers are in 8 bits. Raises SettingError."""
    if name == "int8" and not (device == "cpu" and torch.cpu._is_vnni_supported()):
        found = "this one has none" if device == "cpu" else f"the device is {device!r}"
        raise SettingError("precision", f"int8 needs a CPU with AVX-512 VNNI, and {found}.")
    if name == "float8" and not (is_nvidia(device) and torch.cuda.get_device_capability(device) >= FLOAT8):
        found = f"the device is {device!r}"
        if device.startswith("cuda"):
            found = "this one is older" if is_nvidia(device) else "this one is not"
        raise SettingError("precision", f"float8 needs a GPU of NVIDIA's, Ada, Hopper or newer, and {found}.")
    if name == "float16" and device == "cpu":
        raise SettingError("precision", "float16 needs a GPU; a CPU draws in bfloat16, float32 or int8.")
    if name == "bfloat16" and device == "cpu" and not cpu.has_bfloat16():
        raise SettingError(
            "precision",
            "bfloat16 needs a CPU that multiplies it (AVX-512), and this one does not: auto draws in float32.",
        )
    eight_bits = name in ("int8", "float8")
    return usual_dtype(device, eight_bits) if name == "auto" or eight_bits else getattr(torch, name), eight_bits


def checkpoint(of_model: Card, steps: int) -> int:
    """The schedule whose checkpoint draws ``steps``; 0 where one checkpoint draws any number."""
    return of_model.steps_for(steps) if of_model.schedules else 0


class Loader:
    """Gives the pipeline for a model and a number of steps.

    A model's checkpoints share their text encoders and VAE. UNets stay, the least recently used going first, as long as
    all of them, as kernels hold them, come to at most ``most_bytes``, or else to half the device's memory. LoRA
    checkpoints share the UNet that they change: while any of them is here it stays on the device too, if there is room
    for it and one of them, so that a checkpoint that went comes back by a few small products, the same to the bit.
    """

    def __init__(
        self,
        device: str,
        most_bytes: int | None = None,
        *,
        precision: str = "auto",
        triton_kernels: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        """``triton_kernels``, ``cuda_graphs``: None is wherever they can be."""
        self.device, self._triton_kernels = device, triton_kernels
        by_cuda = is_nvidia(device) if cuda_graphs is None else cuda_graphs
        # One for all networks, which never run at once.
        self._graphs: Memory | None = Pool() if by_cuda else Workspace() if device == "cpu" else None
        self.dtype, self._eight_bits = usable_precision(precision, device)
        self._asked = precision
        self._most_bytes = half_the_memory(device) if most_bytes is None else most_bytes
        self._loaded: OrderedDict[tuple[str, int], Pipeline] = OrderedDict()
        self._seconds: dict[str, float] = {}  # that a model's checkpoint last took
        self._came_to: dict[str, int] = {}  # bytes, a model's UNet when it was last loaded

    @classmethod
    def from_settings(cls, settings: Settings) -> "Loader":
        """The one of a program that draws; on a CPU its memory is arranged for that.

        Raises FulguriteError where this machine cannot do what the settings say; it names the flag, variable or file.
        """
        try:
            device = usable_device(settings.device)
            check_gpu_settings(settings, device)
            if device == "cpu":
                cpu.keep_memory()
            if is_nvidia(device) and settings.triton_kernels is None and (why := why_not_triton(device)):
                log.warning("drawing without the kernels for NVIDIA's GPUs: %s", why)
            return cls(
                device,
                int(settings.unet_gb * 1e9) if settings.unet_gb else None,
                precision=settings.precision,
                triton_kernels=settings.triton_kernels,
                cuda_graphs=settings.cuda_graphs,
            )
        except SettingError as error:
            raise FulguriteError(f"{settings.origin(error.setting)}: {error.why}") from None

    @property
    def precision(self) -> str:
        """The one in force: what "auto" has come to."""
        return self._asked if self._eight_bits else str(self.dtype).removeprefix("torch.")

    def __call__(self, model: str, steps: int) -> Pipeline:
        of_model = card(model)
        name = model, checkpoint(of_model, steps)
        if name not in self._loaded:
            started = time.monotonic()
            alike = (kept.networks for (other, _), kept in self._loaded.items() if other == model)
            like = max(alike, key=lambda networks: networks.base is not None, default=None)
            if like:  # without its UNet: held here it would make no room
                like = replace(like, unet=None)  # type: ignore[arg-type]
            dtype = None if self._asked == "auto" else self.dtype
            kept = dtype or kept_dtype(of_model, self.device, self.dtype)
            room = self._came_to.get(model) or published_bytes(of_model.unet, kept)
            while self._loaded and self._bytes() + room > self._most_bytes:
                self._loaded.popitem(last=False)
            pipeline = Pipeline.load(
                model,
                steps=steps,
                device=self.device,
                dtype=dtype,
                eight_bits=self._eight_bits,
                triton=self._triton_kernels,
                graphs=self._graphs,
                like=like,
            )
            self._loaded[name] = pipeline
            self._make_room_for_base()
            if self.device == "cpu":
                cpu.give_back_memory()
            self._seconds[model] = time.monotonic() - started
            self._came_to[model] = held_bytes(pipeline.networks.unet)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def switch_seconds(self, model: str, steps: int) -> float:
        """What it costs to get a checkpoint ready: nothing while it is here."""
        return 0.0 if (model, steps) in self._loaded else self._seconds.get(model, 1.0)

    def drop_others(self, model: str, steps: int) -> None:
        """Gives up everything that another checkpoint needs, to make room."""
        for name in [name for name in self._loaded if name != (model, steps)]:
            del self._loaded[name]
        if self._graphs:
            self._graphs.renew()
        for kept in self._loaded.values():
            for network in (kept.networks.unet, kept.networks.vae, *kept.networks.text_encoders):
                if isinstance(network, GRAPHED):  # torch gives no graph's memory back while one lives
                    network.graphs.kept.clear()
        self._drop_bases()

    def _make_room_for_base(self) -> None:
        """Keeps the newest checkpoint, and of the others and the UNet that it is a LoRA on what there is room for."""
        while len(self._loaded) > 1 and self._bytes() > self._most_bytes:
            self._loaded.popitem(last=False)
        if self._bytes() > self._most_bytes:
            self._drop_bases()

    def _drop_bases(self) -> None:
        for kept in self._loaded.values():
            kept.networks = replace(kept.networks, base=None)

    def _bytes(self) -> int:
        """Of the UNets and what they are LoRAs on. On a CPU that is the file itself, mapped: no memory of ours."""
        bases = {id(base): base.tensors for kept in self._loaded.values() if (base := kept.networks.base)}
        tensors = [tensor for base in bases.values() for tensor in base.values() if tensor.device.type != "cpu"]
        unets = sum(held_bytes(kept.networks.unet) for kept in self._loaded.values())
        return unets + sum(tensor.nbytes for tensor in tensors)


def held_bytes(network: nn.Module) -> int:
    """Of all tensors that its layers hold: parameters, and what kernels have put in their place."""
    values = [value for layer in network.modules() for value in vars(layer).values()]
    values += [kept for value in values if isinstance(value, dict) for kept in value.values()]
    return sum({id(value): value.nbytes for value in values if isinstance(value, torch.Tensor)}.values())


def published_bytes(config: UNetConfig, dtype: torch.dtype) -> int:
    """Of a UNet as its files have it, before any kernel packs or rounds it."""
    return weights_in(config) * dtype.itemsize


def half_the_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory // 2
    if not hasattr(os, "sysconf"):  # Windows
        raise FulguriteError("FULGURITE_UNET_GB is needed: this system does not say how much memory it has.")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
