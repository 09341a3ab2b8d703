"""One frozen settings object, read once: flags, then ``FULGURITE_*`` variables, then a TOML file, then defaults."""

import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_config_path, user_data_path
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from fulgurite.errors import FulguriteError
from fulgurite.parameters import MOST_STEPS

PREFIX = "FULGURITE_"
LEAST_SECRET = 16  # characters, or bytes, of a secret that signs
CONFIG = PREFIX + "CONFIG"  # the file's path, where it is not the usual one
DEMO = {"bytedance/stable-diffusion-xl-lightning": "fulgurite/spark-lightning"}  # who answers for whom

# Kubernetes tells every pod of a namespace where its Services are. What it says of one called "fulgurite" begins as our
# own variables do, and FULGURITE_PORT, which it makes a URL, has even the name of a setting. None of it is for us.
OF_KUBERNETES = re.compile(
    PREFIX + r"(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=|PORT_\d+_(TCP|UDP|SCTP)|PORT=(tcp|udp|sctp)://)"
)


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


def in_environment() -> dict[str, str]:
    """What our variables say, by the settings' names. Empty ones say nothing: .env files are full of them."""
    ours = {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in ours.items()
        if value and name != CONFIG and not OF_KUBERNETES.match(f"{name}={value}")
    }


def variable(name: str) -> str:
    """What a setting is called in the environment."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """What a setting is called on the command line, where each model has a flag of its own."""
    return "--model" if name == "models" else f"--{name.replace('_', '-')}"


class Settings(BaseModel):
    """How this program runs on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(default_factory=lambda: user_data_path("fulgurite"))  # where state lives
    api_key: SecretStr | None = None  # a key for yourself; None: the ledger's, of which the first start makes one
    ledger: SecretStr | None = None  # a database's URL, which may hold a password; None: ledger.db under home
    keep_seconds: int = Field(86_400, ge=60, le=30 * 86_400)  # how long answers are kept for retries
    host: str = Field("127.0.0.1", min_length=1)  # an empty one would be every interface
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    cards: Path | None = None  # a folder with the cards of your own models; docs/cards.md
    models: tuple[str, ...] = ()  # ids served, separated by commas; none: all there are
    fast_decoder: tuple[str, ...] = ()  # ids whose fast decoder is used unless a request says not
    warm: tuple[str, ...] = ()  # MODEL or MODEL:STEPS, drawn once before the server answers
    demo: bool = False  # the embedded model answers for SDXL-Lightning
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; "auto": CUDA's GPU, else the CPU
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"] = "auto"  # docs/engine.md
    queue_size: int = Field(64, ge=1)  # pictures waiting, past which the server says 503
    replicas: int | None = Field(None, ge=1)  # engines on a Ray cluster, a GPU each; None: one in this process
    deadline_seconds: float = Field(3600, gt=0)  # within which a picture is made, or else refused or given up
    hang_seconds: float = Field(600, gt=0)  # that one stage, such as a step, may take before the device counts as hung
    exact: bool = True  # a picture is the same to the bit whoever shares its batch; docs/engine.md: what that costs
    triton_kernels: bool | None = None  # hand-written ones, on an NVIDIA GPU; None: where they can run
    cuda_graphs: bool | None = None  # a network's kernels launched at once, on an NVIDIA GPU; None: there, yes
    unet_gb: float | None = Field(None, gt=0)  # that UNets may fill before one goes; None: half the device's memory
    max_body_bytes: int = Field(1 << 20, ge=1 << 10)
    webhook_secret: SecretStr | None = None  # of which keys' own are made; None: one is made, under home
    webhook_private: bool = False  # webhooks may go to addresses of this machine and of private networks
    shutdown_seconds: int = Field(30, ge=0, le=3600)  # that pictures being made are given when the server stops

    _origins: dict[str, str] = {}  # of those that are not the default

    @field_validator("home", "cards", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        if value == "":  # which a path would take for the current folder
            raise ValueError("a folder's path is not empty")
        try:
            return Path(value).expanduser() if isinstance(value, (str, Path)) else value
        except RuntimeError:
            raise ValueError(f"{str(value)!r} begins with the home of a user that this machine does not know") from None

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

    @field_validator("webhook_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().strip()) < LEAST_SECRET:
            raise ValueError(f"a secret has {LEAST_SECRET} characters or more")
        return value

    def usual_decoder(self, model: str) -> Literal["full", "fast"]:
        """Of requests that name none."""
        return "fast" if model in self.fast_decoder else "full"

    def drawn_by(self, model: str) -> str:
        """The model that draws what a model is asked for: itself, but in a demonstration."""
        return DEMO.get(model, model) if self.demo else model

    def warm_checkpoints(self) -> list[tuple[str, int]]:
        """The models, and the most steps to spend, that are drawn with once before the server answers."""
        named = map(model_and_steps, self.warm)
        return [(self.drawn_by(model), steps or MOST_STEPS) for model, steps in named]

    def origin(self, name: str) -> str:
        """Where a setting's value comes from: a flag, a variable, the file, or the default."""
        return self._origins.get(name, "default")


def model_and_steps(wanted: str) -> tuple[str, int | None]:
    """What ``MODEL`` or ``MODEL:STEPS`` names. Raises ValueError."""
    model, colon, steps = wanted.partition(":")
    if colon and not (steps.isdecimal() and 1 <= int(steps) <= MOST_STEPS):
        raise ValueError(f"{wanted!r}: after the colon stands the most steps to spend, 1 to {MOST_STEPS}")
    return model, int(steps) if steps else None


def read_settings(**flags: Any) -> Settings:
    """The settings in force. Flags that are None were not given. Raises FulguriteError naming what is wrong."""
    variables = in_environment()
    refuse_unknown(variables, {*Settings.model_fields, "config"}, variable)
    file, path = in_file(), settings_file()
    refuse_unknown(file, Settings.model_fields, str, f"{path}: ")
    given = {name: value for name, value in flags.items() if value is not None}
    origins = {name: f"{path}: {name}" for name in file}
    origins |= {name: variable(name) for name in variables}
    origins |= {name: flag(name) for name in given}
    try:
        settings = Settings(**file | variables | given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise FulguriteError(f"{origins[name]}: {first['msg'].removeprefix('Value error, ')}.") from None
    settings._origins = origins
    return settings


def refuse_unknown(
    names: Iterable[str], known: Collection[str], spelled: Callable[[str], str], where: str = ""
) -> None:
    """Raises FulguriteError where one of the names is no setting's; it says which may be meant."""
    for name in names:
        if name not in known:
            meant = "".join(f" Did you mean {spelled(near)}?" for near in get_close_matches(name, known, n=1))
            there_are = ", ".join(map(spelled, sorted(known)))
            raise FulguriteError(f"{where}{spelled(name)} is no setting.{meant} There are: {there_are}.")
