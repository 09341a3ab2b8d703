"""What `deploy/` says agrees with the program, with itself and with docs/operating.md."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy import make_url
from typer.main import get_command

from fulgurite.cli import app
from fulgurite.ledger.database import with_driver
from fulgurite.settings import CONFIG, Settings, read_settings, variable

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MANUAL = (ROOT / "docs" / "operating.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVER, DATABASE = COMPOSE["services"]["server"], COMPOSE["services"]["database"]


def read_dockerfile() -> list[tuple[str, str]]:
    """Its instructions and what they say."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    split = (line.partition(" ") for line in "\n".join(lines).replace("\\\n", "").splitlines() if line)
    return [(instruction, said.strip()) for instruction, _, said in split]


DOCKERFILE = read_dockerfile()
IMAGE = dict(DOCKERFILE)  # of what is said once, or last
IMAGE_ENVIRONMENT = dict(pair.split("=", 1) for pair in shlex.split(IMAGE["ENV"]))


def read_unit() -> dict[str, list[str]]:
    unit: dict[str, list[str]] = {}
    for line in (DEPLOY / "fulgurite.service").read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            unit.setdefault(name, []).append(value)
    return unit


UNIT = read_unit()
UNIT_ENVIRONMENT = dict(pair.split("=", 1) for pair in UNIT["Environment"])


@pytest.mark.parametrize("file", ["Dockerfile", "compose.yaml", "fulgurite.service"])
def test_every_variable_is_a_setting(file: str) -> None:
    named = set(re.findall(r"FULGURITE_[A-Z_]+", (DEPLOY / file).read_text()))
    assert named
    assert named <= {CONFIG, *map(variable, Settings.model_fields)}


@pytest.mark.parametrize(
    "environment", [IMAGE_ENVIRONMENT, IMAGE_ENVIRONMENT | SERVER["environment"], UNIT_ENVIRONMENT]
)
def test_their_values_are_good(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_settings().home == Path("/var/lib/fulgurite")


@pytest.mark.parametrize(
    "line", [json.loads(IMAGE["ENTRYPOINT"]) + json.loads(IMAGE["CMD"]), shlex.split(UNIT["ExecStart"][0])]
)
def test_what_is_started_is_a_command_line_of_ours(line: list[str]) -> None:
    program, command, *arguments = line
    assert Path(program).name in PROJECT["scripts"]
    assert command == "serve"
    get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]


def seconds(span: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m|)", span).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "m" else 1)


@pytest.mark.parametrize(
    "span",
    [SERVER["stop_grace_period"], UNIT["TimeoutStopSec"][0], *re.findall(r"--stop-timeout (\S+)", MANUAL)],
)
def test_the_server_ends_by_itself_before_it_is_killed(span: str) -> None:
    assert seconds(span) > Settings().shutdown_seconds + 10  # for the ledger and webhooks


def test_the_ports_agree() -> None:
    (published,) = SERVER["ports"]
    inside = published.split(":")[-1]
    assert inside == IMAGE["EXPOSE"] == IMAGE_ENVIRONMENT["FULGURITE_PORT"]
    assert f"--publish {published}" in MANUAL


def test_state_and_models_are_in_volumes_and_folders_of_the_servers_own() -> None:
    folders = [IMAGE_ENVIRONMENT["FULGURITE_HOME"], IMAGE_ENVIRONMENT["HF_HOME"]]
    assert json.loads(IMAGE["VOLUME"]) == folders
    assert any(said.endswith(" ".join(folders)) for instruction, said in DOCKERFILE if instruction == "RUN")
    mounted = [volume.split(":") for volume in SERVER["volumes"]]
    assert [target for _, target in mounted] == folders
    assert {name for name, _ in mounted} < COMPOSE["volumes"].keys()
    assert [UNIT_ENVIRONMENT["FULGURITE_HOME"], UNIT_ENVIRONMENT["HF_HOME"]] == folders
    assert [f"/var/lib/{UNIT['StateDirectory'][0]}", f"/var/cache/{UNIT['CacheDirectory'][0]}"] == folders
    assert all(f":{folder}" in MANUAL for folder in folders)


def test_compose_has_the_ledger_in_its_own_database() -> None:
    url = with_driver(make_url(SERVER["environment"]["FULGURITE_LEDGER"]))
    assert COMPOSE["services"][url.host] is DATABASE
    assert url.username == DATABASE["environment"]["POSTGRES_USER"]
    assert url.database == DATABASE["environment"]["POSTGRES_DB"]
    assert SERVER["environment"]["PGPASSWORD"] == DATABASE["environment"]["POSTGRES_PASSWORD"]
    assert SERVER["environment"]["PGPASSWORD"].startswith("${POSTGRES_PASSWORD:?")  # never in the file
    assert DATABASE["healthcheck"]["test"][-2:] == [f"--username={url.username}", f"--dbname={url.database}"]
    assert SERVER["depends_on"]["database"]["condition"] == "service_healthy"


def test_what_the_image_is_built_from_is_there_and_not_ignored() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [said.split()[:-1] for instruction, said in DOCKERFILE if instruction == "COPY" and "--from" not in said]
    sources = {source for sources in copied for source in sources}
    assert sources == sent
    assert all((ROOT / source).exists() for source in sources)
    for file in (PROJECT["readme"], *PROJECT["license-files"]):  # without which the package cannot be built
        assert file.split("/")[0] in sources


def test_all_that_the_image_installs_is_in_the_lock() -> None:
    (asks,) = (said for instruction, said in DOCKERFILE if instruction == "RUN" and "tomllib" in said)
    program = re.search(r'python3 -c "(.*?)"', asks)
    assert program
    ran = subprocess.run([sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {canonicalize_name(Requirement(line).name) for line in ran.stdout.splitlines()}
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert "psycopg" in wanted
    assert wanted <= {line.partition("==")[0] for line in lock}


def healthy(port: int) -> bool:
    """What the image's health check finds of a server on this port."""
    command = json.loads(IMAGE["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[0] == "python"
    environment = {"FULGURITE_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}  # through which it must not ask
    return not subprocess.run([sys.executable, *command[1:]], env=environment, stderr=subprocess.DEVNULL).returncode


def test_the_health_check_tells_a_server_that_answers_from_one_that_does_not(address: str) -> None:
    assert healthy(int(address.rpartition(":")[2]))

    class Fails(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Fails) as failing:
        threading.Thread(target=failing.serve_forever).start()
        try:
            assert not healthy(failing.server_port)
        finally:
            failing.shutdown()
    assert not healthy(failing.server_port)  # where nobody listens now


def test_the_manual_installs_what_the_unit_starts() -> None:
    program = Path(UNIT["ExecStart"][0].split()[0])
    assert f"venv {program.parents[1]}" in MANUAL
    assert re.search(rf"useradd .* {UNIT['User'][0]}\n", MANUAL)
    assert f"EnvironmentFile={UNIT['EnvironmentFile'][0]}" in MANUAL


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "fulgurite.service"
    program = UNIT["ExecStart"][0].split()[0]  # it looks whether that is there
    unit.write_text((DEPLOY / unit.name).read_text().replace(program, sys.executable))
    said = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True).stderr
    assert [line for line in said.splitlines() if unit.name in line] == []  # of others' units it may complain, too
