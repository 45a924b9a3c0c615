"""Corrupt samples and files: named, skipped, replaced, or refused before the start."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_shards import BOTH, assert_right, damage, load, pack, plain, take

from armillary.engine.data.format import codec
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.data.loading.loader import SequentialLoader

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def rows_in_order(folder: Path, epoch: int = 0) -> list[int]:
    return EpochOrder.of(Survey.load(folder), "train", seed=3).rows(epoch, 0, 25).tolist()


@BOTH
def test_a_corrupt_sample_is_named(tmp_path, reader):
    folder = pack(tmp_path / "s")
    row = rows_in_order(folder)[9]
    tar = damage(folder, row)
    with load(folder, reader=reader) as loader:
        take(loader, 2)
        for _ in range(2):  # and again, if someone goes on
            with pytest.raises(codec.CorruptBlob, match=f"sample 'g{row:05d}' .position 9 of epoch 0, row {row}") as e:
                next(loader)
        assert str(tar) in str(e.value) and "CRC-32" in str(e.value) and "on_corrupt='skip'" in str(e.value)
        assert loader.state_dict()["position"] == 8 and loader.corrupt == 0


@BOTH
@pytest.mark.parametrize("world,size", [(1, 8), (2, 2)])
def test_a_skipped_sample_is_replaced_by_the_next_for_any_number_of_ranks(tmp_path, caplog, reader, world, size):
    folder = pack(tmp_path / "s")
    order = rows_in_order(folder)
    for place in (3, 11, 12, 24):  # 11 and 12: the next one is corrupt too; 24: not in this epoch
        damage(folder, order[place])
    wanted = list(order)
    wanted[3], wanted[11], wanted[12] = order[4], order[13], order[13]
    ranks = [
        load(folder, micro_batch=size, accumulation=8 // size // world, rank=r, world=world, reader=reader,
             on_corrupt="skip")
        for r in range(world)
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        parts = [plain(p) for _ in range(24 // size // world) for p in map(next, ranks)]
    for part in parts:
        assert_right(part)
    assert torch.cat([p["row"] for p in parts]).tolist() == wanted[:24]
    assert torch.cat([p["position"] for p in parts]).tolist() == list(range(24))
    assert sum(rank.corrupt for rank in ranks) == 3
    assert f"replaced by sample 'g{order[4]:05d}'" in caplog.text
    for rank in ranks:
        rank.close()


def test_skipping_gives_up_where_nothing_is_left(tmp_path):
    folder = pack(tmp_path / "s", counts={"train": (3,)})
    for row in range(3):
        damage(folder, row)
    with (
        load(folder, micro_batch=2, on_corrupt="skip") as loader,
        pytest.raises(codec.CorruptBlob, match="and so are the samples after it.*armillary data check"),
    ):
        next(loader)


def test_an_image_of_another_size_is_corrupt(tmp_path):
    folder = pack(tmp_path / "s")
    replace(Survey.load(folder), width=8).save(folder)
    with load(folder) as loader, pytest.raises(codec.CorruptBlob, match="shape is 2x9x7, expected 2x9x8"):
        next(loader)


@pytest.mark.parametrize("packed", [False, True], ids=["decoded", "packed"])
@pytest.mark.parametrize("claimed", ["bitplane", "float16"])
def test_a_blob_of_another_codec_is_corrupt(tmp_path, claimed, packed):
    held = {"bitplane": "float16", "float16": "bitplane"}[claimed]
    folder = pack(tmp_path / "s", held)
    replace(Survey.load(folder), codec=claimed).save(folder)
    with (
        load(folder, packed=packed) as loader,
        pytest.raises(codec.CorruptBlob, match=f"codec is {held}, the survey's is {claimed}"),
    ):
        next(loader)


def test_an_empty_blob_is_corrupt(tmp_path):
    folder = pack(tmp_path / "s", counts={"train": (3,)})
    index = folder / "train-000000.idx"
    lines = index.read_text().splitlines()
    lines[2] = " ".join([*lines[2].split()[:2], "0", lines[2].split()[3]])
    index.write_text("\n".join(lines) + "\n")
    with (
        load(folder, micro_batch=3) as loader,
        pytest.raises(codec.CorruptBlob, match="0 bytes from byte .* corrupt: 0"),
    ):
        next(loader)


@pytest.mark.parametrize(
    "break_it,error,message",
    [
        (lambda f: (f / "survey.json").unlink(), FileNotFoundError, "no survey here"),
        (
            lambda f: (f / "train-000002.idx").unlink(),
            FileNotFoundError,
            "train-000002.idx.*missing; write it anew: python -c",
        ),
        (lambda f: (f / "train-000001.tar").unlink(), FileNotFoundError, "train-000001.tar.*missing; copy it again"),
        (
            lambda f: os.truncate(f / "train-000003.tar", 1000),
            ValueError,
            "1000 bytes, but survey.json says.*truncated",
        ),
        (lambda f: os.truncate(f / "train-000003.tar", 10**5), ValueError, "not the file that was packed"),
    ],
)
def test_damage_found_before_the_start(tmp_path, break_it, error, message):
    folder = pack(tmp_path / "s")
    break_it(folder)
    with pytest.raises(error, match=message):
        load(folder)
    if error is ValueError:
        load(folder, micro_batch=2, split="test").close()  # the damage is in another split
        load(folder, micro_batch=2, rank=0, world=2).close()  # shard 3 is looked at by rank 1


def test_the_cure_for_a_missing_index_works(tmp_path):
    folder = pack(tmp_path / "s")
    index = folder / "train-000002.idx"
    content = index.read_bytes()
    index.unlink()
    with pytest.raises(FileNotFoundError) as e:
        load(folder)
    exec(str(e.value).partition('python -c "')[2].removesuffix('"'), {})
    assert index.read_bytes() == content


@BOTH
@pytest.mark.parametrize(
    "content,message",
    [
        ("", "not a complete DALI index"),
        ("v1.2 3\nimg 512 100 a.img\n", "not a complete DALI index"),
        ("v1.1 0\n", "not a complete DALI index"),
        ("v1.2 1\nimg 512 100 a.img\n", "1 samples, but survey.json says 3; write it anew"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, reader, content, message):
    folder = pack(tmp_path / "s", counts={"train": (3,)})
    (folder / "train-000000.idx").write_text(content)
    with load(folder, reader=reader, micro_batch=3) as loader, pytest.raises(ValueError, match=message):
        next(loader)


def test_an_index_line_that_says_nothing(tmp_path):
    folder = pack(tmp_path / "s", counts={"train": (1,)})
    (folder / "train-000000.idx").write_text("v1.2 1\nimg 512 a.img\n")
    with load(folder, micro_batch=1) as loader, pytest.raises(ValueError, match="line 2 is b'img 512 a.img'"):
        next(loader)


@BOTH
def test_a_tar_cut_short_during_the_run(tmp_path, reader):
    folder = pack(tmp_path / "s", counts={"train": (5,)})
    with load(folder, reader=reader, micro_batch=5) as loader:
        os.truncate(folder / "train-000000.tar", 700)
        with pytest.raises(OSError, match="train-000000.tar: ends .* bytes before sample 'g0000") as e:
            next(loader)
    assert any("of epoch 0" in note for note in e.value.__notes__)


@BOTH
def test_sequential_leaves_corrupt_samples_out(tmp_path, reader, caplog):
    folder = pack(tmp_path / "s")
    for row in (0, 1, 2, 9):
        damage(folder, row)
    options = {"split": "train", "batch": 3, "device": "cpu", "reader": reader}
    loader = SequentialLoader(folder, on_corrupt="skip", **options)
    rows = torch.cat([b["row"] for b in loader]).tolist()
    assert rows == [r for r in range(25) if r not in (0, 1, 2, 9)]
    assert loader.corrupt == 4 and caplog.text.count("left out") == 4
    with pytest.raises(codec.CorruptBlob, match="sample 'g00000'"):
        list(SequentialLoader(folder, **options))
