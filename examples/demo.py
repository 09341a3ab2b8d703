"""What `make demo` runs: starts the server, sends it the hosted API's published request, shows what came back."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

CLIENT = Path(__file__).with_name("client.py")
START_SECONDS = 120  # the first import of torch from a cold disk can take most of a minute


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("The server did not start: see its output above.")
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    sys.exit(f"The server did not answer within {START_SECONDS} seconds.")


def main() -> None:
    url, key = f"http://127.0.0.1:{free_port()}", secrets.token_urlsafe(16)
    # With none of the user's own settings, and a ledger that is gone at the end.
    usual = {name: value for name, value in os.environ.items() if not name.startswith("FULGURITE_")}
    command = [sys.executable, "-m", "fulgurite", "serve", "--demo", "--port", url.rpartition(":")[2]]
    print("Starting the server:", " ".join(["fulgurite", *command[3:]]), flush=True)
    home = tempfile.TemporaryDirectory()
    own = {"FULGURITE_API_KEY": key, "FULGURITE_HOME": home.name, "FULGURITE_CONFIG": os.devnull}
    server = subprocess.Popen(command, env=usual | own)
    try:
        wait_until_up(url, server)
        print(f"Sending the hosted API's published request: {CLIENT.name}, with URL and key changed", flush=True)
        started = time.monotonic()
        client = subprocess.run([sys.executable, CLIENT], env=os.environ | {"API_URL": f"{url}/api/v1", "API_KEY": key})
        seconds = time.monotonic() - started
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        home.cleanup()
    if client.returncode:
        sys.exit("The request failed.")

    # The picture remembers how it was made.
    with Image.open("output.png") as picture:
        made = dict(re.findall(r"(Steps|Model): ([^,]+)", str(picture.info["parameters"]).splitlines()[-1]))
    print(f"""
  picture   {Path("output.png").resolve()}
  seconds   {seconds:.1f}
  steps     {made["Steps"]}
  model     {made["Model"]}

Next:
  .venv/bin/fulgurite generate "a red rocket on a blue background" -o rocket.png
  .venv/bin/fulgurite serve --demo
  .venv/bin/fulgurite pull bytedance/stable-diffusion-xl-lightning""")


if __name__ == "__main__":
    main()
