"""Worker processes that cannot start: a clear error soon, never a wait."""

import multiprocessing.synchronize
import os
import subprocess
import sys
import textwrap

import pytest

from armillary.engine.data.building.workers import Workers

LARGE = 100_000  # numbers of 8 bytes: more than the 65,536 bytes that a pipe holds

SCRIPT = """
    import sys

    import numpy as np
    from armillary.engine.data.building.build import build
    from armillary.engine.data.sources.source import Sample

    class Made:
        bands, pixel_scale_arcsec, unit, labels = ("g",), None, "count", {}

        def __init__(self):
            self.large = np.zeros(int(sys.argv[2]))

        def __len__(self):
            return 20

        def __setstate__(self, state):
            BROKEN
            self.__dict__ |= state

        def read(self, index):
            image = np.random.default_rng(index).normal(size=(1, 8, 8)).astype(np.float32)
            return Sample(f"k{index}", image, None, 1.0, 2.0, {}, "made")

    GUARD
        build(Made(), sys.argv[1], name="made", processes=2, progress=False)
"""


def run(tmp_path, values: int, guard: str, broken: str = "pass") -> subprocess.CompletedProcess:
    """The script, started in a process of its own; one that hangs fails after two minutes."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).replace("GUARD", guard).replace("BROKEN", broken))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out"), str(values)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_build_starts_without_what_it_does_not_need():
    """Each worker process imports what a build imports: torch alone takes two seconds."""
    code = "import sys; import armillary.engine.data.building.build; assert 'torch' not in sys.modules"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_a_script_without_a_guard_is_told_so(tmp_path):
    done = run(tmp_path, LARGE, "if True:")
    said = done.stderr.strip().splitlines()[-1] if done.returncode == 1 else done.stderr
    assert said.startswith("RuntimeError: the worker processes died as they started"), done.stderr
    assert said.endswith('put the call that builds below `if __name__ == "__main__":` in the script that was started')
    assert "RuntimeError: this worker process came to the call that started it; put" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_that_workers_cannot_read_is_an_error_too(tmp_path):
    guard = 'if __name__ == "__main__":'
    done = run(tmp_path, 10, guard, 'raise OSError("no such volume")')
    assert done.returncode == 1 and "the worker processes died as they started" in done.stderr
    assert "OSError: no such volume" in done.stderr


@pytest.mark.slow
def test_a_large_source_reaches_the_workers(tmp_path):
    done = run(tmp_path, LARGE, 'if __name__ == "__main__":')
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("test"))[:2] == [
        "catalog.parquet",
        "survey.json",
    ]


def test_processes_that_cannot_share_locks_say_where_these_lie(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(
        OSError, match=r"processes: 2 cannot share locks, which lie in /dev/shm .*; make room there, or take 1"
    ):
        with Workers(object(), 2, tmp_path):
            pass
    assert not list(tmp_path.iterdir())
