"""Stage two: the text encoders, taught to say what is in the scene that a caption describes.

SDXL's encoders come ready from a billion captioned pictures. Here every caption is written from a scene that is
known exactly, so instead of by contrast with pictures they learn from that: which things, turned to which colours,
on what background, in which style. It takes minutes, and a UNet that starts from encoders that know a fox from a
rocket spends its own hours on drawing; together from nothing, it first learned colours and never reached shapes.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.models import CLIPTextEncoder, Tokenizer
from fulgurite.training.loop import Stage
from fulgurite.training.scenes import COLOURS, HUES, STYLE_WORDS, Scene, caption, random_scene
from fulgurite.training.sources import Sprites

NOTHING = "nothing"


class Questions(nn.Module):
    """Linear heads on a pooled state, one for each thing that can be asked of a scene."""

    def __init__(self, dim: int, sprites: Sprites) -> None:
        super().__init__()
        names, hues, colours = [t.name for t in sprites.things], list(HUES), list(COLOURS)
        self.answers = {
            "first": names, "second": [NOTHING, *names],
            "first_colour": [NOTHING, *hues], "second_colour": [NOTHING, *hues],
            "top": colours, "bottom": colours, "style": list(STYLE_WORDS),
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


def answers_of(scene: Scene) -> dict[str, str]:
    first, *rest = scene.things
    second = rest[0] if rest else None
    return {
        "first": first.thing.name,
        "second": second.thing.name if second else NOTHING,
        "first_colour": first.colour or NOTHING,
        "second_colour": (second.colour if second else None) or NOTHING,
        "top": scene.background[0],
        "bottom": scene.background[-1],
        "style": scene.style,
    }


def train_text_encoders(
    sprites: Sprites,
    card: Card,
    tokenizer: Tokenizer,
    folder: Path,
    steps: int,
    device: str = "cpu",
    batch: int = 128,
    seed: int = 0,
) -> nn.ModuleDict:
    """Trains in ``folder``, going on from its checkpoint; returns the averaged text_encoder and text_encoder_2."""
    torch.manual_seed(seed)
    first, second = (CLIPTextEncoder(config).to(device) for config in card.text_encoders)
    questions = nn.ModuleList(
        Questions(config.projection_dim or config.hidden_size, sprites).to(device) for config in card.text_encoders
    )
    networks = nn.ModuleDict({"text_encoder": first, "text_encoder_2": second, "questions": questions})
    stage = Stage(folder, networks, peak=1e-3, steps=steps, decay=0.995)
    while stage.step < steps:
        rng = random.Random(f"text {seed} {stage.step}")
        scenes = [random_scene(rng, sprites) for _ in range(batch)]
        ids = tokenizer([caption(scene, rng) for scene in scenes]).to(device)
        losses = {}
        for name, encoder, asked in (("first", first, questions[0]), ("second", second, questions[1])):
            with torch.autocast(device, torch.bfloat16):
                _, pooled = encoder(ids)
            assert isinstance(asked, Questions)
            targets = {question: numbers.to(device) for question, numbers in asked.targets(scenes).items()}
            losses[name] = asked.loss(pooled.float(), targets)
        stage.update(losses)
    average = stage.average
    assert isinstance(average, nn.ModuleDict)
    del average["questions"]
    return average.eval()
