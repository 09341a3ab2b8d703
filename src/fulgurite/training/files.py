"""Files that are there whole or not at all: what a run was writing when it was killed is made again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what ``path`` is to hold: it is there once all of that is written, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"new-{path.name}")
    yield new
    new.replace(path)
