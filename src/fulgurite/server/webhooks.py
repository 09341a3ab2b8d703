"""Webhooks: a prediction's end told to an address of the client's, signed as Standard Webhooks has it.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

import httpx

from fulgurite.errors import FulguriteError
from fulgurite.server.problems import Problem
from fulgurite.settings import LEAST_SECRET, Settings

log = logging.getLogger("fulgurite")
PORT = "[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
URL_PATTERN = rf"^[Hh][Tt][Tt][Pp][Ss]?://[A-Za-z0-9_][A-Za-z0-9._-]*(:({PORT}))?([/?#][!-~]*)?$"
DELAYS = (0.0, 2.0, 10.0, 60.0, 300.0)  # seconds before each try
TIMEOUT = 10.0  # seconds for a receiver to answer
LOOKUP_SECONDS = 5.0  # for its name to be found
LAST_SECONDS = 5.0  # that those on their way are given when the server stops


class Webhooks:
    """Those on their way in this process. What has not arrived when it ends is lost; the prediction is not."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Its own threads: a name server that does not answer holds up webhooks alone.
        self._lookups = ThreadPoolExecutor(16, "lookup")
        self._tasks: set[asyncio.Task[None]] = set()

    def secret_of(self, key_id: str) -> str:
        """What a key's webhooks are signed with: its own secret, made of the server's. May read or make a file.

        Raises FulguriteError.
        """
        derived = hmac.digest(server_secret(self._settings), key_id.encode(), hashlib.sha256)
        return "whsec_" + base64.b64encode(derived).decode()

    async def check(self, url: str) -> None:
        """Raises Problem: 422 if it is no URL, 403 if it leads into the server's own network."""
        if not re.fullmatch(URL_PATTERN, url):
            message = "webhook: send an http or https URL, such as https://example.com/hook."
            if re.match("[^/?#]*//[^/?#]*@", url):
                message = "webhook: leave the user and password out, which are not sent: its signature says who sends."
            raise Problem(422, "invalid_parameter", message, "webhook")
        await self._addresses(url)

    async def _addresses(self, url: str) -> list[str]:
        """Where a URL's host is now: nowhere, perhaps. Raises Problem (403) if it may not be there."""
        look_up = partial(socket.getaddrinfo, urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                found = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            return []
        addresses = [str(address[4][0]) for address in found]
        if not (self._settings.webhook_private or all(ipaddress.ip_address(each).is_global for each in addresses)):
            message = "webhook: its host is in a private network. An operator can allow that: webhook_private."
            raise Problem(403, "webhook_not_allowed", message, "webhook")
        return addresses

    def send(self, url: str, key_id: str, about: str, told: Callable[[], Awaitable[tuple[str, bytes]]]) -> None:
        """Tells the receiver what ``told`` comes to: a ``webhook-id``, the same at every try, and a body.

        It is on its way from now on, so that a server that stops waits for it; ``about``: what the log calls it.
        """
        task = asyncio.create_task(self._deliver(url, key_id, told), name=about)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, url: str, key_id: str, told: Callable[[], Awaitable[tuple[str, bytes]]]) -> None:
        id, body = await told()
        why = ""
        trusted = await asyncio.to_thread(certificates)
        async with httpx.AsyncClient(
            verify=trusted, timeout=TIMEOUT, follow_redirects=False, trust_env=False
        ) as client:
            for number, delay in enumerate(DELAYS, 1):
                await asyncio.sleep(delay)
                try:
                    # Looked up again, since names move; and the request goes to the address that was looked at.
                    if not (addresses := await self._addresses(url)):
                        raise httpx.ConnectError(f"its host has no address, or not within {LOOKUP_SECONDS:g} s")
                    secret = await asyncio.to_thread(self.secret_of, key_id)
                    headers = signed(secret, id, body, int(time.time()))
                    request = client.build_request("POST", url, content=body, headers=headers)
                    pin(request, addresses[0])
                    async with asyncio.timeout(TIMEOUT):
                        answer = await client.send(request, stream=True)  # of which no more than the head is read
                        await answer.aclose()
                    if answer.is_success:
                        return
                    why = f"answered {answer.status_code}"
                except TimeoutError:
                    why = f"no answer within {TIMEOUT:g} s"
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    why = str(error) or type(error).__name__
                except Problem as error:
                    why = error.message
                except (FulguriteError, OSError) as error:  # of the secret's file, which somebody may mend meanwhile
                    why = str(error)
                log.warning("webhook for %s: try %d of %d failed: %s", id, number, len(DELAYS), why)
        log.warning("webhook for %s given up after %d tries: %s", id, len(DELAYS), why)

    async def close(self) -> None:
        """Gives what is on its way a last moment; the log has what did not arrive."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LAST_SECONDS)
            for task in late:
                task.cancel()
                log.warning("webhook for %s not delivered: the server stopped first", task.get_name())
        self._lookups.shutdown(wait=False)


@cache
def certificates() -> ssl.SSLContext:
    """What receivers are trusted by, read once: that takes tens of milliseconds."""
    return httpx.create_ssl_context(trust_env=False)


def check_secret(settings: Settings) -> None:
    """That webhooks can be signed, as far as that can be known before the first. Raises FulguriteError."""
    if settings.webhook_secret or os.path.exists(secret_file(settings)):
        server_secret(settings)


def secret_file(settings: Settings) -> Path:
    return settings.home / "webhook.secret"


def server_secret(settings: Settings) -> bytes:
    """What keys' own secrets are made of: the setting, else the file's, which is made where there is none.

    Raises FulguriteError.
    """
    if settings.webhook_secret:
        return settings.webhook_secret.get_secret_value().encode()
    file = secret_file(settings)
    try:
        if not file.exists():
            make_secret(file)
        secret = file.read_bytes()
    except OSError as error:
        raise FulguriteError(f"Cannot read or make {file}, which signs webhooks: {error.strerror}.") from None
    if not secret.strip():
        raise FulguriteError(f"{file} is empty: delete it, to have another secret made.")
    if len(secret.strip()) < LEAST_SECRET:
        why = f"holds a secret of less than {LEAST_SECRET} bytes"
        raise FulguriteError(f"{file} {why}: write a longer one, or delete it, to have another made.")
    return secret


def make_secret(file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent) as new:  # for its owner alone
        new.write(secrets.token_hex(32).encode())
        new.flush()
        os.fsync(new.fileno())
        with suppress(FileExistsError):  # another server was first
            os.link(new.name, file)  # whole, or not there at all


def pin(request: httpx.Request, address: str) -> None:
    """Sends a request to this address, whatever its host's name leads to by then; the host is asked for by its name."""
    host = request.url.host  # which the header Host has, and TLS checks
    request.url = request.url.copy_with(host=address)
    request.extensions = {**request.extensions, "sni_hostname": host}


def signed(secret: str, id: str, body: bytes, timestamp: int) -> dict[str, str]:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }
