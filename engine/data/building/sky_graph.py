"""Make a survey's sky graph and write it beside the survey."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from armillary.engine.config.provenance import facts
from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.columns import numbers
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sky_graph.build import connect
from armillary.engine.data.sky_graph.graph import GraphOptions, GraphRecord, SkyGraph, catalog_checksum, graph_file
from armillary.engine.exclusive import exclusive_file

__all__ = ["build_graph"]


def build_graph(folder: Path | str, options: GraphOptions | None = None, *, threads: int = 1) -> tuple[SkyGraph, Path]:
    """Make a graph over all rows of a survey's catalogue and write its file beside them.

    Args:
        folder: The survey.
        options: Which rows become neighbours; the defaults of `GraphOptions` where None.
        threads: Threads of the k-d tree.

    Returns:
        The graph, and its file.

    Raises:
        FileNotFoundError: There is no survey.
        ValueError: Positions or redshifts are unknown or out of range, or too few rows may be seen.
    """
    folder, options = Path(folder), options or GraphOptions()
    survey = Survey.load(folder)
    label = options.redshift
    if label is not None and label not in survey.labels:
        raise ValueError(f"redshift: no label {label!r}; the survey has {', '.join(survey.labels) or 'none'}")
    columns = ["split", "ra", "dec"] + ([] if label is None else [label])
    table = read_catalog(survey, columns)
    path = graph_file(folder, options.name)
    redshift = None if label is None else numbers(table[label])
    if label is not None and redshift is None:
        raise ValueError(f"redshift: the label {label!r} holds text, a graph needs numbers")
    split = table["split"].to_numpy(zero_copy_only=False)
    ra, dec = table["ra"].to_numpy(), table["dec"].to_numpy()
    arrays = connect(ra, dec, options, split=split, redshift=redshift, threads=threads)
    provenance = {name: value for name, value in facts(survey).items() if name != "pixels"}
    provenance["versions"]["scipy"] = importlib.metadata.version("scipy")
    record = GraphRecord(survey.name, catalog_checksum(folder), len(table), options, provenance)
    graph = SkyGraph(*arrays, record)
    with exclusive_file(path):
        graph.save(path)
    return graph, path
