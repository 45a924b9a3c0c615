"""What the documentation points at is there."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:engine|models|kernels|tests|benchmarks|recipes|csrc)/[\w/.]+\.(?:py|cpp|h))`")
MODULE = re.compile(r"`(\w+\.py)`")


@functools.cache
def modules():
    """Names of the repository's Python files, wherever they lie."""
    folders = ("engine", "models", "kernels", "recipes", "tests", "benchmarks")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    links = [link for link in LINK.findall(text) if not link.startswith(("http://", "https://"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    missing += sorted({*MODULE.findall(text)} - modules())
    assert missing == []


def test_the_folders_of_the_readme_are_all_there():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| folder | what is in it |") :].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 15
    found = [name for name in named if any(ROOT.glob(name)) or any(ROOT.glob(f"engine/data/{name}"))]
    assert found == named


def test_the_site_is_built_without_a_warning(tmp_path):
    """Its pages; `make docs` builds the reference of all modules, too."""
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"ARMILLARY_DOCS": "pages", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    built = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changelog"} <= built
