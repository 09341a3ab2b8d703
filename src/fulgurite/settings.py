"""One frozen settings object, read once: flags, then ``FULGURITE_*`` variables, then a TOML file, then defaults."""

import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_config_path, user_data_path
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, SettingsConfigDict

from fulgurite.errors import FulguriteError

PREFIX = "FULGURITE_"
CONFIG = PREFIX + "CONFIG"  # the file's path, where it is not the usual one


def settings_file() -> Path:
    """Where the settings' file is, or would be."""
    return Path(os.environ.get(CONFIG) or user_config_path("fulgurite") / "settings.toml")


def in_file() -> dict[str, Any]:
    """What the file says; nothing, where there is none and none was named. Raises FulguriteError."""
    file = settings_file()
    if not file.exists() and not os.environ.get(CONFIG):
        return {}
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise FulguriteError(f"Cannot read the settings' file {file}: {error.strerror}.") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise FulguriteError(f"{file} is not TOML: {error}.") from None


class Settings(BaseSettings):
    """How this program runs on this machine."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    home: Path = Field(default_factory=lambda: user_data_path("fulgurite"))  # where state lives
    api_key: SecretStr | None = None  # a key for yourself; None: the ledger's, of which the first start makes one
    ledger: SecretStr | None = None  # a database's URL, which may hold a password; None: ledger.db under home
    keep_seconds: int = Field(86_400, ge=60, le=30 * 86_400)  # how long answers are kept for retries
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    cards: Path | None = None  # a folder with the cards of your own models; docs/training.md
    models: Annotated[tuple[str, ...], NoDecode] = ()  # ids served, separated by commas; none: all there are
    fast_decoder: Annotated[tuple[str, ...], NoDecode] = ()  # ids whose fast decoder is used unless a request says not
    warm: Annotated[tuple[str, ...], NoDecode] = ()  # MODEL or MODEL:STEPS, drawn once before the server answers
    demo: bool = False  # the embedded model answers for SDXL-Lightning
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto": a GPU where there is one
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"] = "auto"  # docs/engine.md
    queue_size: int = Field(64, ge=1)  # pictures waiting, past which the server says 503
    deadline_seconds: float = Field(3600, gt=0)  # within which a picture is made, or else refused or given up
    hang_seconds: float = Field(600, gt=0)  # that one step may take before the device is taken for dead
    exact: bool = True  # a picture is the same to the bit whoever shares its batch; docs/engine.md: what that costs
    triton_kernels: bool = False  # hand-written ones, on a GPU; no GPU has measured them yet
    cuda_graphs: bool = False  # all of a step's kernels launched at once, on a GPU; no GPU has measured it yet
    unet_gb: float | None = Field(None, gt=0)  # that UNets may fill before one goes; None: half the device's memory
    max_body_bytes: int = Field(1 << 20, ge=1 << 10)
    webhook_secret: SecretStr | None = None  # of which keys' own are made; None: one is made, under home
    webhook_private: bool = False  # webhooks may go to addresses of this machine and of private networks
    shutdown_seconds: int = Field(30, ge=0, le=3600)  # that pictures being made are given when the server stops

    _flags: frozenset[str] = frozenset()  # names of those that flags gave

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: Any, env_settings: Any, *_: Any, **__: Any
    ) -> Any:
        return init_settings, env_settings, InitSettingsSource(settings_cls, in_file())

    @field_validator("models", "fast_decoder", "warm", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("warm")
    @classmethod
    def _with_steps(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for wanted in value:
            model_and_steps(wanted)
        return value

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value() if value else "unset"
        if not (key.isascii() and key.isprintable() and " " not in key and key):
            raise ValueError("a key is printable ASCII without spaces, so that it can be sent in a header")
        return value

    def usual_decoder(self, model: str) -> Literal["full", "fast"]:
        """Of requests that name none."""
        return "fast" if model in self.fast_decoder else "full"

    def origin(self, name: str) -> str:
        """Where a setting's value comes from."""
        return origin(name, self._flags)


def model_and_steps(wanted: str) -> tuple[str, int | None]:
    """What ``MODEL`` or ``MODEL:STEPS`` names. Raises ValueError."""
    model, colon, steps = wanted.partition(":")
    if colon and not (steps.isdecimal() and 1 <= int(steps) <= 20):
        raise ValueError(f"{wanted!r}: after the colon stands the most steps to spend, 1 to 20")
    return model, int(steps) if steps else None


def read_settings(**flags: Any) -> Settings:
    """The settings in force. Flags that are None were not given. Raises FulguriteError naming what is wrong."""
    known = {CONFIG} | {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = [name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known]
    if unknown:
        raise FulguriteError(f"{unknown[0]} is no setting. There are: {', '.join(sorted(known))}.")
    strangers = [name for name in in_file() if name not in Settings.model_fields]
    if strangers:
        raise FulguriteError(
            f"{settings_file()}: {strangers[0]} is no setting. There are: {', '.join(sorted(Settings.model_fields))}."
        )
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise FulguriteError(f"{origin(name, given)}: {first['msg'].removeprefix('Value error, ')}.") from None
    settings._flags = frozenset(given)
    return settings


def origin(name: str, flags: Collection[str]) -> str:
    """Where a setting's value comes from: a flag, a variable, the file, or the default."""
    if name in flags:
        return f"--{name.replace('_', '-')}"
    if PREFIX + name.upper() in (variable.upper() for variable in os.environ):
        return PREFIX + name.upper()
    return f"{settings_file()}: {name}" if name in in_file() else "default"
