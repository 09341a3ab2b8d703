"""What waits for a GPU to measure it comes to its end, over networks so small that a CPU bears them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def run(*command: object) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a run, by their names."""
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row.pop("name"): row for row in rows}


def test_the_first_steps_of_distilling_sdxl(tmp_path: Path) -> None:
    run(BENCH / "distil_sdxl.py", "--small", "--steps", 1, "--batch", 1, "--folder", tmp_path, "--out", tmp_path)
    rows = [row for row in kept(tmp_path).values() if "seconds" in row]
    assert [(row["objective"], row["learns"]) for row in rows] == [
        ("squared", "the whole UNet"),
        ("squared", "small changes"),
        ("conditional", "small changes"),
        ("relaxed", "the whole UNet"),
    ]
    assert all(row["seconds"] > 0 for row in rows)


def drawn_every_way(folder: Path, *arguments: object) -> dict[str, dict[str, Any]]:
    run(BENCH / "gpu.py", "--smoke", "--out", folder, *arguments)
    return kept(folder)


def test_every_way_of_drawing(tmp_path: Path) -> None:
    rows = drawn_every_way(tmp_path)
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    graphed = {name for name in skipped if name.startswith("pictures: Triton and graphs")}
    assert len(graphed) == 8
    only_on_a_gpu = {"as served", "compiled", "diffusers, compiled"}
    assert skipped.keys() == graphed | only_on_a_gpu
    assert set(skipped.values()) == {"there is no GPU here"}
    timed = {name for name, row in rows.items() if "ms" in row}
    assert {"step, eager", "decode, torch.channels_last", "step, Triton", "step of 1, Triton, float8"} <= timed
    assert rows["kernels that are wrong here"] == {"names": []}
    kernels = kept(tmp_path / "kernels")  # told by a process of its own
    assert min(kernels[f"GEGLU 1x4x64, {way}"]["ms"] for way in ("plain", "Triton")) > 0
    assert rows["Triton kernels, relative error of the networks"]["step"] < 1e-5
    assert rows["diffusers, eager, 4 steps"]["picture"] > 0
    assert rows["target, batch 1, 4 steps"]["best"] == rows["eager, batch 1, 4 steps"]["ms"] / 1000


def test_what_is_not_begun_in_time_is_told(tmp_path: Path) -> None:
    rows = drawn_every_way(tmp_path, "--minutes", 0)
    assert rows["ceiling"] == rows["compiled"] == {"skipped": "of 0 minutes too little is left"}
    assert rows["target, batch 1, 4 steps"]["met"] is False


def test_one_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from report import Report

    report = Report(tmp_path, minutes=1)
    assert not report.part("broken", lambda: 1 / 0)
    assert not report.part("long", lambda: report.row("long", ms=1.0), needs=61)
    assert report.part("whole", lambda: report.row("whole", ms=1.0))
    rows = kept(tmp_path)
    assert (rows["broken"]["failed"], rows["whole"]["ms"]) == ("ZeroDivisionError: division by zero", 1.0)
    with pytest.raises(SystemExit, match=r"^These failed: broken\.$"):
        report.end()
    assert "too little" in rows["long"]["skipped"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_the_engine_at_sdxls_sizes(tmp_path: Path) -> None:
    run(BENCH / "serving_sdxl.py", "--smoke", "--seconds", 1, "--loads", 0.8, "--out", tmp_path)
    found = kept(tmp_path)
    assert found["pictures"]["compared"] > 0
    assert found["pictures"]["different"] == found["pictures"]["errors"] == 0
    assert {row["exact"] for name, row in found.items() if name.startswith("step of 1,")} == {True}
    assert {row["apart"] for name, row in found.items() if name.endswith("beside rows alone")} == {0}
    assert found["another checkpoint, merge"]["seconds"] > 0
    assert found["serving, load 0.8, ours"]["pictures"] > 0
