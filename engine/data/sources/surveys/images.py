"""Pictures (JPEG, PNG; grey or RGB; 8 or 16 bits) in a folder or zip archive, with an optional CSV of labels.

A picture that its EXIF says to be rotated or mirrored is read upright, as it is displayed.

Pictures are made for display: their values are counts of an unknown stretch, and their noise is not sky noise. They are
packed in the unit "count"; the builder takes steps of one count for 8-bit ones, which loses nothing.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from armillary.engine.data.sources.files.image_files import ImageFiles, ImageHeader
from armillary.engine.data.sources.files.labels import LabelFile, beside
from armillary.engine.data.sources.listing import Listing, find_files, left_out_name, list_folder
from armillary.engine.data.sources.source import listing_mark

__all__ = ["Pictures"]

PICTURES = (".jpg", ".jpeg", ".png")
BANDS = {1: ("grey",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class _Header(ImageHeader):
    channels: int
    bits: int

    def kind(self) -> str:
        return f"{self.bits}-bit {'grey' if self.channels == 1 else 'RGB'}"


class Pictures(ImageFiles):
    """A `Source` of pictures; see `ImageFiles`. The survey has the kind (grey or RGB, 8 or 16 bits) that most have.

    Args:
        path: Folder (searched recursively), zip archive, or folder with one archive in place of pictures.
        labels: CSV of labels (see `labels.read_labels`); defaults to `labels.csv` in the folder, beside or in the archive.
        size: Cut the central `size` x `size` pixels out of every picture; smaller pictures are unusable.
        bands: Band names; by default red, green, blue or grey.
        pixel_scale_arcsec: Arcseconds a pixel; unknown by default.
        missing: Numbers that mean "unknown" in labels; by default those of `sentinels`.
        on_bad: "skip" leaves out rows of the labels that name no file.

    Raises:
        FileNotFoundError: There is no such folder, archive or labels file.
        ValueError: There are no pictures, none is readable, or the labels do not fit them.
    """

    unit = "count"
    # Pillow and zipfile raise all of these; NotImplementedError and RuntimeError: compressed or encrypted otherwise
    damage = (OSError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
    what = "picture"

    def __init__(
        self,
        path: Path | str,
        *,
        labels: Path | str | None = None,
        size: int | None = None,
        bands: tuple[str, ...] | None = None,
        pixel_scale_arcsec: float | None = None,
        missing: Sequence[float] | None = None,
        on_bad: str = "error",
    ) -> None:
        self.path = _archive_in(Path(path))
        self.pixel_scale_arcsec = pixel_scale_arcsec
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such folder or archive of pictures")
        entries = self._list()
        if not entries:
            raise ValueError(f"{path}: no pictures in it (looked for {', '.join(PICTURES)})")
        super().__init__(
            self.path, [name for name, *_ in entries], listing_mark(entries), labels, size, missing, on_bad
        )
        if bands is not None and len(bands) != self._channels:
            raise ValueError(f"bands: {len(bands)} names ({', '.join(bands)}) for pictures of {self._channels} bands")
        self.bands = bands or BANDS[self._channels]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open archive."""
        return {**self.__dict__, "_zip": None}

    @property
    def lossless_step(self) -> tuple[float, ...] | None:
        """One count a band for 8-bit pictures."""
        return (1.0,) * self._channels if self._bits == 8 else None

    def _list(self) -> list[tuple[str, int, int]]:
        """Name, size and, in an archive, CRC of all pictures, sorted by name."""
        if self.path.is_dir():
            found = find_files(self.path, PICTURES, "picture")
            return [(p.relative_to(self.path).as_posix(), p.stat().st_size, 0) for p in found]
        try:
            members = self._archive().infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: neither a folder nor a readable zip archive: {error}") from error
        listing, entries = Listing([]), []
        for m in members:
            if reason := None if m.is_dir() else left_out_name(m.filename):
                listing.drop(reason, m.filename)
            elif m.filename.lower().endswith(PICTURES):
                entries.append((m.filename, m.file_size, m.CRC))
        listing.tell(self.path)
        return sorted(entries)

    def _labels_with_files(self) -> LabelFile | None:
        """labels.csv in the folder or beside the archive, else the one in the archive."""
        if self.path.is_dir() or (found := beside(self.path)) is not None:
            return beside(self.path)
        inside = [n for n in self._archive().namelist() if n.split("/")[-1] == "labels.csv" and not left_out_name(n)]
        if len(inside) > 1:
            raise ValueError(
                f"{self.path}: it holds {inside[0]} and {inside[1]}; say which labels are meant (--labels)"
            )
        if not inside:
            return found
        try:
            return LabelFile(f"{self.path}: {inside[0]}", "labels.csv", self._archive().read(inside[0]))
        except self.damage as error:
            raise ValueError(f"{self.path}: {inside[0]}: not readable: {error}") from error

    def _archive(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != os.getpid():  # a forked child must not share the file position
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1]

    def _open(self, name: str) -> IO[bytes]:
        return open(self.path / name, "rb") if self.path.is_dir() else self._archive().open(name)

    def _where(self, name: str) -> str:
        return f"{self.path}: {name}"

    def _source(self, name: str) -> str:
        return f"{self.path.resolve().name}:{name}"

    def _header(self, name: str) -> _Header:
        with self._open(name) as f:
            return _read_header(f)

    def _agree(self, headers: Mapping[int, Any]) -> None:
        """The survey's kind."""
        kind, count = Counter(h.kind() for h in headers.values()).most_common(1)[0]
        first = next(h for h in headers.values() if h.kind() == kind)
        self._channels, self._bits = first.channels, first.bits
        for i, h in headers.items():
            if h.kind() != kind:
                self._refuse(i, f"{h.kind()}, the survey is {kind} ({count} of {len(self.files)} pictures)")

    def _decode(self, name: str) -> np.ndarray:
        with self._open(name) as f:
            return _decode(f.read())


def _archive_in(path: Path) -> Path:
    """The archive that a folder holds in place of pictures; else the path itself."""
    if not path.is_dir():
        return path
    archives = [p for p in path.iterdir() if p.suffix.lower() == ".zip" and not left_out_name(p.name)]
    pictures = len(archives) == 1 and any(p.name.lower().endswith(PICTURES) for p in list_folder(path).files)
    return archives[0] if len(archives) == 1 and not pictures else path


def _png16(head: bytes) -> bool:
    """True for a PNG with 16 bits a sample (its first chunk is IHDR; byte 24 is the bit depth)."""
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10"


def _image(f: IO[bytes]) -> ImageFile.ImageFile:
    """Open a picture; larger ones than Pillow's limit are no galaxies, but mosaics or attacks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(f)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"too large for a picture of a galaxy: {error}") from error


def _read_header(f: IO[bytes]) -> _Header:
    """Size and kind, without decoding pixels."""
    head = f.read(32)
    f.seek(0)
    try:
        picture = _image(f)
    except UnidentifiedImageError as error:
        raise ValueError("not a JPEG or PNG") from error
    with picture:
        deep = _png16(head)
        if deep and picture.mode not in ("RGB", "I;16", "I;16B", "I"):
            raise ValueError("16 bits with transparency are not supported")
        channels = {"L": 1, "LA": 1, "1": 1, "I;16": 1, "I;16B": 1, "I": 1, "RGB": 3, "RGBA": 3, "P": 3}
        if picture.mode not in channels:
            raise ValueError(f"colour mode {picture.mode} is not supported; convert it to RGB or grey")
        width, height = picture.size if _orientation(picture) < 5 else picture.size[::-1]
        return _Header(height, width, channels=channels[picture.mode], bits=16 if deep else 8)


def _decode(data: bytes) -> np.ndarray:
    """[C, H, W] float32 counts of a picture."""
    with _image(io.BytesIO(data)) as picture:
        turned = _orientation(picture)
        if not _png16(data[:32]):
            return _planes(np.asarray(_opaque(picture)), turned)
        if picture.mode != "RGB":
            return _planes(np.asarray(picture), turned)
    # Pillow keeps the first byte of a 16-bit RGB sample only. Read as little-endian, that is the second one.
    high, low = (_raw(data, mode) for mode in ("RGB;16B", "RGB;16L"))
    return _planes(high.astype(np.uint16) * 256 + low, turned)


def _orientation(picture: Image.Image) -> int:
    """Where EXIF says that the first row and column of pixels are shown, 1 (as stored) to 8; tag 274 of TIFF 6.0."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its EXIF is damaged; its pixels need not be
            found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, OSError, struct.error, KeyError, TypeError):
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _raw(data: bytes, mode: str) -> np.ndarray:
    with _image(io.BytesIO(data)) as picture:
        picture.tile = [tile._replace(args=mode) for tile in picture.tile]
        return np.asarray(picture)


def _opaque(picture: Image.Image) -> Image.Image:
    """An 8-bit picture as L or RGB."""
    grey = picture.mode in ("L", "LA", "1")
    if "A" in picture.mode or "transparency" in picture.info:
        if np.asarray(picture.convert("RGBA").getchannel("A")).min() < 255:
            raise ValueError("it has transparent pixels; flatten it")
    return picture.convert("L" if grey else "RGB")


def _planes(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[C, H, W] float32 of pixels [h, w] or [h, w, C], upright."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if orientation > 4:  # the first row of pixels is a side
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=np.float32)
