"""Results that are kept as they come: a run that is cut off, or a part of it that fails, leaves all the others."""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Skip(Exception):
    """There is nothing to measure here."""


class Report:
    """A line of results.jsonl and of log.txt for every result, in a folder."""

    def __init__(self, folder: Path, minutes: float = math.inf) -> None:
        """``minutes``: how long there is for all parts."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._rows, self._log = folder / "results.jsonl", folder / "log.txt"
        self._started, self._minutes = time.monotonic(), minutes
        self.results: dict[str, dict[str, Any]] = {}

    def say(self, line: str) -> None:
        line = f"{time.monotonic() - self._started:6.1f} s  {line}"
        print(line, flush=True)
        with self._log.open("a", encoding="utf-8") as file:
            print(line, file=file)

    def row(self, name: str, **values: Any) -> None:
        self.results[name] = values
        with self._rows.open("a", encoding="utf-8") as file:
            print(json.dumps({"name": name, **values}), file=file)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))

    def seconds_left(self) -> float:
        return 60 * self._minutes - (time.monotonic() - self._started)

    def part(self, name: str, measure: Callable[[], object], needs: float = 0) -> bool:
        """Measures, and returns whether it went well; if not, that is a row, and the run goes on.

        It is not begun where fewer seconds are left than it ``needs``. A ``Skip`` says why there is nothing to measure.
        """
        try:
            if self.seconds_left() < needs:
                raise Skip(f"of {self._minutes:g} minutes too little is left")
            self.say(f"--- {name}")
            measure()
        except Skip as skip:
            self.row(name, skipped=str(skip))
        except Exception as error:
            self.row(name, failed=f"{type(error).__name__}: {error}")
            self.say(traceback.format_exc())
        else:
            return True
        return False

    def end(self) -> None:
        """Ends the program with status 1 where a part has failed."""
        if failed := [name for name, row in self.results.items() if "failed" in row]:
            sys.exit(f"These failed: {', '.join(failed)}.")
