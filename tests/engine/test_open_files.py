"""A low limit of open files is raised as far as it may be, or said before work."""

import resource
import subprocess
import sys

import pytest

from armillary.engine.open_files import open_file_problems

FREE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "set_to"),
    [(256, FREE, 1024), (256, 4096, 1024), (256, 600, 600), (1024, 4096, None), (FREE, FREE, None), (700, 700, None)],
)
def test_a_limit_is_raised_as_far_as_it_is_needed(monkeypatch, soft, hard, set_to):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: found.append(limits))
    assert open_file_problems() == [] and found == ([] if set_to is None else [(set_to, hard)])


def test_a_command_that_may_open_too_few_says_so():
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    program += "from armillary.engine.cli import main; sys.exit(main(['data', 'kinds']))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "armillary data kinds: open files: a process must be allowed at least 512 at a time, got 64;"
    )
