"""The structure of the code, read from its imports: no circle of files or folders, and one direction of dependence."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "models", "engine", "recipes")
"""From the bottom up: each may import what stands before it, and itself."""

CLOSED_TO = {
    "engine/data": ("engine/train", "engine/zero", "engine/weights", "engine/evaluate"),
    "engine/evaluate": ("engine/train", "engine/zero"),
    "engine/config": ("engine/train", "engine/zero", "engine/weights"),
}
"""Folder: folders that nothing in it may import, not even inside a function."""


MOST_FILES = 12


@cache
def modules():
    """Every module of the project: dotted name below `armillary` -> file relative to the root."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.relative_to(ROOT)
    return found


def import_names(statements):
    """Names that statements import, at any depth, except for type checkers alone."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            for part in ("body", "orelse", "handlers", "finalbody", "cases"):
                if isinstance(inner := getattr(node, part, None), list):  # not the body of a lambda
                    yield from import_names(inner)


def imported(path):
    """Modules that a file imports anywhere."""
    for name in import_names(ast.parse((ROOT / path).read_text()).body):
        if name.startswith("armillary."):
            inner = name.removeprefix("armillary.")
            while inner and inner not in modules():
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


@cache
def edges():
    """Module -> the modules that it imports."""
    return {name: set(imported(path)) - {name} for name, path in modules().items()}


def circles(graph):
    """Strongly connected components of more than one node (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            start = stack.index(node)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def folder(module):
    """The room of a module: its folder, or itself where it stands at the top of a floor, above or below all rooms."""
    path = modules()[module]
    return (path if len(path.parts) == 2 else path.parent).as_posix()


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert len(modules()) > 200 and sum(map(len, edges().values())) > 500  # the imports are read at all


def test_no_files_import_each_other_in_a_circle():
    assert circles(edges()) == []


def test_no_folders_import_each_other_in_a_circle():
    folders = defaultdict(set)
    for module, others in edges().items():
        folders[folder(module)] |= {folder(other) for other in others} - {folder(module)}
    assert circles(folders) == []


def test_imports_point_one_way():
    wrong = [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if FLOORS.index(other.partition(".")[0]) > FLOORS.index(module.partition(".")[0])
    ]
    assert wrong == []


@pytest.mark.parametrize("inner", CLOSED_TO)
def test_wings_do_not_reach_into_the_trainer(inner):
    wrong = [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if f"{folder(module)}/".startswith(f"{inner}/")
        and any(f"{folder(other)}/".startswith(f"{closed}/") for closed in CLOSED_TO[inner])
    ]
    assert wrong == []


def test_no_room_is_too_full():
    counts = defaultdict(int)
    for path in [*modules().values(), *(path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py"))]:
        counts[path.parent.as_posix()] += path.name != "__init__.py"
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("name", FLOORS[:-1])
def test_top_folders_stay_name_spaces(name):
    """A package called `kernels` or `engine` would clash with others on the path that the launcher sets."""
    assert not (ROOT / name / "__init__.py").exists()
