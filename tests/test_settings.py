"""Where settings come from: flags, then variables, then the file, then defaults; and what is said of bad ones."""

import inspect
import os
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from fulgurite.cli import app
from fulgurite.errors import FulguriteError
from fulgurite.settings import Settings, read_settings


@pytest.fixture
def file() -> Path:
    return Path(os.environ["FULGURITE_CONFIG"])


def test_flags_beat_variables_beat_the_file_beats_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().port == 8000
    file.write_text('port = 8001\nmodels = ["fulgurite/spark"]\n')
    assert read_settings().port == 8001
    assert read_settings().models == ("fulgurite/spark",)
    monkeypatch.setenv("FULGURITE_PORT", "8002")
    assert read_settings().port == 8002
    assert read_settings(port=8003).port == 8003


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 'http'", r"settings\.toml: port: .*integer"),
        ("prot = 80", r"settings\.toml: prot is no setting\. Did you mean port\? There are: .*port"),
        ("xyz = 80", r"settings\.toml: xyz is no setting\. There are: .*port"),
        ("port = ", r"settings\.toml is not TOML: Invalid value"),
        ("api_key = 'two words'", r"settings\.toml: api_key: (?!.*two words)"),
        ("host = ''", r"settings\.toml: host: "),
        ("home = ''", r"settings\.toml: home: a folder's path is not empty\."),
        ("cards = ''", r"settings\.toml: cards: a folder's path is not empty\."),
        ("home = '~nobody-here/x'", r"settings\.toml: home: '~nobody-here/x' begins with the home of a user"),
        ("home = 7", r"settings\.toml: home: .*path"),
        ("warm = ['a/b:21']", r"settings\.toml: warm: 'a/b:21': after the colon .* 1 to 20\."),
        ("[port]", r"settings\.toml: port: "),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(
    file: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FULGURITE_HOME")
    file.write_text(text)
    with pytest.raises(FulguriteError, match=said):
        read_settings()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FULGURITE_DEVISE", r"^FULGURITE_DEVISE is no setting\. Did you mean FULGURITE_DEVICE\? There are: FULG"),
        ("FULGURITE_CONFG", r"Did you mean FULGURITE_CONFIG\?"),
        ("FULGURITE_XYZ", r"^FULGURITE_XYZ is no setting\. There are: FULG"),
    ],
)
def test_a_variable_that_is_no_setting_is_an_error(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "cpu")
    with pytest.raises(FulguriteError, match=said):
        read_settings()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULGURITE_HOME")
    usual = read_settings()
    monkeypatch.setenv(f"FULGURITE_{name.upper()}", "")
    settings = read_settings()
    assert getattr(settings, name) == getattr(usual, name)
    assert settings.origin(name) == "default"


def test_an_empty_flag_is_an_error() -> None:
    for name in ("host", "home", "cards"):
        with pytest.raises(FulguriteError, match=f"^--{name}: "):
            read_settings(**{name: ""})


def test_folders_may_begin_with_the_users_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/zoe")
    monkeypatch.setenv("FULGURITE_HOME", "~/state")
    file.write_text("cards = '~/cards'")
    assert (read_settings().home, read_settings().cards) == (Path("/users/zoe/state"), Path("/users/zoe/cards"))
    assert read_settings(home=Path("~/flag")).home == Path("/users/zoe/flag")


@pytest.mark.parametrize("service", ["FULGURITE", "FULGURITE_DB"])
def test_where_services_of_kubernetes_are_is_no_setting(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pod finds in its environment where its namespace has such a Service."""
    of_service = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }
    for name, value in of_service.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    settings = read_settings()
    assert (settings.port, settings.origin("port")) == (8000, "default")
    assert read_settings(port=8003).port == 8003


def test_origins_are_those_of_when_settings_were_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("queue_size = 7\n")
    settings = read_settings(port=8003)
    file.unlink()
    monkeypatch.setenv("FULGURITE_HOST", "::1")
    origins = [settings.origin(name) for name in ("port", "queue_size", "host")]
    assert origins == ["--port", f"{file}: queue_size", "default"]


def test_a_file_that_is_named_must_be_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.unlink()
    with pytest.raises(FulguriteError, match=r"Cannot read the settings' file .*No such file"):
        read_settings()
    monkeypatch.delenv("FULGURITE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(file.parent / "empty"))
    assert read_settings().port == 8000


def test_the_command_shows_values_and_where_they_come_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("queue_size = 7\napi_key = 'hush-hush'\n")
    monkeypatch.setenv("FULGURITE_PORT", "8002")
    shown = CliRunner().invoke(app, ["settings"]).stdout
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert "8002" in rows["port"]
    assert "FULGURITE_PORT" in rows["port"]
    assert "7" in rows["queue_size"]
    assert str(file) in rows["queue_size"]
    assert "127.0.0.1" in rows["host"]
    assert "default" in rows["host"]
    assert "hush" not in shown
    assert shown.endswith(f"The settings' file {file} was read.\n")


def test_the_command_says_where_the_file_would_be(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FULGURITE_CONFIG")
    monkeypatch.setattr("fulgurite.settings.user_config_path", lambda _: file.parent / "usual")
    monkeypatch.setenv("FULGURITE_HOST", "a\nb\x1b[1m")
    shown = CliRunner().invoke(app, ["settings"]).stdout
    assert shown.endswith(f"The settings' file {file.parent / 'usual' / 'settings.toml'} is not there.\n")
    assert "a\\nb\\x1b[1m" in shown


def test_every_setting_has_a_flag_but_what_is_secret() -> None:
    [serve] = [command for command in app.registered_commands if command.callback.__name__ == "serve"]
    secret = {name for name, field in Settings.model_fields.items() if field.annotation == SecretStr | None}
    assert secret == {"api_key", "ledger", "webhook_secret"}
    assert set(inspect.signature(serve.callback).parameters) == set(Settings.model_fields) - secret
    result = CliRunner().invoke(app, ["serve", "--queue-size", "0"])
    assert (result.exit_code, result.stderr[:22]) == (1, "Error: --queue-size: I")
