"""What `pip install` gives: a wheel, in an environment of its own, trains a recipe far from the checkout."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("armillary", "engine", "kernels", "models", "recipes", "csrc")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
STEPS = 10

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that the checkout stays as it is.

    The extension is compiled anew only where that of the checkout, which the same setup.py has compiled, is missing or
    older than its sources.
    """
    copy = tmp_path_factory.mktemp("sources")
    leave = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leave)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    compiled = ROOT / "armillary" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if compiled.exists():
        built = copy / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "armillary"
        built.mkdir(parents=True)
        shutil.copy2(compiled, built)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", copy / "dist", copy], check=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Python of an environment that holds the wheel and sees the dependencies of this one, but not the checkout."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    executable = place / "bin" / "python"
    paths = {"base": str(place), "platbase": str(place)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        executable,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    subprocess.run([*pip, wheel], check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    # Only now, or pip would take an installation there for this one. A plain path: the .pth files in there, such as that of an editable installation, are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def start(python, folder, *arguments):
    """Run Python in a folder far from the checkout, without what this process adds to its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [python, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_wheel_holds_every_module(wheel):
    held = {name.removeprefix("armillary/") for name in zipfile.ZipFile(wheel).namelist()}
    folders = ("engine", "kernels", "models", "recipes")
    wanted = {path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*.py")}
    assert wanted - held == set() and len(wanted) > 200
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine" / "explore" / "page").glob("**/*.*")}
    assert {name for name in page if "node_modules" not in name} - held == set() and len(page) > 10
    assert any(name.startswith("_C.") and name.endswith(".so") for name in held) and "py.typed" in held


def test_the_version_is_written_once(python, tmp_path):
    said = start(python, tmp_path, "-c", "import armillary, importlib.metadata as m; print(m.version('armillary'))")
    assert said.split()[-1] == start(python, tmp_path, "-m", "armillary.engine.cli", "--version").split()[-1]
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_a_recipe_trains_in_an_empty_folder(python, tmp_path):
    module = start(python, tmp_path, "-c", "import armillary; print(armillary.__file__)")
    assert str(ROOT) not in module
    simulate = ("-m", "armillary.engine.cli", "data", "simulate", "--out", "survey")
    start(python, tmp_path, *simulate, "--count", 90, "--size", 32, "--processes", 1, "--no-progress")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", 1, "--master_port", port)
    recipe = ("--module", "armillary.recipes.dinov2_vitl", "--preset", "smoke", "--device", "cpu")
    size = ("--train.steps", STEPS, "--train.global-batch", 16, "--train.micro-batch", 8)
    warmup = ("--schedule.learning-rate.warmup-steps", 2, "--schedule.teacher-temperature.warmup-steps", 4)
    start(python, tmp_path, *launcher, *recipe, *size, *warmup, "--data.path", "survey", "--name", "first")
    lines = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
