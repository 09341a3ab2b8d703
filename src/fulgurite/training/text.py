"""Stage two: the text encoders, taught to say what is in the scene that a prompt describes, and where.

SDXL's encoders come ready from a billion captioned pictures. Here every prompt is written from a scene that is
known exactly, so instead of by contrast with pictures they learn from that. The pooled state answers questions: which
things, turned to which colours, on what background, in which style. The last states, which stand behind the prompt
and have no words of their own, sketch the latent, each its part of it. So the UNet's cross-attention finds the outlines
of what it is to draw, where otherwise it would have to learn every thing's shape from its name alone: on little data
it learned colours, and never reached shapes.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.models import CLIPTextEncoder, Tokenizer
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import HERE, Run, Stage
from fulgurite.training.precision import autocast
from fulgurite.training.prompts import Wording
from fulgurite.training.scenes import ARRANGEMENTS, COLOURS, HUES, STYLE_WORDS, Scene
from fulgurite.training.sources import Sprites

NOTHING = "nothing"
BATCH = 96
PARTS = 4  # per side of the latent: as many squared are the states that sketch


def behind_prompts(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which places of token ids ``[B, S]`` are behind the prompt and its end: they have no words of their own."""
    end = (ids == tokenizer.end).int().argmax(dim=1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device) > end


class Questions(nn.Module):
    """Linear heads on a pooled state, one for each thing that can be asked of a scene."""

    def __init__(self, dim: int, sprites: Sprites) -> None:
        super().__init__()
        names, hues, colours = [t.name for t in sprites.things], list(HUES), list(COLOURS)
        self.answers = {
            "first": names, "second": [NOTHING, *names],
            "first_colour": [NOTHING, *hues], "second_colour": [NOTHING, *hues],
            "arrangement": [NOTHING, *ARRANGEMENTS], "top": colours, "bottom": colours, "style": list(STYLE_WORDS),
        }  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(dim, len(answers)) for name, answers in self.answers.items()})

    def targets(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """The true answers' numbers, ``[B]`` for each question."""
        rows = [answers_of(scene) for scene in scenes]
        return {
            name: torch.tensor([answers.index(row[name]) for row in rows]) for name, answers in self.answers.items()
        }

    def loss(self, pooled: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the questions for pooled states ``[B, P]``."""
        losses = [F.cross_entropy(head(pooled), targets[name]) for name, head in self.heads.items()]
        return torch.stack(losses).mean()


class Sketch(nn.Module):
    """A linear map from the last states of both encoders to the latent, a square part from each."""

    def __init__(self, dim: int, latent: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = latent
        self.part = (height // PARTS, width // PARTS)
        self.linear = nn.Linear(dim, channels * math.prod(self.part))

    def forward(self, states: Tensor) -> Tensor:  # [B, S, D] to [B, C, h, w]
        parts = self.linear(states[:, -PARTS * PARTS :])
        return F.fold(parts.transpose(1, 2), (self.part[0] * PARTS, self.part[1] * PARTS), self.part, stride=self.part)


def answers_of(scene: Scene) -> dict[str, str]:
    first, *rest = scene.things
    second = rest[0] if rest else None
    return {
        "first": first.thing.name,
        "second": second.thing.name if second else NOTHING,
        "first_colour": first.colour or NOTHING,
        "second_colour": (second.colour if second else None) or NOTHING,
        "arrangement": scene.arrangement or NOTHING,
        "top": scene.background[0],
        "bottom": scene.background[-1],
        "style": scene.style,
    }


def train_text_encoders(
    latents: LatentSet,
    sprites: Sprites,
    wording: Wording,
    card: Card,
    folder: Path,
    steps: int,
    run: Run = HERE,
) -> nn.ModuleDict:
    """Trains in ``folder``, going on from its checkpoint; returns the averaged text_encoder and text_encoder_2."""
    device = run.device
    torch.manual_seed(0)
    first, second = (CLIPTextEncoder(config).to(device) for config in card.text_encoders)
    questions = Questions(card.unet.pooled_dim, sprites).to(device)
    sketch = Sketch(card.unet.cross_attention_dim, latents.latents[:1].shape[1:]).to(device)
    networks = nn.ModuleDict(
        {"text_encoder": first, "text_encoder_2": second, "questions": questions, "sketch": sketch}
    )
    stage = Stage(folder, networks, peak=1.5e-3, steps=steps, decay=0.995, run=run)
    while stage.step < steps:
        rng = random.Random(f"text {stage.number}")
        clean, scenes = latents.batch(BATCH, rng)
        ids = wording.tokenizer([wording.describe(scene, rng) for scene in scenes]).to(device)
        with autocast(run.kind):
            (states, _), (more, pooled) = first(ids), second(ids)
            drawn = sketch(torch.cat([states, more], dim=-1)).float()
        off = (drawn - clean.to(device)).square().mean(dim=(1, 2, 3))
        behind = behind_prompts(ids, wording.tokenizer)[:, -PARTS * PARTS]  # not all of these are, of long prompts
        targets = {question: numbers.to(device) for question, numbers in questions.targets(scenes).items()}
        asked = questions.loss(pooled.float(), targets)
        stage.update({"questions": asked, "sketch": 2 * (off * behind).mean()})
    average = stage.average
    assert isinstance(average, nn.ModuleDict)
    del average["questions"], average["sketch"]
    return average.eval()
