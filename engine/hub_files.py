"""Files to and from the Hugging Face hub, by the huggingface_hub library (extra `hub`).

    hf://OWNER/REPO/FILE               a file of a model repository
    hf://datasets/OWNER/REPO           a data set
    hf://datasets/OWNER/REPO/INSIDE    a file or folder of it

REPO@REVISION means a branch, a tag or a commit. A file is fetched once and kept in that library's cache; HF_TOKEN, HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE are obeyed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["check_repo", "fetch", "fetch_dataset", "upload"]

SCHEME = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
"""Also with one slash: pathlib takes the second away."""

DATASET = re.compile(r"hf:/{1,2}datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?")


def fetch(path: Path | str) -> Path:
    """The local copy of what a path names: of `hf://...` a file out of the hub, of anything else the path itself.

    Args:
        path: A path, or an address as above. An address without a file means model.safetensors.

    Raises:
        ValueError: The address is none, or huggingface_hub is not installed.
        OSError: The hub or the file cannot be reached.
    """
    if not str(path).startswith("hf:"):
        return Path(path)
    match, address = SCHEME.fullmatch(str(path)), _address(path)
    if match is None:
        raise ValueError(f"{address}: must be hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE")
    hub = _library()
    with _said_of(address, hub):
        return Path(
            hub.hf_hub_download(match["repo"], match["file"] or "model.safetensors", revision=match["revision"])
        )


def fetch_dataset(path: Path | str) -> Path:
    """The local copy of data: of `hf://datasets/...` what it names on the hub, of anything else the path itself.

    All that is named is fetched before any of it is read, so the cache needs room for it.

    Args:
        path: A path, or an address as above.

    Raises:
        ValueError: The address is none, or huggingface_hub is not installed.
        OSError: The hub cannot be reached, or has no such data set, file or folder.
    """
    if not str(path).startswith("hf:"):
        return Path(path)
    match, address = DATASET.fullmatch(str(path).rstrip("/")), _address(path)
    if match is None:
        raise ValueError(f"{address}: must be hf://datasets/OWNER/REPO, with a file or folder of it or without")
    hub, inside = _library(), match["inside"] or ""
    wanted = [glob.escape(inside), f"{glob.escape(inside)}/*"] if inside else None
    with _said_of(address, hub):
        copy = Path(
            hub.snapshot_download(match["repo"], repo_type="dataset", revision=match["revision"], allow_patterns=wanted)
        )
    if not (copy / inside).exists():
        raise OSError(f"{address}: the data set has no file or folder {inside!r}")
    return copy / inside


def upload(folder: Path, repo: str) -> str:
    """Upload a folder into a model repository; one that does not exist is made, and is seen by its owner alone.

    Args:
        folder: What to upload, all of it.
        repo: OWNER/NAME.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The name is none, or huggingface_hub is not installed.
        OSError: The hub cannot be reached or refuses.
    """
    check_repo(repo)
    hub = _library()
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(
            api.upload_folder(folder_path=folder, repo_id=repo, commit_message=f"Upload {folder.name}").commit_url
        )
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise OSError(f"{repo}: was not uploaded, {folder} holds everything: {_first_line(error)}") from error


def check_repo(repo: str) -> None:
    """Refuse what cannot be uploaded to, before any work.

    Args:
        repo: OWNER/NAME.

    Raises:
        ValueError: It is no such name, or huggingface_hub is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"push: must be OWNER/NAME of a repository, got {repo!r}")
    _library()


def _address(path: Path | str) -> str:
    return re.sub("^hf:/*", "hf://", str(path))


@contextmanager
def _said_of(address: str, hub: Any) -> Iterator[None]:
    """Errors of the library as OSError with the address."""
    try:
        yield
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError) as error:
        raise OSError(f"{address}: cannot be fetched from the hub: {_first_line(error)}") from error


def _library():  # type: ignore[no-untyped-def]
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ValueError("the hub needs the package huggingface_hub; pip install 'armillary[hub]'") from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
