"""``/metrics``, ``/healthz`` and ``/readyz``: for who watches over the server."""

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fulgurite.errors import LedgerError
from fulgurite.records import Entry
from fulgurite.server.protocol import Engine, Ledger

log = logging.getLogger("fulgurite")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
CHECK_SECONDS = 1.0  # that what a check of the ledger found holds
CHECK_PATIENCE = 5.0  # seconds, after which a check that has not ended counts as failed
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


class LedgerWatch:
    """Whether the ledger can be used, as it was a moment ago: however often that is asked, it is looked at rarely."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger check")  # one: a check that hangs is not joined by others
        self._check: Future[bool] | None = None
        self._fresh_until = 0.0
        self._usable = True

    async def usable(self) -> bool:
        if self._check is None or (self._check.done() and time.monotonic() >= self._fresh_until):
            self._check = self._thread.submit(self._look)
        await asyncio.wait({asyncio.wrap_future(self._check)}, timeout=CHECK_PATIENCE)
        return self._check.done() and self._check.result()

    def _look(self) -> bool:
        try:
            self._ledger.check()
            usable = True
        except Exception as error:
            usable = False
            if self._usable:  # told once, not at every probe
                log.error("not ready: %s", error, exc_info=not isinstance(error, LedgerError))
        if usable and not self._usable:
            log.info("ready again: the ledger can be used")
        self._usable = usable
        self._fresh_until = time.monotonic() + CHECK_SECONDS
        return usable


def add_watching(app: FastAPI, engine: Engine, ledger: Ledger, metrics: Metrics) -> None:
    watch = LedgerWatch(ledger)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """That the server answers, and how busy its engine is."""
        return {"status": "ok", "engine": engine.stats()}

    @app.get(
        "/readyz", responses={NOT_READY: {"description": "Not now: starting, busy, failed or without its ledger."}}
    )
    async def readyz() -> JSONResponse:
        """Whether a picture asked for now would be made.

        The state is starting, ready, busy (no place in the queue), failed, or ledger_unavailable.
        """
        state: str = engine.state()
        if state == "ready" and not await watch.usable():
            state = "ledger_unavailable"
        return JSONResponse({"state": state}, READY if state == "ready" else NOT_READY)

    @app.get("/metrics", response_class=Response, summary="Prometheus metrics")
    async def show() -> Response:
        """For Prometheus. It asks for no key: keep it inside your network."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
