"""Several processes of one command: they wait for one another, and end with all that torch started in them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import time
from pathlib import Path
import torch
import typer
from accelerate import PartialState
from torch import nn
from fulgurite.cli_training import timed
from fulgurite.training.loop import Stage

folder, minutes = Path(sys.argv[1]), float(sys.argv[2])
save = torch.save

def slowly(*arguments):
    time.sleep(1)
    save(*arguments)

torch.save = slowly

def train(run):
    network = nn.Linear(3, 1)
    stage = Stage(folder, nn.ModuleDict({"one": network}), peak=0.1, steps=3, decay=0.9, run=run)
    while stage.step < 3:
        stage.update({"loss": network(torch.randn(8, 3)).square().mean()})

status = 0
try:
    with timed("cpu", minutes) as run:
        group = torch.distributed.group.WORLD
        print("patience", group._get_backend(torch.device("cpu")).options._timeout)
        del group
        train(run)
except typer.Exit as end:
    status = end.exit_code
print("saved", (folder / "checkpoint.pt").exists())
print("threads", sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("minutes", "status"), [(1, 0), (0, 3)])
def test_processes_end_together_and_leave_no_threads(tmp_path: Path, minutes: float, status: int) -> None:
    """Whether a stage is done or its time is up: the first still writes its checkpoint when the other is done."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "stage", str(minutes)],
            env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in both:
        told, _ = process.communicate(timeout=120)
        assert process.returncode == status
        assert "patience 1 day" in told
        assert "saved True" in told
        assert "gloo" not in told.split("threads")[1]
