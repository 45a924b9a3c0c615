"""The objects of a map: numbered as they are shown, with their labels, places on the sky and rows elsewhere.

Objects are shown in a shuffled order, so that the first of them, at any number, are a fair sample of all: a page that has to be
quick draws those first. Everything outside of this module knows an object by its number in that order.

Shape legend: N objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from armillary.engine.config.provenance import survey_fingerprint
from armillary.engine.data.format.catalog import catalog_file, read_catalog
from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.data.format.survey import Survey
from armillary.engine.explore.embedding_map import EmbeddingMap

__all__ = ["MISSING", "Label", "Objects", "check_origin", "find_labels"]

CATEGORIES = 200
"""Different words of a label that is shown by colours; one with more is text."""

MISSING = 255
"""Code of an object without a word."""

GRID = 65_535
NOT_NUMBERS = (math.inf, -math.inf)


@dataclass(frozen=True)
class Label:
    """A column of the catalogue.

    Attributes:
        name: Its name.
        meaning: Unit or meaning.
        kind: "number", "category" (words, of which there are few), or "text".
        categories: The words, in alphabetical order; a code is the place of one.
    """

    name: str
    meaning: str
    kind: Literal["number", "category", "text"]
    categories: tuple[str, ...] = ()


def check_origin(files: EmbeddingFiles, survey: Survey) -> None:
    """Refuse embeddings of another survey.

    Raises:
        ValueError: They say that they are.
    """
    made, given = files.metadata.get("fingerprint"), survey_fingerprint(survey)
    if made is not None and made != given:
        raise ValueError(
            f"data: {files.path} holds embeddings of the survey {files.metadata.get('survey')!r}, but {survey.folder} is "
            f"{survey.name!r} with other samples; give the survey that was embedded"
        )


def find_labels(survey: Survey) -> dict[str, Label]:
    """The split and every label of a survey, by name."""
    schema: Any = pq.read_schema(catalog_file(survey))
    found = {}
    for name, meaning in {"split": "part of the survey", **survey.labels}.items():
        kind: Any = schema.field(name).type
        if pa.types.is_floating(kind) or pa.types.is_integer(kind):
            found[name] = Label(name, meaning, "number")
            continue
        words = pc.unique(_words(read_catalog(survey, [name])[name]).combine_chunks()).drop_null().sort().to_pylist()
        words = [word for word in words if word]
        found[name] = Label(
            name, meaning, "category" if len(words) <= CATEGORIES else "text", tuple(words[:CATEGORIES])
        )
    return found


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


class Objects:
    """N embedded objects of a survey.

    Args:
        survey: Loaded from its folder.
        files: The embeddings.
        mapped: Their map.
        labels: Of `find_labels`.

    Attributes:
        survey: As given.
        labels: As given.
        keys: [N] Arrow strings, in the order of the embeddings.
        order: [N] int32 row of the embeddings, by number.
        number: [N] int32, the inverse: number by row of the embeddings.
        catalog_row: [N] int32 row of the survey's catalogue, by number.
        point: [N, 2] float32 places in the map, by number.

    Raises:
        ValueError: An object is not in the survey.
    """

    def __init__(self, survey: Survey, files: EmbeddingFiles, mapped: EmbeddingMap, labels: dict[str, Label]) -> None:
        self.survey, self.labels = survey, labels
        self.keys = files.keys().combine_chunks()
        self.order = np.random.default_rng(0).permutation(len(self.keys)).astype(np.int32)
        self.number = np.empty_like(self.order)
        self.number[self.order] = np.arange(len(self.order), dtype=np.int32)
        catalogue: Any = read_catalog(survey, ["key"])["key"].cast(pa.large_string()).combine_chunks()
        row = np.arange(len(self.keys), dtype=np.int32)
        if not catalogue.equals(self.keys):
            found = pc.index_in(self.keys, value_set=catalogue)
            if found.null_count:
                stranger = self.keys.filter(pc.is_null(found))[0].as_py()
                raise ValueError(
                    f"data: survey {survey.name!r} lacks {found.null_count:,} of {len(self.keys):,} embedded objects, such as "
                    f"{stranger!r}; give the survey that was embedded"
                )
            row = found.to_numpy().astype(np.int32)
        self.catalog_row = row[self.order]
        self.point = mapped.point[self.order]
        self._sky: np.ndarray | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.order)

    def grid_points(self) -> np.ndarray:
        """[N, 2] uint16 places in the map, on a grid over a square that holds all of them."""
        low, high = self.point.min(0), self.point.max(0)
        side = max(float((high - low).max()), 1e-30)
        scaled = (self.point - (low + high) / 2) / side + 0.5
        return np.clip(scaled * GRID + 0.5, 0, GRID).astype("<u2")

    def values(self, name: str) -> np.ndarray:
        """[N] of a label: float32 numbers, NaN where unknown; or uint8 codes of words.

        Raises:
            KeyError: There is no such label, or it is text.
        """
        label = self.labels[name]
        column = read_catalog(self.survey, [name])[name]
        if label.kind == "number":
            return column.to_numpy().astype("<f4")[self.catalog_row]
        if label.kind == "text":
            raise KeyError(name)
        codes = pc.index_in(_words(column), value_set=pa.array(label.categories, pa.string()))
        return pc.fill_null(codes, MISSING).to_numpy().astype(np.uint8)[self.catalog_row]

    def key(self, number: int) -> str:
        """Key of an object."""
        key: str = self.keys[int(self.order[number])].as_py()
        return key

    def find(self, key: str) -> int | None:
        """Number of the object with a key; None where none has it."""
        row = pc.index(self.keys, pa.scalar(key, pa.large_string())).as_py()
        return int(self.number[row]) if row >= 0 else None

    def describe(self, number: int) -> dict[str, Any]:
        """Key, split, position and labels of an object; what is unknown is None."""
        names = ["key", "split", "ra", "dec", *self.survey.labels]
        row = int(self.catalog_row[number])
        with pq.ParquetFile(catalog_file(self.survey)) as file:
            group = 0
            while row >= (rows := file.metadata.row_group(group).num_rows):
                row, group = row - rows, group + 1
            found: dict[str, Any] = file.read_row_group(group, columns=names).slice(row, 1).to_pylist()[0]
        return {
            name: None if value == "" or value in NOT_NUMBERS or value != value else value
            for name, value in found.items()
        }

    def nearest(self, ra: float, dec: float) -> tuple[int, float] | None:
        """The object nearest to a position on the sky.

        Args:
            ra: Degrees, ICRS.
            dec: Degrees, ICRS.

        Returns:
            Its number and the separation in arcseconds; None where no object has a position.
        """
        if self._sky is None:
            table = read_catalog(self.survey, ["ra", "dec"])
            self._sky = np.radians(np.stack([table[n].to_numpy()[self.catalog_row] for n in ("ra", "dec")]))
        there = np.radians([ra, dec])
        half = (self._sky - there[:, None]) / 2
        chord = np.sin(half[1]) ** 2 + np.cos(there[1]) * np.cos(self._sky[1]) * np.sin(half[0]) ** 2
        if not np.isfinite(chord).any():
            return None
        number = int(np.nanargmin(chord))
        return number, float(np.degrees(2 * np.arcsin(min(1.0, np.sqrt(chord[number])))) * 3600)

    def table(self, numbers: np.ndarray) -> pa.Table:
        """Key, split, position, every label and place in the map of some objects, in their order."""
        names = ["key", "split", "ra", "dec", *self.survey.labels]
        rows: Any = read_catalog(self.survey, names).take(pa.array(self.catalog_row[numbers]))
        for name, column in (("map_x", 0), ("map_y", 1)):
            if name not in names:
                rows = rows.append_column(name, pa.array(self.point[numbers, column]))
        return rows
