"""LoRA (Hu et al., arXiv 2106.09685): a small file of low-rank changes, merged into a UNet's weights.

Read are kohya's names, made of diffusers' or of the original layout's (``lora_unet_down_blocks_0_...``,
``lora_unet_input_blocks_1_...``), and peft's (``unet.down_blocks.0....lora_A.weight``).
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fulgurite.errors import WeightsError
from fulgurite.models import UNetConfig
from fulgurite.weights import original
from fulgurite.weights.files import read
from fulgurite.weights.fit import several

PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)


def spellings(module: str, modules: dict[str, str]) -> tuple[str, ...]:
    """What files call a module of the UNet, up to the names of the pair."""
    theirs = original.translated(module, modules)
    return f"unet.{module}", "lora_unet_" + module.replace(".", "_"), "lora_unet_" + theirs.replace(".", "_")


def merged(
    weights: dict[str, Tensor], path: Path, config: UNetConfig, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The UNet's tensors with the changes of a LoRA file added to them, as ``dtype`` on ``device``.

    Raises WeightsError that names what the UNet has no place for.
    """
    left, default_alpha = read(path), adapter_alpha(path)
    if not left:
        raise WeightsError(f"{path} holds no changes.")
    modules, result, wrong = original.unet_modules(config), dict(weights), []
    for name, weight in weights.items():
        for base in spellings(name.removesuffix(".weight"), modules):
            for down_name, up_name in PAIRS:
                if base + down_name not in left or base + up_name not in left:
                    continue
                down, up = left.pop(base + down_name), left.pop(base + up_name)
                alpha = left.pop(base + ".alpha", default_alpha)
                if fits(weight, down, up, alpha):
                    result[name] = changed(weight, down, up, alpha, device).to(dtype)
                else:
                    wrong.append(base)
    problems = [(wrong, "change(s) of another shape"), (list(left), "unexpected tensor(s)")]
    if wrong or left:
        told = "; ".join(several(names, what) for names, what in problems if names)
        raise WeightsError(f"{path} does not fit the UNet: {told}.")
    return result


def adapter_alpha(path: Path) -> float | None:
    """Alpha where the file's header states one for all changes, as newer diffusers writes it."""
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        settings = dict(json.loads(header))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} has adapter settings in its header that cannot be read.") from error
    for name in ("use_dora", "use_rslora", "alpha_pattern"):
        if settings.get(f"unet.{name}"):
            raise WeightsError(f"{path} is a kind of LoRA that is not read here: its {name} is set.")
    return settings.get("unet.lora_alpha")


def fits(weight: Tensor, down: Tensor, up: Tensor, alpha: Tensor | float | None) -> bool:
    """Whether ``down`` ``[R, I, ...]`` and ``up`` ``[O, R, ...]`` make a change of a weight ``[O, I, ...]``."""
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        return False
    if min(down.ndim, up.ndim, weight.ndim) < 2 or len(down) == 0:
        return False
    inner, outer = down.flatten(1), up.flatten(1)
    return inner.shape[1] == weight[0].numel() and outer.shape == (len(weight), len(inner))


def changed(weight: Tensor, down: Tensor, up: Tensor, alpha: Tensor | float | None, device: str) -> Tensor:
    """``weight + alpha / rank * up @ down``, in float32; without an alpha it is the rank."""
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    # First to the device, then in float32: together, torch would convert on the host and send twice as much.
    down, up = (part.to(device).float().flatten(1) for part in (down, up))
    return weight.to(device, torch.float32) + scale * (up @ down).view(weight.shape)
