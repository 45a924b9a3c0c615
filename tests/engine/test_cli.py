"""The `armillary` command: dispatch, help, errors, version."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import armillary
from armillary.engine import cli

HEAVY = ("torch", "pyarrow", "matplotlib", "astropy", "faiss", "sklearn", "h5py")
"""Packages that take a second or so to import, and that no help needs."""

CODE = """
import json, sys, time
from armillary.engine import cli
started = time.process_time()
told = []
for name in json.load(sys.stdin):
    begun = time.process_time()
    print("\\f")
    assert cli.main([*name.split(), "--help"]) == 0
    told.append([name, started + time.process_time() - begun, sorted(sys.modules)])
print(json.dumps(told), file=sys.stderr)
"""


def test_help_comes_at_once_and_imports_nothing_heavy():
    names = ["", *cli.COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(names), capture_output=True, text=True, check=True
    )
    texts = done.stdout.split("\f")[1:]
    for text, (name, took, modules) in zip(texts, json.loads(done.stderr), strict=True):
        assert (name or "data build") in text
        assert not set(HEAVY) & set(modules), name
        # Seconds of a processor: 0.2 to 0.5 where it has nothing else to do, with torch and pyarrow 3.
        assert took < 2, name


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "usage: armillary"),
        (["nothing"], 2, "no command 'nothing'"),
        (["data"], 2, "data simulate"),
        (["data", "burn"], 2, "no command 'data burn'"),
        (["version", "2"], 2, "no command 'version'"),
        (["export", "/nowhere", "-o", "x"], 2, "/nowhere: no such run or file"),
        (
            ["export", "/nowhere", "-o", "x", "--block-chunks", "2"],
            2,
            "block_chunks: must be 0 without --format dinov2, got 2",
        ),
        (["export"], 2, "Folder of the run"),
    ],
)
def test_bad_commands(words, code, message, capsys):
    assert cli.main(words) == code
    assert message in capsys.readouterr().err


def test_a_missing_part_takes_away_its_command_only(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "embed", ("armillary.no_such_part", "main", ""))
    assert cli.main(["embed"]) == 2
    assert "lacks armillary.no_such_part" in capsys.readouterr().err
    assert cli.main(["--version"]) == cli.main(["-h"]) == cli.main(["export", "--help"]) == 0


def test_the_extra_of_a_package_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    simulate = ["data", "simulate", "--out", str(tmp_path / "x"), "--count", "2", "--processes", "1", "--no-progress"]
    monkeypatch.setitem(sys.modules, "galsim", None)
    assert cli.main(simulate) == 2
    assert capsys.readouterr().err.endswith("simulated surveys need galsim: pip install 'armillary[sim]'\n")
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(cli.COMMANDS, "embed", ("galsim", "main", ""))
    assert cli.main(["embed"]) == 2
    assert capsys.readouterr().err == "armillary embed: this installation lacks galsim; pip install 'armillary[sim]'\n"


def test_help_has_no_line_breaks_of_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert cli.main(["data", "build", "--help"]) == 0
    assert "samples of train whose cutouts overlap one of the test split" in capsys.readouterr().out


def test_names_and_descriptions_are_apart(capsys):
    assert cli.main(["--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    names = [line.split("  ")[1] for line in lines]
    assert names == [*cli.COMMANDS, "version"] and all("  " in line.strip() for line in lines)


def test_a_package_that_a_command_needs_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "armillary.engine.data.inspect.leakage", None)
    assert cli.main(["data", "leaks", str(tmp_path)]) == 2
    assert "this installation lacks armillary.engine.data.inspect.leakage" in capsys.readouterr().err


def test_ctrl_c_and_no_memory_are_no_tracebacks(monkeypatch, capsys):
    for error, code, message in ((KeyboardInterrupt(), 130, "interrupted"), (MemoryError("4 TiB"), 2, "memory: 4 TiB")):

        def fail(run: int = 0, *, error=error) -> int:
            raise error

        monkeypatch.setattr("armillary.engine.hub.cli.export", fail)
        assert cli.main(["export"]) == code
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["version", "data kinds", "data"]
)  # print, rich, and standard error's reader lives on
def test_a_reader_that_leaves_is_no_error(words):
    command = f"{sys.executable} -m armillary.engine.cli {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == ("2\n" if words == "data" else "141\n") and "Error" not in done.stderr


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version(word, capsys):
    assert cli.main([word]) == 0
    assert capsys.readouterr().out == f"armillary {armillary.__version__}\n"


def test_the_citation_names_this_version():
    text = (Path(__file__).parents[2] / "CITATION.cff").read_text()
    assert f"\nversion: {armillary.__version__}\n" in text
