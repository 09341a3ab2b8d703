"""What is asked for, what that comes to with a model, and what is given: records, known without any network."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from fulgurite.cards import Card
from fulgurite.errors import RequestError
from fulgurite.models import Tokenizer
from fulgurite.parameters import DEFAULT_GUIDANCE, MOST_STEPS, Decoder, within_bounds

Preview = Callable[[], Image.Image | None]  # the picture as it would be now, small and rough
OnStep = Callable[[int, int, Preview], None]  # steps done, steps in all


@dataclass(frozen=True)
class Request:
    """One picture asked for, in the hosted API's terms and bounds. Raises RequestError beyond them."""

    prompt: str
    negative_prompt: str = ""
    height: int = 1024  # pixels
    width: int = 1024
    num_steps: int = MOST_STEPS  # that may be spent
    guidance: float = DEFAULT_GUIDANCE
    seed: int | None = None  # None: a random one
    decoder: Decoder = "full"

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if (name, value) != ("seed", None)}
        found = within_bounds(given)
        for name in given:
            object.__setattr__(self, name, getattr(found, name))  # 512.0 is 512 from now on

    def seeded(self) -> "Request":
        """The same, with a random seed where it has none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


@dataclass(frozen=True)
class Plan:
    """What a request comes to with a model; known before any network is loaded."""

    steps: int  # run, not asked for
    strength: float  # of guidance; 1: none is computed
    drawn_size: tuple[int, int]  # width, height that the network draws
    latent_shape: tuple[int, int, int]
    network_rows: int  # of the UNet's batch that it takes: with classifier-free guidance two


def plan(card: Card, request: Request) -> Plan:
    """What the request comes to with the card's model. Raises RequestError where it has no such decoder."""
    if request.decoder not in card.decoders:
        has = " or ".join(map(repr, card.decoders))
        raise RequestError(f"decoder: {card.id} has no {request.decoder!r} one, only {has}.", "decoder")
    strength, drawn = guidance_strength(card, request), drawn_size(card, request.width, request.height)
    rows = 2 if strength != 1 and not card.schedules else 1
    return Plan(card.steps_for(request.num_steps), strength, drawn, latent_shape(card, drawn), rows)


def guidance_strength(card: Card, request: Request) -> float:
    """The strength that the API's guidance stands for; 1: none is computed.

    It rises from 1 at 0 through the card's at 7.5: for an undistilled model that of classifier-free guidance, for
    a distilled one that of attention guidance away from a negative prompt. A distilled model has its teacher's
    guidance in its weights, so without a negative prompt 7.5 leaves it alone, and other values are relative to that.
    """
    share = request.guidance / DEFAULT_GUIDANCE
    if card.schedules and not request.negative_prompt:
        return share
    return 1 + share * (card.guidance_strength - 1)


def drawn_size(card: Card, width: int, height: int) -> tuple[int, int]:
    """The width and height that the network draws for a picture of the size asked for."""
    if card.native_shapes:
        return min(card.native_shapes, key=lambda s: abs(math.log(s[0] / s[1]) - math.log(width / height)))
    cell = card.vae.downscale
    return math.ceil(width / cell) * cell, math.ceil(height / cell) * cell


def latent_shape(card: Card, size: tuple[int, int]) -> tuple[int, int, int]:
    cell = card.vae.downscale
    return card.vae.latent_channels, size[1] // cell, size[0] // cell


@dataclass(frozen=True)
class Picture:
    """A picture made, and how."""

    image: Image.Image
    request: Request  # with its seed filled in
    model: str
    steps: int  # run, not asked for
    drawn_size: tuple[int, int]  # width, height that the network drew, before cropping or resampling
    seconds: float
    notes: tuple[str, ...]  # what was not done as asked, each a sentence for people


def notes(card: Card, request: Request, to: Plan, tokenizers: Sequence[Tokenizer]) -> tuple[str, ...]:
    """What was not done as asked: fewer steps, another size, a prompt cut short or not understood."""
    found = []
    if to.steps != request.num_steps:
        found.append(f"ran {to.steps} steps, the largest schedule of this model within the {request.num_steps} allowed")
    if card.native_shapes and to.drawn_size != (request.width, request.height):
        width, height = to.drawn_size
        cut = ", its edges cut off" if width * request.height != height * request.width else ""
        found.append(f"drawn at {width}x{height} and resampled to {request.width}x{request.height}{cut}")
    if request.negative_prompt and request.guidance == 0:
        neither = "neither had an effect" if card.schedules else "it had no effect"
        found.append(f"negative_prompt beside a guidance of 0: {neither}")
    for name in ("prompt", "negative_prompt"):
        if any(tokenizer.encode(getattr(request, name))[1] for tokenizer in tokenizers):
            found.append(f"{name} was cut to its first {tokenizers[0].length - 2} tokens")
        if unknown := tokenizers[0].unknown(getattr(request, name)):
            found.append(f"{name} has words that this model never learned: {first_ten(unknown)}")
    return tuple(found)


def first_ten(words: Sequence[str]) -> str:
    """The first ten words, each at most as long as a word is."""
    return ", ".join(word[:40] for word in words[:10]) + ", ..." * (len(words) > 10)
