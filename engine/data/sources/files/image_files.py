"""What the readers of images in files of their own share: the survey's size, labels from a CSV, samples by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from armillary.engine.data.sources.files.fits_tables import damage_of
from armillary.engine.data.sources.files.labels import LabelFile, beside, read_labels, stem
from armillary.engine.data.sources.source import BadSample, Rows, Sample, cut_out, key_from_name

__all__ = ["ImageFiles", "ImageHeader"]


@dataclass(frozen=True)
class ImageHeader:
    """Pixels of an image along each axis."""

    height: int
    width: int


class ImageFiles(ABC):
    """A `Source` of images, one file each; the base of readers. All headers are read when it is made.

    What the survey's images have in common (bands, scale, depth: the reader's `_agree`) and, unless `size` is given,
    their size are those of most files; other files are unusable samples, reported by name.

    Args:
        path: Folder (searched recursively), archive or file.
        files: Names of the images, below `path`.
        mark: Changes when the files do.
        labels: CSV of labels (see `labels.read_labels`); defaults to `labels.csv` in the folder or beside the archive.
        size: Cut the central `size` x `size` pixels out of every image; smaller images are unusable.
        missing: Numbers that mean "unknown" in labels; by default those of `sentinels`.
        on_bad: "skip" leaves out rows of the labels that name no file.

    Raises:
        FileNotFoundError: There is no such CSV.
        ValueError: None of the files is readable, the labels do not fit them, or `size` is not positive.
    """

    labels: dict[str, str]
    damage: ClassVar[tuple[type[Exception], ...]]
    """What the reader's library raises for files that are damaged or of another kind."""
    what: ClassVar[str]
    """What a file is called in errors."""

    def __init__(
        self,
        path: Path,
        files: list[str],
        mark: str,
        labels: Path | str | None,
        size: int | None,
        missing: Sequence[float] | None = None,
        on_bad: str = "error",
    ) -> None:
        self.path, self.files, self._mark = path, files, mark
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        found = LabelFile.open(Path(labels)) if labels is not None else self._labels_with_files()
        self._labels_mark = {} if found is None else {found.name: found.mark()}
        self._table = read_labels(found, files, missing, on_bad)
        self.labels = self._table.labels
        self._bad: dict[int, str] = {}
        headers = {}
        for i, name in enumerate(files):
            try:
                headers[i] = self._header(name)
            except self.damage as error:
                self._refuse(i, self._unreadable(name, error))
        if not headers:
            raise ValueError(f"{path}: none of its {len(files)} {self.what}s is usable; {self._bad[0]}")
        self._agree(headers)
        sizes = {i: (h.height, h.width) for i, h in headers.items() if i not in self._bad}
        common, count = Counter(sizes.values()).most_common(1)[0]
        self._height, self._width = common if size is None else (size, size)
        for i, (height, width) in sizes.items():
            if size is not None and min(height, width) < size:
                self._refuse(i, f"{width}x{height} pixels, smaller than the size {size}")
            elif size is None and (height, width) != common:
                self._refuse(
                    i,
                    f"{width}x{height} pixels, the survey has {common[1]}x{common[0]} ({count} of {len(files)} "
                    f"{self.what}s); a size cuts all of them to one",
                )

    @abstractmethod
    def _where(self, name: str) -> str:
        """A file, for errors."""

    @abstractmethod
    def _header(self, name: str) -> ImageHeader:
        """What a file says of its image, without decoding pixels."""

    @abstractmethod
    def _agree(self, headers: Mapping[int, ImageHeader]) -> None:
        """Decide what the survey's images have in common, and refuse the files that are otherwise."""

    @abstractmethod
    def _decode(self, name: str) -> np.ndarray:
        """[C, H, W] pixels of a file."""

    def _labels_with_files(self) -> LabelFile | None:
        """The labels that lie with the files; None where there are none."""
        return beside(self.path)

    def _zero_is_missing(self, name: str) -> bool:
        """Whether pixels of exactly 0 carry no data."""
        return False

    def _refuse(self, index: int, why: str) -> None:
        self._bad.setdefault(index, f"{self._where(self.files[index])}: {why}")

    def _unreadable(self, name: str, error: BaseException) -> str:
        return f"not a readable {self.what}: {damage_of(Path(self._where(name)), error)}"

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def inputs(self) -> dict[str, str]:
        """The folder or archive (checksum of names and sizes) and the labels file."""
        return {self.path.resolve().name: self._mark} | self._labels_mark

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`."""
        columns = {name: values[start:stop] for name, values in self._table.columns.items()}
        splits = self._table.splits[start:stop] if self._table.splits is not None else None
        bad = {i: self._bad[i] for i in range(start, stop) if i in self._bad}
        return Rows([key_from_name(stem(f)) for f in self.files[start:stop]], columns, splits, bad)

    def read(self, index: int) -> Sample:
        """Read one file.

        Raises:
            BadSample: It is damaged, or unlike the others.
        """
        if index in self._bad:
            raise BadSample(self._bad[index])
        name = self.files[index]
        try:
            stored = self._decode(name)
        except self.damage as error:
            raise BadSample(f"{self._where(name)}: {self._unreadable(name, error)}") from error
        payload = cut_out(stored, self._height, self._width, zero_is_missing=self._zero_is_missing(name))
        return self.describe(index, index + 1).sample(0, self.labels, self._source(name), **payload)

    def _source(self, name: str) -> str:
        """A file, for the catalogue."""
        return name
