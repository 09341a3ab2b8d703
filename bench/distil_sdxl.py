"""The first steps of SDXL's distillation at full size, with random weights: memory, and seconds a step.

For one GPU of 80 GB. The plan's first stage as it is, a whole UNet by squared error; a LoRA by squared error and
then, upon it, another against a discriminator; and a whole UNet against a discriminator, which may not fit. A step is
one batch: the plan's updates gather many. Writes up to 17 GB into a temporary folder. With --small the networks are
small, which any machine bears.

    python bench/distil_sdxl.py --out results [--small] [--batch 4] [--steps 3] [--folder /tmp]
"""

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from fulgurite.benchmark import peak_memory
from fulgurite.cards import Card
from fulgurite.models import VAE, CLIPTextEncoder, UNet, UNetConfig
from fulgurite.training import distil as distillation
from fulgurite.training.distil import Ground, distil
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import Run, Stage
from fulgurite.training.plans import RANK, SDXL
from fulgurite.training.precision import half
from fulgurite.training.sdxl import SIZE, teacher_card
from report import Report

SMALL = UNetConfig(
    block_out_channels=(32, 64, 64), transformer_layers_per_block=(0, 1, 2), attention_head_dim=16,
    cross_attention_dim=128, addition_time_embed_dim=16, pooled_dim=64,
)  # fmt: skip


def small(of_model: Card) -> Card:
    first, second = of_model.text_encoders
    few = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    first, second = replace(first, **few), replace(second, **few, projection_dim=64)
    vae = replace(of_model.vae, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    return replace(of_model, unet=SMALL, text_encoders=(first, second), vae=vae)


@torch.no_grad()
def random_network(build: type[nn.Module], config: object, device: str) -> nn.Module:
    """In half precision, with weights small enough for numbers to stay finite through all layers."""
    with torch.device("meta"):
        network = build(config).to(half(torch.device(device).type))
    network = network.to_empty(device=device)
    for parameter in network.parameters():
        parameter.normal_(0, 0.02)
    return network.requires_grad_(False).eval()


class Words:
    """Stands for the tokenizers, which are not here: any caption is the same tokens."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[self.end - 1, 5, 6] + [self.end] * 74]).expand(len(captions), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and log.txt")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of each stage that are timed, after one that is not")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    report = Report(arguments.out)
    device = str(PartialState().device)
    of_model = small(teacher_card()) if arguments.small else teacher_card()
    size = (128, 128) if arguments.small else SIZE
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        unet = random_network(UNet, of_model.unet, device)
        report.row("UNet", device=device, billion_weights=sum(p.numel() for p in unet.parameters()) / 1e9)
        save_file({key: tensor.contiguous() for key, tensor in unet.state_dict().items()}, folder / "unet.safetensors")
        del unet
        encoders = [random_network(CLIPTextEncoder, config, device) for config in of_model.text_encoders]
        cell = of_model.vae.downscale
        latents = np.random.default_rng(0).standard_normal((8, 4, size[1] // cell, size[0] // cell)).astype(np.float16)
        words = tuple(Words(config.eos_token_id) for config in of_model.text_encoders)
        run = Run(device)
        ground = Ground(
            of_model, folder / "unet.safetensors", words, encoders, random_network(VAE, of_model.vae, device),
            LatentSet(size, latents, ["a fox"] * 8), arguments.batch, run, half(run.kind), checkpointing=True,
        )  # fmt: skip
        updates = arguments.steps + 1
        guided = replace(SDXL[0], name="guided", rank=RANK, updates=updates)
        against = replace(SDXL[1], name="against", teacher="guided", upon="guided", updates=updates)
        whole = replace(SDXL[3], name="whole", teacher="guided", upon="guided", start=None, updates=updates)
        first = replace(SDXL[0], updates=updates)
        for name, plan in {
            "first": first, "LoRA": guided, "LoRA against a discriminator": against, "whole, against one": whole,
        }.items():  # fmt: skip
            report.part(name, partial(measure, report, name, plan, ground, folder))
    report.end()


def measure(report: Report, name: str, plan: distillation.Distillation, ground: Ground, folder: Path) -> None:
    """Seconds a step and the most memory of a stage's first steps, after one that is not timed; no checkpoints."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ends: list[float] = []
    update = Stage.update

    def timed(stage: Stage, losses: dict[str, torch.Tensor]) -> None:
        update(stage, losses)  # its losses are read there, so a GPU is done by now
        ends.append(time.perf_counter())

    # Without checkpoints there is nothing to be gone on from, and gigabytes need no fingerprint.
    unmarked = patch.object(distillation, "made_of", lambda plan, ground, students: "here")
    with patch.object(Stage, "update", timed), patch.object(Stage, "save", lambda stage: None), unmarked:
        distil(plan, ground, folder / "students", folder / "work")
    report.row(
        f"{name}, a step",
        objective=plan.objective,
        learns="small changes" if plan.rank else "the whole UNet",
        batch=ground.batch,
        seconds=(ends[-1] - ends[0]) / (len(ends) - 1),
        memory_gb=(peak_memory(ground.run.device) or 0) / 1e9,
    )


if __name__ == "__main__":
    main()
