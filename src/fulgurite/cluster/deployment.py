"""Replicas put onto a Ray cluster, and taken from it again."""

import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ReplicaState

from fulgurite.cluster.engine import ClusterEngine
from fulgurite.cluster.replica import Event, Replica, start
from fulgurite.engine import Say
from fulgurite.errors import FulguriteError
from fulgurite.request import Request
from fulgurite.settings import Settings
from fulgurite.threads import waiting

log = logging.getLogger("fulgurite")
PREFIX = "fulgurite-"  # of the applications' names; each server has one of its own
LOOK_SECONDS = 1.0  # between two looks at how many replicas there are
STALE_SECONDS = 10.0  # after which what the last look found says nothing
HEALTH_SECONDS = 5.0, 30.0  # between Ray's looks at a replica, and how long it may take to answer one
STARTS = 3  # of a replica that fails to, before all is given up
BEGUN = 1000  # more pictures than a replica ever has begun at once
SECRETS = {"api_key": None, "ledger": None, "webhook_secret": None}  # which no worker needs


def open_cluster(settings: Settings, say: Say) -> ClusterEngine:
    """Starts ``settings.replicas`` engines on the Ray cluster that RAY_ADDRESS names, and waits until one is ready.

    Where it names none, and none runs on this machine, one is started that ends with this program. Those of an earlier
    server on the cluster are ended. Raises FulguriteError where they cannot be had.
    """
    if settings.device not in ("auto", "cuda", "cpu"):
        why = f"each of the replicas has a device of its own: cuda or cpu, not {settings.device!r}."
        raise FulguriteError(f"{settings.origin('device')}: {why}")
    join()
    name = PREFIX + uuid.uuid4().hex[:8]
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        for earlier in serve.status().applications:
            if earlier.startswith(PREFIX):
                say("Ending the engines of an earlier server.")
                serve.delete(earlier)
        handle: Any = deployed(settings, name, say)
        for line in handle.ready.remote().result():
            say(line)
        remote = handle.options(stream=True).draw.remote
        watch = Watch(name)
    except BaseException as error:
        leave(name)
        if isinstance(error, RayError | RayServeException | RuntimeError | TimeoutError):
            raise FulguriteError(f"The engines cannot start: {error}") from error
        raise

    async def draw(model: str, request: Request, key: str, steps_told: bool) -> AsyncGenerator[Event, None]:
        events = remote(model, request, key, steps_told)
        try:
            async for event in events:
                yield event
        finally:  # Ray goes on with what nobody listens to
            events.cancel()

    def close() -> None:
        watch.stop()
        leave(name)

    return ClusterEngine(draw, watch.running, settings.queue_size, settings.deadline_seconds, close)


def join() -> None:
    """Raises FulguriteError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if "://" in (address := os.environ.get("RAY_ADDRESS", "")):
        raise FulguriteError(
            f"RAY_ADDRESS: {address!r} is for who is outside of a cluster: run the server on one of its machines."
        )
    at_the_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace="fulgurite", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (RayError, ConnectionError, ValueError, RuntimeError) as error:
        why = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        hint = (
            "RAY_ADDRESS names the cluster, of which this machine has to be one, with the same Ray and Python; "
            "one that asks for a token wants RAY_AUTH_MODE=token too"
        )
        raise FulguriteError(f"Cannot join or start a Ray cluster: {why}. {hint}.") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_the_end)  # Ray has put its own there


def deployed(settings: Settings, name: str, say: Say) -> Any:
    """Ray's handle of the replicas, one of which is ready. Raises FulguriteError where none will be."""
    replicas = settings.replicas or 1
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [node.get("GPU", 0) for node in nodes]
    on_gpus = settings.device == "cuda" or (settings.device == "auto" and any(gpus))
    machines = [(int(node.get("CPU", 0)), int(n) if on_gpus else replicas) for node, n in zip(nodes, gpus, strict=True)]
    threads = share(machines, replicas)
    each = "a GPU" if on_gpus else counted(threads, "processor")
    say(f"Starting on a Ray cluster: {counted(replicas, 'engine')}, {each} each.")
    deployment: Any = serve.deployment(Replica)
    application = deployment.options(
        num_replicas=replicas,
        ray_actor_options={
            "num_cpus": 1 if on_gpus else threads,
            "num_gpus": int(on_gpus),
            "runtime_env": {"env_vars": {**waiting(), "OMP_NUM_THREADS": str(threads)}},
        },
        # An engine knows best how much is too much, and whose turn it is: nothing waits before it.
        max_ongoing_requests=settings.queue_size + BEGUN,
        max_constructor_retry_count=STARTS,
        graceful_shutdown_timeout_s=settings.shutdown_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_SECONDS[0],
        health_check_timeout_s=HEALTH_SECONDS[1],
    ).bind(partial(start, settings.model_copy(update=SECRETS)))
    target = serve.RunTarget(application, name, route_prefix=None)
    [handle] = serve.run_many([target], wait_for_applications_running=False)
    said = ""
    while True:
        application = serve.status().applications[name]
        message = " ".join(one.message.strip() for one in application.deployments.values())
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            why = re.sub(r"^fulgurite[.]errors[.]\w+: ", "", (message or application.message).rpartition("\n")[2])
            raise FulguriteError(f"The engines cannot start: {why}")
        if ready(application):
            return handle
        if message not in ("", said):
            said = message
            say(message)
        time.sleep(0.1)


def ready(application: Any) -> int:
    """How many of an application's replicas can draw."""
    return sum(one.replica_states.get(ReplicaState.RUNNING, 0) for one in application.deployments.values())


def share(machines: Sequence[tuple[int, int]], replicas: int) -> int:
    """The most processors that each of so many replicas can have, of machines' processors and places for replicas."""

    def fit(each: int) -> bool:
        return sum(min(processors // each, places) for processors, places in machines) >= replicas

    most = max(processors for processors, _ in machines)
    return max(filter(fit, range(1, most + 1)), default=1)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def leave(name: str) -> None:
    """Takes the server's replicas from the cluster, and this program too."""
    try:
        with suppress(RayError, RayServeException, TimeoutError):
            serve.delete(name)
    finally:
        ray.shutdown()


class Watch:
    """Counts ready replicas on a thread of its own.

    Asking Ray is slow, and slowest when the cluster is in trouble.
    """

    def __init__(self, name: str) -> None:
        self._name, self._found, self._when = name, 0, time.monotonic()
        self._stopped = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._work, name="cluster-watch", daemon=True)
        self._thread.start()

    def running(self) -> int:
        """How many are ready; 0 if the cluster has not answered for STALE_SECONDS."""
        return self._found if time.monotonic() - self._when < STALE_SECONDS else 0

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(LOOK_SECONDS)

    def _work(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            application = serve.status().applications.get(self._name)
        except Exception:  # whatever it is, the next look may find more
            log.warning("Ray does not say how its replicas are.", exc_info=True)
            return
        self._found, self._when = ready(application) if application else 0, time.monotonic()
