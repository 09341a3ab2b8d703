"""The catalogue, for programs and for people; its examples are run as they stand."""

import html
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import HEADERS, KEY, LIGHTNING, SPARK, FakeEngine, body
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite.cards import cards
from fulgurite.errors import NotPulledError
from fulgurite.ledger import Ledger
from fulgurite.server import create_app
from fulgurite.settings import read_settings


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
    """What a browser shows, the addresses it fetches, and those it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sources, self.links = "", [], []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]


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


def test_who_opens_the_server_s_address_finds_the_models_and_the_documentation(client: TestClient) -> None:
    response = client.get("/", headers={"Authorization": ""})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Text()
    page.feed(response.text)
    for model in client.get("/api/v1/models").json()["models"]:
        for wanted in (model["id"], model["name"], model["cost"], model["description"]):
            assert wanted in page.text
        assert f"/models/{model['id']}" in page.links
        assert '<a href="/">' in client.get(f"/models/{model['id']}").text
    assert "POST http://testserver/api/v1" in page.text
    assert {client.get(link).status_code for link in page.links} == {200}
    assert client.head("/", headers={"Authorization": ""}).status_code == 200
    assert client.get("/nope").json()["error"]["code"] == "not_found"
    assert "/" not in client.get("/openapi.json").json()["paths"]
    assert "<script>" not in client.get("/", headers={"Host": "a<script>alert(1)</script>"}).text


def test_only_models_that_are_served_are_listed(engine: FakeEngine, ledger: Ledger) -> None:
    with TestClient(create_app(engine, ledger, read_settings(models=(SPARK,)))) as client:
        page = Text()
        page.feed(client.get("/").text)
    assert [link for link in page.links if link.startswith("/models")] == [f"/models/{SPARK}"]


def test_in_a_demonstration_a_picture_costs_what_its_page_says(engine: FakeEngine, ledger: Ledger) -> None:
    with TestClient(create_app(engine, ledger, read_settings(demo=True)), headers=HEADERS) as client:
        model = client.get(f"/api/v1/models/{LIGHTNING}").json()
        assert (model["cost"], model["cost_microdollars"]) == ("$0 per image", 0)
        for page in ("/", f"/models/{LIGHTNING}"):
            assert "$0 per image" in client.get(page).text
            assert "$0.0011" not in client.get(page).text
            assert html.escape(model["demo"]) in client.get(page).text
        picture = client.post("/api/v1", json=body() | {"model": LIGHTNING})
    assert picture.headers["x-fulgurite-price"] == "0"
    assert [(entry.model, entry.price) for entry in ledger.entries()] == [(f"{SPARK}-lightning", 0)]


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
