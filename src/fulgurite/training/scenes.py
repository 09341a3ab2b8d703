"""Scenes put together from sprites, and words that say what is in them: training data without end.

A scene is drawn from a random generator, rendered to pixels, and described; one scene has many captions, so a
cached latent can be paired with fresh words each time it is seen.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fulgurite.training.sources import SPRITE, Sprites, Thing, often
from fulgurite.training.words import FAULTS, FILLERS, FOREMOST, SYNONYMS

COLOURS = {
    "red": (214, 48, 49), "orange": (242, 140, 40), "yellow": (250, 208, 60), "green": (72, 168, 88),
    "teal": (40, 160, 160), "blue": (58, 118, 220), "purple": (132, 84, 200), "pink": (244, 143, 188),
    "brown": (140, 96, 64), "black": (28, 28, 32), "grey": (150, 152, 158), "white": (252, 252, 252),
}  # fmt: skip
HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 125, "teal": 178, "blue": 216, "purple": 272, "pink": 330}
STYLE_WORDS = {
    "3d": ("3d", "3d style", "3d render", "3d icon"),
    "flat": ("flat", "flat style", "flat design", "flat icon"),
    "cartoon": ("cartoon", "cartoon style"),
    "classic": ("classic", "classic style"),
    "sticker": ("sticker", "sticker style"),
    "outline": ("outline", "outline style", "line art"),
}
# Where the prompt names no style, the answer should be one style, not a mixture: mostly the first.
STYLE_WEIGHTS = {"3d": 3.0}
COMMON_WEIGHT, FOREMOST_WEIGHT = 4, 20  # how much oftener a common thing is drawn, and the published request's
# Some things are held out of one of these; the others the embedded model knew of everything before it learned these.
WITHHELD = ("cartoon", "sticker")
SPOKEN_WITH_Y = "uni", "ufo", "eu"  # at their beginning, where a vowel is written
UNSAID_STYLE = {"3d": 0.7}  # how often the caption leaves this style out
OTHERS_UNSAID = 0.12
TWO = 0.3  # the share of scenes that hold two things


@dataclass(frozen=True)
class Arrangement:
    """How two things stand."""

    centres: tuple[tuple[float, float], tuple[float, float]]  # of both, as shares of the picture's width and height
    weight: float  # how often things stand so


# The first thing is on the left, above or in front, and hides some of the second. Place and size do not vary, since no
# word says them: the network would learn to blur over them. Both are half as large as the picture, with corners at
# eighths of it, whole steps of the UNet's convolutions: what these learn of a thing in one place, they know in others.
ALONE, OF_TWO = 0.875, 0.5  # how large a thing is, as a share of the picture's shorter side
ARRANGEMENTS = {
    "beside": Arrangement(((0.25, 0.5), (0.75, 0.5)), 0.4),
    "upon": Arrangement(((0.5, 0.375), (0.5, 0.75)), 0.3),
    "before": Arrangement(((0.625, 0.625), (0.375, 0.375)), 0.3),
}
Links = tuple[tuple[str, ...], tuple[str, ...]]  # what is between the first and the second; and the other way round
LINKS: dict[str, Links] = {
    "beside": (("and", "and", "next to", "beside", "to the left of"), ("to the right of",)),
    "upon": (("on", "on top of", "riding", "sitting on", "above"), ("under", "carrying", "wearing")),
    "before": (("in front of", "in front of"), ("behind", "holding", "with")),
}


@dataclass(frozen=True)
class Placed:
    """A thing in a scene."""

    thing: Thing
    sprite: int
    colour: str | None  # its hue is turned to this colour
    centre: tuple[float, float]  # as a share of the picture's width and height
    side: float  # as a share of the picture's shorter side


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    things: tuple[Placed, ...]  # one or two, in the order of ARRANGEMENTS
    style: str
    background: tuple[str, ...]  # colours from top to bottom
    size: tuple[int, int]  # width, height in pixels
    arrangement: str | None = None  # of two things


def random_scene(rng: random.Random, sprites: Sprites, size: tuple[int, int] = (256, 256)) -> Scene:
    """One scene: seven in ten hold one thing, the others two."""
    weights = [weight(thing) for thing in sprites.things]
    first = rng.choices(sprites.things, weights)[0]
    styles = list(first.sprites)
    style = rng.choices(styles, [STYLE_WEIGHTS.get(s, 1.0) for s in styles])[0]
    things, arrangement = [first], None
    if rng.random() < TWO and any(style in other.sprites for other in sprites.things if other is not first):
        arrangement = rng.choices(list(ARRANGEMENTS), [each.weight for each in ARRANGEMENTS.values()])[0]
    while arrangement and len(things) < 2:
        other = rng.choices(sprites.things, weights)[0]
        if style in other.sprites and other is not first:
            things.append(other)

    placed = []
    for thing, (centre, side) in zip(things, places(arrangement), strict=True):
        colour = rng.choice(list(HUES)) if rng.random() < 0.16 else None
        if colour and not saturated(sprites.pixels[thing.sprites[style]]):
            colour = None
        placed.append(Placed(thing, thing.sprites[style], colour, centre, side))
    kind = rng.random()
    if kind < 0.4:
        background: tuple[str, ...] = ("white",)
    else:
        background = tuple(rng.sample(list(COLOURS), 1 if kind < 0.85 else 2))
    return Scene(tuple(placed), style, background, size, arrangement)


def places(arrangement: str | None) -> list[tuple[tuple[float, float], float]]:
    """Centre and side of each thing."""
    if arrangement is None:
        return [((0.5, 0.5), ALONE)]
    return [(centre, OF_TWO) for centre in ARRANGEMENTS[arrangement].centres]


def scene_of(things: Sequence[Thing], style: str, arrangement: str | None = None) -> Scene:
    """One thing, or two that stand so, in their own colours on white."""
    stand = zip(things, places(arrangement), strict=True)
    placed = tuple(Placed(thing, thing.sprites[style], None, centre, side) for thing, (centre, side) in stand)
    return Scene(placed, style, ("white",), (SPRITE, SPRITE), arrangement)


def held_out_style(thing: Thing) -> str | None:
    """The style that training never shows the thing in, if there is one.

    One thing in six has one, so that drawing it so shows what a model puts together itself.
    """
    number, styles = zlib.crc32(thing.name.encode()), [style for style in WITHHELD if style in thing.sprites]
    return styles[number // 6 % len(styles)] if number % 6 == 0 and styles and len(thing.sprites) > 1 else None


def held_out_together(scene: Scene) -> bool:
    """Whether nothing composed so is shown in training, in any style: one composition in eight, for evaluation.

    One thing in its own colours on white is always shown: it is what the shortest prompts ask for.
    """
    composed = [(placed.thing.name, placed.colour) for placed in scene.things], scene.background, scene.arrangement
    shown = composed == ([(scene.things[0].thing.name, None)], ("white",), None)
    return not shown and zlib.crc32(repr(composed).encode()) % 8 == 0


def training_scene(rng: random.Random, sprites: Sprites, size: tuple[int, int] = (256, 256)) -> Scene:
    """One scene without any held-out pair of thing and style, that is not composed as held-out ones are."""
    while True:
        scene = random_scene(rng, sprites, size)
        apart = any(held_out_style(placed.thing) == scene.style for placed in scene.things)
        if not apart and not held_out_together(scene):
            return scene


def weight(thing: Thing) -> int:
    if thing.name == FOREMOST:
        return FOREMOST_WEIGHT
    return COMMON_WEIGHT if often(thing.name) else 1


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Which pixels ``[H, W]`` of a sprite have a hue worth speaking of."""
    rgb = pixels[..., :3].astype(np.int16)
    return (rgb.max(-1) - rgb.min(-1) > 60) & (pixels[..., 3] > 128)


def saturated(pixels: np.ndarray) -> bool:
    """Whether most of a sprite has a hue, so that turning it changes the thing's colour."""
    small = pixels[::4, ::4]
    return bool(coloured(small).sum() > 0.45 * (small[..., 3] > 128).sum())


def recoloured(sprite: Image.Image, colour: str) -> Image.Image:
    """The sprite with its hues turned so that its commonest is ``colour``."""
    hsv = np.asarray(sprite.convert("RGB").convert("HSV")).copy()
    mask = coloured(np.asarray(sprite))
    commonest = np.bincount(hsv[..., 0][mask] // 8, minlength=32).argmax() * 8 + 4
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) - commonest + HUES[colour] * 255 // 360) % 256
    turned = Image.fromarray(hsv, "HSV").convert("RGB")
    turned.putalpha(sprite.getchannel("A"))
    return turned


def render_background(colours: tuple[str, ...], size: tuple[int, int]) -> Image.Image:
    top, bottom = np.array(COLOURS[colours[0]], float), np.array(COLOURS[colours[-1]], float)
    ramp = np.linspace(0, 1, size[1])[:, None, None]
    rows = np.broadcast_to(top + (bottom - top) * ramp, (size[1], size[0], 3))
    return Image.fromarray(rows.round().astype(np.uint8))


def render(scene: Scene, sprites: Sprites) -> np.ndarray:
    """The scene's pixels ``[H, W, 3]``, uint8."""
    canvas = render_background(scene.background, scene.size)
    for placed in reversed(scene.things):  # the first hides some of the second
        sprite = Image.fromarray(np.asarray(sprites.pixels[placed.sprite]))
        if placed.colour:
            sprite = recoloured(sprite, placed.colour)
        side = round(placed.side * min(scene.size))
        if side != SPRITE:
            sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        x, y = (round(c * n - side / 2) for c, n in zip(placed.centre, scene.size, strict=True))
        canvas.paste(sprite, (x, y), sprite)
    return np.array(canvas)


@dataclass(frozen=True)
class Said:
    """What words for a scene say of it, where they may leave it out or say it otherwise."""

    names: tuple[str, ...]  # of its things
    white: bool  # that a white background is white
    styled: bool  # which style it is in


def plain(name: str) -> str:
    """A thing's name without what emoji's add to it."""
    return name.removesuffix(" face")


def names_of(thing: Thing) -> tuple[str, ...]:
    """All that a caption may call it."""
    return thing.name, *SYNONYMS.get(thing.name, ()), *thing.kinds


def name_of(thing: Thing, rng: random.Random) -> str:
    """The thing's name, or now and then another word for it or what kind of thing it is."""
    pick = rng.random()
    if pick < 0.08 and thing.kinds:
        return rng.choice(thing.kinds)
    if pick < 0.4 and thing.name in SYNONYMS:
        return rng.choice(SYNONYMS[thing.name])
    return plain(thing.name) if rng.random() < 0.5 else thing.name


def a_or_an(words: str) -> str:
    vowel = words[0].lower() in "aeiou" and not words.lower().startswith(SPOKEN_WITH_Y)
    return ("an " if vowel else "a ") + words


def with_article(words: str, rng: random.Random) -> str:
    pick = rng.random()
    if pick < 0.6:
        return a_or_an(words)
    return words if pick < 0.9 else "the " + words


def caption(scene: Scene, rng: random.Random, said: Said | None = None) -> str:
    """Words for the scene: its things, their colours if turned, the background unless white, the style at times.

    ``said``: what is by chance otherwise.
    """
    parts = []
    for i, placed in enumerate(scene.things):
        name = said.names[i] if said else name_of(placed.thing, rng)
        words = f"{placed.colour} {name}" if placed.colour else name
        if rng.random() < 0.2:
            words = f"{rng.choice(FILLERS)} {words}"
        parts.append(with_article(words, rng))
    text = linked(scene, parts, LINKS, rng)

    if len(scene.background) == 2:
        text += rng.choice((" on a {} to {} gradient background", " on a {} and {} gradient")).format(*scene.background)
    elif scene.background[0] != "white" or (said.white if said else rng.random() < 0.15):
        text += rng.choice((" on a {} background", " on {}", ", {} background")).format(scene.background[0])

    if said.styled if said else styled(scene, rng):
        word = rng.choice(STYLE_WORDS[scene.style])
        text = f"{text}, {word}" if rng.random() < 0.8 else f"{word} of {text}"
    if rng.random() < 0.08:
        text = rng.choice(("a picture of ", "an image of ", "an icon of ", "a drawing of ")) + text
    return text


def styled(scene: Scene, rng: random.Random) -> bool:
    """Whether to say the scene's style: so that what names none is mostly one of them."""
    return rng.random() >= UNSAID_STYLE.get(scene.style, OTHERS_UNSAID)


def linked(scene: Scene, parts: Sequence[str], links: Mapping[str, Links], rng: random.Random) -> str:
    """Words for each of the scene's things, and between two some that say how they stand."""
    if scene.arrangement is None:
        return parts[0]
    onward, back = links[scene.arrangement]
    link = rng.choice(onward + back)
    first, second = parts if link in onward else reversed(parts)
    return f"{first} {link} {second}"


def no_caption(rng: random.Random) -> str:
    """Words that say nothing of any scene: none, or a negative prompt's, so that both guide alike."""
    return "" if rng.random() < 0.5 else ", ".join(rng.sample(FAULTS, rng.randint(1, 4)))
