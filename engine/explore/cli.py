"""Command `armillary explore`: a page on this machine with the map of a survey's embeddings.

armillary explore embeddings.parquet --data SURVEY
armillary explore embeddings.parquet --data SURVEY --run RUN       # also search by a dropped FITS or JPEG
armillary explore embeddings.parquet --data SURVEY --atlas map.parquet      # a file for embedding-atlas, and no page
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from armillary.engine.evaluate.cli import DeviceName
from armillary.engine.user_code import Packages, trust

if TYPE_CHECKING:
    from armillary.engine.data.format.survey import Survey
    from armillary.engine.explore.objects import Label

__all__ = ["explore"]

PREFERRED = "redshift"


def explore(
    embeddings: tyro.conf.Positional[Path],
    *,
    data: Path,
    run: Path | None = None,
    map: str = "auto",
    colour: str | None = None,
    index: Path | None = None,
    atlas: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8642,
    browser: bool = False,
    device: DeviceName = "auto",
    package: Packages = (),
) -> int:
    """Open a page with the map of embeddings: colours, lasso, filters, cutouts, spectra, similarity search.

    The map is made once, and kept beside the embeddings. The page is served until Ctrl-C, to this machine only; it needs no network.

    Args:
        embeddings: File or folder of `armillary embed`.
        data: Folder of the survey that was embedded.
        run: The run that made the embeddings, to search for a file that is dropped on the page.
        map: tsne, umap, pca, a Parquet file with columns key, x and y, or auto: a kept t-SNE map, else a new one of up to
            20,000 objects, else PCA.
        colour: Label to colour by at first; redshift where there is one.
        index: Folder of an index that `armillary search --save-index` wrote; by default one is made, exact up to 4 GiB.
        atlas: Write this Parquet file, which the program embedding-atlas opens, in place of serving a page.
        host: Address to listen at; any but this machine's own asks for a token, which is printed.
        port: Port; 0 for any that is free.
        browser: Also open the page in this machine's browser.
        device: Where to run the encoder; auto takes a GPU where there is one.
        package: Name of a package, or path of its folder or of a recipe, with methods of your own; repeatable.
    """
    from armillary.engine.data.format.embedding_files import EmbeddingFiles
    from armillary.engine.data.format.survey import Survey
    from armillary.engine.evaluate.cli import choose_device
    from armillary.engine.explore.api import Pages
    from armillary.engine.explore.embedding_map import CHOICES, choice_problem, open_map
    from armillary.engine.explore.export import write_atlas
    from armillary.engine.explore.objects import Objects, check_origin, find_labels
    from armillary.engine.explore.server import Server
    from armillary.engine.explore.similar import Similar

    trust(*package)
    where = choose_device(device)
    survey, files = Survey.load(data), EmbeddingFiles.open(embeddings)
    check_origin(files, survey)
    labels = find_labels(survey)
    shown = _colour(colour, labels, survey)
    chosen = map if map in CHOICES else Path(map)
    if problem := choice_problem(files, chosen):
        raise ValueError(problem)
    _check(run, index, atlas)
    if atlas is not None:
        from armillary.engine.exclusive import exclusive_file

        with exclusive_file(atlas):
            write_atlas(atlas, Objects(survey, files, open_map(files, chosen), labels), files)
        print(f"written: {atlas}; embedding-atlas {shlex.quote(str(atlas))} --x x --y y --neighbors neighbors")
        return 0
    with Server(host, port) as server:
        mapped = open_map(files, chosen)
        objects = Objects(survey, files, mapped, labels)
        similar = Similar(files, objects.keys, index, run, where)
        about = {
            "map": mapped.sentence,
            "run": files.metadata.get("run", ""),
            "readout": files.metadata.get("readout", ""),
        }
        server.listen(Pages(objects, similar, about, shown))
        print(f"{len(objects):,} objects of {survey.name} at {server.url} (Ctrl-C ends it)", flush=True)
        if browser:
            import webbrowser

            webbrowser.open(server.url)
        server.serve()
    # Threads may make the index or embed a file: waiting could take minutes, and torch aborts a process that ends around it.
    sys.stdout.flush()
    os._exit(0)


def _colour(name: str | None, labels: dict[str, Label], survey: Survey) -> str | None:
    """The label to colour by at first."""
    shown = [label.name for label in labels.values() if label.kind != "text"]
    if name is None:
        return next((n for n in (PREFERRED, *(n for n in shown if n != "split"), *shown) if n in shown), None)
    if name in labels and name not in shown:
        raise ValueError(f"colour: {name!r} is text with too many different values to colour by")
    if name not in shown:
        raise ValueError(f"colour: survey {survey.name!r} has no label {name!r}; it has {', '.join(shown)}")
    return name


def _check(run: Path | None, index: Path | None, atlas: Path | None) -> None:
    """Refuse what is not there before any work."""
    if run is not None:
        from armillary.engine.weights.trained_encoder import TrainedEncoder

        TrainedEncoder.open(run)
    if index is not None and not (index / "index.json").is_file():
        raise FileNotFoundError(
            f"{index}: no index here (index.json is missing); `armillary search --save-index` writes one"
        )
    if atlas is not None:
        if atlas.suffix != ".parquet":
            raise ValueError(f"atlas: must end in .parquet, got {atlas}")
        if atlas.is_dir():
            raise IsADirectoryError(f"{atlas}: must be a file, got a folder")
