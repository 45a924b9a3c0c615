"""The cells of each tutorial run one after the other, in a process of their own, with a few steps in place of hundreds."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.ipynb"))}
FIRST = {"evaluate_report": "own_survey_search", "new_method": "own_survey_search"}
"""What a tutorial says has to be run before it."""

MADE = {
    "survey_encoder_labels": "compared/report.html",
    "photometry_table": "redshifts.parquet",
    "own_survey_search": "like.png",
    "evaluate_report": "evaluation/report.html",
    "new_method": "beside/report.html",
}
"""The last thing that a tutorial writes."""


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """Runs a tutorial, after the one that it needs; once, since several need the same. They share a folder."""
    folder = tmp_path_factory.mktemp("tutorials")
    small = {"TUTORIAL_STEPS": "2", "TUTORIAL_GALAXIES": "300", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}

    @cache
    def run(name):
        if name in FIRST:
            run(FIRST[name])
        text = "\n\n".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code")
        python = [sys.executable, "-c", text]  # as in a notebook, worker processes find no script to run again
        done = subprocess.run(python, cwd=folder, env=os.environ | small, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder / "tutorial"

    return run


def cells(name):
    """Cells of a notebook."""
    return json.loads(NOTEBOOKS[name].read_text())["cells"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_runs(name, run_once):
    assert (run_once(name) / MADE[name]).is_file()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_tutorial_says_what_it_takes_links_to_what_is_there_and_holds_no_outputs(name):
    text = "\n".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "markdown")
    assert not [link for link in re.findall(r"\]\(([^):#]+)", text) if not (NOTEBOOKS[name].parent / link).exists()]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells(name))
    head = "".join(cells(name)[0]["source"])
    assert all(word in head for word in ("minute", "memory", "disk")), "its first cell says what it takes"
