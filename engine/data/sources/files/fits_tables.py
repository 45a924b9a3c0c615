"""What readers of survey FITS files share: opening, columns and units, with errors that name file, HDU and column."""

from __future__ import annotations

import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.io import fits

from armillary.engine.data.sources.hdus import all_hdus

__all__ = ["FLUX_UNIT", "READ_ERRORS", "Table", "check_flux_unit", "damage_of", "is_plain", "open_fits"]

READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    zlib.error,
    fits.VerifyError,
    UserWarning,
)
"""What astropy raises for damaged files."""

FLUX_UNIT = "1e-17 erg/s/cm2/angstrom"
UNIT_TOLERANCE = 1e-6  # relative
FORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])")
CODES = {"L": "u1", "X": "u1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "A": "S1", "E": ">f4", "D": ">f8"}
CODES |= {"C": ">c8", "M": ">c16", "P": ">i8", "Q": ">c16"}  # the last two are pairs: bytes are all that counts


def open_fits(path: Path, *, unsigned: bool = True) -> Any:
    """Open a FITS file and read the headers of all its HDUs; memory-mapped unless it is compressed.

    Args:
        path: The file; its first bytes tell whether it is compressed.
        unsigned: Keep FITS's unsigned whole numbers whole. Otherwise they become floats, and BLANK becomes NaN.

    Raises:
        ValueError: It is no FITS file, or shorter than its headers say.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # astropy reports every repair of a sloppy header
            warnings.filterwarnings("error", message=".*truncated")
            if not is_plain(path):
                hdus = fits.open(path, memmap=False, uint=unsigned)
                _read_headers(hdus)
                return hdus
            file = open(path, "rb")
            try:
                hdus = fits.open(file, memmap=None, uint=unsigned)  # True refuses images with BZERO, such as masks
                _read_headers(hdus)
            except BaseException:
                file.close()
                raise
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not readable as FITS: {error}") from error
    return hdus


def _read_headers(hdus: Any) -> None:
    """Read the headers of all HDUs, or close the file."""
    try:
        for _ in all_hdus(hdus):
            pass
    except BaseException:
        hdus.close()
        raise


def damage_of(path: Path, error: BaseException) -> str:
    """What an error says of a file, without the file's name and that it is not readable."""
    return str(error).removeprefix(f"{path}: ").removeprefix("not readable as FITS: ")


def is_plain(path: Path) -> bool:
    """Whether a file begins as FITS does, uncompressed."""
    with open(path, "rb") as file:
        return file.read(6) == b"SIMPLE"


class Table:
    """A binary table, read whole and taken apart by numpy.

    astropy describes every column by an object with a dozen checked properties, which for the 240 columns of an SDSS
    spectrum takes twenty times as long as reading it.

    Args:
        path: The file, for errors.
        hdu: The HDU.

    Attributes:
        name: Name of the HDU for errors.
        count: Rows.
        columns: Names in stored order, in upper case.

    Raises:
        ValueError: It is no binary table, or its header contradicts itself.
    """

    def __init__(self, path: Path, hdu: Any) -> None:
        self.path = path
        self.name = hdu.name or "without a name"
        if not isinstance(hdu, fits.BinTableHDU):
            raise ValueError(f"{path}: HDU {self.name} is no table but {type(hdu).__name__}")
        self._header = hdu.header
        self.count = int(self._header["NAXIS2"])
        self._fields: dict[str, tuple[int, str, int]] = {}
        offset = 0
        for number in range(1, int(self._header["TFIELDS"]) + 1):
            form = str(self._header.get(f"TFORM{number}", "")).strip()
            parsed = FORM.match(form)
            if not parsed:
                raise ValueError(f"{path}: HDU {self.name}: TFORM{number} = {form!r} is no format of a binary table")
            repeat, code = int(parsed[1] or 1), parsed[2]
            name = str(self._header.get(f"TTYPE{number}", f"column {number}")).strip().upper()
            self._fields.setdefault(name, (offset, form, number))
            offset += (repeat + 7) // 8 if code == "X" else repeat * np.dtype(CODES[code]).itemsize
        if offset != self._header["NAXIS1"]:
            raise ValueError(
                f"{path}: HDU {self.name}: its columns take {offset} bytes a row, NAXIS1 is {self._header['NAXIS1']}"
            )
        self.columns = list(self._fields)
        place = hdu.fileinfo()
        place["file"].seek(place["datLoc"])
        data = place["file"].read(self.count * offset)
        if len(data) != self.count * offset:
            raise ValueError(
                f"{path}: HDU {self.name}: it has {len(data)} of {self.count * offset} bytes; the file is truncated"
            )
        self._data = np.frombuffer(data, np.uint8).reshape(self.count, offset)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a column; case does not matter."""
        return name.upper() in self._fields

    def has_value(self, name: str) -> bool:
        """Whether there is such a column, with one value a row."""
        parsed = FORM.match(self._fields[name.upper()][1]) if name in self else None
        return parsed is not None and (parsed[2] == "A" or parsed[1] in ("", "1"))

    def require(self, *names: str) -> str:
        """The first of a column's names that is there.

        Raises:
            ValueError: None is.
        """
        found = next((name for name in names if name in self), None)
        if found is None:
            also = f" (nor {', '.join(names[1:])})" if names[1:] else ""
            raise ValueError(
                f"{self.path}: column {names[0]!r} of HDU {self.name}: missing{also}; it has "
                f"{', '.join(self.columns) or 'none'}"
            )
        return found

    def numbers(self, *names: str) -> np.ndarray:
        """A column of numbers, by the first of its names that is there.

        Returns:
            [N] of its own type in the machine's byte order.

        Raises:
            ValueError: There is no such column, or it does not hold one number a row.
        """
        name = self.require(*names)
        values = self._values(name)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{self._where(name)}: holds {self._fields[name.upper()][1]!r}, not numbers")
        return values

    def texts(self, *names: str) -> np.ndarray:
        """A column as text without blanks around it; whole numbers keep all their digits.

        Returns:
            [N] str.

        Raises:
            ValueError: There is no such column, or it does not hold one value a row.
        """
        values = self._values(self.require(*names))
        if values.dtype.kind == "S":
            values = np.char.decode(values, "ascii", "replace")
        return np.char.strip(values.astype(str))

    def _where(self, name: str) -> str:
        return f"{self.path}: column {name!r} of HDU {self.name}"

    def _values(self, name: str) -> np.ndarray:
        offset, form, number = self._fields[name.upper()]
        parsed = FORM.match(form)
        assert parsed is not None  # the constructor saw to it
        repeat, code = int(parsed[1] or 1), parsed[2]
        if code == "A":
            dtype = np.dtype(f"S{max(repeat, 1)}")
            repeat = min(repeat, 1)
        else:
            dtype = np.dtype(CODES[code])
        if repeat != 1 or code in "XPQ":
            raise ValueError(f"{self._where(name)}: holds {form!r}, and must hold one value a row")
        raw = np.ascontiguousarray(self._data[:, offset : offset + dtype.itemsize]).reshape(-1).view(dtype)
        if code == "L":
            return raw == ord("T")
        if code == "A":
            return raw
        values = raw.astype(dtype.newbyteorder("="))
        zero, scale = self._header.get(f"TZERO{number}", 0), self._header.get(f"TSCAL{number}", 1)
        if scale == 1 and zero == 1 << 8 * dtype.itemsize - 1 and code in "IJK":  # FITS's unsigned whole numbers
            return values.view(f"u{dtype.itemsize}") + np.array(zero, f"u{dtype.itemsize}")
        return values if (scale, zero) == (1, 0) else values * float(scale) + float(zero)


def check_flux_unit(path: Path, where: str, text: object) -> None:
    """Refuse fluxes that are not in 1e-17 erg/s/cm2/angstrom; a file that names none has the unit of its format.

    Args:
        path: The file, for errors.
        where: Where the unit was found.
        text: The unit as the file spells it; None or "" where it does not.

    Raises:
        ValueError: The unit is another one, or unintelligible.
    """
    if not text or not str(text).strip():
        return
    spelled = re.sub(r"\bang(strom)?s?\b", "Angstrom", str(text), flags=re.IGNORECASE)
    spelled = re.sub(r"\bergs\b", "erg", spelled)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two slashes
            factor = units.Unit(spelled).to(units.Unit("1e-17 erg / (s cm2 Angstrom)"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {where}: its unit is {text!r}, and must be {FLUX_UNIT}: {error}") from error
    if abs(factor - 1) > UNIT_TOLERANCE:
        raise ValueError(f"{path}: {where}: its unit {text!r} is {factor:g} times {FLUX_UNIT}, and must be equal to it")
