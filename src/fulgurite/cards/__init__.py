"""Model cards: one TOML file a model. Adding a model is adding a card: here, or in a folder of one's own."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)

from fulgurite.errors import FulguriteError, RequestError, UnknownModelError
from fulgurite.models import CLIPTextConfig, TinyDecoderConfig, UNetConfig, VAEConfig
from fulgurite.models.unet import NAG_TAU
from fulgurite.parameters import MOST_STEPS


@dataclass(frozen=True)
class Repo:
    """A repository on the hub, at one revision of it."""

    repo: str
    revision: str


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from; read by fulgurite.weights."""

    source: Literal["embedded", "hub", "local"]  # in the package, pulled from the hub, or files of this machine

    # Step counts to the files made for them. "_x0" in a UNet's name: it predicts the clean latent.
    unets: dict[str, str] = field(default_factory=dict)  # not of "embedded"
    loras: dict[str, str] = field(default_factory=dict)  # merged after the one that all share, lora_file

    # "hub"
    base: Repo | None = None  # the text encoders, the tokenizers, and the UNet that a LoRA is merged into
    vae: Repo | None = None
    fast_decoder: Repo | None = None
    distilled: Repo | None = None

    # "local"; "embedded" too has its path, and those of its LoRA files, inside the package
    path: str = ""  # a folder as diffusers publishes it, or a whole single file
    unet_file: str = ""  # instead of the UNet in path
    vae_file: str = ""  # instead of the VAE in path
    fast_decoder_file: str = ""  # instead of the fast decoder in path
    lora_file: str = ""  # merged into the UNet
    tokenizers: str = ""  # the folder that holds tokenizer/ and tokenizer_2/; needed with a single file


# What would be passed over, by the source of the weights.
ELSEWHERE = "vae", "fast_decoder", "distilled"
INSTEAD = "unet_file", "vae_file", "fast_decoder_file", "tokenizers"
NOT_READ = {
    "hub": ("path", "lora_file", *INSTEAD),
    "embedded": ("base", "unets", *ELSEWHERE, *INSTEAD),
    "local": ELSEWHERE,
}


def for_a_path(model: str) -> str:
    """A model's id, checked to be its page's address as it is."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", model, re.ASCII):
        raise ValueError("An id is letters, digits, '.', '_' and '-', with '/' between its parts, such as local/fox")
    return model


def rising(steps: tuple[int, ...]) -> tuple[int, ...]:
    if list(steps) != sorted(set(steps)):
        raise ValueError("Numbers of steps should rise")
    return steps


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))  # for the tables in it, too
@dataclass(frozen=True)
class Card:
    """What a model is, what it costs, what it can do, and the sizes of its networks."""

    id: Annotated[str, Field(max_length=200), AfterValidator(for_a_path)]
    name: str
    type: str
    description: str
    license: str
    cost_microdollars: Annotated[int, Field(ge=0, le=1_000_000_000)]  # per image
    hosted_regions: tuple[str, ...]
    available_regions: tuple[str, ...]
    base_architecture: str
    # Step counts it was distilled for, of those that a request may spend; empty: any number of steps.
    schedules: Annotated[tuple[Annotated[PositiveInt, Field(le=MOST_STEPS)], ...], AfterValidator(rising)]
    prediction: Annotated[str, Field(pattern="^(epsilon|v|x0)$")]
    guidance_strength: float  # what the API's 7.5 stands for, where guidance is computed at all
    native_shapes: tuple[tuple[PositiveInt, PositiveInt], ...]  # width, height; empty: any size
    # A latent channel's red, green, blue a row, last what is added; or empty.
    preview_rgb: tuple[tuple[float, float, float], ...]
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[CLIPTextConfig, CLIPTextConfig]
    weights: Weights
    fast_decoder: TinyDecoderConfig | None = None  # a quicker one than the VAE's, where the model has one
    guidance_tau: float = NAG_TAU  # of attention guidance: how much longer it may make attention's outputs
    # Of an undistilled model, diffusers' name: with no negative prompt it is guided away from zeros, not from an empty
    # prompt's states. As it was trained: SDXL's was so.
    force_zeros_for_empty_prompt: bool = False

    @property
    def decoders(self) -> tuple[str, ...]:
        """What can make pixels of its latents."""
        return ("full", "fast") if self.fast_decoder else ("full",)

    @property
    def usual_size(self) -> tuple[int, int]:
        """Width and height of a picture where nobody says."""
        return self.native_shapes[0] if self.native_shapes else (1024, 1024)

    def steps_for(self, most: int) -> int:
        """The steps run when a request allows ``most``: the largest schedule that fits. Raises RequestError if none."""
        if not self.schedules:
            return most
        fitting = [steps for steps in self.schedules if steps <= most]
        if not fitting:
            raise RequestError(f"num_steps: {self.id} needs at least {min(self.schedules)}.", "num_steps")
        return max(fitting)


CARD = TypeAdapter(Card)


def parse(text: str) -> Card:
    """Reads one card's TOML; what is missing, unknown, or of a value that cannot be, is an error that names it."""
    table = tomllib.loads(text)
    for name in ("text_encoder", "text_encoder_2"):
        if name not in table:
            raise ValueError(f"the table [{name}] is missing")
    table["text_encoders"] = table.pop("text_encoder"), table.pop("text_encoder_2")
    try:
        return consistent(CARD.validate_python(table))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        name = name.replace("text_encoders.0", "text_encoder").replace("text_encoders.1", "text_encoder_2")
        given = "" if first["type"] == "missing" else f" = {first['input']!r}"
        raise ValueError(f"{name}{given}: {first['msg'].removeprefix('Value error, ')}") from None


def consistent(of_model: Card) -> Card:
    """The card, its entries checked against one another. Raises ValueError."""
    cell = of_model.vae.downscale
    for width, height in of_model.native_shapes:
        if width % cell or height % cell:
            raise ValueError(f"native_shapes: {width}x{height} is not whole latents: its VAE takes multiples of {cell}")
    weights, found = of_model.weights, vars(of_model.weights)
    if weights.source == "local" and not weights.path:
        raise ValueError("weights.path: it is empty, and should name the folder or the single file of the weights")
    if unread := [name for name in NOT_READ[weights.source] if found[name]]:
        raise ValueError(f"weights.{unread[0]}: a model whose source is {weights.source!r} has none")
    for name, number, wanted in numbers_that_agree(of_model):
        if number != wanted:
            raise ValueError(f"{name}: {number}, where the rest of the card needs {wanted}")
    return of_model


def numbers_that_agree(of_model: Card) -> Iterator[tuple[str, int, int | None]]:
    """Sizes that others determine: their names, what they are and what they should be."""
    unet, vae, fast, (first, second) = of_model.unet, of_model.vae, of_model.fast_decoder, of_model.text_encoders
    levels = len(unet.block_out_channels)
    yield "unet.cross_attention_dim", unet.cross_attention_dim, first.hidden_size + second.hidden_size
    yield "unet.pooled_dim", unet.pooled_dim, second.projection_dim
    yield "unet.in_channels", unet.in_channels, vae.latent_channels
    yield "unet.out_channels", unet.out_channels, vae.latent_channels
    yield "numbers in unet.transformer_layers_per_block", len(unet.transformer_layers_per_block), levels
    positions = "text_encoder_2.max_position_embeddings", second.max_position_embeddings
    yield *positions, first.max_position_embeddings
    if of_model.preview_rgb:
        yield "rows of preview_rgb", len(of_model.preview_rgb), vae.latent_channels + 1
    if fast:
        yield "fast_decoder.latent_channels", fast.latent_channels, vae.latent_channels
        yield "numbers in fast_decoder.block_out_channels", len(fast.block_out_channels), len(vae.block_out_channels)
        yield "numbers in fast_decoder.num_blocks", len(fast.num_blocks), len(vae.block_out_channels)


@cache
def packaged() -> dict[str, Card]:
    """The package's own cards by id, in the order of their file names."""
    files = sorted((f for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {card.id: card for card in (parse(file.read_text(encoding="utf-8")) for file in files)}


added: dict[str, Card] = {}  # by ``add``
folders: dict[str, Path] = {}  # of those, as they were named


def add(folder: Path | None) -> None:
    """Makes the cards of a folder known from now on, beside the package's. Paths in them start at the folder.

    Raises FulguriteError that names the file which is no card, or whose id is another's.
    """
    if folder is None:
        return
    if not folder.is_dir():
        raise FulguriteError(f"There is no folder {folder} of cards.")
    found: dict[str, Card] = {}
    for file in sorted(folder.glob("*.toml")):
        try:
            card = parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FulguriteError(f"{file} is no model's card: {error}.") from None
        if card.id in packaged() or card.id in found:
            raise FulguriteError(f"{file}: there is a model {card.id} already. Give it another id.")
        if card.weights.source == "local":
            card = replace(card, weights=starting_at(folder, card.weights))
        found[card.id] = card
    added.update(found)
    folders.update(dict.fromkeys(found, folder))


def pull_command(of_model: Card, steps: int) -> str:
    """What fetches a hub model's weights for so many steps, as people type it."""
    words = ["fulgurite", "pull", of_model.id, "--steps", str(steps)]
    return shlex.join([*words, "--cards", str(folders[of_model.id])] if of_model.id in folders else words)


def starting_at(folder: Path, weights: Weights) -> Weights:
    """The same weights, their paths no longer relative."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {steps: placed(path) for steps, path in value.items()}
        return str(folder.resolve() / value) if value else value

    names = ("path", "unet_file", "vae_file", "fast_decoder_file", "lora_file", "tokenizers", "unets", "loras")
    return replace(weights, **{name: placed(getattr(weights, name)) for name in names})


def cards() -> dict[str, Card]:
    """All cards by id: the package's, then those that were added."""
    return packaged() | added


def card(model: str) -> Card:
    """The card of a model id. Raises UnknownModelError, which names the models there are."""
    if model not in cards():
        raise UnknownModelError(model, list(cards()))
    return cards()[model]
