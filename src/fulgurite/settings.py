"""One frozen settings object, read once: flags first, then ``FULGURITE_*`` variables, then defaults."""

import os
from pathlib import Path
from typing import Annotated, Any

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fulgurite.errors import FulguriteError

PREFIX = "FULGURITE_"


class Settings(BaseSettings):
    """How this program runs on this machine."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    home: Path = Field(default_factory=lambda: user_data_path("fulgurite"))  # where state lives
    api_key: SecretStr | None = None  # a key for yourself; None: the ledger's, of which the first start makes one
    ledger: SecretStr | None = None  # a database's URL, which may hold a password; None: ledger.db under home
    keep_seconds: int = Field(86_400, ge=60, le=30 * 86_400)  # how long answers are kept for retries
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    models: Annotated[tuple[str, ...], NoDecode] = ()  # ids served, separated by commas; none: all there are
    demo: bool = False  # the embedded model answers for SDXL-Lightning
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto": a GPU where there is one
    queue_size: int = Field(64, ge=1)  # pictures waiting, past which the server says 503
    max_body_bytes: int = Field(1 << 20, ge=1 << 10)

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value() if value else "unset"
        if not (key.isascii() and key.isprintable() and " " not in key and key):
            raise ValueError("a key is printable ASCII without spaces, so that it can be sent in a header")
        return value


def read_settings(**flags: Any) -> Settings:
    """The settings in force. Flags that are None were not given. Raises FulguriteError naming what is wrong."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = [name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known]
    if unknown:
        raise FulguriteError(f"{unknown[0]} is no setting. There are: {', '.join(sorted(known))}.")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise FulguriteError(f"{'--' + name if name in given else PREFIX + name.upper()}: {first['msg']}.") from None
