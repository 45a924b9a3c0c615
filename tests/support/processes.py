"""Starts commands and recipes as a user does: the `armillary` command, and recipes under the deepspeed launcher."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def armillary(*arguments):
    """Command line of `armillary`."""
    return [sys.executable, "-m", "armillary.engine.cli", *map(str, arguments)]


def recipe(*arguments, ranks=2, name="dinov2_vitl"):
    """Command line of a recipe under the launcher."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        port,
    ]
    return [*launcher, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]


def start(command):
    """Start a command in a session of its own, its output into one pipe."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def kill(process):
    """SIGKILL the command and everything it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(command, code=0):
    """Run a command to its end; returns what it said."""
    process = start(command)
    said, _ = process.communicate()
    assert process.returncode == code, f"{' '.join(command)}\nexit code {process.returncode}\n{said[-4000:]}"
    return said
