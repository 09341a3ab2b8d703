"""Pulling from a hub: the real client, a small server on this machine that speaks as much of the hub as it needs."""

import hashlib
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import pytest
import small_sdxl as small
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_weights import LORA_MODULES, kohya_names, lora_tensors
from typer.testing import CliRunner

from fulgurite import Pipeline, Request, cards
from fulgurite.cards import card
from fulgurite.cli import app
from fulgurite.errors import FulguriteError, NotPulledError
from fulgurite.pipeline import no_fast_decoder
from fulgurite.weights import hub, load_networks

CARD = small.small_card()
SDXL = "bytedance/stable-diffusion-xl-lightning"
REPOS = CARD.weights.base, CARD.weights.vae, CARD.weights.fast_decoder, CARD.weights.distilled
BASE, VAE, FAST, LIGHTNING = (repo.repo for repo in REPOS)
REVISIONS = {repo.repo: repo.revision for repo in REPOS}
UNETS, LORAS = CARD.weights.unets, CARD.weights.loras


class Hub:
    """What the server holds, what it was asked for, and what it shall do wrong."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}  # "owner/name/file in it"
        self.got: list[tuple[str, str]] = []  # the file, the range
        self.cut: dict[str, int] = {}  # sends so many bytes of a file, once
        self.status = 0  # answers everything with this

    @property
    def downloads(self) -> list[str]:
        return [path for path, _ in self.got]


def cached() -> set[str]:
    """The files in the cache, by repository."""
    found = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/**/*")
    parts = [path.relative_to(constants.HF_HUB_CACHE).parts for path in found if path.is_file()]
    return {"/".join([*part[0].split("--")[1:], *part[3:]]) for part in parts}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        found = re.fullmatch(r"/(.+?/.+?)/resolve/(\w+)/(.+)", self.path)
        repo, revision, name = found.groups() if found else ("", "", "")
        path = self.hub.files.get(f"{repo}/{name}")
        if self.hub.status or path is None or revision != REVISIONS[repo]:
            self.send_response(self.hub.status or 404)
            self.send_header("X-Error-Code", "EntryNotFound" if not self.hub.status else "")
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.hub.got.append((f"{repo}/{name}", self.headers.get("Range") or ""))
            self.wfile.write(data[start:][: self.hub.cut.pop(f"{repo}/{name}", None)])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = small.saved_pipeline(tmp_path_factory.mktemp("model"))
    small.oracle_fast_decoder(small.FAST).save_pretrained(path / "fast_decoder")
    return path


@pytest.fixture(scope="module")
def published(model, tmp_path_factory) -> dict[str, Path]:
    """The repositories' files, small."""
    folder = tmp_path_factory.mktemp("hub")
    files = {f"{BASE}/{name}": model / name for name in hub.TOKENIZERS}
    for name in (*hub.TEXT_ENCODERS, hub.BASE_UNET):
        files[f"{BASE}/{name}"] = model / name.replace(".fp16", "")
    files[f"{BASE}/unet/diffusion_pytorch_model.safetensors"] = folder / "not asked for"
    files[f"{VAE}/{hub.VAE}"] = model / "vae/diffusion_pytorch_model.safetensors"
    files[f"{FAST}/{hub.VAE}"] = model / "fast_decoder/diffusion_pytorch_model.safetensors"
    unet = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    for i, name in enumerate(UNETS.values()):
        save_file(unet | {"conv_in.bias": torch.full((32,), float(i))}, folder / name)
        files[f"{LIGHTNING}/{name}"] = folder / name
    for name in LORAS.values():
        save_file(lora_tensors(small.oracle_unet(small.UNET), kohya_names), folder / name)
        files[f"{LIGHTNING}/{name}"] = folder / name
    return files


@pytest.fixture
def server(published, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with all files, and an empty cache."""
    state = Hub()
    state.files = dict(published)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def pull(*steps: int, **options: bool) -> None:
    hub.pull(CARD, steps, progress=False, **options)


def refusal(*steps: int, **options: bool) -> str:
    with pytest.raises(FulguriteError) as caught:
        pull(*steps, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMMON = {f"{BASE}/{name}" for name in (*hub.TOKENIZERS, *hub.TEXT_ENCODERS)} | {
    f"{VAE}/{hub.VAE}",
    f"{FAST}/{hub.VAE}",
}


def test_a_pull_takes_exactly_what_is_needed_and_it_loads(server, model):
    pull(4)
    assert cached() == COMMON | {f"{LIGHTNING}/{UNETS['4']}"}
    # The second tokenizer's vocabulary is the first's: the hub's client sees that and keeps one.
    assert len(server.downloads) == len(set(server.downloads)) == len(cached()) - 2

    networks = load_networks(CARD, 4, "cpu", torch.float32)
    assert networks.prediction == "epsilon"
    assert (networks.unet.conv_in.bias == 2).all()
    assert networks.tokenizers[1].pad == 0
    wanted = load_file(model / "vae/diffusion_pytorch_model.safetensors")
    assert torch.equal(networks.vae.state_dict()["quant_conv.weight"], wanted["quant_conv.weight"])
    wanted = load_file(model / "fast_decoder/diffusion_pytorch_model.safetensors")
    assert torch.equal(networks.fast_decoder.state_dict()["decoder.layers.0.bias"], wanted["decoder.layers.0.bias"])


def test_several_schedules_share_what_they_have_in_common(server):
    pull(1, 2, 8)
    assert cached() == COMMON | {f"{LIGHTNING}/{UNETS[n]}" for n in ("1", "2", "8")}
    server.got.clear()
    pull(4, 8)
    assert server.downloads == [f"{LIGHTNING}/{UNETS['4']}"]
    assert load_networks(CARD, 1, "cpu", torch.float32).prediction == "x0"
    for i, steps in enumerate((1, 2, 4, 8)):
        assert (load_networks(CARD, steps, "cpu", torch.float32).unet.conv_in.bias == i).all()


def test_files_of_one_name_in_two_repositories_are_two_files(server):
    """As where somebody's UNet lies at its repository's root, where the VAE's does too."""
    server.files[f"{LIGHTNING}/{hub.VAE}"] = server.files[f"{LIGHTNING}/{UNETS['4']}"]
    alike = replace(CARD, weights=replace(CARD.weights, unets={"4": hub.VAE}))
    hub.pull(alike, (4,), progress=False)
    files = hub.cached_files(alike, 4)
    assert [LIGHTNING.replace("/", "--") in str(file) for file in (files.unet, files.vae)] == [True, False]


def test_what_is_pulled_needs_no_network_again(server):
    pull(4)
    server.status = 500
    server.got.clear()
    pull(4)
    assert server.got == []


def test_a_lora_comes_with_the_base_unet_and_is_merged(server, model):
    pull(2, use_lora=True)
    assert cached() == COMMON | {f"{BASE}/{hub.BASE_UNET}", f"{LIGHTNING}/{LORAS['2']}"}
    found = load_networks(CARD, 2, "cpu", torch.float32).unet.state_dict()
    base = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    changed = {name.removesuffix(".weight") for name, tensor in found.items() if not torch.equal(tensor, base[name])}
    assert changed == set(LORA_MODULES)


def test_it_lies_in_the_hubs_own_cache_at_the_pinned_revisions(server, tmp_path):
    pull(4)
    for repo, revision in REVISIONS.items():
        assert (tmp_path / "cache/hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / revision).is_dir()


def test_every_card_pins_commits():
    weights = card(SDXL).weights
    for repo in (weights.base, weights.vae, weights.fast_decoder, weights.distilled):
        assert re.fullmatch(r"[0-9a-f]{40}", repo.revision), repo


def test_a_broken_connection_is_resumed_where_it_broke(server, published, monkeypatch):
    name = f"{LIGHTNING}/{UNETS['4']}"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    server.cut[name] = 110_000
    pull(4)
    assert [span for path, span in server.got if path == name] == ["", "bytes=100000-"]
    path = hub.HubFile(CARD.weights.distilled, UNETS["4"]).cached()
    assert path.read_bytes() == published[name].read_bytes()


def test_a_file_that_the_hub_does_not_have_is_told_before_anything_is_downloaded(server):
    server.files.pop(f"{LIGHTNING}/{UNETS['4']}")
    assert "did not give" in refusal(4)
    assert server.got == []


def test_files_that_are_whole_are_kept_when_the_network_goes_away(server, monkeypatch):
    download = hub.hf_hub_download

    def interrupted(repo: str, name: str, **options: object) -> str:
        if name == hub.VAE:
            raise hub.errors.LocalEntryNotFoundError("the network is gone")
        return download(repo, name, **options)

    monkeypatch.setattr(hub, "hf_hub_download", interrupted)
    assert "cannot be reached" in refusal(4)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    server.got.clear()
    pull(4)
    assert server.downloads == [f"{VAE}/{hub.VAE}", f"{LIGHTNING}/{UNETS['4']}", f"{FAST}/{hub.VAE}"]


def test_a_full_disk_is_told_before_anything_is_downloaded(server, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refusal(4)
    assert re.fullmatch(
        r"The disk of \S+cache/hub is too full: \d+\.\d GB are to come and 0\.0 GB are free\. "
        r"Make room, or set HF_HOME to a folder on another disk\.",
        message,
    )
    assert server.got == []


def test_a_disk_that_fills_up_meanwhile(server, monkeypatch):
    def full(*arguments: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)
    assert "No space left on device" in refusal(4)


def test_without_a_network(server, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(4)
    assert re.fullmatch(
        r"The hub at http://127.0.0.1:9 cannot be reached \(.*refused\): "
        r"run this again once it can; whole files are kept\.",
        message,
    )


def test_what_is_no_address_is_told(server, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "nonsense/{repo_id}/{revision}/{filename}")
    assert "cannot be reached (Request URL is missing an 'http://' or 'https://' protocol)" in refusal(4)


def test_an_error_of_the_hub_s_library_is_told_by_what_caused_it(server, monkeypatch):
    def refused(*arguments: object, **options: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("check your connection") from OSError("403 Forbidden")

    monkeypatch.setattr(hub, "hf_hub_download", refused)
    assert "cannot be reached (403 Forbidden): " in refusal(4)


def test_where_the_network_is_forbidden(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(4) == "HF_HUB_OFFLINE is set, which forbids the network: unset it to pull."


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses(server, status):
    server.status = status
    message = refusal(4)
    assert message.startswith(f"The hub at {constants.ENDPOINT} did not give {CARD.id}: ")
    assert str(status) in message
    assert "developer.mozilla.org" not in message


def test_schedules_that_the_model_does_not_have(server):
    assert refusal(3) == f"{CARD.id} has no 3-step UNet: there are those for 1, 2, 4, 8 steps."
    assert refusal(4, 1, use_lora=True) == f"{CARD.id} has no 1-step LoRA: there are those for 2, 4, 8 steps."


def test_models_that_are_not_on_the_hub():
    with pytest.raises(FulguriteError, match="nothing to pull for fulgurite/spark"):
        hub.pull(card("fulgurite/spark"), (4,))


def test_what_is_not_pulled_says_how(server):
    pull(4)
    with pytest.raises(NotPulledError) as caught:
        load_networks(CARD, 8, "cpu", torch.float32)
    assert str(caught.value) == (
        f"The 8-step weights of {CARD.id} are not on this machine: `fulgurite pull {CARD.id} --steps 8`."
    )


@pytest.mark.usefixtures("server")
def test_what_is_not_pulled_of_a_card_of_your_own_says_where_the_card_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "added", {})
    monkeypatch.setattr(cards, "folders", {})
    folder = tmp_path / "my cards"
    folder.mkdir()
    of_package = (resources.files("fulgurite.cards") / "sdxl_lightning.toml").read_text("utf-8")
    (folder / "fox.toml").write_text(of_package.replace(card(SDXL).id, "local/fox", 1))
    cards.add(folder)
    own, pulled = card("local/fox"), []
    with pytest.raises(NotPulledError) as caught:
        hub.cached_files(own, 8)
    for message in (str(caught.value), str(no_fast_decoder(own, 8))):
        [command] = re.findall("`fulgurite (.*)`", message)
        cards.added.clear()  # as in a program of its own
        with monkeypatch.context() as pulling:
            pulling.setattr(hub, "pull", lambda of, steps, use_lora: pulled.append((of.id, steps)))
            assert CliRunner().invoke(app, shlex.split(command)).exit_code == 0
    assert pulled == [("local/fox", (8,))] * 2


def test_weights_that_were_pulled_before_there_was_a_fast_decoder(server, monkeypatch):
    """They draw as before, and say how to get it."""
    with monkeypatch.context() as earlier:
        earlier.setattr(hub, "fast_decoder", lambda card: [])
        pull(4)
    request = Request("a red fox", num_steps=6, width=256, height=256, seed=1)
    draw = Pipeline(CARD, load_networks(CARD, 4, "cpu", torch.float32))
    before = draw.draw(request).image
    with pytest.raises(NotPulledError) as caught:
        draw.draw(replace(request, decoder="fast"))
    [command] = re.findall(f"`fulgurite pull {CARD.id} --steps 4`", str(caught.value))
    server.got.clear()
    result = CliRunner().invoke(app, command.strip("`").split()[1:])
    assert (result.exit_code, server.downloads) == (0, [f"{FAST}/{hub.VAE}"])
    draw = Pipeline(CARD, load_networks(CARD, 4, "cpu", torch.float32))
    assert (
        draw.draw(replace(request, decoder="fast")).image.tobytes()
        != before.tobytes()
        == draw.draw(request).image.tobytes()
    )


def test_a_single_file_takes_the_tokenizers_of_the_base_model(server):
    pull(4)
    weights = replace(CARD.weights, source="local", path="/nowhere.safetensors")
    first, second = hub.cached_tokenizers(replace(CARD, weights=weights))
    assert (first / "vocab.json").is_file()
    assert second.name == "tokenizer_2"


def test_the_progress_bar_shows_each_file(server, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # shown although this is no terminal
    hub.pull(CARD, (4,))
    shown = capsys.readouterr().err
    assert UNETS["4"] in shown
    pull(8)
    assert capsys.readouterr().err == ""
