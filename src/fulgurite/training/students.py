"""Finished students: where they are, and cards by which they are served (``fulgurite serve --cards FOLDER``)."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

from fulgurite.cards import parse
from fulgurite.errors import FulguriteError
from fulgurite.training.distil import existing, student_file
from fulgurite.weights.files import Files, folder_files

STEPS = (8, 4, 2, 1)


def students_in(folder: Path, unet: Path) -> dict[int, Files]:
    """Students by their steps, from a folder that a recipe wrote: upon the guided one, where there is that.

    ``unet``: the undistilled one's file.
    """
    of_base, found = replace(folder_files(unet.parent.parent), unet=unet), {}
    for n in STEPS:
        loras = [student_file(folder, name, False) for name in ("guided", str(n))]
        if whole := existing(folder, str(n), whole=True):
            found[n] = replace(of_base, unet=whole)
        elif changes := tuple(path for path in loras if path.exists()):
            found[n] = replace(of_base, loras=changes)
    return found


def write_card(of: str, file: Path, unet: Path, students: dict[int, Files] | None = None, preview: str = "") -> None:
    """The package's card ``of`` a model, for other weights; its id: ``local/`` and the file's name, as ids may be.

    ``unet``: the undistilled one's file, in a model's folder; ``students``: those of ``students_in``; ``preview``: the
    lines of a linear map to colours, where that is another. Paths in it are relative to it.
    """
    text = (resources.files("fulgurite.cards") / of).read_text(encoding="utf-8")
    text = with_line(text, "id", "local/" + (re.sub(r"[^A-Za-z0-9._-]+|^[.-]+", "-", file.stem).strip("-.") or "model"))
    text = with_line(text, "name", file.stem)
    text = with_line(text, "description", "Trained on this machine.")
    text = with_line(text, "schedules", sorted(students or ()))
    if preview:
        text = re.sub(r"(# [^\n]*\n)?preview_rgb = \[\n.*?\n\]\n", lambda _: preview, text, count=1, flags=re.S)
    table = weights_table(file.parent, unet, students or {})
    text = re.sub(r"\[weights\]\n.*?\n(?=\[(?!weights))", lambda _: table, text, count=1, flags=re.S)
    parse(text)  # what cannot be read is not written
    file.write_text(text, encoding="utf-8")


def with_line(text: str, key: str, value: str | list[int]) -> str:
    line = f"{key} = {as_toml(value)}"
    return re.sub(rf"^{key} = .*$", lambda _: line, text, count=1, flags=re.M)


def as_toml(value: str | list[int]) -> str:
    """JSON is TOML, but for two halves of a character, which TOML wants whole, and DEL, which it wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def weights_table(folder: Path, unet: Path, students: Mapping[int, Files]) -> str:
    """The card's table of weights: whole UNets, small changes, or those alone that all steps share.

    Raises FulguriteError where all steps share one and some step has a whole UNet, which that would change too.
    """

    def line(key: object, path: Path) -> str:
        return f"{key} = {as_toml(os.path.relpath(path, folder))}"

    wholes = {n: files.unet for n, files in students.items() if files.unet != unet}
    changes = {n: files.loras for n, files in students.items() if files.loras}
    shared = {loras[0] for loras in changes.values() if loras[0].stem.startswith("guided")}
    own = {n: loras[-1] for n, loras in changes.items() if loras[-1] not in shared}
    if shared and wholes:
        raise FulguriteError(f"No card can have both: move away {min(shared)} or {min(wholes.values())}.")
    lines = ["[weights]", 'source = "local"', line("path", unet.parent.parent)]
    lines += [line("lora_file", path) for path in shared]
    for key, paths in {"unets": wholes, "loras": own}.items():
        if paths:
            lines += ["", f"[weights.{key}]", *(line(n, path) for n, path in paths.items())]
    return "\n".join([*lines, "", ""])
