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
import time
from urllib.parse import urlsplit

import httpx

from fulgurite.server.problems import Problem
from fulgurite.settings import Settings

log = logging.getLogger("fulgurite")
PORT = "[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
URL_PATTERN = rf"^https?://[A-Za-z0-9][A-Za-z0-9.-]*(:({PORT}))?(/[!-~]*)?$"
DELAYS = (0.0, 2.0, 10.0, 60.0, 300.0)  # seconds before each try
TIMEOUT = 10.0  # seconds for a receiver to answer
LAST_SECONDS = 5.0  # that first tries are given when the server stops


class Webhooks:
    """Those on their way in this process. What has not arrived when it ends is lost; the prediction is not."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def secret_of(self, key_id: str) -> str:
        """What a key's webhooks are signed with: its own secret, made of the server's. May read or make a file."""
        derived = hmac.digest(self._server_secret(), key_id.encode(), hashlib.sha256)
        return "whsec_" + base64.b64encode(derived).decode()

    def _server_secret(self) -> bytes:
        if self._settings.webhook_secret:
            return self._settings.webhook_secret.get_secret_value().encode()
        file = self._settings.home / "webhook.secret"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return file.read_bytes()
        with os.fdopen(descriptor, "wb") as new:
            new.write(secrets.token_hex(32).encode())
        return file.read_bytes()

    async def check(self, url: str) -> None:
        """Raises Problem: 422 if it is no URL, 403 if it leads into the server's own network."""
        if not re.fullmatch(URL_PATTERN, url):
            message = "webhook: send an http or https URL, such as https://example.com/hook."
            raise Problem(422, "invalid_parameter", message, "webhook")
        if self._settings.webhook_private:
            return
        try:
            found = await asyncio.get_running_loop().getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return  # no address now: sending will find that out, and try again
        if not all(ipaddress.ip_address(address[4][0]).is_global for address in found):
            message = "webhook: its host is in a private network. An operator can allow that: webhook_private."
            raise Problem(403, "webhook_not_allowed", message, "webhook")

    def send(self, url: str, key_id: str, id: str, body: bytes) -> None:
        """Tells the receiver, trying again for some minutes. Every try carries the same ``webhook-id``."""
        task = asyncio.create_task(self._deliver(url, key_id, id, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, url: str, key_id: str, id: str, body: bytes) -> None:
        secret = await asyncio.to_thread(self.secret_of, key_id)
        why = ""
        async with httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False, trust_env=False) as client:
            for delay in DELAYS:
                await asyncio.sleep(delay)
                try:
                    await self.check(url)  # again: names may have moved
                    answer = await client.post(url, content=body, headers=signed(secret, id, body, int(time.time())))
                    if answer.is_success:
                        return
                    why = f"answered {answer.status_code}"
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    why = str(error) or type(error).__name__
                except Problem as error:
                    why = error.message
        log.warning("webhook for %s given up after %d tries: %s", id, len(DELAYS), why)

    async def close(self) -> None:
        """Gives what is on its way a last moment."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=LAST_SECONDS)
            for task in late:
                task.cancel()


def signed(secret: str, id: str, body: bytes, timestamp: int) -> dict[str, str]:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }
