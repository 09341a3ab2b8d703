"""The pictures that the embedded model learns from: captioned vector art out of npm packages, as sprites.

A sprite is one thing in one style on nothing: 256x256 RGBA. The packages are fetched when the data set is
built; NOTICE.md beside the model's weights names their authors and licences.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fulgurite.errors import FulguriteError
from fulgurite.training.files import whole
from fulgurite.training.words import COMMON, KINDS, SYNONYMS

SPRITE = 256  # pixels per side
METADATA = "emojibase-data@17.0.0"
# Style word: the package that draws everything in that style.
STYLES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "cartoon": "@iconify-json/noto@1.2.9",
    "classic": "@iconify-json/noto-v1@1.2.5",
    "sticker": "@iconify-json/twemoji@1.2.5",
    "outline": "@iconify-json/streamline-emojis@1.2.4",
}
# Drawn alone, letters, signs and skin tones teach words that no prompt uses.
DROPPED_GROUPS = {"component", "symbols", "flags"}
DROPPED_SUBGROUPS = {"place-map", "time", "alphanum", "transport-sign", "family"}
PEOPLE_GROUPS = {"smileys-emotion", "people-body"}
# The small set's. Of only two, a thing that is held out of one would have the other alone, and no need of its word.
SMALL_STYLES = ("3d", "flat", "cartoon", "sticker")


@dataclass(frozen=True)
class Thing:
    """One nameable thing and where its sprites are."""

    name: str
    tags: tuple[str, ...]
    sprites: dict[str, int]  # style: row of the sprite array

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of its tags say what kind of thing it is; others say what comes to mind ("movie", of popcorn)."""
        return tuple(tag for tag in self.tags if tag in KINDS)


@dataclass(frozen=True)
class Sprites:
    """All things, with their pictures ``[N, 256, 256, 4]``, uint8, mapped from disk."""

    things: list[Thing]
    pixels: np.ndarray

    @classmethod
    def open(cls, folder: Path, names: frozenset[str] | None = None) -> "Sprites":
        """Those of a built folder; of the things with these names alone, where names are given.

        Raises FulguriteError where it was built before one of these was among what is built.
        """
        table = json.loads((folder / "things.json").read_text(encoding="utf-8"))
        if missing := (names or frozenset()) - {row["name"] for row in table}:
            raise FulguriteError(f"{folder} is without {', '.join(sorted(missing))}: delete it, to have it built anew.")
        rows = [row for row in table if not names or row["name"] in names]
        things = [Thing(row["name"], tuple(row["tags"]), row["sprites"]) for row in rows]
        return cls(things, np.load(folder / "sprites.npy", mmap_mode="r"))


def fetch(package: str, folder: Path) -> Path:
    """Unpacks an npm package under ``folder`` and returns where it lies."""
    target = folder / re.sub(r"[^a-z0-9.]+", "-", package.lower()).strip("-")
    if not target.exists():
        if shutil.which("npm") is None:
            raise FulguriteError("Training fetches its pictures with npm, which is not installed here.")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", package, "--loglevel", "error", "--pack-destination", str(folder)]
        packed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if packed.returncode:  # npm has said why
            raise FulguriteError(f"npm could not fetch {package}.")
        archived = folder / packed.stdout.split()[-1]
        with tarfile.open(archived) as archive, whole(target) as new:
            archive.extractall(new, filter="data")
        archived.unlink()
    return target / "package"


def hexcode(text: str) -> str:
    """One spelling of an emoji's code points: lower case, without variation selectors."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def vector_style(folder: Path) -> dict[str, bytes]:
    """An Iconify package's drawings: hexcode to SVG."""
    table = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    codes = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    drawings = {}
    for code, name in codes.items():
        icon = table["icons"].get(name)
        if icon:
            width, height = icon.get("width", table["width"]), icon.get("height", table["height"])
            head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            drawings[hexcode(code)] = f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'.encode()
    return drawings


def bitmap_style(folder: Path) -> dict[str, bytes]:
    """A package of pictures named by hexcode: hexcode to WebP."""
    return {hexcode(path.stem): path.read_bytes() for path in (folder / "assets").glob("*.webp")}


def rasterize(drawing: bytes) -> np.ndarray:
    """SVG or WebP to ``[256, 256, 4]``, uint8."""
    if drawing.startswith(b"<svg"):
        import resvg_py

        svg = resvg_py.svg_to_bytes(svg_string=drawing.decode(), width=SPRITE, height=SPRITE)
        drawing = bytes(svg)
    image = Image.open(io.BytesIO(drawing)).convert("RGBA").resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def often(name: str) -> bool:
    """Whether a thing is one of those that are asked for often."""
    return name in COMMON or name in SYNONYMS


def wanted(entry: dict, groups: dict[str, str], subgroups: dict[str, str], small: bool) -> bool:
    if "group" not in entry:
        return False  # regional indicators: letters
    group, subgroup = groups[str(entry["group"])], subgroups[str(entry["subgroup"])]
    if small and not often(entry["label"]):
        return False
    return group not in DROPPED_GROUPS and subgroup not in DROPPED_SUBGROUPS


def capped(entries: list[dict], groups: dict[str, str], share: float = 0.2) -> list[dict]:
    """Keeps people near a fifth: beside those asked for often, of the many gestures and roles those evenly spaced."""

    def thinned(entry: dict) -> bool:
        return groups[str(entry["group"])] in PEOPLE_GROUPS and not often(entry["label"])

    people, others = [e for e in entries if thinned(e)], [e for e in entries if not thinned(e)]
    room = int(len(others) * share / (1 - share))
    stride = max(1, -(-len(people) // room)) if room else 1
    return others + people[::stride]


def build(folder: Path, small: bool) -> None:
    """Fetches the packages and renders every sprite into ``folder``; done once, then read back."""
    if not (folder / "things.json").exists():
        packages = folder / "packages"
        styles = {
            style: (bitmap_style if style == "3d" else vector_style)(fetch(package, packages))
            for style, package in STYLES.items()
            if not small or style in SMALL_STYLES
        }
        metadata = fetch(METADATA, packages)
        names = json.loads((metadata / "meta/groups.json").read_text(encoding="utf-8"))
        groups, subgroups = names["groups"], names["subgroups"]
        entries = json.loads((metadata / "en/data.json").read_text(encoding="utf-8"))
        entries = capped([e for e in entries if wanted(e, groups, subgroups, small)], groups)

        things: list[Thing] = []
        rows: list[np.ndarray] = []
        for entry in entries:
            sprites = {}
            for style, drawings in styles.items():
                drawing = drawings.get(hexcode(entry["hexcode"]))
                if drawing:
                    sprites[style] = len(rows)
                    rows.append(rasterize(drawing))
            if sprites:
                things.append(Thing(entry["label"], tuple(entry.get("tags", ())), sprites))
        np.save(folder / "sprites.npy", np.stack(rows))
        with whole(folder / "things.json") as new:
            new.write_text(json.dumps([asdict(t) for t in things]), encoding="utf-8")
