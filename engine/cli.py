"""The `armillary` command: everything but training, which recipes start.

    armillary data build|check|show|...            make and look at surveys
    armillary embed ...                            embeddings of a survey by a run's encoder
    armillary evaluate ...                         embed and judge, with a report
    armillary report ...                           the report from embeddings that exist
    armillary search ...                           objects whose embeddings are like that of one
    armillary explore ...                          a page with the map of embeddings: lasso, filters, cutouts, search
    armillary query ...                            quantities of galaxies, given others
    armillary export ...                           encoder or whole state out of a run
    armillary version                              also --version

A command is a function with typed arguments in the part that does the work; tyro makes options of them. It is imported
when it is asked for, and imports what it works with when it is run, so that help comes at once and a package that is missing
takes away one command only. Exit codes: 0 done; 1 done, and the result is bad (a damaged survey, a collapsed encoder); 2 bad
input; 4 damaged weights; 130 Ctrl-C; 141 nobody reads the output any more (`| head`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Sequence

import tyro

import armillary
from armillary.engine.command_line import refuse_repeats, repeatable
from armillary.engine.open_files import open_file_problems
from armillary.engine.weights.verify import CheckpointError

__all__ = ["COMMANDS", "main"]

INTERRUPTED, UNREAD = 130, 141  # as shells call an end by SIGINT and by SIGPIPE

COMMANDS = {
    "data build": ("armillary.engine.data.cli", "build", "pack files into a survey"),
    "data check": ("armillary.engine.data.inspect.cli", "check", "verify a survey's files"),
    "data kinds": ("armillary.engine.data.cli", "kinds", "list what can be read"),
    "data leaks": ("armillary.engine.data.inspect.cli", "leaks", "look for objects in two splits"),
    "data show": ("armillary.engine.data.inspect.cli", "show", "draw samples of a survey"),
    "data stats": ("armillary.engine.data.inspect.cli", "stats", "histograms, redshifts, sky coverage"),
    "data export": ("armillary.engine.data.inspect.cli", "export", "write samples as FITS, HDF5 or Parquet"),
    "data graph": ("armillary.engine.data.cli", "graph", "neighbours on the sky"),
    "data simulate": ("armillary.engine.data.simulate.cli", "simulate", "make a survey of simulated galaxies"),
    "data simulate-photometry": (
        "armillary.engine.data.simulate.populations.cli",
        "simulate_photometry",
        "make one of photometry and star-formation histories",
    ),
    "embed": ("armillary.engine.embed.cli", "embed", "embeddings of a survey by a run's encoder"),
    "evaluate": ("armillary.engine.evaluate.cli", "evaluate", "embed a survey and judge the encoder"),
    "calibrate": (
        "armillary.engine.evaluate.cli",
        "calibrate",
        "correct a run's answers by held-out samples",
    ),
    "report": ("armillary.engine.evaluate.cli", "report", "the report from embeddings that exist"),
    "runs": ("armillary.engine.evaluate.runs_cli", "runs", "runs of a folder as a table; how two differ"),
    "search": ("armillary.engine.evaluate.search_cli", "search", "objects like one, within and across modalities"),
    "explore": ("armillary.engine.explore.cli", "explore", "look around in embeddings: map, cutouts, spectra, search"),
    "query": ("armillary.engine.query.cli", "query", "quantities of galaxies, given others, from a run"),
    "export": ("armillary.engine.hub.cli", "export", "encoder or whole state out of a run"),
    "completion": ("armillary.engine.completion", "completion", "commands and options for the shell's tab key"),
}
"""Name: (module, function, one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own where None.

    Returns:
        Exit code.
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error has its exit code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return UNREAD
    return code


def _run(words: list[str]) -> int:
    """Exit code of the command that these words give."""
    if words and re.match("--local[-_]rank=", words[0]):  # put there by launchers, also in LOCAL_RANK
        del words[0]
    if words in (["--version"], ["version"]):
        print(f"armillary {armillary.__version__}")
        return 0
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        asked = bool({"-h", "--help"} & set(words[:2]))
        group = words[0] if words and any(n.startswith(words[0] + " ") for n in COMMANDS) else ""
        if words and not asked and not (group and len(words) == 1):
            print(f"armillary: no command {' '.join(words[: 2 if group else 1])!r}\n", file=sys.stderr)
        print(_help(group), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module, function, _ = COMMANDS[name]
    try:
        if problems := open_file_problems():
            raise ValueError("; ".join(problems))
        command = getattr(importlib.import_module(module), function)
        refuse_repeats(words, repeatable(command))
        # Help is wrapped to the terminal; tyro would keep the line breaks of the source in it as well.
        command.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(command.__doc__ or ""))
        return int(tyro.cli(command, prog=f"armillary {name}", args=words[len(name.split()) :]) or 0)
    except SystemExit as left:  # tyro has said why
        return UNREAD if isinstance(left.__context__, BrokenPipeError) else int(left.code or 0)  # rich ends so
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"\narmillary {name}: interrupted; the same command starts again, or goes on", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"armillary {name}: {_lacking(error)}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"armillary {name}: {error}", file=sys.stderr)
        return 4
    except MemoryError as error:
        print(f"armillary {name}: there is not enough memory: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"armillary {name}: {error}", file=sys.stderr)
        return 2


def _lacking(error: ModuleNotFoundError) -> str:
    """What is missing, with the extra of armillary that brings it."""
    if error.name is None:  # our own, which says it
        return str(error)
    try:
        required = importlib.metadata.requires("armillary") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    found = (re.match(rf"{re.escape(error.name)}\b.*extra == ['\"](\w+)", line) for line in required)
    extra = next((match[1] for match in found if match), "")
    return f"this installation lacks {error.name}" + (f"; pip install 'armillary[{extra}]'" if extra else "")


def _help(group: str) -> str:
    shown = {n: text for n, (_, _, text) in COMMANDS.items() if n.startswith(group)}
    shown |= {} if group else {"version": "the version of armillary, as --version says it"}
    width = max(map(len, shown)) + 2
    lines = [f"  {n:{width}}{text}" for n, text in shown.items()]
    command = f"armillary {group} COMMAND" if group else "armillary COMMAND"
    more = f"{command} --help says more. Training is started from a recipe: deepspeed recipes/NAME.py"
    return "\n".join([f"usage: {command} ...", "", *lines, "", more])


if __name__ == "__main__":
    sys.exit(main())
