"""Command `armillary completion`: commands and options for the shell's tab key."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tyro

__all__ = ["completion", "flags", "script"]

_SCRIPT = """\
# Completion of the armillary command; for zsh: autoload -U +X bashcompinit && bashcompinit before it.
_armillary() {
  local word=${COMP_WORDS[COMP_CWORD]} first=${COMP_WORDS[1]} both="${COMP_WORDS[1]} ${COMP_WORDS[2]}" flags=""
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "FIRST" -- "$word")); return; fi
  case "$first" in
GROUPS
  esac
  case "$both" in
PAIRS
    *) case "$first" in
SINGLES
      esac;;
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$flags --help" -- "$word"));;
    *) COMPREPLY=($(compgen -f -- "$word"));;
  esac
}
complete -o filenames -F _armillary armillary
"""


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh"]]) -> int:
    """Print what a shell needs to complete commands, options and files.

    armillary completion bash >> ~/.bash_completion

    Args:
        shell: Which shell.
    """
    from armillary.engine.cli import COMMANDS

    before = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    print(before + script({name: _function(*place[:2]) for name, place in COMMANDS.items()}), end="")
    return 0


def _function(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def flags(command: Callable[..., Any]) -> list[str]:
    """Options of a command: its keyword parameters, and the fields of those that are records."""
    hints = typing.get_type_hints(command)
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        fields = dataclasses.fields(hints[name]) if dataclasses.is_dataclass(hints.get(name)) else None
        if fields is not None:
            found += [f"--{field.name.replace('_', '-')}" for field in fields]
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY or name == "out":
            found.append(f"--{name.replace('_', '-')}")
    return found


def script(commands: Mapping[str, Callable[..., Any]]) -> str:
    """The completion script of commands by name; a name of two words is a group and its command."""
    groups: dict[str, list[str]] = {}
    cases: dict[bool, list[str]] = {True: [], False: []}
    for name, command in commands.items():
        group, _, inner = name.partition(" ")
        groups.setdefault(group, [])
        if inner:
            groups[group].append(inner)
        cases[bool(inner)].append(f'"{name}") flags="{" ".join(flags(command))}";;')
    named = [
        f'    {group}) if [ "$COMP_CWORD" = 2 ]; then COMPREPLY=($(compgen -W "{" ".join(inner)}" -- "$word")); return; fi;;'
        for group, inner in groups.items()
        if inner
    ]
    parts = {"FIRST": " ".join([*groups, "version"]), "GROUPS": "\n".join(named)}
    parts |= {
        "PAIRS": "\n".join(f"    {c}" for c in cases[True]),
        "SINGLES": "\n".join(f"        {c}" for c in cases[False]),
    }
    text = _SCRIPT
    for mark, content in parts.items():
        text = text.replace(mark, content)
    return text
