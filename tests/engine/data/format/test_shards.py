import json
import re
import subprocess
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from armillary.engine.data.building.build import build
from armillary.engine.data.format.shards import ShardWriter, read_index, read_members, write_index
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.sources.surveys.images import Pictures

BLOBS = {
    "a": {"img": b"x" * 100},
    "b_2": {"img": b"", "spc": b"s" * 700, "vec": b"v" * 8},
    "c-3": {"spc": b"y" * 512},
    "d" * 96: {"img": b"z" * 5000, "vec": b"w"},
}


def write(path, blobs=None):
    with ShardWriter(path, "train") as writer:
        for key, parts in (BLOBS if blobs is None else blobs).items():
            writer.add(key, parts)
    return writer


def test_same_content_gives_the_same_bytes_and_the_record_fits(tmp_path):
    (tmp_path / "x").mkdir()
    first, second = write(tmp_path / "s.tar"), write(tmp_path / "x" / "s.tar")
    raw = (tmp_path / "s.tar").read_bytes()
    assert raw == (tmp_path / "x" / "s.tar").read_bytes() and first.record == second.record
    assert (first.record.name, first.record.split, first.record.count) == ("s.tar", "train", 4)
    assert first.record.bytes == len(raw) and len(raw) % tarfile.RECORDSIZE == 0
    digest = subprocess.run(["sha256sum", tmp_path / "s.tar"], capture_output=True, text=True, check=True).stdout
    assert digest.split()[0] == first.record.sha256
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["s.tar", "x"]  # nothing temporary is left


def test_python_and_offsets_read_it(tmp_path):
    writer = write(tmp_path / "s.tar")
    raw = (tmp_path / "s.tar").read_bytes()
    assert raw[257:265] == b"ustar\x0000"
    with tarfile.open(tmp_path / "s.tar") as tar:
        headers = tar.getmembers()
        assert {h.name: tar.extractfile(h).read() for h in headers} == {
            f"{k}.{extension}": v for k, blobs in BLOBS.items() for extension, v in blobs.items()
        }
    assert {(h.mtime, h.uid, h.gid, h.uname, h.gname, h.mode) for h in headers} == {(0, 0, 0, "", "", 0o644)}
    for member in writer.members:
        assert {p.extension: raw[p.offset : p.offset + p.size] for p in member.parts} == BLOBS[member.key]
        assert raw[member.offset :][: member.size].endswith(list(BLOBS[member.key].values())[-1])
        assert member.part("img") is None or member.part("img").offset == member.offset
    assert list(read_members(tmp_path / "s.tar")) == writer.members


def test_index_is_the_one_that_dali_would_write(tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    writer = write(tmp_path / "s.tar")
    index = write_index(tmp_path / "s.tar")
    with wds2idx.IndexCreator(str(tmp_path / "s.tar"), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    assert index.read_text() == (tmp_path / "dali.idx").read_text()
    assert read_index(index) == writer.members
    assert write_index(tmp_path / "s.tar", writer.members).read_text() == index.read_text()


def test_webdataset_reads_keys_and_blobs(tmp_path):
    tariterators = pytest.importorskip("webdataset.tariterators")
    write(tmp_path / "s.tar")
    with open(tmp_path / "s.tar", "rb") as f:
        members = tariterators.tar_file_expander([{"url": "s.tar", "stream": f}])
        samples = list(tariterators.group_by_keys(members))
    assert {s["__key__"]: {e: s[e] for e in ("img", "spc", "vec") if e in s} for s in samples} == BLOBS


def test_an_error_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "s.tar", "train")
    with pytest.raises(KeyError), writer:
        writer.add("a", {"img": b"x"})
        raise KeyError("stop")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=r"s\.tar: the shard is not finished"):
        _ = writer.record


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "é", "x" * 97])
def test_keys_that_do_not_fit_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must be 1 to 96 letters"):
        write(tmp_path / "s.tar", {key: {"img": b"x"}})


@pytest.mark.parametrize("blobs", [{}, {"jpg": b"x"}])
def test_blobs_of_no_modality_are_refused(tmp_path, blobs):
    with pytest.raises(ValueError, match="key 'a': blobs must be some of img, spc, vec"):
        write(tmp_path / "s.tar", {"a": blobs})


def test_repeated_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"key 'a': already in s\.tar"), ShardWriter(tmp_path / "s.tar", "t") as writer:
        writer.add("a", {"img": b"x"})
        writer.add("a", {"img": b"y"})


def test_truncated_tars_are_seen(tmp_path):
    writer = write(tmp_path / "s.tar")
    raw = (tmp_path / "s.tar").read_bytes()
    last = writer.members[-1]
    for length in (0, 100, 512, last.offset + 10, last.offset + last.size, last.offset + 5120, last.offset + 5632):
        (tmp_path / "s.tar").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="truncated|not a readable tar"):
            list(read_members(tmp_path / "s.tar"))


def test_foreign_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=r"member 'a\.jpg' is none of <key>\.img, <key>\.spc"):
        list(read_members(tmp_path / "s.tar"))


@pytest.mark.parametrize("text", ["", "v1.1 1\nimg 512 1 a.img\n", "v1.2 2\nimg 512 1 a.img\n", "v1.2 1\nimg 512\n", "v1.2 1\njpg 512 1 a.jpg\n", "v1.2 1\nimg 512 1 a.img spc 1536 1 b.spc\n", "v1.2 x\n"])  # fmt: skip
def test_malformed_indices_are_refused(tmp_path, text):
    (tmp_path / "s.idx").write_text(text)
    with pytest.raises(ValueError, match=r"not a DALI index of version v1\.2"):
        read_index(tmp_path / "s.idx")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A survey of 12 pictures in shards of 4, built once."""
    root = tmp_path_factory.mktemp("sound")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)).save(root / "in" / f"p{i:02d}.png")
    (root / "in" / "labels.csv").write_text("file,z,type\np00,0.1,Sa\np01,0.2,\n")
    build(Pictures(root / "in"), root / "out", name="tiny", samples_per_shard=4, progress=False)
    return root / "out"


@pytest.fixture
def survey(sound, tmp_path):
    """A copy to damage."""
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite_catalog(folder, change):
    pq.write_table(change(pq.read_table(folder / "catalog.parquet")), folder / "catalog.parquet")


def edit_json(folder, change):
    raw = json.loads((folder / "survey.json").read_text())
    del raw["sha256"]
    change(raw)
    (folder / "survey.json").write_text(json.dumps(raw))


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def middle_of_blob(folder, row):
    entry = pq.read_table(folder / "catalog.parquet").slice(row, 1).to_pylist()[0]
    return Survey.load(folder).shards[entry["shard"]].name, entry["offset"] + entry["size"] // 2, entry["key"]


@pytest.mark.parametrize("options", [{}, {"blobs": 2}, {"blobs": 0, "checksums": False, "threads": 1}])
def test_a_sound_survey_has_no_problems(sound, options):
    seen = []
    assert check_survey(sound, progress=seen.append, **options) == []
    assert sum(seen) == 12


def set_column(name, values):
    return lambda t: t.set_column(t.schema.names.index(name), name, pa.array(values, t.schema.field(name).type))


def repeat_key(table):
    keys = table["key"].to_pylist()
    return set_column("key", [keys[1], *keys[1:]])(table)


DAMAGE = {
    "no survey": (lambda f: (f / "survey.json").unlink(), "survey.json", "no survey here"),
    "not json": (lambda f: (f / "survey.json").write_text("{"), "survey.json", "not a readable survey"),
    "version": (lambda f: edit_json(f, lambda r: r.update(format_version=9)), "survey.json", "format version 9"),
    "a digit": (lambda f: (f / "survey.json").write_text((f / "survey.json").read_text().replace('"width": 8', '"width": 9')), "survey.json", "its SHA-256 differs"),
    "bands": (lambda f: edit_json(f, lambda r: r.update(bands=5)), "survey.json", "bands must be names, got 5"),
    "side": (lambda f: edit_json(f, lambda r: r.update(height=10**9)), "survey.json", "height and width must be 0 .. 65535"),
    "labels": (lambda f: edit_json(f, lambda r: r.update(labels={"z": 1})), "survey.json", "labels must be names with their meaning"),
    "nested": (lambda f: (f / "survey.json").write_text("[" * 100_000), "survey.json", "not a readable survey"),
    "no catalogue": (lambda f: (f / "catalog.parquet").unlink(), "catalog.parquet", "missing"),
    "cut catalogue": (lambda f: (f / "catalog.parquet").write_bytes((f / "catalog.parquet").read_bytes()[:500]), "catalog.parquet", "not readable"),
    "column": (lambda f: rewrite_catalog(f, lambda t: t.drop_columns("ra")), "catalog.parquet", "column 'ra' is missing"),
    "label": (lambda f: rewrite_catalog(f, lambda t: t.drop_columns("z")), "catalog.parquet", "column 'z' is missing"),
    "type": (lambda f: rewrite_catalog(f, lambda t: t.set_column(0, "key", pa.array(range(12)))), "catalog.parquet", "column 'key' is int64, not string"),
    "extra": (lambda f: rewrite_catalog(f, lambda t: t.append_column("w", pa.array(range(12)))), "catalog.parquet", "column 'w' is not among the labels"),
    "rows": (lambda f: rewrite_catalog(f, lambda t: t.slice(1)), "catalog.parquet", "11 rows, survey.json counts 12"),
    "order": (lambda f: rewrite_catalog(f, lambda t: t.take(list(range(11, -1, -1)))), "catalog.parquet", "not in the order of shards"),
    "split": (lambda f: rewrite_catalog(f, set_column("split", ["other"] * 12)), "catalog.parquet", "12 rows are of another split"),
    "duplicate": (lambda f: rewrite_catalog(f, repeat_key), "catalog.parquet", "the key occurs 2 times"),
    "offset": (lambda f: rewrite_catalog(f, set_column("offset", [0] * 12)), "train-000000.tar", "the catalogue says"),
    "no shard": (lambda f: (f / "train-000000.tar").unlink(), "train-000000.tar", "missing"),
    "no index": (lambda f: (f / "train-000000.idx").unlink(), "train-000000.idx", "missing"),
    "bad index": (lambda f: (f / "train-000000.idx").write_text("v1.2"), "train-000000.idx", "not a DALI index"),
    "stale index": (lambda f: (f / "train-000000.idx").write_text((f / "train-000001.idx").read_text()), "train-000000.idx", "says .* at byte"),
    "short index": (lambda f: write_index(f / "train-000000.tar", list(read_members(f / "train-000000.tar"))[:-1]), "train-000000.idx", "3 entries for 4 samples"),
    "cut shard": (lambda f: (f / "train-000000.tar").write_bytes((f / "train-000000.tar").read_bytes()[:2000]), "train-000000.tar", "2000 bytes, survey.json says"),
    "empty shard": (lambda f: (f / "train-000000.tar").write_bytes(b""), "train-000000.tar", "0 bytes"),
    "stranger": (lambda f: (f / "train-000009.tar").write_bytes(b""), "train-000009.tar", "not part of the survey"),
    "codec": (lambda f: edit_json(f, lambda r: r.update(codec="float16")), "train-000000.tar", "a bitplane blob of"),
    "shape": (lambda f: edit_json(f, lambda r: r.update(height=11)), "train-000000.tar", r"survey.json says .*\(3, 11, 8\)"),
    "step": (lambda f: edit_json(f, lambda r: r.update(step=[2.0, 1, 1])), "train-000000.tar", "quantised by"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(survey, name):
    change, file, match = DAMAGE[name]
    change(survey)
    problems = check_survey(survey)
    assert problems
    found = [p for p in problems if p.file == file]
    assert found and re.search(match, found[0].what), problems
    assert all(p.cure and p.file in str(p) and p.cure in str(p) for p in problems)


def test_a_flipped_bit_is_found_by_checksum_and_by_blob(survey):
    name, place, key = middle_of_blob(survey, 5)
    flip(survey / name, place)
    problems = check_survey(survey)
    assert [(p.file, p.key) for p in problems] == [(name, ""), (name, key)]
    assert "SHA-256" in problems[0].what and "CRC" in problems[1].what
    assert [p.key for p in check_survey(survey, checksums=False)] == [key]
    assert check_survey(survey, checksums=False, blobs=0) == []


def test_an_exchanged_shard_is_found(survey):
    (survey / "train-000000.tar").write_bytes((survey / "train-000001.tar").read_bytes())
    files = {p.file for p in check_survey(survey)}
    assert {"train-000000.tar", "train-000000.idx"} <= files


def test_unfinished_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_survey(tmp_path / "none")
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / "plan.json").write_text("{}")
    (problem,) = check_survey(tmp_path)
    assert "not finished" in problem.what and problem.cure == "run the same build again"
