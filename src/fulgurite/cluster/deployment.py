"""Replicas put onto a Ray cluster, and taken from it again."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from fulgurite.cluster.engine import ClusterEngine
from fulgurite.cluster.replica import Replica, start
from fulgurite.errors import FulguriteError
from fulgurite.settings import Settings
from fulgurite.threads import waiting

APP = "fulgurite"
LOOK_SECONDS = 1.0  # between two looks at how many replicas there are
HEALTH_SECONDS = 5.0  # between Ray's
SECRETS = {"api_key": None, "ledger": None, "webhook_secret": None}  # which no worker needs


def open_cluster(settings: Settings, say: Callable[[str], None]) -> ClusterEngine:
    """Starts ``settings.replicas`` engines on the Ray cluster that RAY_ADDRESS names, and waits until they are ready.

    Where it names none, and none runs on this machine, one is started that ends with this program. A server that was
    here before and left its replicas behind has them replaced. Raises FulguriteError where they cannot be had.
    """
    assert settings.replicas
    if settings.device not in ("auto", "cuda", "cpu"):
        why = f"each of the replicas has a device of its own: cuda or cpu, not {settings.device!r}."
        raise FulguriteError(f"{settings.origin('device')}: {why}")
    join()
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = each_one(settings, nodes)
        say(f"Starting on a Ray cluster: {counted(settings.replicas, 'engine')}, {told(resources)} each.")
        if (gpus := sum(node.get("GPU", 0) for node in nodes)) < settings.replicas * resources.get("num_gpus", 0):
            say(f"The cluster has {counted(int(gpus), 'GPU')}: waiting until there are {settings.replicas}.")
        serve.start(proxy_location=ProxyLocation.Disabled)
        deployment: Any = serve.deployment(Replica)
        application = deployment.options(
            num_replicas=settings.replicas,
            ray_actor_options={**resources, "runtime_env": {"env_vars": waiting()}},
            # An engine knows best how much is too much, and whose turn it is: nothing waits before it.
            max_ongoing_requests=2 * settings.queue_size,
            graceful_shutdown_timeout_s=settings.shutdown_seconds,
            graceful_shutdown_wait_loop_s=0.2,
            health_check_period_s=HEALTH_SECONDS,
            health_check_timeout_s=settings.hang_seconds,
        ).bind(partial(start, settings.model_copy(update=SECRETS)))
        handle: Any = serve.run(application, name=APP, route_prefix=None)
        for line in handle.ready.remote().result():
            say(line)
    except BaseException as error:
        why = failure()
        leave()
        if isinstance(error, RayServeException | RuntimeError):
            raise FulguriteError(f"The engines cannot start: {why or error}") from error
        raise
    watch = Watch()

    def close() -> None:
        watch.stop()
        leave()

    return ClusterEngine(
        handle.options(stream=True).draw.remote,
        lambda: watch.running,
        settings.queue_size,
        settings.deadline_seconds,
        close,
    )


def join() -> None:
    """Raises FulguriteError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    at_the_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace=APP, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (RayError, ConnectionError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        hint = "RAY_ADDRESS names the cluster; one that asks for a token wants RAY_AUTH_MODE=token too"
        raise FulguriteError(f"Cannot join or start a Ray cluster: {why}. {hint}.") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_the_end)  # Ray has put its own there


def each_one(settings: Settings, nodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """What a replica takes of these machines: a GPU; where there are none, its share of processors, at least one."""
    if settings.device == "cuda" or (settings.device == "auto" and any(node.get("GPU") for node in nodes)):
        return {"num_cpus": 1, "num_gpus": 1}
    assert settings.replicas
    return {"num_cpus": share([int(node.get("CPU", 0)) for node in nodes], settings.replicas)}


def share(processors: Sequence[int], replicas: int) -> int:
    """The most processors that each of so many replicas can have, on machines that have so many."""
    fitting = [each for each in range(1, max(processors) + 1) if sum(n // each for n in processors) >= replicas]
    return max(fitting, default=1)


def told(resources: dict[str, float]) -> str:
    return "a GPU" if "num_gpus" in resources else counted(int(resources["num_cpus"]), "processor")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def failure() -> str:
    """Why replicas do not start, by the end of the traceback that Ray has of one."""
    with suppress(RayError, RayServeException, KeyError):
        for deployment in serve.status().applications[APP].deployments.values():
            last = deployment.message.strip().rpartition("\n")[2]
            return last.removeprefix(f"{FulguriteError.__module__}.{FulguriteError.__name__}: ")
    return ""


def leave() -> None:
    """Takes the replicas from the cluster, and this program too."""
    with suppress(RayError, RayServeException):
        serve.delete(APP)
    ray.shutdown()


class Watch:
    """How many replicas can draw, looked at beside all else: asking takes its time, the longer the worse things are."""

    def __init__(self) -> None:
        self.running = 0
        self._stopped = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._work, name="cluster-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            application = serve.status().applications.get(APP)
        except (RayError, RayServeException):
            self.running = 0
            return
        found = application.deployments.values() if application else ()
        self.running = sum(deployment.replica_states.get(ReplicaState.RUNNING, 0) for deployment in found)
