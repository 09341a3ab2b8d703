"""The command line, over a tiny pipeline; then with the embedded model."""

import doctest
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import LIGHTNING, SPARK, FakeEngine, needs_weights
from PIL import Image
from typer.testing import CliRunner

from fulgurite import Pipeline, __version__, cards, cli_serve, pipeline, threads
from fulgurite.cli import app
from fulgurite.cli_ledger import show_table
from fulgurite.engine import warm_up
from fulgurite.parameters import Parameters
from fulgurite.settings import read_settings
from fulgurite.training.students import write_card


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def with_tiny(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda model, **options: tiny)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def metadata(file: str) -> str:
    with Image.open(file) as picture:
        return picture.info["parameters"]


@pytest.mark.usefixtures("with_tiny")
def test_generate_writes_the_file_and_says_so() -> None:
    result = run("generate", "a red fox", "-o", "fox.png", "--steps", "2", "--seed", "7", "--negative", "blurry")
    assert result.exit_code == 0
    assert result.stdout == "fox.png\n"
    assert "256x256, 2 steps, full decoder, seed 7, fulgurite/spark" in result.stderr
    assert metadata("fox.png").startswith("a red fox\nNegative prompt: blurry\nSteps: 2,")


@pytest.mark.usefixtures("with_tiny")
def test_the_same_seed_gives_the_same_file() -> None:
    for name in ("a.png", "b.png"):
        assert run("generate", "a red fox", "-o", name, "--steps", "2", "--seed", "7").exit_code == 0
    assert run("generate", "a red fox", "-o", "c.png", "--steps", "2", "--seed", "8").exit_code == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


@pytest.mark.usefixtures("with_tiny")
def test_the_fast_decoder_is_used_when_asked_for() -> None:
    run("generate", "a red fox", "-o", "full.png", "--steps", "1", "--seed", "7")
    result = run("generate", "a red fox", "-o", "fast.png", "--steps", "1", "--seed", "7", "--decoder", "fast")
    assert "fast decoder" in result.stderr
    assert "Decoder: full," in metadata("full.png")
    assert "Decoder: fast," in metadata("fast.png")
    with Image.open("full.png") as full, Image.open("fast.png") as fast:
        assert full.tobytes() != fast.tobytes()


@pytest.mark.usefixtures("with_tiny")
def test_several_pictures_count_their_seeds_up() -> None:
    result = run("generate", "a red fox", "-o", "fox.png", "--steps", "1", "--seed", "7", "-n", "3")
    assert result.stdout == "fox-1.png\nfox-2.png\nfox-3.png\n"
    assert [metadata(f"fox-{i}.png").split("Seed: ")[1][0] for i in (1, 2, 3)] == ["7", "8", "9"]
    run("generate", "a red fox", "-o", "one.png", "--steps", "1", "--seed", "8")
    assert Path("one.png").read_bytes() == Path("fox-2.png").read_bytes()


@pytest.mark.usefixtures("with_tiny")
def test_after_the_last_seed_comes_the_first() -> None:
    result = run("generate", "a red fox", "-o", "fox.png", "--steps", "1", "--seed", str(2**64 - 1), "-n", "2")
    assert result.exit_code == 0
    assert f"seed {2**64 - 1}," in result.stderr
    assert "seed 0," in result.stderr


@pytest.mark.usefixtures("with_tiny")
def test_another_size_is_said() -> None:
    result = run("generate", "a red fox", "--size", "512x300", "--steps", "1")
    assert result.stdout == "output.png\n"
    assert "resampled to 512x300" in result.stderr
    with Image.open("output.png") as picture:
        assert picture.size == (512, 300)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "prompt: "),
        (["fox", "--size", "512"], "--size: '512' is not WIDTHxHEIGHT"),
        (["fox", "--size", "512x-3"], "--size: "),
        (["fox", "--size", "255x512"], "--size: "),
        (["fox", "--size", "512x" + "9" * 5000], "--size: "),
        (["fox", "--steps", "0"], "--steps: "),
        (["fox", "--steps", "21"], "--steps: "),
        (["fox", "--decoder", "quick"], "--decoder: "),
        (["fox", "--guidance", "nan"], "--guidance: "),
        (["fox", "--guidance", "-1"], "--guidance: "),
        (["fox", "--seed", "-1"], "--seed: "),
        (["fox", "--seed", str(2**64)], "--seed: "),
        (["fox", "--model", "acme/nope"], "There are: bytedance/stable-diffusion-xl-lightning, fulgurite/spark, "),
        (["fox", "-o", "fox.jpg"], "name it fox.png"),
        (["fox", "-o", "fox"], "name it fox.png"),
        (["fox", "-o", "./.png"], "name it output.png."),
        (["fox", "-o", "nowhere/fox.png"], "there is no folder nowhere."),
        (["fox", "-o", "nowhere/../fox.png"], "there is no folder nowhere."),
        (["fox", "-o", "file.txt/fox.png"], "--output: there is no folder file.txt."),
        (["fox", "-o", f"{'f' * 300}.png"], ".png: File name too long."),
        (["fox", "-o", f"{'f' * 250}.png", "-n", "2"], "-1.png: File name too long."),
        (["fox", "-o", "sub.png", "-n", "3"], "--output: cannot write sub-2.png: Is a directory."),
        (["fox", "-o", "astray.png"], "--output: cannot write astray.png: No such file or directory."),
        (["fox", "-o", "folder.png"], "folder.png is a folder: name a file in it, such as folder.png/output.png."),
        (["fox", "-o", "."], "--output: . is a folder: name a file in it, such as output.png."),
        (["fox", "-o", ""], "--output: . is a folder"),
        (["fox", "-o", ".."], "--output: .. is a folder"),
        (["fox", "--cards", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    for folder in ("folder.png", "sub-2.png"):
        Path(folder).mkdir()
    Path("file.txt").touch()
    Path("astray.png").symlink_to("nowhere/fox.png")
    result = run("generate", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert sorted(map(str, Path().glob("*.png"))) == ["astray.png", "folder.png", "sub-2.png"]


@pytest.mark.usefixtures("with_tiny")
def test_a_file_that_is_there_stays_until_there_is_another_picture() -> None:
    Path("fox.png").write_bytes(b"an earlier picture")
    assert run("generate", "fox", "-o", "fox.png", "--model", "acme/nope").exit_code == 1
    assert Path("fox.png").read_bytes() == b"an earlier picture"
    assert run("generate", "fox", "-o", "fox.png", "--steps", "1").exit_code == 0
    assert metadata("fox.png").startswith("fox\n")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="this user may write everywhere")
def test_what_may_not_be_written_is_told_before_anything_is_drawn() -> None:
    Path("closed").mkdir(mode=0o500)
    Path("kept.png").touch(mode=0o400)
    for name in ("closed/fox.png", "kept.png"):
        result = run("generate", "fox", "-o", name)
        assert (result.exit_code, result.stderr) == (1, f"Error: --output: cannot write {name}: Permission denied.\n")


@pytest.mark.parametrize("arguments", [["fox", "-n", "0"], ["fox", "--steps", "four"], ["fox", "--nope"], []])
def test_misuse_says_how_to_use_it(arguments: list[str]) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.usefixtures("with_tiny")
def test_a_file_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("generate", "fox", "--steps", "1", "--seed", "7")
    said = "Error: Cannot write output.png: No space left on device. --seed 7 draws the same picture again.\n"
    assert (result.exit_code, result.stderr) == (1, said)


def test_a_server_is_warm_before_it_answers(engine: FakeEngine) -> None:
    settings = read_settings(warm=(f"{LIGHTNING}:4", SPARK), demo=True)
    said: list[str] = []
    warm_up(engine.submit, settings, said.append)
    assert [(model, request.num_steps) for model, request in engine.jobs] == [(f"{SPARK}-lightning", 4), (SPARK, 20)]
    assert [line.split(" is warm")[0] for line in said] == [f"{SPARK}-lightning", SPARK]


def test_a_server_that_cannot_be_warm_says_why() -> None:
    result = run("serve", "--port", "0", "--warm", f"{LIGHTNING}:2")
    assert result.exit_code == 1
    assert f"Error: The 2-step weights of {LIGHTNING} are not on this machine" in result.stderr
    assert "answers at" not in result.stderr


def test_what_is_warm_is_what_is_served() -> None:
    result = run("serve", "--port", "0", "--model", SPARK, "--warm", LIGHTNING)
    assert result.exit_code == 1
    assert f"Error: --warm: {LIGHTNING!r} is not among the models served." in result.stderr


@pytest.mark.parametrize("flag", ["--home", "--cards"])
def test_an_empty_path_is_not_the_current_folder(flag: str) -> None:
    result = run("serve", "--port", "0", flag, "")
    assert (result.exit_code, result.stderr) == (1, f"Error: {flag}: a folder's path is not empty.\n")


def test_bad_settings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULGURITE_PORT", "http")
    for command in (["generate", "fox"], ["serve"]):
        result = run(*command)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: FULGURITE_PORT: ")


def test_a_server_that_cannot_be_made_says_why_and_leaves_nothing_open() -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for flags, said in (
            (["--model", "acme/nope"], "--model: There is no model 'acme/nope' here."),
            (["--port", port], f"Cannot listen on 127.0.0.1, port {port}: Address already in use.\n"),
            (["--device", "abacus"], "--device: cannot compute on 'abacus' here: "),
        ):
            result = run("serve", *flags)
            assert result.exit_code == 1
            assert f"Error: {said}" in result.stderr
            assert "API key" not in result.stderr or flags[0] == "--device"
            left = {thread.name for thread in set(threading.enumerate()) - before}
            assert not left & {"ledger", "engine", "engine-watchdog"}


def test_a_webhook_secret_that_signs_nothing_is_refused_at_the_start(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    for content, said in (
        (b"", "is empty: delete it, to have another secret made."),
        (b" \n", "is empty: delete it, to have another secret made."),
        (
            b"too short\n",
            "holds a secret of less than 16 bytes: write a longer one, or delete it, to have another made.",
        ),
    ):
        (home / "webhook.secret").write_bytes(content)
        result = run("serve", "--port", "0")
        assert (result.exit_code, result.stderr) == (1, f"Error: {home / 'webhook.secret'} {said}\n")
    (home / "webhook.secret").unlink()
    (home / "webhook.secret").mkdir()
    result = run("serve", "--port", "0")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: Cannot read or make {home / 'webhook.secret'}, which signs webhooks: ")
    monkeypatch.setenv("FULGURITE_WEBHOOK_SECRET", "fifteen of them")
    result = run("serve", "--port", "0")
    said = "Error: FULGURITE_WEBHOOK_SECRET: a secret has 16 characters or more.\n"
    assert (result.exit_code, result.stderr) == (1, said)


def test_a_start_says_how_many_keys_are_active(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = ("serve", "--port", "0", "--warm", f"{LIGHTNING}:2")  # which ends by itself
    assert "Your API key, shown this once: " in run(*warm).stderr
    again = run(*warm).stderr
    assert again.startswith("1 key is active; `fulgurite keys create NAME` makes another.\n")
    assert "fg-" not in again
    monkeypatch.setenv("FULGURITE_API_KEY", "a-secret-of-mine")
    again = run(*warm).stderr
    assert again.startswith("2 keys are active; ")
    assert "a-secret-of-mine" not in again


def test_models_lists_the_cards() -> None:
    result = run("models")
    assert SPARK in result.stdout
    assert "1, 2, 4, 8" in result.stdout


def test_commands_take_cards_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "added", {})
    Path("cards").mkdir()
    write_card("spark.toml", Path("cards/fox.toml"), Path("cards/fox/unet/model.safetensors"))
    assert "local/fox" in run("models", "--cards", "cards").stdout
    monkeypatch.setattr(cards, "added", {})
    assert "local/fox" not in run("models").stdout
    for command in (["pull", "local/hare"], ["bench", "--model", "local/hare"]):
        monkeypatch.setattr(cards, "added", {})
        assert "local/fox" in run(*command, "--cards", "cards").stderr


def test_a_table_in_a_pipe_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = run("models").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [LIGHTNING, SPARK, f"{SPARK}-lightning"]
    assert "on the hub: pull them" in lines[1]


def test_on_a_narrow_terminal_nothing_of_a_table_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # whose width rich takes to be 80
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_table(("id", "name"), [("i" * 60, "x " + "y" * 40)], whole=("id",))
    shown = capsys.readouterr().out
    assert "i" * 60 in shown
    assert (shown.count("x"), shown.count("y")) == (1, 40)
    assert shown.count("\n") == 3  # the title, and two lines of the name


def test_the_help_has_the_bounds_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bounds = Parameters.model_json_schema()["properties"]
    shown = " ".join(run("generate", "--help").stdout.split())
    for name, unit in (("width", " each"), ("num_steps", ""), ("guidance", "")):
        assert f"{bounds[name]['minimum']:g} to {bounds[name]['maximum']:g}{unit}" in shown


def test_the_version() -> None:
    assert run("--version").stdout == f"fulgurite {__version__}\n"


def test_pull_hands_the_card_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = []
    monkeypatch.setattr(
        "fulgurite.weights.hub.pull", lambda card, steps, use_lora: pulled.append((card.id, steps, use_lora))
    )
    model = "bytedance/stable-diffusion-xl-lightning"
    run("pull", model)
    run("pull", model, "--lora")
    run("pull", model, "--steps", "2, 4")
    assert pulled == [(model, (1, 2, 4, 8), False), (model, (2, 4, 8), True), (model, (2, 4), False)]
    assert "--steps: 'all' is not a list" in run("pull", model, "--steps", "all").stderr
    assert "There are: " in run("pull", "acme/nope").stderr


def test_pull_has_nothing_to_do_for_the_embedded_model() -> None:
    result = run("pull", SPARK)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_help_is_quick_because_it_imports_little() -> None:
    code = "import sys, fulgurite.cli; print({'torch', 'fastapi', 'pydantic', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    module = subprocess.run([sys.executable, "-m", "fulgurite", "--help"], capture_output=True, text=True)
    assert "Usage: fulgurite" in module.stdout


def test_arguments_that_are_no_utf_8_are_one_line() -> None:
    command = [sys.executable.encode(), b"-m", b"fulgurite", b"generate", b"fox \xff"]
    result = subprocess.run(command, capture_output=True, env=os.environ)
    assert result.returncode == 1
    assert result.stderr.startswith(b"Error: prompt: ")


@pytest.mark.parametrize("setting", ["FULGURITE_TRITON_KERNELS", "FULGURITE_CUDA_GRAPHS"])
def test_what_needs_a_gpu_is_refused_without_one(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULGURITE_DEVICE", "cpu")
    monkeypatch.setenv(setting, "true")
    for command in (["generate", "a red fox"], ["serve", "--port", "0"], ["bench"]):
        result = run(*command)
        assert result.exit_code == 1
        assert setting in result.stderr
        assert "'cpu'" in result.stderr


def test_precisions_that_the_device_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULGURITE_DEVICE", "cpu")
    for command in (["generate", "a red fox"], ["serve", "--port", "0"], ["bench"]):
        result = run(*command, "--precision", "float16")
        assert result.exit_code == 1
        assert "--precision: float16 needs a GPU" in result.stderr
        result = run(*command, "--precision", "int4")
        assert result.exit_code == 1
        assert "--precision: Input should be 'auto', " in result.stderr


@needs_weights
def test_generate_with_the_embedded_model() -> None:
    for name in ("a.png", "b.png"):
        assert run("generate", "a red rocket", "-o", name, "--steps", "4", "--seed", "7").exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with Image.open("a.png") as picture:
        assert picture.size == (256, 256)


@needs_weights
def test_the_docstrings_example() -> None:
    assert doctest.testmod(pipeline).failed == 0


@needs_weights
def test_threads_that_wait_give_their_core_away_soon() -> None:
    """As OpenMP itself tells when it starts, which is with torch."""
    command = [sys.executable, "-m", "fulgurite", "generate", "a red fox", "--steps", "1"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment["OMP_DISPLAY_ENV"] = "verbose"
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("this torch's threads are not GNU's")
    assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in result.stderr


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_how_threads_wait_is_left_as_the_user_set_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    threads.share_cores()
    assert dict(os.environ) == before


def test_a_signal_to_stop_is_heard_before_anything_slow_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's first process hears none that it has no handler for."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def slow(given: dict[str, object]) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(cli_serve, "run", slow)
    try:
        assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
