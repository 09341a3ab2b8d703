"""Model cards: one TOML file a model. Adding a model is adding a card."""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from fulgurite.errors import UnknownModelError
from fulgurite.models import CLIPTextConfig, TinyDecoderConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class Repo:
    """A repository on the hub, at one revision of it."""

    repo: str
    revision: str


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from; read by fulgurite.weights."""

    source: str  # "embedded" in the package, pulled from the "hub", or "local": files of this machine

    # "hub"
    base: Repo | None = None  # the text encoders, the tokenizers, and the UNet that a LoRA is merged into
    vae: Repo | None = None
    fast_decoder: Repo | None = None
    distilled: Repo | None = None
    unets: dict[str, str] = field(default_factory=dict)  # steps to the file made for them; "_x0" in a name: predicts x0
    loras: dict[str, str] = field(default_factory=dict)

    # "local"; "embedded" too has its path, and those of its LoRA files, inside the package: a step count's own file
    # in loras is merged after the one that all share, lora_file
    path: str = ""  # a folder as diffusers publishes it, or a whole single file
    unet_file: str = ""  # instead of the UNet in path
    vae_file: str = ""  # instead of the VAE in path
    fast_decoder_file: str = ""  # instead of the fast decoder in path
    lora_file: str = ""  # merged into the UNet
    tokenizers: str = ""  # the folder that holds tokenizer/ and tokenizer_2/; needed with a single file


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
    guidance_strength: float  # what the API's 7.5 stands for, where guidance is computed at all
    native_shapes: tuple[tuple[int, int], ...]  # width, height; empty: any size
    preview_rgb: tuple[
        tuple[float, ...], ...
    ]  # a latent channel's red, green, blue a row, last what is added; or empty
    unet: UNetConfig
    vae: VAEConfig
    fast_decoder: TinyDecoderConfig | None  # a quicker one than the VAE's, where the model has one
    text_encoders: tuple[CLIPTextConfig, CLIPTextConfig]
    weights: Weights

    @property
    def decoders(self) -> tuple[str, ...]:
        """What can make pixels of its latents."""
        return ("full", "fast") if self.fast_decoder else ("full",)

    def steps_for(self, most: int) -> int:
        """The steps run when a request allows ``most``: the largest schedule that fits."""
        return max((n for n in self.schedules if n <= most), default=self.schedules[0]) if self.schedules else most


def frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def parse(text: str) -> Card:
    """Reads one card's TOML; a missing or unknown field is a TypeError that names it."""
    table = tomllib.loads(text)
    first, second = (CLIPTextConfig(**frozen(table.pop(key))) for key in ("text_encoder", "text_encoder_2"))
    weights = table.pop("weights")
    weights |= {key: Repo(**weights[key]) for key in ("base", "vae", "fast_decoder", "distilled") if key in weights}
    unet, vae = UNetConfig(**frozen(table.pop("unet"))), VAEConfig(**frozen(table.pop("vae")))
    fast_decoder = TinyDecoderConfig(**frozen(table.pop("fast_decoder"))) if "fast_decoder" in table else None
    shapes, preview = (tuple(map(tuple, table.pop(key))) for key in ("native_shapes", "preview_rgb"))
    return Card(
        unet=unet,
        vae=vae,
        fast_decoder=fast_decoder,
        text_encoders=(first, second),
        native_shapes=shapes,
        preview_rgb=preview,
        weights=Weights(**weights),
        **frozen(table),
    )


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
