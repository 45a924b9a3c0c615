"""What the shell completes, asked of a real bash."""

import subprocess

import pytest

from armillary.engine import cli
from armillary.engine.completion import script


def command(run: str, *, split: tuple[str, ...] = (), batch_size: int = 1) -> int:
    """A command."""
    return 0


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What a bash that knows two commands makes of words; the last one is being typed."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "completion").write_text(script({"embed": command, "data build": command, "data check": command}))
    (folder / "runs").mkdir()

    def ask(*words):
        typed = " ".join(f"'{w}'" for w in words)
        lines = [
            "source completion",
            f"COMP_WORDS=(armillary {typed})",
            f"COMP_CWORD={len(words)}",
            "_armillary",
            'echo "${COMPREPLY[@]}"',
        ]
        done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["e"], ["embed"]),
        ([""], ["embed", "data", "version"]),
        (["data", ""], ["build", "check"]),
        (["data", "c"], ["check"]),
        (["embed", "--"], ["--split", "--batch-size", "--help"]),
        (["data", "build", "--ba"], ["--batch-size"]),
        (["embed", "ru"], ["runs"]),
    ],
)
def test_the_tab_key(complete, words, found):
    assert complete(*words) == found


def test_every_command_has_its_options(capsys):
    assert cli.main(["completion", "bash"]) == 0
    said = capsys.readouterr().out
    assert '"data build") flags="--out' in said and "--compare" in said and "--tasks" in said
    assert subprocess.run(["bash", "-n"], input=said, text=True, capture_output=True).stderr == ""
