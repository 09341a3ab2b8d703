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


def drawn_every_way(folder: Path, *arguments: object) -> dict[str, dict[str, object]]:
    run(BENCH / "gpu.py", "--smoke", "--out", folder, *arguments)
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row.pop("name"): row for row in rows}


def test_every_way_of_drawing(tmp_path: Path) -> None:
    rows = drawn_every_way(tmp_path)
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    only_on_a_gpu = {"graphs", "pictures, graphs", "float8", "overlap", "attention", "compiled"}
    assert skipped.keys() == only_on_a_gpu | {"diffusers, compiled", "compiled by trying out"}
    assert set(skipped.values()) == {"there is no GPU here"}
    timed = {name for name, row in rows.items() if "ms" in row}
    assert {"step, eager", "decode, channels-last", "step, Triton", "step, Triton, float8"} <= timed
    assert rows["Triton kernels, relative error of the networks"]["step"] < 1e-5
    assert rows["diffusers, eager, 4 steps"]["picture"] > 0
    assert rows["target, batch 1, 4 steps"]["best"] == rows["eager, batch 1, 4 steps"]["ms"] / 1000


def test_what_is_not_begun_in_time_is_told(tmp_path: Path) -> None:
    rows = drawn_every_way(tmp_path, "--minutes", 0)
    assert rows["ceiling"] == rows["compiled by trying out"] == {"skipped": "the 0 minutes are over"}
    assert rows["target, batch 1, 4 steps"]["met"] is False


def test_the_engine_at_sdxls_sizes(tmp_path: Path) -> None:
    run(BENCH / "serving_sdxl.py", "--smoke", "--seconds", 1, "--loads", 0.8, "--out", tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["same_bits"]["compared"] > 0
    assert found["same_bits"]["different"] == found["same_bits"]["failed"] == 0
