"""A PostgreSQL of our own for the tests, from the system's packages, on a socket in a temporary folder."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nonexistent"))


def user() -> pwd.struct_passwd:
    """Who runs it: PostgreSQL refuses root, and its package brings a user. Raises KeyError where there is none."""
    return pwd.getpwuid(os.getuid()) if os.getuid() else pwd.getpwnam("postgres")


def missing() -> str | None:
    """Why there is no PostgreSQL to test with; None where there is one."""
    if not (BINARIES / "initdb").exists():
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    try:
        user()
    except KeyError:
        return "there is no user to run PostgreSQL as"
    return None


@contextmanager
def postgresql() -> Iterator[str]:
    """Runs it; gives a URL to which a database's name is added."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    owner = user()
    shutil.chown(folder, owner.pw_name)

    def run(*command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "cwd": folder}
        as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
        subprocess.run([str(BINARIES / command[0]), *command[1:]], check=True, **quiet, **as_user)

    data = str(folder / "data")
    try:
        run("initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--no-locale", "-E", "UTF8")
        run(
            "pg_ctl",
            "-D",
            data,
            "-w",
            "-o",
            f"-F -c listen_addresses='' -k {folder}",
            "-l",
            str(folder / "log"),
            "start",
        )
        try:
            yield f"postgresql://postgres@/{{}}?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
