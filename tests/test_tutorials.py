"""The cells of each tutorial run one after the other, in a process of their own, with a few steps in place of hundreds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = os.environ | {"TUTORIAL_STEPS": "2", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-c", text]  # as in a notebook, worker processes find no script to run again
    done = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorial" / "compared" / "report.html").is_file()
