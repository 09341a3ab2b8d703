"""Workers of the recipe end with the process that started them, whatever ends that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from fulgurite.training.workers import workers

SCRIPT = """
import os
import sys
import time
from pathlib import Path
from fulgurite.training.workers import workers

def work(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with workers(2) as pool:
        for job in [pool.submit(work, Path(sys.argv[1])) for _ in range(6)]:
            job.result()
"""


def alive(pid: int) -> bool:
    """Whether there is such a process, and not merely its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(met: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_who_started_them(tmp_path: Path, how: signal.Signals) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "begun"
    script.write_text(SCRIPT)
    folder.mkdir()
    with subprocess.Popen([sys.executable, script, folder]) as parent:
        until(lambda: len(list(folder.iterdir())) == 2)
        pids = [int(path.name) for path in folder.iterdir()]
        assert all(map(alive, pids))
        os.kill(parent.pid, how)
    until(lambda: not any(map(alive, pids)))


def test_what_is_not_begun_is_dropped_where_its_process_fails() -> None:
    """Else Ctrl-C would wait for all of it."""
    jobs: list[Future] = []

    def interrupted() -> None:
        with workers(1) as pool:
            jobs.extend(pool.submit(time.sleep, 0.2) for _ in range(100))
            jobs[0].result()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert jobs[-1].cancelled()
