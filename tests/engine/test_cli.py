"""The `armillary` command: dispatch, help, errors."""

import subprocess
import sys

import pytest

from armillary.engine import cli


def test_help_is_fast_and_needs_no_part():
    code = "import sys; from armillary.engine import cli; cli.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "data build" in done.stdout and done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "usage: armillary"),
        (["nothing"], 2, "no command 'nothing'"),
        (["data"], 2, "data simulate"),
        (["data", "burn"], 2, "no command 'data burn'"),
        (["export", "/nowhere", "-o", "x"], 2, "/nowhere: no such run or file"),
        (["export", "/nowhere", "-o", "x", "--block-chunks", "2"], 2, "block_chunks: only with --format dinov2"),
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
