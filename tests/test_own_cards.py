"""Models of one's own: a folder of cards, their weights beside them, as training writes both."""

import re
import shutil
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest
from conftest import needs_weights
from typer.testing import CliRunner

from fulgurite import Pipeline, cards
from fulgurite.cli import app
from fulgurite.errors import FulguriteError
from fulgurite.parameters import Parameters
from fulgurite.training.recipe import UNET_FILE
from fulgurite.training.students import students_in, write_card
from fulgurite.weights.load import locate

INSIDE = Path(str(resources.files("fulgurite") / "embedded"))
PREVIEW = "# As a test has it.\npreview_rgb = [\n" + "    [0.5, 0.25, 0.125],\n" * 17 + "]\n"


@pytest.fixture(autouse=True)
def nothing_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "added", {})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What `fulgurite train recipe --out mine/fox` leaves behind."""
    folder = tmp_path / "mine"
    shutil.copytree(INSIDE / "spark", folder / "fox")
    shutil.copytree(INSIDE / "spark-lightning", folder / "fox-lightning")
    unet = folder / "fox" / UNET_FILE
    write_card("spark.toml", folder / "fox.toml", unet, preview=PREVIEW)
    students = students_in(folder / "fox-lightning", unet)
    write_card("spark_lightning.toml", folder / "fox-lightning.toml", unet, students, PREVIEW)
    return folder


@needs_weights
@pytest.mark.parametrize(("own", "inside"), [("fox", "spark"), ("fox-lightning", "spark-lightning")])
def test_what_was_trained_draws_as_what_is_inside(
    trained: Path, monkeypatch: pytest.MonkeyPatch, own: str, inside: str
) -> None:
    monkeypatch.chdir(trained.parent)
    cards.add(Path("mine"))
    monkeypatch.chdir("/")  # paths start at the folder, wherever the program is by then
    asked = {"width": 256, "height": 256, "num_steps": 1, "seed": 3}
    mine, theirs = (
        Pipeline.load(model, steps=1)("a red fox", **asked) for model in (f"local/{own}", f"fulgurite/{inside}")
    )
    assert mine.image.tobytes() == theirs.image.tobytes()
    assert cards.card(f"local/{own}").preview_rgb == ((0.5, 0.25, 0.125),) * 17


def test_the_manual_has_every_key_and_a_card_that_is_one() -> None:
    manual = (Path(__file__).parents[1] / "docs/cards.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)`", "".join(line for line in manual.splitlines() if line.startswith("| `"))))
    keys = {field.name for field in fields(cards.Card)} - {"text_encoders"} | {"text_encoder", "text_encoder_2"}
    of_the_hub = {"base", "vae", "fast_decoder", "distilled"}
    assert keys - {"weights"} | {field.name for field in fields(cards.Weights)} - of_the_hub <= described

    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", manual, re.M)
    fox = cards.parse(max(indented, key=len).replace("    ", ""))
    assert (fox.id, fox.schedules, fox.weights.path) == ("local/fox", (4,), "fox.safetensors")
    lightning = cards.card("bytedance/stable-diffusion-xl-lightning")
    assert (fox.unet, fox.vae, fox.text_encoders) == (lightning.unet, lightning.vae, lightning.text_encoders)


@needs_weights
def test_each_number_of_steps_has_its_own_file(trained: Path) -> None:
    unet = trained / "fox" / UNET_FILE
    shutil.copy(unet, trained / "fox-lightning/1step_unet_x0.safetensors")
    (trained / "fox-lightning/4step_lora.safetensors").touch()
    with pytest.raises(FulguriteError, match=r"guided_lora\.safetensors or .*1step_unet_x0\.safetensors"):
        write_card("spark_lightning.toml", trained / "both.toml", unet, students_in(trained / "fox-lightning", unet))
    (trained / "fox-lightning/guided_lora.safetensors").unlink()
    students = students_in(trained / "fox-lightning", unet)
    write_card("spark_lightning.toml", trained / "some.toml", unet, students)
    cards.add(trained)
    of_model = cards.card("local/some")
    assert of_model.schedules == (1, 4)
    one, four = (locate(of_model, steps) for steps in (1, 4))
    assert (one.unet.name, one.predicts_x0, one.loras) == ("1step_unet_x0.safetensors", True, ())
    assert (four.unet, four.loras) == (unet, (trained / "fox-lightning/4step_lora.safetensors",))


@needs_weights
def test_the_commands_know_own_cards(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FULGURITE_CARDS", str(trained))
    listed = CliRunner().invoke(app, ["models"])
    assert [line.split()[0] for line in listed.output.splitlines() if "local/" in line] == [
        "local/fox-lightning", "local/fox",
    ]  # fmt: skip
    output = tmp_path / "fox.png"
    drawn = CliRunner().invoke(
        app, ["generate", "a fox", "-o", str(output), "--model", "local/fox-lightning", "--steps", "1"]
    )
    assert (drawn.exit_code, output.exists()) == (0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id = 1 2", "bad.toml is no model's card"),
        ('id = "x"', r"bad.toml is no model's card: the table \[text_encoder\] is missing\.$"),
        (None, "there is a model fulgurite/spark already"),
    ],
)
def test_a_card_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    of_package = (resources.files("fulgurite.cards") / "spark.toml").read_text("utf-8")
    (tmp_path / "bad.toml").write_text(of_package if text is None else text)
    with pytest.raises(FulguriteError, match=message):
        cards.add(tmp_path)
    assert cards.added == {}
    with pytest.raises(FulguriteError, match="There is no folder"):
        cards.add(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ('prediction = "epsilon"', 'prediction = "v_prediction"', r"prediction = 'v_prediction': .*epsilon\|v\|x0"),
        ('source = "hub"', 'source = "hubb"', "weights.source = 'hubb': Input should be 'embedded', 'hub' or 'local'"),
        ("schedules = [1, 2, 4, 8]", "schedules = [8, 4]", r"schedules = \[8, 4\]: Numbers of steps should rise"),
        ("schedules = [1, 2, 4, 8]", "schedules = [4, 4]", r"schedules = \[4, 4\]: Numbers of steps should rise"),
        ("schedules = [1, 2, 4, 8]", "schedules = [0, 4]", "schedules.0 = 0: Input should be greater than 0"),
        ("schedules = [1, 2, 4, 8]", 'schedules = ["few"]', "schedules.0 = 'few': Input should be a valid integer"),
        ("guidance_strength = 3.0", 'guidance_strength = "much"', "guidance_strength = 'much': .* valid number"),
        ("guidance_strength = 3.0", "guidance_strength = nan", "guidance_strength = nan: .* finite number"),
        ("native_shapes = []", 'native_shapes = []\nguidance_tau = "much"', "guidance_tau = 'much': .* valid number"),
        ("native_shapes = []", 'native_shapes = ["256x256"]', "native_shapes.0 = '256x256': Input should be"),
        ("cost_microdollars = 1100", "cost_microdollars = -1", "cost_microdollars = -1: .* greater than or equal to 0"),
        ("[unet]", "[unet]\nin_chanels = 4", "unet.in_chanels = 4: Unexpected"),
        ("[unet]", "[unet]\nin_channels = 4.5", "unet.in_channels = 4.5: Input should be a valid integer"),
        ("[unet]\n", "", r"unet: Field required\.$"),
        ("[text_encoder_2]", "[text_encoder_3]", r"the table \[text_encoder_2\] is missing\.$"),
        ("schedules = [1, 2, 4, 8]", "schedules = [25, 50]", "schedules.0 = 25: .* less than or equal to 20"),
        ("native_shapes = []", "native_shapes = [[0, -5]]", "native_shapes.0.0 = 0: Input should be greater than 0"),
        ("native_shapes = []", "native_shapes = [[512, 500]]", "native_shapes: 512x500 .* multiples of 8"),
        ("cost_microdollars = 1100", f"cost_microdollars = 1{'0' * 25}", "cost_microdollars = 10+: Input should be"),
        (
            "cost_microdollars = 1100",
            "cost_microdollars = 1_000_000_001",
            "cost_microdollars = 1000000001: .* 1000000000",
        ),
        ('source = "hub"', 'source = "local"', "weights.path: it is empty"),
        ('source = "hub"', 'source = "hub"\nlora_file = "fox"', "weights.lora_file: a model whose source is 'hub' has"),
        ("[unet]", "[unet]\ncross_attention_dim = 5", "unet.cross_attention_dim: 5, where .* needs 2048"),
        ("[unet]", "[unet]\ntransformer_layers_per_block = [2]", "numbers in unet.transformer_.*: 1, .* needs 3"),
        ("preview_rgb = [", "preview_rgb = [[0, 0, 0],", "rows of preview_rgb: 6, where .* needs 5"),
        ("preview_rgb = [", "preview_rgb = [[0, 0],", r"preview_rgb.0.2: Field required"),
        ("[fast_decoder]", "[fast_decoder]\nnum_blocks = [1]", "numbers in fast_decoder.num_blocks: 1, .* needs 4"),
        ('hidden_act = "gelu"', 'hidden_act = "relu"', "text_encoder_2.hidden_act = 'relu': .*'gelu'"),
    ],
)
def test_what_a_card_cannot_say_is_named(tmp_path: Path, line: str, instead: str, message: str) -> None:
    of_package = (resources.files("fulgurite.cards") / "sdxl_lightning.toml").read_text("utf-8")
    assert line in of_package
    (tmp_path / "bad.toml").write_text(of_package.replace(line, instead, 1))
    with pytest.raises(FulguriteError, match=f"bad.toml is no model's card: {message}"):
        cards.add(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("my fox", "my-fox"), (".füchse 2", "f-chse-2"), ("...", "model"), ("a.b_c-d", "a.b_c-d"), ("🦊\x7f", "model")],
)
def test_a_trained_model_s_id_is_one_whatever_its_folder_is_called(tmp_path: Path, name: str, wanted: str) -> None:
    write_card("spark.toml", tmp_path / f"{name}.toml", tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
    written = cards.parse((tmp_path / f"{name}.toml").read_text("utf-8"))
    assert (written.id, written.name, written.weights.path) == (f"local/{wanted}", name, name)


@pytest.mark.parametrize("name", ["", "my fox", "fox?", "fox#1", "/fox", "fox/", "local//fox", "local/..", "füchse"])
def test_an_id_is_for_an_address(name: str) -> None:
    of_package = (resources.files("fulgurite.cards") / "spark.toml").read_text("utf-8")
    with pytest.raises(ValueError, match=r"^id = '.*': An id is letters"):
        cards.parse(of_package.replace("fulgurite/spark", name, 1))
    assert cards.parse(of_package.replace("fulgurite/spark", "my_fox-2.0", 1)).id == "my_fox-2.0"


def test_the_steps_of_schedules_are_those_of_requests() -> None:
    of_package = (resources.files("fulgurite.cards") / "spark.toml").read_text("utf-8")
    most = Parameters.model_json_schema()["properties"]["num_steps"]["maximum"]
    assert cards.parse(of_package.replace("schedules = []", f"schedules = [{most}]")).schedules == (most,)
    with pytest.raises(ValueError, match="schedules"):
        cards.parse(of_package.replace("schedules = []", f"schedules = [{most + 1}]"))


def test_a_fast_decoder_is_not_needed() -> None:
    of_package = (resources.files("fulgurite.cards") / "sdxl_lightning.toml").read_text("utf-8")
    assert cards.parse(of_package.replace("[fast_decoder]\n", "")).decoders == ("full",)
