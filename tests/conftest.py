"""What several tests share: an own home for each, a fake engine, databases, and a tiny pipeline with random weights."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import postgres
import psycopg
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import fulgurite
from fulgurite import Picture, Pipeline, Request
from fulgurite.cards import card
from fulgurite.engine import Engine, Runner, Stages
from fulgurite.kernels import cpu
from fulgurite.ledger import Ledger
from fulgurite.models import (
    VAE,
    CLIPTextConfig,
    CLIPTextEncoder,
    TinyDecoder,
    TinyDecoderConfig,
    Tokenizer,
    UNet,
    UNetConfig,
    VAEConfig,
)
from fulgurite.models.tokenizer import END, START
from fulgurite.pipeline import Encoded, Row
from fulgurite.request import OnStep, Preview, plan
from fulgurite.sampling import trailing_schedule
from fulgurite.server import create_app, listen, server_for
from fulgurite.settings import read_settings
from fulgurite.weights import Networks

SPARK, LIGHTNING = "fulgurite/spark", "bytedance/stable-diffusion-xl-lightning"
KEY = "the-key-of-these-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HAS_WEIGHTS = any((Path(fulgurite.__file__).parent / "embedded" / "spark").rglob("*.safetensors"))
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="the embedded weights are not there")
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no instructions for int8")
needs_bfloat16 = pytest.mark.skipif(not cpu.has_bfloat16(), reason="this CPU has no instructions for bfloat16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]  # of a CPU
PRECISIONS = ["float32", pytest.param("bfloat16", marks=needs_bfloat16), pytest.param("int8", marks=needs_vnni)]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: there is nothing to compile its kernels for

torch.set_num_threads(1)  # quicker for networks as small as the tests', above all on a busy machine


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own settings and state."""
    for name in [name for name in os.environ if name.startswith("FULGURITE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FULGURITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FULGURITE_CONFIG", str(tmp_path / "settings.toml"))
    (tmp_path / "settings.toml").touch()
    return tmp_path / "home"


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drawn(model: str, request: Request, notes: tuple[str, ...] = ()) -> Picture:
    """A picture without a network."""
    image = Image.new("RGB", (request.width, request.height), "orange")
    return Picture(image, request, model, request.num_steps, image.size, 0.1, notes)


class FakeEngine:
    """Answers at once with a plain picture, or with what ``answer`` gives or raises; held, not at all.

    Pictures of the seeds in ``waits`` come once their events are set. What ``refuses`` is, it raises of every job.
    """

    def __init__(self) -> None:
        self.waits: dict[int, threading.Event] = {}
        self.answer: Callable[[str, Request], Picture] = drawn
        self.jobs: list[tuple[str, Request]] = []
        self.futures: list[Future[Picture]] = []
        self.held = False
        self.refuses: Exception | None = None

    def submit(self, model: str, request: Request, on_step: OnStep | None = None, key: str = "") -> Future[Picture]:
        if self.refuses:
            raise self.refuses
        for step in range(0 if self.held or not on_step else request.num_steps):
            on_step(step + 1, request.num_steps, lambda: Image.new("RGB", (16, 16), "orange"))
        self.jobs.append((model, request))
        job: Future[Picture] = Future()
        self.futures.append(job)
        if request.seed in self.waits:
            threading.Thread(target=self._later, args=(job, model, request), daemon=True).start()
        elif not self.held:
            try:
                job.set_result(self.answer(model, request))
            except Exception as error:
                job.set_exception(error)
        return job

    def _later(self, job: Future[Picture], model: str, request: Request) -> None:
        self.waits[request.seed or 0].wait()
        if job.set_running_or_notify_cancel():
            job.set_result(self.answer(model, request))

    def cancel(self, job: Future[Picture]) -> None:
        job.cancel()

    def position(self, job: Future[Picture]) -> int:
        return self.futures.index(job) if self.held and not job.done() else 0

    def seconds_until_begun(self, job: Future[Picture]) -> float:
        return 0.5 * self.position(job)

    def stats(self) -> dict[str, int]:
        return {"queued": 0, "running": 0, "done": len(self.jobs), "failed": 0}

    def state(self) -> str:
        return "busy" if self.held else "ready"


class Blank:
    """A pipeline that draws nothing; ``on`` is called with what each stage is given, and may wait or raise."""

    card, device = card(SPARK), torch.device("cpu")

    def __init__(self, on: Callable[[str, Sequence[Row]], None] = lambda stage, rows: None) -> None:
        self.on = on

    def encode(self, prompt: str) -> Encoded:
        return torch.zeros(1, 1), torch.zeros(1)

    def start(self, request: Request, encode: Callable[[str], Encoded]) -> Row:
        nothing = encode(request.prompt)[1]
        to = plan(self.card, request)
        row = Row(request, to, trailing_schedule(1), nothing, nothing, nothing, nothing, 0.0)
        self.on("start", [row])
        return row

    def step(self, rows: Sequence[Row], batch: int) -> None:
        assert sum(row.plan.network_rows for row in rows) <= batch
        self.on("step", rows)
        for row in rows:
            row.done += 1

    def finish(self, row: Row) -> Picture:
        assert row.done == row.plan.steps
        self.on("finish", [row])
        return drawn(SPARK, row.request)

    def preview(self, row: Row) -> Preview:
        return lambda: None

    def agrees(self, latent_size: tuple[int, int], parts: Sequence[int]) -> bool:
        return True


class Loads:
    """A loader of one pipeline."""

    def __init__(self, pipeline: Stages) -> None:
        self.pipeline = pipeline

    def __call__(self, model: str, steps: int) -> Stages:
        return self.pipeline

    def switch_seconds(self, model: str, steps: int) -> float:
        return 0.0

    def drop_others(self, model: str, steps: int) -> None:
        pass


def engine_of(pipeline: Stages, **options: Any) -> Engine:
    return Engine(lambda: Runner(Loads(pipeline)), **options)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of its own for each test, with the key that tests send."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.keys.set_from_environment(KEY)
    yield ledger
    ledger.close()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'books.db'}"
    server = request.getfixturevalue("postgresql_server")
    name = "t" + uuid.uuid4().hex
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.format(name)


@pytest.fixture
def client(engine: FakeEngine, ledger: Ledger) -> Iterator[TestClient]:
    """The server over the fake engine, with the key sent."""
    app = create_app(engine, ledger, read_settings())
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def address(engine: FakeEngine, ledger: Ledger) -> Iterator[str]:
    """The fake engine's server on a real socket."""
    server, listener = server_for(create_app(engine, ledger, read_settings()), 5), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def body(**data: object) -> dict[str, object]:
    """A good request, with these parameters."""
    return {"model": SPARK, "data": {"prompt": "a red fox", "height": 256, "width": 256} | data}


@pytest.fixture(scope="session")
def tiny() -> Pipeline:
    """The real way from prompt to pixels, over networks far too small and random to draw anything."""
    torch.manual_seed(0)
    byte_tokens = sorted({chr(33 + i) for i in range(94)} | {chr(161 + i) for i in range(163)})
    tokens = [*byte_tokens, *(token + "</w>" for token in byte_tokens), START, END]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, [], length=16)
    text = CLIPTextConfig(len(tokens), 16, 32, 2, 2, 16, "gelu", None, len(tokens) - 1)
    unet = UNetConfig(4, 4, (16, 32), 1, (0, 1), 8, 32, 8, 16, 8)
    vae = VAEConfig(3, 4, (8, 8, 8, 8, 8), 1, 8, 1.0)
    fast = TinyDecoderConfig(4, (8, 8, 8, 8, 8), (1, 1, 1, 1, 1))
    small = replace(
        card(SPARK),
        preview_rgb=(),
        unet=unet,
        vae=vae,
        fast_decoder=fast,
        text_encoders=(text, replace(text, projection_dim=16)),
    )
    encoders = CLIPTextEncoder(small.text_encoders[0]), CLIPTextEncoder(small.text_encoders[1])
    networks = Networks((tokenizer, tokenizer), encoders, UNet(unet), VAE(vae), "v", fast_decoder=TinyDecoder(fast))
    return Pipeline(small, networks)
