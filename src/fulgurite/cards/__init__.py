"""Model cards: one TOML file a model. Adding a model is adding a card."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fulgurite.errors import UnknownModelError
from fulgurite.models import CLIPTextConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class Card:
    """What a model is, what it costs, what it can do, and the sizes of its networks."""

    id: str
    name: str
    type: str
    description: str
    license: str
    cost_microdollars: int  # per image
    hosted_regions: tuple[str, ...]
    available_regions: tuple[str, ...]
    base_architecture: str
    schedules: tuple[int, ...]  # step counts it was distilled for; empty: any number of steps
    prediction: str  # "epsilon", "v" or "x0"
    guidance_strength: float  # what the API's 7.5 stands for; 1: as distilled, no guidance is computed
    native_shapes: tuple[tuple[int, int], ...]  # width, height; empty: any size
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[CLIPTextConfig, CLIPTextConfig]
    weights: dict[str, Any]  # where the weights come from, read by fulgurite.weights

    def steps_for(self, most: int) -> int:
        """The steps run when a request allows ``most``: the largest schedule that fits."""
        return max((n for n in self.schedules if n <= most), default=self.schedules[0]) if self.schedules else most


def frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def parse(text: str) -> Card:
    """Reads one card's TOML; a missing or unknown field is a TypeError that names it."""
    table = tomllib.loads(text)
    first, second = (CLIPTextConfig(**frozen(table.pop(key))) for key in ("text_encoder", "text_encoder_2"))
    unet, vae = UNetConfig(**frozen(table.pop("unet"))), VAEConfig(**frozen(table.pop("vae")))
    shapes = tuple(tuple(shape) for shape in table.pop("native_shapes"))
    return Card(unet=unet, vae=vae, text_encoders=(first, second), native_shapes=shapes, **frozen(table))


@cache
def cards() -> dict[str, Card]:
    """All cards by id, in the order of their file names."""
    files = sorted((f for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {card.id: card for card in (parse(file.read_text(encoding="utf-8")) for file in files)}


def card(model: str) -> Card:
    """The card of a model id. Raises UnknownModelError, which names the models there are."""
    if model not in cards():
        raise UnknownModelError(model, list(cards()))
    return cards()[model]
