"""Each case is a test marked `case(kind, inputs, right)`; `--table` prints what came of them, as `make cases` does.

A case is a kind of fault that somebody ran into: which inputs, and the right value or error. A file of cases a part of the
program; any test with the mark is in the table.
"""

import logging

import pytest
from case_files import Built, build_words, run

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="print a table of the cases")


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("case")
    if mark is not None and (report.when == "call" or report.failed):
        item.config.stash.setdefault(RESULTS, []).append((*mark.kwargs.values(), report.outcome))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--table", default=False):
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "inputs", "right value or error", "", show_lines=True)
    rows = list(dict.fromkeys(config.stash[RESULTS]))
    for kind, inputs, right, outcome in sorted(rows):
        table.add_row(kind, inputs, right, "[green]right" if outcome == "passed" else f"[red]{outcome}")
    Console(width=150).print(table)
    wrong = sum(outcome != "passed" for *_, outcome in rows)
    terminalreporter.write_line(f"{len(rows)} cases, {wrong} wrong")


@pytest.fixture
def build(tmp_path, capsys, caplog):
    """`armillary data build` in this process: its exit code, what it printed and logged, and the survey."""

    def build_survey(source, *words, name="survey"):
        caplog.clear()
        caplog.set_level(logging.WARNING)
        code = run(*build_words(source, tmp_path / "surveys" / name, *words))
        printed = capsys.readouterr()
        return Built(code, printed.out, printed.err + caplog.text, tmp_path / "surveys" / name)

    return build_survey


@pytest.fixture
def refused(build):
    """A build that ends with exit code 2, a message and no traceback; gives the message."""

    def refuse(source, *words):
        found = build(source, *words, name="refused")
        assert found.code == 2 and "Traceback" not in found.err and not (found.folder / "survey.json").exists()
        return " ".join(found.err.split())

    return refuse
