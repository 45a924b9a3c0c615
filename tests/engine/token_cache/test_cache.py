"""Files of cached tokens: round trips, rounding, kills, damage, and folders that hold something else."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.token_cache import fill as fill_module
from armillary.engine.token_cache.cache import CachedTokens, TokenCache, TokenCacheError, TokenLayout
from armillary.engine.token_cache.fill import TokenCacheFill

PLAN = EpochOrder((3, 0, 4, 6), (2, 5, 9, 13))  # rows 2 to 4, 9 to 12 and 13 to 18 of the catalogue
ROWS = [2, 3, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
SHAPES = {"image_tokens": (4, 3), "spectrum_tokens": (7, 2)}
MADE_OF = {"survey": "abc", "views": {"size": 144}}


def tokens(name: str, row: int) -> np.ndarray:
    """What a row's tokens are."""
    return np.random.default_rng([row, len(name)]).normal(0, 3, SHAPES[name]).astype(np.float32)


def parts(chunk: range, size: int = 2):
    """A chunk in batches, as an encoder would hand it over."""
    for first in range(chunk.start, chunk.stop, size):
        rows = [ROWS[i] for i in range(first, min(first + size, chunk.stop))]
        yield first, {name: np.stack([tokens(name, row) for row in rows]) for name in SHAPES}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five samples of float32 a chunk."""
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 5 * 4 * 26)


def fill_of(folder: Path, dtype: str = "float32", made_of=MADE_OF, **changes) -> TokenCacheFill:
    return TokenCacheFill(folder, TokenLayout(**{"samples": 13, "dtype": dtype, "shapes": SHAPES, **changes}), made_of)


def filled(folder: Path, dtype: str = "float32") -> Path:
    fill = fill_of(folder, dtype)
    with fill.prepared():
        for number in fill.pending():
            fill.write(number, parts(fill.chunks[number]))
        fill.finish()
    return folder


def read(folder: Path, rows: list[int], dtype=torch.float32) -> dict:
    cache = TokenCache(folder, PLAN)
    batch = CachedTokens(cache, torch.device("cpu"), dtype, 3)({"row": torch.tensor(rows)}, None)
    cache.close()
    return batch


@pytest.mark.parametrize("rows", [ROWS, [18, 2, 9, 4, 2], [13]], ids=["all", "shuffled", "one"])
def test_float32_comes_back_bit_for_bit(tmp_path, rows):
    batch = read(filled(tmp_path / "f"), rows)
    assert batch["row"].tolist() == rows
    for name in SHAPES:
        assert batch[name].dtype == torch.float32
        np.testing.assert_array_equal(batch[name].numpy(), np.stack([tokens(name, row) for row in rows]))


def test_float16_rounds_to_its_documented_error(tmp_path):
    batch = read(filled(tmp_path / "f", "float16"), ROWS)
    for name in SHAPES:
        exact = np.stack([tokens(name, row) for row in ROWS])
        error = np.abs(batch[name].numpy() - exact)
        assert (error <= np.maximum(2.0**-11 * np.abs(exact), 3e-8)).all() and error.max() > 1e-4
    assert (tmp_path / "f" / "image_tokens.bin").stat().st_size == 13 * 12 * 2


def test_float16_keeps_bfloat16_tokens(tmp_path, monkeypatch):
    exact = {name: torch.randn(13, *shape).bfloat16() for name, shape in SHAPES.items()}
    fill = fill_of(tmp_path, "float16")
    with fill.prepared():
        for number, chunk in enumerate(fill.chunks):
            piece = {name: x[chunk.start : chunk.stop].float().numpy() for name, x in exact.items()}
            fill.write(number, [(chunk.start, piece)])
        fill.finish()
    for name, x in read(tmp_path, ROWS, torch.bfloat16).items():
        if name in SHAPES:
            small = exact[name].float().abs() < 2.0**-14
            assert torch.equal(x[~small], exact[name][~small])


def test_a_killed_fill_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    fill = fill_of(tmp_path)
    assert [len(chunk) for chunk in fill.chunks] == [5, 5, 3]

    def killed():
        for first, arrays in parts(fill.chunks[1]):
            if first == 7:
                raise KeyboardInterrupt
            yield first, arrays

    with pytest.raises(KeyboardInterrupt), fill.prepared():
        fill.write(2, parts(fill.chunks[2]))
        fill.write(1, killed())
    with pytest.raises(TokenCacheError, match="a complete token cache, got"):
        TokenCache(tmp_path, PLAN)
    again = fill_of(tmp_path)
    with again.prepared():
        assert again.pending() == [0, 1]
        with pytest.raises(TokenCacheError, match="all chunks must be filled, got 2 unfinished, first 0"):
            again.finish()
        for number in again.pending():
            again.write(number, parts(again.chunks[number]))
        again.finish()
    assert not (tmp_path / ".fill").exists()
    for name in SHAPES:
        np.testing.assert_array_equal(read(tmp_path, ROWS)[name].numpy(), np.stack([tokens(name, r) for r in ROWS]))


def test_two_runs_do_not_fill_one_folder(tmp_path):
    with (
        fill_of(tmp_path).prepared(),
        pytest.raises(TokenCacheError, match=r"data.token_cache: .*: in use by .*process \d+ on .*; wait"),
    ):
        with fill_of(tmp_path).prepared():
            pass


@pytest.mark.parametrize(
    "change,message",
    [
        ({"made_of": {"survey": "xyz", "views": {"size": 144}}}, "survey 'abc' there, 'xyz' here"),
        ({"made_of": {"survey": "abc", "views": {"size": 96}}}, "views.size 144 there, 96 here"),
        ({"dtype": "float16"}, "dtype 'float32' there, 'float16' here"),
        ({"shapes": {**SHAPES, "image_tokens": (9, 3)}}, "shapes.image_tokens .4, 3. there, .9, 3. here"),
        ({"samples": 14}, "samples 13 there, 14 here"),
    ],
    ids=["survey", "size", "dtype", "shape", "samples"],
)
def test_an_unfinished_fill_of_something_else_is_refused(tmp_path, change, message):
    with fill_of(tmp_path).prepared():
        pass
    with pytest.raises(TokenCacheError, match=message), fill_of(tmp_path, **change).prepared():
        pass


def test_strangers_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TokenCacheError, match="an empty folder or a token cache, got .* with notes.txt"):
        with fill_of(tmp_path).prepared():
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(TokenCacheError, match="a folder that can be written to"), fill_of(tmp_path / "f").prepared():
        pass


def test_a_full_disk_is_found_before_the_first_token(tmp_path):
    with pytest.raises(TokenCacheError, match=r"1456 bytes free .*tokens of 13 samples, 112 bytes each as float32"):
        with fill_of(tmp_path).prepared(lambda folder: SimpleNamespace(free=1000)):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value,dtype,message",
    [
        (np.nan, "float32", "image_tokens must be finite and within float32, got nan in sample 1"),
        (1e5, "float16", r"within float16, got 100000 in sample 1 .*choose data.token_cache_dtype float32"),
    ],
    ids=["nan", "overflow"],
)
def test_tokens_that_cannot_be_stored_are_refused(tmp_path, value, dtype, message):
    fill = fill_of(tmp_path, dtype)
    first, arrays = next(parts(fill.chunks[0]))
    arrays["image_tokens"][1, 2, 0] = value
    with pytest.raises(TokenCacheError, match=message), fill.prepared():
        fill.write(0, [(first, arrays)])


@pytest.mark.parametrize(
    "handed,message",
    [
        (lambda chunk: list(parts(chunk))[1:], "goes on at sample 0, got 2"),
        (lambda chunk: list(parts(chunk))[:2], "ends at sample 5, got 4"),
        (
            lambda chunk: [(0, {name: np.zeros((5, 2, 2), np.float32) for name in SHAPES})],
            "image_tokens must have shape .4, 3.",
        ),
    ],
    ids=["gap", "short", "shape"],
)
def test_parts_that_are_no_chunk_are_refused(tmp_path, handed, message):
    fill = fill_of(tmp_path)
    with pytest.raises(TokenCacheError, match=message), fill.prepared():
        fill.write(0, handed(fill.chunks[0]))
    assert fill.pending() == [0, 1, 2]


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_is_found_when_its_sample_is_read(tmp_path):
    folder = filled(tmp_path / "f")
    flip(folder / "spectrum_tokens.bin", 9 * 56 + 3)
    assert len(read(folder, [row for row in ROWS if row != 15])["row"]) == 12
    with pytest.raises(TokenCacheError, match="spectrum_tokens.bin is corrupt at sample 9 .bytes 504 ... 560."):
        read(folder, [2, 15])


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda f: os.truncate(f / "image_tokens.bin", 600), "image_tokens.bin must have 624 bytes, got 600"),
        (lambda f: (f / "image_tokens.bin").unlink(), "image_tokens.bin must have 624 bytes, got None"),
        (lambda f: os.truncate(f / "rows.crc", 8), "rows.crc must have 104 bytes, got 8"),
        (lambda f: flip(f / "rows.crc", 5), "is damaged: rows.crc is not what tokens.json says"),
        (lambda f: os.truncate(f / "tokens.json", 40), "a complete token cache, got"),
        (lambda f: (f / "tokens.json").write_text("{}"), "a complete token cache, got"),
    ],
    ids=["short", "missing", "short-crc", "crc", "short-json", "empty-json"],
)
def test_damage_is_found_when_the_folder_is_opened(tmp_path, damage, message):
    folder = filled(tmp_path / "f")
    damage(folder)
    with pytest.raises(TokenCacheError, match=message):
        TokenCache(folder, PLAN)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path):
    folder = filled(tmp_path / "f")
    cache = TokenCache(folder, PLAN)
    os.truncate(folder / "image_tokens.bin", 100)
    with pytest.raises(OSError, match="ends before byte 624: cut short since it was opened"):
        cache.read_into("image_tokens", 12, np.empty((4, 3), np.float32))


def test_a_file_cut_short_while_it_is_filled_is_refused(tmp_path):
    fill = fill_of(tmp_path)
    with fill.prepared():
        fill.write(0, parts(fill.chunks[0]))
    os.truncate(tmp_path / "image_tokens.bin", 100)
    with pytest.raises(TokenCacheError, match="image_tokens.bin must have 624 bytes; delete .* to fill it anew"):
        with fill_of(tmp_path).prepared():
            pass


@pytest.mark.parametrize("row", [0, 5, 8, 19])
def test_rows_of_other_splits_have_no_tokens(tmp_path, row):
    cache = TokenCache(filled(tmp_path / "f"), PLAN)
    with pytest.raises(TokenCacheError, match=f"rows must be of the split, got row {row} of catalog.parquet"):
        cache.places(np.array([2, row]))


def test_another_split_is_refused(tmp_path):
    with pytest.raises(TokenCacheError, match="tokens of the 7 samples of the split, got 13"):
        TokenCache(filled(tmp_path / "f"), EpochOrder((7,), (0,)))


def test_an_open_cache_lets_go_of_its_files(tmp_path):
    folder = filled(tmp_path / "f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = TokenCache(folder, PLAN)
        del cache
    assert not [file.path for file in psutil.Process().open_files() if file.path.startswith(str(folder))]
    assert json.loads((folder / "tokens.json").read_text())["complete"] is True
