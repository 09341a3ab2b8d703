"""``/metrics``, ``/healthz`` and ``/readyz``: for who watches over the server."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fulgurite.records import Entry
from fulgurite.server.protocol import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
READY = 200
NOT_READY = 503


class Metrics:
    """This server's own registry: counted since it started, no key and no prompt in any label."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"fulgurite_{name}", help, labels, registry=self.registry)

        self._requests = counter("requests", "HTTP requests answered.", "method", "path", "status")
        self._errors = counter("errors", "Answers that were errors, by their code.", "code")
        self._pictures = counter("pictures", "Pictures that ended, by outcome.", "model", "outcome")
        self._steps = counter("steps", "Steps run for pictures that were made.", "model")
        self._charged = counter("charged_microdollars", "Prices of the pictures that were made.", "model")
        self._phases = Histogram(
            "fulgurite_picture_seconds",
            "Seconds a picture spent in each phase: queued, computed, encoded.",
            ["phase"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's numbers, asked for when they are read (prometheus-client's collector protocol)."""
        stats = self._engine.stats()
        for name in ("queued", "running"):
            yield GaugeMetricFamily(f"fulgurite_engine_{name}", f"Pictures {name} now.", stats[name])
        if "replicas" in stats:
            yield GaugeMetricFamily("fulgurite_replicas", "Engines of the cluster that can draw.", stats["replicas"])
            yield CounterMetricFamily("fulgurite_redrawn", "Pictures begun anew, their replica lost.", stats["redrawn"])

    def request(self, method: str, path: str, status: int, code: str | None) -> None:
        self._requests.labels(method, path, str(status)).inc()
        if code:
            self._errors.labels(code).inc()

    def picture(self, entry: Entry) -> None:
        """Counts a picture that the ledger has taken."""
        self._pictures.labels(entry.model, entry.outcome).inc()
        if entry.outcome == "done":
            self._steps.labels(entry.model).inc(entry.steps_run)
            self._charged.labels(entry.model).inc(entry.price)
            self.phase("queued", entry.seconds_queued)
            self.phase("computed", entry.seconds_computed)

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)


def add_watching(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """That the server answers, and how busy its engine is."""
        return {"status": "ok", "engine": engine.stats()}

    @app.get("/readyz", responses={NOT_READY: {"description": "Not now: starting, busy or failed."}})
    async def readyz() -> JSONResponse:
        """Whether a picture asked for now would be made: starting, ready, busy (no place in the queue) or failed."""
        state = engine.state()
        return JSONResponse({"state": state}, READY if state == "ready" else NOT_READY)

    @app.get("/metrics", response_class=Response, summary="Prometheus metrics")
    async def show() -> Response:
        """For Prometheus. It asks for no key: keep it inside your network."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
