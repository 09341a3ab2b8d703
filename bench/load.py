"""What it takes to load a full-size SDXL UNet: seconds, and memory, split into mapped pages and the process's own.

Writes 5 GB of random weights into a temporary folder, then loads them in a fresh process. Linux only.

    python bench/load.py [--dtype float16] [--folder /tmp]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fulgurite.cards import card
from fulgurite.models import UNet
from fulgurite.weights.load import load_unet

CARD = card("bytedance/stable-diffusion-xl-lightning")


def write(path: Path) -> None:
    """A UNet's file with the names, shapes and kind of the published ones."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet(CARD.unet).state_dict().items()}
    noise = torch.randn(max(shape.numel() for shape in shapes.values())).half()
    save_file({name: noise[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}, path)


def memory() -> dict[str, float]:
    """This process's resident memory in GB: its own pages, those mapped from files, and the most there ever were."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"own": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {key: round(int(fields[name].split()[0]) * 1024 / 1e9, 2) for key, name in names.items()}


def measure(path: Path, dtype: torch.dtype) -> None:
    """Prints one JSON line: memory and seconds before loading, loaded, and when every weight has been used once."""
    report: dict[str, object] = {"before": memory()}
    started = time.perf_counter()
    network = load_unet(path, CARD, "cpu", dtype)
    report["load_seconds"] = round(time.perf_counter() - started, 2)
    report["loaded"] = memory()
    started = time.perf_counter()
    for parameter in network.parameters():
        parameter.max()
    report["first_use_seconds"] = round(time.perf_counter() - started, 2)
    report["used"] = memory()
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", help="of the loaded network; the file is float16")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--file", type=Path, help="measure this file, here and now")
    arguments = parser.parse_args()
    if arguments.file:
        measure(arguments.file, getattr(torch, arguments.dtype))
        return
    if shutil.disk_usage(arguments.folder).free < 7e9:
        sys.exit(f"{arguments.folder} has less than 7 GB free: name another with --folder.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "unet.safetensors"
        write(path)
        subprocess.run([sys.executable, __file__, "--file", path, "--dtype", arguments.dtype], check=True)


if __name__ == "__main__":
    main()
