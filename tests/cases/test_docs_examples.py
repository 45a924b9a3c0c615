"""The commands on data that README and docs show, run as they stand there on small inputs."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from case_files import cutouts, run

ROOT = Path(__file__).parents[2]
TEXTS = {page: (ROOT / page).read_text() for page in ("README.md", "docs/data.md")}
SMALL = {
    "data simulate": ["--count", "12", "--no-progress", "--processes", "1"],
    "data simulate-photometry": ["--count", "12", "--no-progress", "--processes", "1"],
    "data build": ["--no-progress", "--processes", "1"],
    "data export": ["--no-progress"],
}
BLOCK = re.compile(r"```(?:\w*)\n(.*?)```", re.DOTALL)
OPTION = re.compile(r"`(--[a-z][a-z-]*(?: [^`]*)?)`")


def examples():
    """Commands `armillary data ...` of all blocks of code, and of the text of docs/data.md."""
    found = {}
    for page, text in TEXTS.items():
        lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
        inline = re.findall(r"`(armillary data [^`]*)`", re.sub(r"\s+", " ", BLOCK.sub("", text)))
        lines += [line for line in inline if "SURVEY" in line]  # others are parts of commands
        for line in lines:
            command = re.split(r"\s+#|\s{2,}", line.strip())[0]
            if "--kind bricks" in command:  # test_northern_bricks runs it
                continue
            if command.startswith("armillary data ") and len(command.split()) > 3 or command == "armillary data kinds":
                found[f"{page}: {command}"] = command
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the examples name: files, a survey of them, positions."""
    root = tmp_path_factory.mktemp("docs")
    for i in range(30):
        cutouts(root / "SOURCE" / f"{i}", 1, ra=10.0 * i, dec=1.0 + i)
    assert run("data", "build", root / "SOURCE", "-o", root / "SURVEY", "--no-progress", "--processes", "1") == 0
    assert run("data", "export", root / "SURVEY", "-o", root / "EXPORT", "--format", "fits", "--no-progress") == 0
    rows = "".join(f"{2**60 + i},{20 + i / 9},{19 + i / 9},{18 + i / 9}\n" for i in range(9))
    (root / "CATALOGUE").write_text(f"objid,mag_g,mag_r,mag_z\n{rows}")
    return root


@pytest.mark.case(
    kind="documentation", inputs="every `armillary data` command of README and docs/data.md", right="it runs"
)
@pytest.mark.parametrize("command", examples().values(), ids=examples())
def test_commands_of_the_documentation_run(place, tmp_path, monkeypatch, capsys, command):
    for form in ("fits", "hdf5", "parquet") if "fits|hdf5|parquet" in command else ("",):
        words = shlex.split(command.replace("fits|hdf5|parquet", form))[1:]
        name = " ".join(words[:2])
        monkeypatch.chdir(tmp_path)
        out = words.index("-o") + 1 if "-o" in words else words.index("--out") + 1 if "--out" in words else None
        if out is not None and (name != "data show" and name != "data stats"):
            words[out] = f"{tmp_path}/made{form}"
        words = [str(place / word) if word in ("SOURCE", "SURVEY", "CATALOGUE", "EXPORT") else word for word in words]
        code = run(*words, *SMALL.get(name, []))
        assert code in ((0, 1) if name == "data leaks" else (0,)), capsys.readouterr().err


@pytest.mark.case(
    kind="documentation", inputs="every option of `data build` that docs/data.md names", right="it exists"
)
def test_options_of_the_documentation_exist(capsys):
    assert run("data", "build", "--help") == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    section = TEXTS["docs/data.md"]
    section = section[section.index("**Labels.**") : section.index("## Survey recipes")]
    named = {option.split()[0] for option in OPTION.findall(section)} - {"--radius-arcsec", "--identifiers"}
    assert len(named) > 8 and named <= known


@pytest.mark.case(kind="documentation", inputs="the survey recipe of docs/data.md", right="its record can be made")
def test_the_survey_recipe_of_the_documentation():
    blocks = [block for block in BLOCK.findall(TEXTS["docs/data.md"]) if "Preparation(" in block]
    assert len(blocks) == 1
    ast.parse(blocks[0])
    made = {"__name__": "docs"}
    exec(blocks[0], made)
    problems = made["SURVEY"].problems()
    assert problems and all(".path: must be an existing file or folder" in problem for problem in problems)
