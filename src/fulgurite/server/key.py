"""The one API key: from the environment, or made at first start, shown once and kept hashed."""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from fulgurite.errors import FulguriteError
from fulgurite.settings import Settings

KEY_FILE = "api_key.sha256"  # under the home


def hashed(key: bytes) -> str:
    # A key is 256 random bits: one round of SHA-256 is enough, unlike for a password.
    return hashlib.sha256(key).hexdigest()


def api_key(settings: Settings) -> tuple[str, str | None]:
    """The key's hash and, where it has just been made, the key itself, to be shown this once."""
    if settings.api_key:
        return hashed(settings.api_key.get_secret_value().encode()), None
    path = settings.home / KEY_FILE
    try:
        return (kept(path), None) if path.exists() else made(path)
    except OSError as error:
        raise FulguriteError(f"Cannot keep the API key in {path}: {error.strerror}. Set FULGURITE_HOME.") from None


def kept(path: Path) -> str:
    digest = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise FulguriteError(f"{path} holds no key's hash. Delete it, and the next start makes a new key.")
    return digest


def made(path: Path) -> tuple[str, str]:
    key = "fg-" + secrets.token_urlsafe(32)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(hashed(key.encode()) + "\n")
    return hashed(key.encode()), key


def matches(authorization: str, digest: str) -> bool:
    """Whether the header ``Bearer KEY`` carries the key, compared in constant time."""
    scheme, _, key = authorization.partition(" ")
    # Starlette reads headers as Latin-1: back to the bytes that were sent.
    return hmac.compare_digest(hashed(key.strip().encode("latin-1")), digest) and scheme.lower() == "bearer"
