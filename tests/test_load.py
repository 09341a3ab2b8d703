"""A thousand clients at once, slow ones among them: whom there is no room for is told so, and nothing is lost."""

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator

import pytest
import uvicorn
from conftest import KEY, Blank, body, engine_of

from fulgurite.ledger import Ledger
from fulgurite.server import create_app
from fulgurite.settings import read_settings

CLIENTS, SILENT, PLACES = 1000, 50, 64


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * CLIENTS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files here, and this needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_at_once(ledger: Ledger) -> None:
    engine = engine_of(Blank(), queue_size=PLACES)
    text = json.dumps(body()).encode()
    head = f"POST /api/v1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    request = head.encode() + f"Connection: close\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async def fall_silent(port: int) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[:-20])  # never sends the rest
        return writer

    async def talk() -> list[bytes]:
        server = uvicorn.Server(uvicorn.Config(create_app(engine, ledger, read_settings()), port=0, log_level="error"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        silent = [await fall_silent(port) for _ in range(SILENT)]
        answers = await asyncio.gather(*(ask(port) for _ in range(CLIENTS)))
        afterwards = await ask(port)
        for writer in silent:
            writer.close()
        server.should_exit = True
        await serving
        return [*answers, afterwards]

    *answers, afterwards = asyncio.run(talk())
    engine.close()
    statuses = Counter(answer.split(b" ", 2)[1] for answer in answers)
    assert set(statuses) <= {b"200", b"503"}
    assert statuses[b"200"] >= PLACES
    assert statuses[b"503"] > 0  # else this tried nothing
    assert all(b"retry-after: " in answer.lower() for answer in answers if b" 503 " in answer[:20])
    assert afterwards.startswith(b"HTTP/1.1 200")
    outcomes = Counter(entry.outcome for entry in ledger.entries())
    assert outcomes == {"done": statuses[b"200"] + 1, "refused": statuses[b"503"]}
