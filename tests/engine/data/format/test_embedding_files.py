"""Embeddings in one file and in a folder of parts are read alike; what is damaged is named."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from armillary.engine.data.format.embedding_files import RECORD, EmbeddingFiles, EmbeddingWriter, vectors_of

ABOUT = {"run": "toy", "readout": "cls"}
KEYS = [f"k{i}" for i in range(50)]
VECTORS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def write_file(path, start=0, stop=50, step=7):
    """Rows written some at a time."""
    with EmbeddingWriter(path, ABOUT) as file:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            file.write(pa.array(KEYS[first:last]), "train", VECTORS[first:last])
    return path


def write_folder(folder, bounds=(0, 20, 21, 50)):
    folder.mkdir()
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        path = write_file(folder / f"part-{start:06d}.parquet", start, stop)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        parts.append(dict(name=path.name, split="train", rows=stop - start, bytes=size, sha256=digest))
    record = {"format": 1, "dimensions": 6, "metadata": ABOUT, "parts": parts}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_rows_come_back_in_pieces_and_whole(tmp_path, write):
    files = EmbeddingFiles.open(write(tmp_path / "e"))
    assert (len(files), files.dimensions, files.metadata) == (50, 6, ABOUT)
    assert files.keys().to_pylist() == KEYS
    pieces = list(files.batches(("key", "vector"), rows=8))
    assert max(map(len, pieces)) <= 8
    assert [k for piece in pieces for k in piece["key"].to_pylist()] == KEYS
    np.testing.assert_array_equal(np.concatenate([vectors_of(piece) for piece in pieces]), VECTORS)
    np.testing.assert_array_equal(files.vector_of("k20"), VECTORS[20:21])
    assert files.vector_of("nobody").shape == (0, 6)


def test_a_damaged_part_is_named_before_its_vectors_are_read(tmp_path):
    folder = write_folder(tmp_path / "e")
    path = folder / "part-000020.parquet"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 1
    path.write_bytes(flipped)
    files = EmbeddingFiles.open(folder)
    with pytest.raises(ValueError, match="part-000020.parquet: damaged: its SHA-256"):
        list(files.chunks())
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="part-000020.parquet: damaged: .* bytes in place of"):
        EmbeddingFiles.open(folder)
    path.unlink()
    with pytest.raises(ValueError, match="part-000020.parquet: missing; copy it again, or run"):
        EmbeddingFiles.open(folder)


def test_a_damaged_page_of_one_file_is_named(tmp_path):
    path = write_file(tmp_path / "e.parquet")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(VECTORS[9].tobytes())] ^= 1
    path.write_bytes(flipped)
    files = EmbeddingFiles.open(path)
    for read in (lambda: list(files.chunks()), lambda: files.vector_of("k9")):
        with pytest.raises(ValueError, match=r"e.parquet: damaged: .*CRC.*; copy it again, or run"):
            read()


@pytest.mark.parametrize(
    ("content", "match"), [("{}", "not a record of embeddings"), ('{"format": 9}', "format 9, this program reads 1")]
)
def test_a_folder_that_is_something_else(tmp_path, content, match):
    with pytest.raises(FileNotFoundError, match="no embeddings here"):
        EmbeddingFiles.open(tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=match):
        EmbeddingFiles.open(tmp_path)
    (tmp_path / RECORD).unlink()
    (tmp_path / ".fill").mkdir()
    with pytest.raises(ValueError, match="not finished; run the same"):
        EmbeddingFiles.open(tmp_path)


def test_a_row_of_another_width_is_refused(tmp_path):
    with EmbeddingWriter(tmp_path / "e", {}) as file:
        file.write(pa.array(["a"]), "train", np.zeros((1, 3)))
        with pytest.raises(ValueError, match="must have 3 dimensions as before, got 4"):
            file.write(pa.array(["b"]), "train", np.zeros((1, 4)))
