"""Pictures (JPEG, PNG; grey or RGB; 8 or 16 bits) in a folder or zip archive, with an optional CSV of labels.

Pictures are made for display: their values are counts of an unknown stretch, and their noise is not sky noise. They are
packed in the unit "count"; the builder takes steps of one count for 8-bit ones, which loses nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from armillary.engine.data.sources.files.labels import beside, read_labels, stem
from armillary.engine.data.sources.source import BadSample, Rows, Sample, centre_crop, digest, key_from_name

__all__ = ["Pictures"]

PICTURES = (".jpg", ".jpeg", ".png")
BANDS = {1: ("grey",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class _Shape:
    """What a picture's header says."""

    width: int
    height: int
    channels: int
    bits: int

    def kind(self) -> str:
        return f"{self.bits}-bit {'grey' if self.channels == 1 else 'RGB'}"


class Pictures:
    """A `Source` of pictures. All headers are read when it is made.

    The survey has the kind (grey or RGB, 8 or 16 bits) and, unless `size` is given, the size that most pictures have;
    the others are unusable samples, reported by name. The labels file defaults to `labels.csv` in the folder, or beside
    the archive.

    Args:
        path: Folder (searched recursively) or zip archive.
        labels: CSV of labels (see `labels.read_labels`).
        size: Cut the central `size` x `size` pixels out of every picture; smaller pictures are unusable.
        bands: Band names; by default red, green, blue or grey.
        pixel_scale_arcsec: Arcseconds a pixel; unknown by default.

    Raises:
        FileNotFoundError: There is no such folder, archive or labels file.
        ValueError: There are no pictures, none is readable, or the labels do not fit them.
    """

    unit = "count"

    def __init__(
        self,
        path: Path | str,
        *,
        labels: Path | str | None = None,
        size: int | None = None,
        bands: tuple[str, ...] | None = None,
        pixel_scale_arcsec: float | None = None,
    ) -> None:
        self.path = Path(path)
        self.pixel_scale_arcsec = pixel_scale_arcsec
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such folder or archive of pictures")
        if size is not None and size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        self.files, self._mark = self._list()
        if not self.files:
            raise ValueError(f"{path}: no pictures in it (looked for {', '.join(PICTURES)})")
        self._labels_path = Path(labels) if labels is not None else beside(self.path)
        self._table = read_labels(self._labels_path, self.files)
        self.labels = self._table.labels
        self._survey_shape(size)
        if bands is not None and len(bands) != self._channels:
            raise ValueError(f"bands: {len(bands)} names ({', '.join(bands)}) for pictures of {self._channels} bands")
        self.bands = bands or BANDS[self._channels]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open archive."""
        return {**self.__dict__, "_zip": None}

    @property
    def lossless_step(self) -> tuple[float, ...] | None:
        """One count a band for 8-bit pictures."""
        return (1.0,) * self._channels if self._bits == 8 else None

    def inputs(self) -> dict[str, str]:
        """The folder or archive (checksum of names, sizes and, in an archive, CRCs) and the labels file."""
        marks = {self.path.resolve().name: self._mark}
        if self._labels_path is not None:
            marks[self._labels_path.name] = f"sha256:{digest(self._labels_path)}"
        return marks

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels; see `Described`."""
        columns = {name: values[start:stop] for name, values in self._table.columns.items()}
        splits = self._table.splits[start:stop] if self._table.splits is not None else None
        bad = {i: self._bad[i] for i in range(start, stop) if i in self._bad}
        return Rows([key_from_name(stem(f)) for f in self.files[start:stop]], columns, splits, bad)

    def read(self, index: int) -> Sample:
        """Decode one picture.

        Raises:
            BadSample: It is damaged, or unlike the others in size or kind.
        """
        if index in self._bad:
            raise BadSample(self._bad[index])
        name = self.files[index]
        try:
            with self._open(name) as f:
                image = _decode(f.read())
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:  # Pillow raises all of these
            raise BadSample(f"{self.path}: {name}: not a readable picture: {error}") from error
        return Sample(
            key=key_from_name(stem(name)),
            image=np.ascontiguousarray(centre_crop(image, self._height, self._width)),
            valid=None,
            ra=float(self._table.columns["ra"][index]),
            dec=float(self._table.columns["dec"][index]),
            labels=self._table.row(index),
            source=f"{self.path.name}:{name}",
            split=self._table.splits[index] if self._table.splits is not None else None,
        )

    def _list(self) -> tuple[list[str], str]:
        """Pictures, sorted by name, and a checksum of the listing."""
        if self.path.is_dir():
            found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
            entries = [(p.relative_to(self.path).as_posix(), p.stat().st_size, 0) for p in found]
        else:
            try:
                members = self._archive().infolist()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.path}: neither a folder nor a readable zip archive: {error}") from error
            chosen = [m for m in members if m.filename.lower().endswith(PICTURES)]
            entries = sorted((m.filename, m.file_size, m.CRC) for m in chosen)
        # macOS leaves resource forks such as __MACOSX/._a.jpg beside the pictures
        entries = [e for e in entries if not any(part.startswith((".", "__MACOSX")) for part in e[0].split("/"))]
        mark = hashlib.sha256(repr(entries).encode()).hexdigest()
        return [name for name, *_ in entries], f"listing-sha256:{mark}"

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != os.getpid():  # a forked child must not share the file position
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1]

    def _open(self, name: str) -> IO[bytes]:
        return open(self.path / name, "rb") if self.path.is_dir() else self._archive().open(name)

    def _survey_shape(self, size: int | None) -> None:
        """Decide the survey's kind and size; the pictures that do not fit go to `_bad`."""
        self._bad: dict[int, str] = {}
        shapes: dict[int, _Shape] = {}
        for i, name in enumerate(self.files):
            try:
                with self._open(name) as f:
                    shapes[i] = _header(f)
            except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
                self._bad[i] = f"{self.path}: {name}: not a readable picture: {error}"
        if not shapes:
            raise ValueError(f"{self.path}: none of its {len(self.files)} pictures is readable; {self._bad[0]}")
        kinds = Counter(s.kind() for s in shapes.values())
        kind, kind_count = kinds.most_common(1)[0]
        like = {i: s for i, s in shapes.items() if s.kind() == kind}
        first = next(iter(like.values()))
        self._channels, self._bits = first.channels, first.bits
        (common_width, common_height), size_count = Counter((s.width, s.height) for s in like.values()).most_common(1)[
            0
        ]
        self._width, self._height = (size, size) if size is not None else (common_width, common_height)
        for i, s in shapes.items():
            if s.kind() != kind:
                why = f"{s.kind()}, the survey is {kind} ({kind_count} of {len(self.files)} pictures)"
            elif size is None and (s.width, s.height) != (common_width, common_height):
                why = (
                    f"{s.width}x{s.height} pixels, the survey has {common_width}x{common_height} ({size_count} of "
                    f"{len(self.files)} pictures); a size cuts all of them to one"
                )
            elif size is not None and min(s.width, s.height) < size:
                why = f"{s.width}x{s.height} pixels, smaller than the size {size}"
            else:
                continue
            self._bad[i] = f"{self.path}: {self.files[i]}: {why}"


def _png16(head: bytes) -> bool:
    """True for a PNG with 16 bits a sample (its first chunk is IHDR; byte 24 is the bit depth)."""
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10"


def _header(f: IO[bytes]) -> _Shape:
    """Read size and kind without decoding pixels.

    Raises:
        ValueError: The picture has a mode that is not supported.
    """
    head = f.read(32)
    f.seek(0)
    try:
        picture = Image.open(f)
    except UnidentifiedImageError as error:
        raise ValueError("not a JPEG or PNG") from error
    with picture:
        deep = _png16(head)
        if deep and picture.mode not in ("RGB", "I;16", "I;16B", "I"):
            raise ValueError("16 bits with transparency are not supported")
        channels = {"L": 1, "LA": 1, "1": 1, "I;16": 1, "I;16B": 1, "I": 1, "RGB": 3, "RGBA": 3, "P": 3}
        if picture.mode not in channels:
            raise ValueError(f"colour mode {picture.mode} is not supported; convert it to RGB or grey")
        return _Shape(*picture.size, channels=channels[picture.mode], bits=16 if deep else 8)


def _decode(data: bytes) -> np.ndarray:
    """[C, H, W] float32 counts of a picture."""
    with Image.open(io.BytesIO(data)) as picture:
        if not _png16(data[:32]):
            return _planes(np.asarray(_opaque(picture)))
        if picture.mode != "RGB":
            return _planes(np.asarray(picture))
    # Pillow keeps the first byte of a 16-bit RGB sample only. Read as little-endian, that is the second one.
    high, low = (_raw(data, mode) for mode in ("RGB;16B", "RGB;16L"))
    return _planes(high.astype(np.uint16) * 256 + low)


def _raw(data: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        picture.tile = [tile._replace(args=mode) for tile in picture.tile]
        return np.asarray(picture)


def _opaque(picture: Image.Image) -> Image.Image:
    """An 8-bit picture as L or RGB."""
    grey = picture.mode in ("L", "LA", "1")
    if "A" in picture.mode or "transparency" in picture.info:
        if np.asarray(picture.convert("RGBA").getchannel("A")).min() < 255:
            raise ValueError("it has transparent pixels; flatten it")
    return picture.convert("L" if grey else "RGB")


def _planes(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=np.float32)
