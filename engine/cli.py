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
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

import armillary
from armillary.engine.command_line import refuse_repeats, repeatable
from armillary.engine.exclusive import exclusive_file
from armillary.engine.open_files import open_file_problems
from armillary.engine.user_code import Packages, trust
from armillary.engine.weights.verify import CheckpointError

__all__ = ["COMMANDS", "export", "main"]

INTERRUPTED, UNREAD = 130, 141  # as shells call an end by SIGINT and by SIGPIPE

COMMANDS = {
    "data build": ("armillary.engine.data.cli", "build", "pack files into a survey"),
    "data check": ("armillary.engine.data.cli", "check", "verify a survey's files"),
    "data kinds": ("armillary.engine.data.cli", "kinds", "list what can be read"),
    "data leaks": ("armillary.engine.data.cli", "leaks", "look for objects in two splits"),
    "data show": ("armillary.engine.data.cli", "show", "draw samples of a survey"),
    "data stats": ("armillary.engine.data.cli", "stats", "histograms, redshifts, sky coverage"),
    "data export": ("armillary.engine.data.cli", "export", "write samples as FITS, HDF5 or Parquet"),
    "data graph": ("armillary.engine.data.cli", "graph", "neighbours on the sky"),
    "data simulate": ("armillary.engine.data.simulate.cli", "simulate", "make a survey of simulated galaxies"),
    "data simulate-photometry": (
        "armillary.engine.data.simulate.populations.cli",
        "simulate_photometry",
        "the same as photometry and star-formation histories",
    ),
    "embed": ("armillary.engine.embed.cli", "embed", "embeddings of a survey by a run's encoder"),
    "evaluate": ("armillary.engine.evaluate.cli", "evaluate", "embed a survey and judge the encoder"),
    "calibrate": (
        "armillary.engine.evaluate.cli",
        "calibrate",
        "correct a run's answers by held-out samples",
    ),
    "report": ("armillary.engine.evaluate.cli", "report", "the same from embeddings that exist"),
    "runs": ("armillary.engine.evaluate.runs_cli", "runs", "runs of a folder as a table; how two differ"),
    "search": ("armillary.engine.evaluate.search_cli", "search", "objects like one, within and across modalities"),
    "explore": ("armillary.engine.explore.cli", "explore", "look around in embeddings: map, cutouts, spectra, search"),
    "query": ("armillary.engine.query.cli", "query", "quantities of galaxies, given others, from a run"),
    "export": ("armillary.engine.cli", "export", "encoder or whole state out of a run"),
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
        return int(tyro.cli(command, prog=f"armillary {name}", args=words[len(name.split()) :]) or 0)
    except SystemExit as left:  # tyro has said why
        return UNREAD if isinstance(left.__context__, BrokenPipeError) else int(left.code or 0)  # rich ends so
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"\narmillary {name}: interrupted; the same command starts again, or goes on", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"armillary {name}: this installation lacks {error.name}", file=sys.stderr)
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


def _help(group: str) -> str:
    lines = [f"  {n:15}{text}" for n, (_, _, text) in COMMANDS.items() if n.startswith(group)]
    lines += [] if group else [f"  {'version':15}the version of armillary, as --version says it"]
    return "\n".join(
        [
            "usage: armillary COMMAND ...",
            "",
            *lines,
            "",
            "armillary COMMAND --help says more. Training is started from a recipe: deepspeed recipes/NAME.py",
        ]
    )


def export(
    run: tyro.conf.Positional[Path],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    *,
    format: Literal["safetensors", "dinov2", "specformer", "portable", "hf", "onnx"] = "safetensors",
    block_chunks: int = 0,
    push: str | None = None,
    licence: str = "",
    package: Packages = (),
) -> int:
    """Take the encoder, or everything, out of a run's newest checkpoint.

    Args:
        run: Folder of the run; for the encoder also a file exported before.
        out: File to write; with hf, a folder.
        format: safetensors is the encoder with the run's record. dinov2 is its backbone under the names of published
            DINOv2 files, .safetensors or .pth. specformer is a spectrum encoder under the names of AstroCLIP's,
            .safetensors or .ckpt. portable is weights, optimizer, average, loader and counters, from which --restore of a
            recipe continues with another number of ranks or another ZeRO stage. hf is a folder for Hugging Face, which
            `transformers.AutoModel.from_pretrained` opens without armillary, with a model card. onnx is the encoder for
            programs without PyTorch.
        block_chunks: With dinov2, the other program's block_chunks.
        push: With hf, a repository OWNER/NAME of the hub that the folder is uploaded to (private, where it is made).
        licence: With hf, licence of the weights for the model card, as the hub calls it, such as cc-by-4.0.
        package: Name of a package, or path of its folder or of a recipe, with methods or tasks of your own; repeatable.
    """
    from armillary.engine.weights.export import export_dinov2, export_encoder, export_specformer
    from armillary.engine.weights.portable import export_portable, find_checkpoint
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    trust(*package)
    if block_chunks and format != "dinov2":
        raise ValueError(f"block_chunks: must be 0 without --format dinov2, got {block_chunks}")
    if (push or licence) and format != "hf":
        raise ValueError("push, licence: must be left out without --format hf")
    if format == "hf":
        return _export_hub(run, out, push, licence)
    with exclusive_file(out):
        if format == "portable":
            export_portable(find_checkpoint(run), out)
        else:
            encoder = TrainedEncoder.open(run)
            if format == "dinov2":
                export_dinov2(encoder, out, block_chunks)
            elif format == "specformer":
                export_specformer(encoder, out)
            elif format == "onnx":
                from armillary.engine.hub.onnx_file import export_onnx

                export_onnx(encoder, out)
            else:
                export_encoder(encoder, out)
    print(f"{out}: {out.stat().st_size / 2**20:,.1f} MiB")
    return 0


def _export_hub(run: Path, out: Path, push: str | None, licence: str) -> int:
    from armillary.engine.hub.folder import export_folder
    from armillary.engine.weights.hub import check_repo, upload
    from armillary.engine.weights.trained_encoder import TrainedEncoder

    if push:
        check_repo(push)
    figures = run / "evaluation" / "metrics.parquet"
    export_folder(TrainedEncoder.open(run), out, licence=licence, figures=figures if figures.is_file() else None)
    print(f"{out}: {sum(p.stat().st_size for p in out.iterdir() if p.is_file()) / 2**20:,.1f} MiB")
    if push:
        print(upload(out, push))
    return 0


if __name__ == "__main__":
    sys.exit(main())
