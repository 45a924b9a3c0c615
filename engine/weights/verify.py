"""Is a file what was written? Hashes of checkpoints' files and seals of single files, compared when they are read.

A seal is the SHA-256 of a safetensors file as it is with dashes in the seal's own place, a text in the file's metadata. Manifests
have that of `sealed_json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from armillary.engine.sealed_json import sealed, unsealed
from armillary.models.file_hash import sha256_of

__all__ = ["SEAL", "UNSEALED", "CheckpointError", "check_files", "check_seal", "listed_files", "manifest_text"]

SEAL = "sha256"
"""Name of the seal in a file's metadata."""

UNSEALED = "-" * 64
"""What stands in its place while the file is hashed."""


class CheckpointError(RuntimeError):
    """Weights or a run's state could not be written, or what was found cannot be used."""


def manifest_text(files: Mapping[str, tuple[int, str]]) -> str:
    """What a checkpoint's manifest.json holds.

    Args:
        files: Bytes and SHA-256 (hex digits) of each file by its name.
    """
    records = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return json.dumps(sealed(records), indent=1)


def check_files(folder: Path, hashed: Sequence[str] | None = None) -> None:
    """Compare a checkpoint's files with its manifest.

    Args:
        folder: The checkpoint's own folder.
        hashed: Files whose hashes are compared as well as their sizes; None: all of them.

    Raises:
        CheckpointError: One is missing or differs. The newest other checkpoint that is whole is named.
    """
    try:
        found = _damage(folder, hashed)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: was deleted while it was read, as a run that is under way does with its older checkpoints; start again"
        ) from error
    if found is None:
        return
    others = sorted((p for p in folder.parent.glob("step-*") if p != folder), reverse=True)
    whole = next((p for p in others if _damage(p, None) is None), None)
    advice = "no other checkpoint of this run is whole"
    if whole is not None:
        advice = f"the newest whole one is {whole.name}: delete {folder} to go on from there"
    raise CheckpointError(f"{found}; the checkpoint is damaged; {advice}")


def listed_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files by its manifest; none where that cannot be read, which `check_files` reports."""
    try:
        return sorted(unsealed(json.loads((folder / "manifest.json").read_text())))
    except (OSError, ValueError):
        return []


def _damage(folder: Path, hashed: Sequence[str] | None) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    listed = folder / "manifest.json"
    try:
        manifest = unsealed(json.loads(listed.read_text()))
        records = {name: (int(record["bytes"]), str(record["sha256"])) for name, record in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{listed}: must list the checkpoint's files with sizes and hashes, got {error!r}"
    if odd := next((name for name in records if Path(name).name != name), None):
        return f"{listed}: must name files of its own folder, got {odd!r}"
    if "state.json" not in records:
        return f"{listed}: must list state.json, got {', '.join(records) or 'nothing'}"
    for name, (size, digest) in records.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            return f"{path}: must have {size} bytes, " + ("is missing" if there is None else f"got {there}")
        if (hashed is None or name in hashed) and sha256_of(path) != digest:
            return f"{path}: its SHA-256 differs from the manifest's"
    return None


def check_seal(path: Path, metadata: Mapping[str, str]) -> None:
    """Compare a safetensors file with the seal in its metadata, where it has one.

    Raises:
        CheckpointError: They differ.
    """
    seal = metadata.get(SEAL)
    if seal is not None and _unsealed(path, seal, path.stat().st_mtime_ns, path.stat().st_size) != seal:
        raise CheckpointError(f"{path}: differs from what was written; the file is damaged: export it again")


@lru_cache(maxsize=64)
def _unsealed(path: Path, seal: str, *_: int) -> str:
    """Hex digits of a file's hash with this seal left out; of a file that stays as it is only once a process."""
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little")).replace(seal.encode(), UNSEALED.encode(), 1)
        digest = hashlib.sha256(start + header)
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()
