"""What `fulgurite bench` measures: the same picture, the published arithmetic, sums that add up. No times."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import LIGHTNING
from typer.testing import CliRunner

from fulgurite import Pipeline, Request, benchmark
from fulgurite.benchmark import PARTS, PICTURE, Laps, dollars_a_thousand, draw_in_parts, flop_counts
from fulgurite.cards import card
from fulgurite.cli import app

REQUEST = Request("a red fox", width=256, height=256, num_steps=3, seed=7)


def test_the_measured_picture_is_the_one_that_is_drawn(tiny: Pipeline) -> None:
    picture, seconds = draw_in_parts(tiny, REQUEST)
    assert picture.image.tobytes() == tiny.draw(REQUEST).image.tobytes()
    assert set(seconds) == {*PARTS, PICTURE}
    parts = sum(seconds[part] * (3 if part == "step" else 1) for part in PARTS)
    assert parts == pytest.approx(seconds[PICTURE])


def test_laps_of_a_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 15.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(times))
    laps = Laps()
    laps.lap("text")
    laps.lap("step", 4)
    assert laps.seconds == {"text": 1.0, "step": 1.0, PICTURE: 5.0}


@pytest.mark.parametrize(("side", "step", "decode"), [(512, 1.589e12, 2.515e12), (1024, 6.761e12, 10.470e12)])
def test_the_arithmetic_of_sdxl(side: int, step: float, decode: float) -> None:
    """Counted by hand elsewhere: 2 for a product and its sum, attention's included."""
    found = flop_counts(card(LIGHTNING), Request("a fox", width=side, height=side, num_steps=4))
    assert found["step"] == pytest.approx(step, rel=1e-3)
    assert found["decode"] == pytest.approx(decode, rel=1e-3)
    assert found[PICTURE] == found["text"] + 4 * found["step"] + found["decode"]


def test_the_fast_decoders_arithmetic_is_its_own() -> None:
    """All its convolutions are 3x3: 64 channels wide at four sizes, with 4 in and 3 out."""
    layers = {128: 9, 256: 10, 512: 10, 1024: 4}
    inner = sum(count * side**2 for side, count in layers.items()) * 64 * 64
    outer = 128**2 * 4 * 64 + 1024**2 * 64 * 3
    fast = flop_counts(card(LIGHTNING), Request("a fox", decoder="fast"))
    assert fast["decode"] == 2 * 9 * (inner + outer)


def test_ways_are_compared_by_what_each_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    import compare

    work = compare.WORKS["spark"]()
    full, fast = (compare.flops_of(way, work) for way in ("ours", "ours-fast-decoder"))
    assert fast["decode"] < full["decode"] / 5
    assert full[PICTURE] - fast[PICTURE] == full["decode"] - fast["decode"]
    row = {"seconds": {part: [1.0, 1.0, 1.0] for part in compare.COLUMNS}, "peak_memory": 1, "first": 1.0}
    result = {"ways": {"ours": row, "ours-fast-decoder": row.copy()}, "ceiling": 1e9}
    result["flops"] = {"ours": full, "ours-fast-decoder": fast}
    compare.print_table(result, Namespace(price=None))
    for way, flops in result["flops"].items():
        assert result["ways"][way]["of_ceiling"]["decode"] == flops["decode"] / 1e9


@pytest.mark.parametrize("alone", [True, False])
def test_ways_are_in_memory_together_unless_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    import compare

    class Fake(compare.Process):
        here, most = set[str](), 0

        def begin(self) -> None:
            self._connection, self.first, self.memory, self.picture = True, 1.0, 1, np.zeros(3)  # type: ignore[assignment]
            Fake.here.add(self.way)
            Fake.most = max(Fake.most, len(Fake.here))
            if self.way == "openvino":
                raise RuntimeError("openvino: no such library")

        def draw(self) -> dict[str, float]:
            if self.way not in Fake.here:
                self.begin()
            self.rounds.append(dict.fromkeys(compare.COLUMNS, 2.0 if self.way == "ours" else 3.0))
            return self.rounds[-1]

        def close(self) -> None:
            Fake.here.discard(self.way)

    monkeypatch.setattr(compare, "Process", Fake)
    monkeypatch.setattr(compare, "matrix_ceiling", lambda *_: 1e9)
    given = Namespace(reference="ours", rounds=2, patience=1, price=None, alone=alone)
    results: list[dict] = []
    ways = ["diffusers-bfloat16", "openvino", "diffusers-compiled"]
    compare.compare("spark", compare.WORKS["spark"](), {}, ways, given, results)
    assert Fake.most == (1 if alone else 2)
    assert not Fake.here
    rows = results[0]["ways"]
    assert {way: row["rounds"] for way, row in rows.items()} == {
        "diffusers-bfloat16": 2, "diffusers-compiled": 2, "ours": 6 if alone else 4,
    }  # fmt: skip
    assert rows["diffusers-compiled"]["ratios"][PICTURE] == 1.5
    assert "no such library" in results[0]["failed"]["openvino"]
    assert "failed: openvino: no such library" in capsys.readouterr().out


def test_guidance_by_a_second_evaluation_costs_it(tiny: Pipeline) -> None:
    """The undistilled model's guidance takes two rows of a step's batch."""
    guided, alone = (
        flop_counts(tiny.card, Request("a fox", width=256, height=256, guidance=guidance)) for guidance in (7.5, 0)
    )
    assert guided["step"] == pytest.approx(2 * alone["step"], rel=0.02)  # layers of one vector a row run on sixteen


def test_a_thousand_pictures_of_36_seconds_take_ten_hours() -> None:
    assert dollars_a_thousand(36, 2.5) == pytest.approx(25)


def test_the_command(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda model, **options: tiny)
    monkeypatch.setattr(benchmark, "matrix_ceiling", lambda device, dtype: 1e9)
    result = CliRunner().invoke(app, ["bench", "--model", "fulgurite/spark", "--rounds", "3", "--price", "36"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    parts = {row["part"]: row for row in report["parts"]}
    assert set(parts) == {*PARTS, PICTURE}
    assert all(row["lowest"] <= row["seconds"] <= row["highest"] for row in parts.values())
    whole = parts[PICTURE]
    assert report["dollars_a_thousand"] == pytest.approx(10 * whole["seconds"])
    assert whole["of_ceiling"] == pytest.approx(whole["flop"] / whole["seconds"] / 1e9)
    assert whole["flop"] == parts["text"]["flop"] + 4 * parts["step"]["flop"] + parts["decode"]["flop"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "12"], "--size"),
        (["--steps", "21"], "--steps"),
        (["--rounds", "0"], "--rounds"),
        (["--decoder", "quick"], "--decoder"),
        (["--model", "nobody/nothing"], "no model 'nobody/nothing'"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code != 0
    assert said in result.output.replace("\n", " ")
