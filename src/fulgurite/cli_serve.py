"""``fulgurite serve``: the engine, the ledger and the server put together and run; a flag for every setting."""

import gc
import logging
import signal
from contextlib import ExitStack, closing, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fulgurite.cli_ledger import CARDS, HOME
from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.cluster import ClusterEngine
    from fulgurite.engine import Engine
    from fulgurite.ledger import Ledger
    from fulgurite.server.listening import Server
    from fulgurite.settings import Settings


def serve(
    # What is secret has no flag: every user of a machine can read its processes' arguments.
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0: any free one.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model to serve; may be repeated. Else all.")
    ] = None,
    cards: CARDS = None,
    fast_decoder: Annotated[
        list[str] | None, typer.Option(help="A model whose fast decoder is used unless a request says not.")
    ] = None,
    warm: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL[:STEPS]", help="Draws a picture before the server answers; may be repeated."),
    ] = None,
    demo: Annotated[
        bool | None, typer.Option("--demo", help="The small model that ships inside answers for SDXL-Lightning.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; auto: CUDA's GPU, else the CPU.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 (GPU); inexact: int8 (CPU), float8 (GPU); else auto.")
    ] = None,
    triton_kernels: Annotated[
        bool | None, typer.Option(help="Hand-written kernels on an NVIDIA GPU; unless said, where they can run.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option(help="A network's kernels launched at once on an NVIDIA GPU; unless said, so.")
    ] = None,
    exact: Annotated[
        bool | None, typer.Option(help="A picture is the same to the bit whoever shares its batch.")
    ] = None,
    unet_gb: Annotated[
        float | None, typer.Option(help="Memory for UNets, in GB; beyond it the least recently used is evicted.")
    ] = None,
    queue_size: Annotated[
        int | None, typer.Option(help="How many pictures may wait; beyond that the answer is 503.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Engines on a Ray cluster (RAY_ADDRESS, or one on this machine), a GPU each.")
    ] = None,
    deadline_seconds: Annotated[float | None, typer.Option(help="A picture not finished by then is given up.")] = None,
    hang_seconds: Annotated[
        float | None, typer.Option(help="How long a stage, such as a step, may take before the device counts as hung.")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="The largest request body.")] = None,
    keep_seconds: Annotated[int | None, typer.Option(help="How long answers are kept for retries.")] = None,
    webhook_private: Annotated[
        bool | None, typer.Option("--webhook-private", help="Webhooks may go to private networks.")
    ] = None,
    shutdown_seconds: Annotated[
        int | None, typer.Option(help="How long pictures in progress may take once the server is told to stop.")
    ] = None,
    home: HOME = None,
) -> None:
    """Serves the hosted API. All settings have variables too, and a file: `fulgurite settings` shows them."""
    given = {name: tuple(flag) if isinstance(flag, list) else flag for name, flag in locals().items()}
    # Before all that takes time, since a container's first process hears no signal that it has no handler for. Uvicorn
    # finishes what runs, then raises the signal again: both end here, with all closed that was opened.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop_at_hang_up()
    with suppress(KeyboardInterrupt):
        run(given)


def run(given: dict[str, Any]) -> None:
    """Serves by these flags until a signal comes, which is raised as KeyboardInterrupt."""
    from fulgurite.cards import add
    from fulgurite.engine import warm_up
    from fulgurite.ledger import open_ledger
    from fulgurite.server import JSONLines, check_settings, create_app, demo_notices, listen, server_for, url_of
    from fulgurite.settings import read_settings

    settings = read_settings(**given)
    add(settings.cards)
    check_settings(settings)
    lines = logging.StreamHandler()
    lines.setFormatter(JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[lines])  # others' news, such as httpx's, may hold secrets
    logging.getLogger("fulgurite").setLevel(logging.INFO)
    with ExitStack() as opened:
        # First: where the port is taken, no key is made, since a key is shown only once.
        listener = opened.enter_context(listen(settings.host, settings.port))
        ledger = opened.enter_context(closing(open_ledger(settings)))
        admit(settings, ledger)
        engine = engine_for(settings)
        server: Server | None = None
        # By then nobody waits for what it still draws.
        opened.callback(lambda: engine.close(server.seconds_left() if server else settings.shutdown_seconds))
        server = server_for(create_app(engine, ledger, settings), settings.shutdown_seconds)
        if not settings.replicas:  # they are warm
            warm_up(engine.submit, settings, say)
        say(f"Fulgurite answers at {url_of(settings.host, listener.getsockname()[1])}/api/v1")
        for notice in demo_notices(settings):
            say(notice)
        # What is here now stays: collecting garbage need not walk through all of torch again and again.
        gc.collect()
        gc.freeze()
        server.run([listener])


def stop_at_hang_up() -> None:
    """SIGHUP, where there is one, does as SIGTERM; ignored, as under nohup, it stays so."""
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))


def say(line: str) -> None:
    typer.echo(line, err=True)


def admit(settings: "Settings", ledger: "Ledger") -> None:
    """Lets the environment's key in, and says how many are active; where none is, makes one and shows it."""
    ledger.keys.set_from_environment(settings.api_key.get_secret_value() if settings.api_key else None)
    active = sum(key.state() == "active" for key in ledger.keys.all())
    if active:
        are = "1 key is" if active == 1 else f"{active} keys are"
        say(f"{are} active; `fulgurite keys create NAME` makes another.")
    else:
        _, secret = ledger.keys.create("first")
        say(f"Your API key, shown this once: {secret}")


def engine_for(settings: "Settings") -> "Engine | ClusterEngine":
    """The one of this process, or those of a cluster. Raises FulguriteError."""
    if settings.replicas:
        if not find_spec("ray"):
            why = "that needs Ray: in the checkout, pip install -e '.[cluster]'."
            raise FulguriteError(f"{settings.origin('replicas')}: {why}")
        from fulgurite.cluster import open_cluster

        return open_cluster(settings, say)
    from fulgurite.engine import open_engine

    return open_engine(settings, say)
