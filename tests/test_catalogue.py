"""The catalogue, for programs and for people; its examples are run as they stand."""

import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import KEY, LIGHTNING, SPARK, FakeEngine
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite.cards import cards
from fulgurite.errors import NotPulledError


def test_every_card_is_in_the_catalogue(client: TestClient) -> None:
    models = client.get("/api/v1/models", headers={"Authorization": ""}).json()["models"]
    assert [model["id"] for model in models] == list(cards())
    for model in models:
        assert client.get(f"/api/v1/models/{model['id']}").json() == model


def test_a_model_as_the_hosted_documentation_shows_it(client: TestClient) -> None:
    model = client.get(f"/api/v1/models/{LIGHTNING}").json()
    assert model["type"] == "Image Generation"
    assert model["cost"] == "$0.0011 per image"
    assert (model["hosted_regions"], model["available_regions"]) == (["US", "India"], ["Global"])
    assert model["base_architecture"] == "Diffusion"
    assert model["endpoint_url"] == "http://testserver/api/v1"
    assert model["schedules"] == [1, 2, 4, 8]
    assert not {"unet", "vae", "text_encoders", "weights"} & set(model)
    height = model["parameters"]["properties"]["height"]
    assert (height["type"], height["minimum"], height["maximum"], height["default"]) == ("integer", 256, 2048, 1024)
    assert model["parameters"]["required"] == ["prompt"]


class Text(HTMLParser):
    """What a browser shows, and the addresses it fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources = "", []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name == "src"]


def test_the_page(client: TestClient, engine: FakeEngine) -> None:
    response = client.get(f"/models/{SPARK}", headers={"Authorization": ""})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Text()
    page.feed(response.text)
    model = client.get(f"/api/v1/models/{SPARK}").json()
    for wanted in (
        model["name"],
        model["description"],
        "http://testserver/api/v1",
        "256 to 2048",
        *model["examples"].values(),
    ):
        assert wanted in page.text
    [source] = page.sources
    for _ in range(2):
        picture = client.get(source, headers={"Authorization": ""})
        assert picture.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(picture.content)) as image:
            assert image.size == (256, 256)
    assert len(engine.jobs) == 1  # drawn once
    assert client.get("/models/acme/nope").status_code == client.get("/models/acme/nope/example.png").status_code == 404


def test_an_example_that_cannot_be_drawn_is_tried_again(client: TestClient, engine: FakeEngine) -> None:
    working = engine.answer

    def failing(model: str, request: object) -> object:
        raise NotPulledError("run `fulgurite pull`")

    engine.answer = failing
    assert client.get(f"/models/{LIGHTNING}/example.png").json()["error"]["code"] == "not_pulled"
    assert client.get(f"/models/{LIGHTNING}").status_code == 200
    engine.answer = working
    assert client.get(f"/models/{LIGHTNING}/example.png").status_code == 200


def test_the_page_trusts_nobody(client: TestClient) -> None:
    response = client.get(f"/models/{SPARK}", headers={"Host": "a<script>alert(1)</script>"})
    assert "<script>" not in response.text


@pytest.mark.parametrize("language", ["python", "curl", "javascript"])
def test_the_examples_run_as_they_stand(address: str, tmp_path: Path, language: str) -> None:
    program = {"python": [sys.executable], "curl": ["bash", "-e"], "javascript": ["node"]}[language]
    if shutil.which(program[0]) is None:
        pytest.skip(f"there is no {program[0]} here")
    reply = subprocess.run(["curl", "-sS", f"{address}/api/v1/models/{LIGHTNING}"], capture_output=True, check=True)
    script = tmp_path / {"python": "example.py", "curl": "example.sh", "javascript": "example.mjs"}[language]
    script.write_text(json.loads(reply.stdout)["examples"][language].replace("YOUR_KEY", KEY))
    subprocess.run([*program, script], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "output.png") as picture:
        assert "Seed: 12345" in picture.info["parameters"]
