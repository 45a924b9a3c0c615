"""All vectors of a sample as one blob: a header, then little-endian float32 in the order of `Survey.vectors`.

    bytes 0..3  "ARMV"     4..7  CRC-32 of all that follows     8..11  version 1     12..15  number of values

A vector that a sample lacks is NaN throughout.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from armillary.engine.data.format.codec import Blob, CorruptBlob
from armillary.engine.data.format.survey import VectorRecord

__all__ = ["decode_vectors", "encode_vectors"]

HEADER = struct.Struct("<4sIII")
MAGIC = b"ARMV"
VERSION = 1


def encode_vectors(vectors: Mapping[str, NDArray[np.float32]], records: Sequence[VectorRecord]) -> bytes:
    """Encode a sample's vectors.

    Raises:
        ValueError: One is unknown to the survey, of another length, or infinite somewhere.
    """
    if strangers := set(vectors) - {r.name for r in records}:
        raise ValueError(f"vector {sorted(strangers)[0]!r}: the source does not declare it")
    values = []
    for record in records:
        value = vectors.get(record.name)
        if value is None:
            values.append(np.full(record.size, np.nan, "<f4"))
            continue
        if value.shape != (record.size,):
            raise ValueError(f"vector {record.name!r}: must have {record.size} components, got shape {value.shape}")
        if np.isinf(value).any():
            component = record.components[int(np.flatnonzero(np.isinf(value))[0])]
            raise ValueError(f"vector {record.name!r}: component {component!r} is infinite; NaN stands for unknown")
        values.append(value.astype("<f4"))
    body = np.concatenate(values).tobytes() if values else b""
    tail = struct.pack("<II", VERSION, len(body) // 4) + body
    return MAGIC + struct.pack("<I", zlib.crc32(tail)) + tail


def decode_vectors(blob: Blob, records: Sequence[VectorRecord]) -> NDArray[np.float32]:
    """Decode all vectors of a sample, one behind the other.

    Raises:
        CorruptBlob: The checksum, the version or the number of values is wrong.
    """
    raw = bytes(blob)
    if len(raw) < HEADER.size:
        raise CorruptBlob(f"corrupt blob: {len(raw)} bytes are too short for vectors")
    magic, checksum, version, count = HEADER.unpack_from(raw)
    if magic != MAGIC or version != VERSION:
        raise CorruptBlob(f"corrupt blob: not vectors of version {VERSION} (begins with {raw[:4]!r})")
    if zlib.crc32(raw[8:]) != checksum:
        raise CorruptBlob("corrupt blob: the checksum does not match")
    expected = sum(record.size for record in records)
    if count != expected or len(raw) != HEADER.size + 4 * count:
        raise CorruptBlob(f"corrupt blob: {count} values in {len(raw)} bytes, the survey's vectors have {expected}")
    return np.frombuffer(raw, "<f4", offset=HEADER.size)
