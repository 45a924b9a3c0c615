"""Every command and call that the documentation shows is one that the program knows: names, options, values. Nothing is trained.

Commands on data, which need no training, are run by test_docs_examples, the code of notebooks by test_tutorials.
"""

import ast
import functools
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from armillary.engine import cli
from armillary.engine.config.run import Run
from armillary.engine.data.building import survey_recipe
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.train import checks, start
from armillary.models.method import Method

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/tutorials").glob("*.ipynb")),
    ROOT / "benchmarks/README.md",
]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"^!\s*(.*)$", re.MULTILINE)
START = re.compile(r"`((?:deepspeed|python|sbatch) (?:[^`\s]+ )*recipes/[a-z]\w*\.py [^`]*?)(?: \.\.\.)?`")
OF_THE_READER = {"train_colours.py", "recipes/NAME.py"}
LOOP = re.compile(r"(?:do )?\s*for (\w+) in (\S+).*")
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:armillary|deepspeed|torchrun|srun|sbatch|python|make|examples/\S+) .*")
PLACEHOLDERS = {
    "SEED": "0",
    "recipes/survey_X.py": "recipes/survey_cfhtls.py",
}


def text_of(page):
    """A page as Markdown; of a notebook the cells of text, and as blocks of shell the commands that its code hands to one."""
    if page.suffix == ".md":
        return page.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(page.read_text())["cells"]]
    return "\n\n".join(
        text if kind == "markdown" else "\n\n".join(f"```\n{line}\n```" for line in SHELL.findall(text))
        for kind, text in cells
    )


def prose(page):
    """A page without its blocks, in one line."""
    return re.sub(r"\s+", " ", BLOCK.sub("", text_of(page)))


def commands(block):
    """Commands of a block of shell: loops opened with their first value, continued lines joined, what follows dropped.

    In a block with prompts the other lines are what was printed.
    """
    values = {}
    lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        for part in re.split(r"; |&& ", re.split(r"\s+#|\s{2,}|\s>>", line.strip())[0]):
            if loop := LOOP.fullmatch(part.strip()):
                values[loop[1]] = loop[2]
                continue
            part = re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), part.strip().removeprefix("do "))
            if COMMAND.fullmatch(part):
                yield part


def shown():
    found = {}
    for page in PAGES:
        for language, block in BLOCK.findall(text_of(page)):
            for command in commands(block) if not language else ():
                found[f"{page.name}: {command}"] = command
        for command in START.findall(prose(page)):
            found[f"{page.name}, in the text: {command}"] = command
    return found


def blocks():
    return {
        f"{page.name}, block {number}": block
        for page in PAGES
        for number, (language, block) in enumerate(BLOCK.findall(text_of(page)))
        if language == "python"
    }


def words_of(command):
    """Words behind launchers: the program (armillary, make or a script), and its arguments."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    at = next(i for i, word in enumerate(words) if word in ("armillary", "make") or word.endswith(".py"))
    if words[at - 1 : at] == ["--module"]:
        assert words[0] == "deepspeed"
    return words[at], [word.split("|")[0] for word in words[at + 1 :]]


def knows(words, monkeypatch):
    """Parse a command of armillary with the command itself taken out."""
    if words == ["version"]:
        return
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS)
    place, function, _ = cli.COMMANDS[name]
    module, called = importlib.import_module(place), []
    real = getattr(module, function)
    monkeypatch.setattr(module, function, functools.wraps(real)(lambda *_, **__: called.append(name)))
    assert cli.main(words) == 0 and called


def starts(script, words, monkeypatch, tmp_path):
    """Start a recipe up to the point where its survey would be opened."""
    for option, value in zip(words, words[1:], strict=False):
        if option in ("--restore", "--init-from") and not value.startswith("hf:"):
            (tmp_path / value).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setattr(checks, "problems", lambda *_: [])
    monkeypatch.setattr(start, "run_to_exit_code", lambda *_, **__: 0)
    monkeypatch.setattr(start, "_plan", lambda *_: 0)
    monkeypatch.setattr(survey_recipe, "prepare", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


@pytest.mark.case(
    kind="documentation", inputs="every command of README, CONTRIBUTING and docs/", right="its options and names exist"
)
@pytest.mark.parametrize("command", shown().values(), ids=shown())
def test_commands_of_the_documentation_exist(command, monkeypatch, tmp_path, capsys):
    program, words = words_of(command)
    try:
        if program == "armillary":
            knows(words, monkeypatch)
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words if "=" not in word} <= {*targets}
        elif program.startswith("recipes/") and program != "recipes/NAME.py":
            starts(ROOT / program, words, monkeypatch, tmp_path)
        elif program.startswith("benchmarks/"):
            assert (ROOT / program).is_file()
        else:
            assert program in OF_THE_READER
    except (AssertionError, StopIteration) as error:
        raise AssertionError(capsys.readouterr()) from error


@pytest.mark.case(
    kind="documentation", inputs="every option in the text of README, CONTRIBUTING and docs/", right="it exists"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page, capsys):
    for words in (found.split() for found in re.findall(r"`armillary ([^`]*)`", prose(page))):
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS), None)
        assert name or words[0] in ("version", "data", "COMMAND"), words
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        if name and options:
            assert cli.main([*name.split(), "--help"]) == 0
            assert options <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), words


TAKEN = {"QuantityView": QuantityView, "Run": Run, "method": Method}
"""What blocks of Python take from those before them; `method` stands for an object of that class."""


@pytest.mark.case(
    kind="documentation", inputs="every block of Python in README and docs/", right="its imports and arguments exist"
)
@pytest.mark.parametrize("block", blocks().values(), ids=blocks())
def test_python_of_the_documentation(block):
    tree, names = ast.parse(block), dict(TAKEN)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("armillary."):
            exec(compile(ast.Module([node], []), "docs", "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        path = ast.unparse(call.func)
        head, *rest = path.split(".")
        if head not in names or not path.replace(".", "").isidentifier() or rest[:-1]:
            continue
        function = functools.reduce(getattr, rest, names[head])
        positional = [None] * (len(call.args) + (head == "method"))
        given = {keyword.arg: None for keyword in call.keywords}
        cut = any(isinstance(value, ast.Constant) and value.value is ... for value in call.args)
        signature = inspect.signature(function)
        (signature.bind_partial if cut else signature.bind)(*([] if cut else positional), **given)
