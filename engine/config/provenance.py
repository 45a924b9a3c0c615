"""Where a run comes from: commit, command line, versions, survey."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from armillary.engine.data.format.survey import Survey

__all__ = ["commit", "facts", "survey_fingerprint"]


def commit() -> str | None:
    """Commit of this source tree, with "+changes" where files differ from it; None outside of git."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


def survey_fingerprint(survey: Survey) -> str:
    """Hash of what decides the content and order of a survey's samples."""
    parts = [survey.bands, survey.step, survey.unit, [(s.name, s.split, s.count, s.sha256) for s in survey.shards]]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def facts(survey: Survey) -> dict[str, Any]:
    """What is kept beside a run's record, as JSON types."""
    packages = ("armillary", "torch", "deepspeed", "numpy", "safetensors")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "commit": commit(),
        "command": sys.argv,
        "versions": versions,
        "machine": platform.node(),
        "survey": survey_fingerprint(survey),
        "pixels": survey.pixels().to_json(),
    }
