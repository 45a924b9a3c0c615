"""What the page asks for: a table of addresses and the functions that answer them.

    GET  /                         the page, and its files
    GET  /api/about                what is shown: survey, labels, recipe of the map, what can be done
    GET  /api/points               [N, 2] uint16, little-endian: places in the map
    GET  /api/labels/NAME          [N] float32, little-endian, or uint8 codes of words (255: none)
    GET  /api/objects/NUMBER       key, position and labels of an object
    GET  /api/images/NUMBER        its cutout as PNG
    GET  /api/spectra/NUMBER       its spectrum
    GET  /api/find?q=TEXT          the object with a key, or nearest to a position on the sky
    GET  /api/similar/NUMBER?k=24  the objects most similar to one
    POST /api/similar?k=24         the objects most similar to that of a file, which is the body
    POST /api/export?format=csv    a table of the objects whose numbers (uint32, little-endian) are the body

Numbers are those of `Objects`. A request that cannot be answered gets a sentence, as JSON with the name "problem".
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.search.query import Query
from armillary.engine.evaluate.spectra.figures import LINES
from armillary.engine.explore.export import Format, as_csv, as_fits
from armillary.engine.explore.objects import Objects
from armillary.engine.explore.pictures import Pictures, png, spectrum_curve
from armillary.engine.explore.similar import NotReady, Similar
from armillary.models.rules import one_of

__all__ = ["LARGEST_UPLOAD", "Pages", "Refused", "Reply"]

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
BINARY = "application/octet-stream"

LARGEST_UPLOAD = 64 << 20
MOST_ANSWERS = 500


class Refused(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        problem: A sentence.
    """

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        body: Bytes.
        kind: Their media type.
        status: HTTP status.
        headers: Further headers.
    """

    body: bytes
    kind: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Reply:
        """JSON; there are no NaNs in it."""
        return cls(json.dumps(value, allow_nan=False).encode(), status=status)


class Pages:
    """Answers requests about the objects of a map; safe to use from several threads.

    Args:
        objects: What is shown.
        similar: Search among them.
        about: Sentences about the map and the embeddings, for the page.
        colour: Label that points are coloured by at first; None for none.
    """

    def __init__(self, objects: Objects, similar: Similar, about: Mapping[str, str], colour: str | None) -> None:
        self.objects, self.similar, self.colour = objects, similar, colour
        self.about = dict(about)
        self.pictures = Pictures(objects.survey, objects.catalog_row)
        mark = json.dumps([self.about, objects.survey.name, len(objects)])
        self._session = hashlib.sha256(mark.encode()).hexdigest()[:12]
        self._files = {f"/{p.relative_to(PAGE).as_posix()}": p for p in PAGE.rglob("*") if p.suffix in TYPES}
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
            ("GET", re.compile(r"/api/about"), self._about),
            ("GET", re.compile(r"/api/points"), self._points),
            ("GET", re.compile(r"/api/labels/(?P<name>[^/]+)"), self._label),
            ("GET", re.compile(r"/api/objects/(?P<number>\d{1,12})"), self._object),
            ("GET", re.compile(r"/api/images/(?P<number>\d{1,12})"), self._image),
            ("GET", re.compile(r"/api/spectra/(?P<number>\d{1,12})"), self._spectrum),
            ("GET", re.compile(r"/api/find"), self._find),
            ("GET", re.compile(r"/api/similar/(?P<number>\d{1,12})"), self._similar),
            ("POST", re.compile(r"/api/similar"), self._similar_to_file),
            ("POST", re.compile(r"/api/export"), self._export),
        ]

    def answer(self, method: str, target: str, body: bytes = b"", name: str = "") -> Reply:
        """Answer a request.

        Args:
            method: GET or POST.
            target: Path with its query.
            body: What came with a POST.
            name: Name of the file that the body is.

        Raises:
            Refused: It cannot be answered.
        """
        parts = urllib.parse.urlsplit(target)
        path = urllib.parse.unquote(parts.path)
        options = {k: v[-1] for k, v in urllib.parse.parse_qs(parts.query).items()}
        if method == "GET" and (file := self._files.get("/index.html" if path == "/" else path)):
            return Reply(file.read_bytes(), TYPES[file.suffix], headers={"Cache-Control": "no-cache"})
        others = []
        for wanted, pattern, function in self._routes:
            if not (found := pattern.fullmatch(path)):
                continue
            if wanted != method:
                others.append(wanted)
                continue
            given: dict[str, Any] = found.groupdict()
            if "number" in given:
                given["number"] = self._number(given["number"])
            if method == "POST":
                given |= {"body": body, "name": name}
            return function(options=options, **given)
        if others:
            raise Refused(405, f"{path} takes {others[0]}, not {method}")
        raise Refused(404, f"there is nothing at {path}")

    def _number(self, text: str) -> int:
        if int(text) >= len(self.objects):
            raise Refused(
                404, f"there is no object {text}; the last of {len(self.objects):,} is {len(self.objects) - 1}"
            )
        return int(text)

    def _about(self, options: dict[str, str]) -> Reply:
        survey = self.objects.survey
        return Reply.json(
            {
                **self.about,
                "session": self._session,
                "survey": survey.name,
                "count": len(self.objects),
                "modalities": [m for m in survey.modalities if m != "vectors"],
                "labels": [
                    vars(label) | {"categories": list(label.categories)} for label in self.objects.labels.values()
                ],
                "colour": self.colour,
                "lines": LINES if survey.spectrum is not None else {},
                "takesFiles": self.similar.takes_files,
                "largestUpload": LARGEST_UPLOAD,
            }
        )

    def _points(self, options: dict[str, str]) -> Reply:
        return Reply(self.objects.grid_points().tobytes(), BINARY)

    def _label(self, name: str, options: dict[str, str]) -> Reply:
        try:
            return Reply(self.objects.values(name).tobytes(), BINARY)
        except KeyError:
            raise Refused(404, f"no label {name!r} can be shown by colours") from None

    def _object(self, number: int, options: dict[str, str]) -> Reply:
        return Reply.json(self.objects.describe(number))

    def _image(self, number: int, options: dict[str, str]) -> Reply:
        if (made := self.pictures.image(number)) is None:
            raise Refused(404, "this object has no image")
        return Reply(made, "image/png", headers={"Cache-Control": "private, max-age=3600"})

    def _spectrum(self, number: int, options: dict[str, str]) -> Reply:
        if (made := self.pictures.spectrum(number)) is None:
            raise Refused(404, "this object has no spectrum")
        return Reply.json(made)

    def _find(self, options: dict[str, str]) -> Reply:
        text = options.get("q", "").strip()
        if not text:
            raise Refused(400, "q: must be a key or a position on the sky")
        if (number := self.objects.find(text)) is not None:
            return Reply.json({"number": number, "key": text})
        position = sky_position(text)
        if position is None:
            example = self.objects.key(0)
            raise Refused(404, f"{text!r} is no key here (one is {example}) and no position such as 150.1 2.2")
        found = self.objects.nearest(*position)
        if found is None:
            raise Refused(404, "no object of this survey has a position on the sky")
        number, arcsec = found
        return Reply.json({"number": number, "key": self.objects.key(number), "arcsec": round(arcsec, 3)})

    def _similar(self, number: int, options: dict[str, str]) -> Reply:
        rows, cosines = self.similar.of_row(int(self.objects.order[number]), _answers(options))
        return Reply.json({"key": self.objects.key(number), "number": number, "answers": self._pairs(rows, cosines)})

    def _similar_to_file(self, options: dict[str, str], body: bytes, name: str) -> Reply:
        if not body:
            raise Refused(400, "the file is empty")
        k = _answers(options)
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).name)[-80:].lstrip(".") or "upload"
        with tempfile.TemporaryDirectory(prefix="armillary-explore-") as place:
            path = Path(place) / safe
            path.write_bytes(body)
            try:
                one, rows, cosines = self.similar.of_file(path, k)
            except NotReady:
                raise
            except Exception as error:  # readers of files meet whatever people drop on the page
                said = str(error).replace(str(path), safe).replace(place, "the upload").strip()
                said = re.sub(r"; give the kind \(--kind\).*", "; drop a FITS file, a JPEG or a PNG", said)
                raise Refused(422, f"{safe} cannot be searched for: {said or type(error).__name__}") from error
        return Reply.json({"key": safe, "answers": self._pairs(rows, cosines), **_seen(one)})

    def _pairs(self, rows: np.ndarray, cosines: np.ndarray) -> list[list[float]]:
        return [[int(self.objects.number[row]), round(float(c), 4)] for row, c in zip(rows, cosines, strict=True)]

    def _export(self, options: dict[str, str], body: bytes, name: str) -> Reply:
        if len(body) % 4 or not body:
            raise Refused(400, "the body must hold numbers of objects, four bytes each")
        numbers = np.frombuffer(body, "<u4")
        if numbers.max() >= len(self.objects):
            raise Refused(400, f"there is no object {numbers.max()}")
        form = options.get("format", "csv")
        if problem := one_of("format", form, get_args(Format)):
            raise Refused(400, problem[0])
        table = self.objects.table(numbers)
        made = as_csv(table) if form == "csv" else as_fits(table, dict(self.objects.survey.labels))
        file = f"selection-{len(numbers)}.{form}"
        return Reply(
            made,
            "text/csv" if form == "csv" else "application/fits",
            headers={"Content-Disposition": f'attachment; filename="{file}"'},
        )


def sky_position(text: str) -> tuple[float, float] | None:
    """Right ascension and declination in degrees of "150.1 2.2", "150.1,+2.2" or "10:00:30 +02:12:00"; None of anything else."""
    words = text.replace(",", " ").split()
    if len(words) != 2:
        return None
    try:
        ra, dec = (float(w) for w in words)
    except ValueError:
        from astropy.coordinates import Angle

        try:
            ra, dec = Angle(words[0], "hourangle").degree, Angle(words[1], "deg").degree
        except ValueError:
            return None
    return (ra % 360, dec) if np.isfinite(ra) and -90 <= dec <= 90 else None


def _answers(options: dict[str, str]) -> int:
    text = options.get("k", "24")
    if not text.isdigit() or not 1 <= int(text) <= MOST_ANSWERS:
        raise Refused(400, f"k: must be a number from 1 to {MOST_ANSWERS}, got {text!r}")
    return int(text)


def _seen(one: Query) -> dict[str, Any]:
    """Picture and spectrum of what was in a file."""
    seen: dict[str, Any] = {}
    if one.sample is not None and one.survey is not None:
        if one.sample.image is not None:
            made = png(galaxy_picture(one.sample.image, one.sample.valid, one.survey))
            seen["picture"] = "data:image/png;base64," + base64.b64encode(made).decode()
        if one.sample.spectrum is not None and one.survey.spectrum is not None:
            seen["spectrum"] = spectrum_curve(one.sample.spectrum, one.survey.spectrum)
    return seen
