"""What waits for a GPU to measure it comes to its end, over networks so small that a CPU bears them."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def run(*command: object) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_first_steps_of_distilling_sdxl(tmp_path: Path) -> None:
    said = run(BENCH / "distil_sdxl.py", "--small", "--steps", 1, "--batch", 1, "--folder", tmp_path)
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(row["objective"], row["learns"]) for row in rows] == [
        ("squared", "small changes"),
        ("conditional", "small changes"),
        ("squared", "the whole UNet"),
        ("relaxed", "the whole UNet"),
    ]
    assert all(row["seconds_a_step"] > 0 for row in rows)


def test_every_variant_of_drawing(tmp_path: Path) -> None:
    """As far as in a moment; what is not begun by then is told, and so is what came of the targets."""
    run(BENCH / "gpu.py", "--smoke", "--minutes", 0.1, "--out", tmp_path)
    rows = {row.pop("name"): row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert rows["ceiling"]["flops"] > 0
    assert not any("failed" in row for row in rows.values())
    assert rows["compiled by trying out"] == {"skipped": "the 0.1 minutes are over"}
    assert any(name.startswith("target") for name in rows)


def test_the_engine_at_sdxls_sizes(tmp_path: Path) -> None:
    run(BENCH / "serving_sdxl.py", "--smoke", "--seconds", 1, "--loads", 0.8, "--out", tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["same_bits"]["compared"] > 0
    assert found["same_bits"]["different"] == found["same_bits"]["failed"] == 0
