"""Who may know whom: the import directions of the design, read from the sources."""

import ast
from pathlib import Path

import pytest

import fulgurite

PACKAGE = Path(fulgurite.__file__).parent

# What each part may import of ours, beside itself. A part that is not here, such as the command line, may know all.
MAY_KNOW = {
    "errors": set(),
    "models": set(),
    "sampling": set(),
    "kernels": {"models"},
    "cards": {"errors", "models", "parameters"},
    "weights": {"cards", "errors", "models"},
    "request": {"cards", "errors", "models", "parameters"},
    "pipeline": {"cards", "errors", "kernels", "models", "request", "sampling", "weights"},
    "parameters": {"errors"},
    "picture_file": {"request"},
    "benchmark": {"cards", "models", "picture_file", "pipeline", "request"},
    "client": {"errors"},
    "settings": {"errors", "parameters"},
    "threads": set(),
    "records": set(),
    "engine": {"cards", "errors", "kernels", "models", "pipeline", "request", "sampling", "settings", "weights"},
    "cluster": {"cards", "engine", "errors", "request", "settings", "threads"},
    "ledger": {"errors", "records", "settings"},
    # The engine and the ledger by protocols:
    "server": {"cards", "errors", "parameters", "picture_file", "records", "request", "settings"},
    "training": {"cards", "errors", "kernels", "models", "pipeline", "sampling", "weights"},
}
OUTSIDERS = {"diffusers", "transformers", "peft", "openvino"}  # oracles and opponents, never needed to run


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import: write it in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_a_part_knows_only_those_it_may(path):
    part = part_of(path)
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    names = {name.split(".")[1] for name in imports(path) if name.startswith("fulgurite.")}
    ours = {fulgurite.MODULE_OF.get(name, name) for name in names} & parts
    assert ours - {part} <= MAY_KNOW.get(part, parts)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_the_oracles_are_never_imported(path):
    assert not {name.split(".")[0] for name in imports(path)} & OUTSIDERS


def test_the_networks_know_torch_and_nobody_else():
    standard = {"collections", "dataclasses", "functools", "json", "math", "pathlib", "re", "typing", "unicodedata"}
    allowed = standard | {"tokenizers", "torch"}
    for path in (PACKAGE / "models").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed | {"fulgurite"}, path


def test_the_scheduler_of_the_engine_needs_no_torch():
    assert not any(name.split(".")[0] == "torch" for name in imports(PACKAGE / "engine/scheduler.py"))


def test_the_server_touches_no_network():
    """It knows the engine by a protocol; requests and pictures are plain records."""
    for path in (PACKAGE / "server").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path
