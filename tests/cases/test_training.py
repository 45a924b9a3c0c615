"""Training and what it leaves: bad settings, damaged and lost files, second owners, interruptions. Whole runs that are killed are
in tests/engine/train/test_nothing_lost.py and tests/soak.py."""

import hashlib
import json
import os
import shutil
import signal

import h5py
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import toy
from case_files import cutout, cutouts, pictures, run
from PIL import Image
from plain import flip, write_world

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.exclusive import exclusive, exclusive_file
from armillary.engine.sealed_json import sealed
from armillary.engine.token_cache.cache import TokenCache, TokenCacheError, TokenLayout
from armillary.engine.token_cache.fill import TokenCacheFill
from armillary.engine.token_cache.identity import compare_probe
from armillary.engine.train.loop import StopRequest
from armillary.engine.train.start import start
from armillary.engine.train.telemetry import LineFile, _keep_until
from armillary.engine.weights import checkpoint, resume
from armillary.engine.weights.verify import CheckpointError, listed_files


@pytest.fixture
def recipe(tmp_path):
    return toy.toy_run(tmp_path / "runs", toy.toy_survey(tmp_path / "survey"))


SETTINGS = {
    "a learning rate of nothing": ("--optim.lr nan", "optim.lr: must be a finite number > 0, got nan"),
    "a seed of 70 bits": (f"--seed {2**70}", "seed: must be in 0 .. 2^64 - 1"),
    "a batch that ranks cannot share": ("--train.global-batch 7", "must be a multiple of micro_batch * ranks"),
    "more samples than there are": ("--train.global-batch 99999999", "must be at most the 1000 samples"),
    "a name that is a path": ("--name ../other", "name: must be of letters, digits"),
    "a name of two lines": ("--name a\\nb", "name: must be of letters, digits"),
    "a split of nothing": ("--data.split nowhere", "must be one that the survey has (train), got 'nowhere'"),
    "a survey that is none": ("--data.path /dev/null", "data.path: must be a packed survey"),
    "a device that is not there": ("--device tpu", "device"),
    "no checkpoints": (
        "--checkpoint.keep 0 --checkpoint.every-minutes nan",
        "checkpoint.every_minutes: must be a finite",
    ),
    "momentum of 2": ("--schedule.ema-momentum.start 2", "schedule.ema_momentum.start: must be in [0, 1], got 2.0"),
    "words for numbers": ("--train.steps 1e3", ""),
    "a plan of nothing": ("--plan --train.micro-batch 0", "train.micro_batch: must be at least 1, got 0"),
    "a plan into nowhere": ("--plan --plan.out /proc/plan.html", "/proc/plan.html: cannot be written"),
    "a plan into a folder": ("--plan --plan.out /", "/: must be a file, got a folder"),
    "a file that is not there": ("--restore /nowhere", "--restore: must be an existing file, got /nowhere"),
}


@pytest.mark.case(
    kind="settings of a run", inputs=", ".join(SETTINGS), right="exit 2 before work, field and value named"
)
@pytest.mark.parametrize(("words", "message"), SETTINGS.values(), ids=SETTINGS)
def test_bad_settings(recipe, capsys, words, message):
    assert start(recipe, {}, [word.replace("\\n", "\n") for word in words.split(" ")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not recipe.folder.exists()


@pytest.mark.case(
    kind="damaged checkpoints",
    inputs="a bit flipped in each file",
    right="refused by name, and the newest whole one named",
)
def test_a_bit_in_each_file_of_a_checkpoint(recipe):
    folder = recipe.folder / "checkpoints"
    write_world(recipe, folder, 2, step=4)
    newest = write_world(recipe, folder, 2, step=8)
    for name in [*listed_files(newest), "manifest.json"]:
        kept = (newest / name).read_bytes()
        flip(newest / name, len(kept) // 2)
        with pytest.raises(
            CheckpointError, match=rf"{name}.*newest whole one is step-00000004: delete .*step-00000008"
        ):
            resume.open_archive(newest)
        (newest / name).write_bytes(kept)
    resume.open_archive(newest)


@pytest.mark.case(
    kind="damaged checkpoints", inputs="`latest` lost, garbled, or leading elsewhere", right="the newest whole one"
)
@pytest.mark.parametrize("text", [None, b"", b"\xff\x00", b"../../other/step-00000009", b"step-00000009"])
def test_a_lost_pointer(recipe, text):
    newest = write_world(recipe, recipe.folder / "checkpoints", 1)
    (newest.parent / "latest").unlink()
    if text is not None:
        (newest.parent / "latest").write_bytes(text)
    assert checkpoint.latest(newest.parent) == newest


@pytest.mark.case(
    kind="damaged checkpoints", inputs="files that its manifest does not list, or in other folders", right="not read"
)
def test_files_beside_a_checkpoint(recipe):
    newest = write_world(recipe, recipe.folder / "checkpoints", 1)
    (newest / "shard-00001.safetensors").write_bytes(b"of nobody")
    archive, _ = resume.open_archive(newest)
    assert [path.name for path in archive.files] == ["shard-00000.safetensors"]
    listed = newest / "manifest.json"
    records = json.loads(listed.read_text().replace("shard-00000", "../shard-00000"))
    listed.write_text(json.dumps(sealed({name: record for name, record in records.items() if name != "sha256"})))
    with pytest.raises(CheckpointError, match="must name files of its own folder"):
        resume.open_archive(newest)


@pytest.mark.case(
    kind="interruptions", inputs="SIGTERM, SIGINT, SIGHUP (a closed terminal)", right="a step's end, saved, exit 75"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_ask(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which a run respects
    stop = StopRequest()
    os.kill(os.getpid(), number)
    stop.forget()
    assert stop.asked


@pytest.mark.case(
    kind="interruptions", inputs="the run's folder moved or deleted under way", right="the log goes on in a new one"
)
def test_a_run_folder_that_is_deleted(tmp_path):
    (tmp_path / "run").mkdir()
    lines = LineFile(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run")
    assert lines.append("{}") is None
    lines.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.case(
    kind="exclusive use", inputs="export, data export into a file that another writes", right="exit 2, the writer named"
)
def test_a_file_in_use(tmp_path, build, capsys):
    out, survey = tmp_path / "out.parquet", build(cutouts(tmp_path / "s")).folder
    with exclusive_file(out):
        for words in (("export", tmp_path / "run"), ("data", "export", survey, "--format", "parquet", "--no-progress")):
            assert run(*words, "-o", out) == 2
            assert f"{out}: in use by" in capsys.readouterr().err


@pytest.mark.case(kind="exclusive use", inputs="a token cache that another run fills", right="refused, the run named")
def test_a_token_cache_in_use(tmp_path):
    fill = TokenCacheFill(tmp_path, TokenLayout(4, "float16", {"image_tokens": (2, 3)}), {})
    with exclusive(tmp_path), pytest.raises(TokenCacheError, match="data.token_cache: .*: in use by .*process"):
        with fill.prepared():
            pass


@pytest.mark.case(
    kind="changed catalogues",
    inputs="a label of catalog.parquet changed after the build",
    right="refused by all that read it",
)
def test_a_changed_catalogue(tmp_path, build, capsys):
    folder = build(cutouts(tmp_path / "s", 4), "--split", "random:1", "--test-fraction", "0.5").folder
    table = pq.read_table(folder / "catalog.parquet")
    place = table.column_names.index("ra")
    pq.write_table(table.set_column(place, "ra", pc.add(table["ra"], 1.0)), folder / "catalog.parquet")
    for words in (
        ("leaks",),
        ("graph", "--k", "1"),
        ("stats", "-o", tmp_path / "x.png"),
        ("export", "--format", "parquet", "-o", tmp_path / "x"),
    ):
        assert run("data", words[0], folder, *words[1:]) == 2
        assert "catalog.parquet: its SHA-256 is" in capsys.readouterr().err


@pytest.mark.case(
    kind="splits",
    inputs="cutouts that overlap across the border of a split",
    right="the training one is the split `border`",
)
def test_cutouts_across_a_border(tmp_path, build, capsys):
    for name, dec in {"far": 1.0, "below": 1.9999, "above": 2.0001, "inside": 2.5}.items():
        cutout(tmp_path / "s" / f"{name}.fits", dec=dec)
    built = build(tmp_path / "s", "--split", "dec:2:3")
    splits = dict(zip(built.catalog["key"], built.catalog["split"], strict=True))
    assert splits == {"far": "train", "below": "border", "above": "test", "inside": "test"}
    assert run("data", "leaks", built.folder) == 0 and "share nothing within" in capsys.readouterr().out


@pytest.mark.case(kind="pictures", inputs="a JPEG or PNG that EXIF turns", right="upright, as it is shown")
def test_a_picture_that_exif_turns(tmp_path, build):
    folder = pictures(tmp_path / "s", 2)
    pixels = np.random.default_rng(5).integers(0, 255, (12, 12), np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # shown a quarter to the right
    for path in folder.iterdir():
        path.unlink()
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    np.testing.assert_array_equal(build(folder).samples()["a"].image[0], np.rot90(pixels, -1))


@pytest.mark.case(
    kind="tables",
    inputs="HDF5 with a data set of another length, a scalar, a group, ragged rows",
    right="left out and named",
)
def test_an_hdf5_table_with_odd_data_sets(tmp_path, build):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["g"], file["r"], file["z"] = np.arange(4.0), np.arange(4.0), np.arange(4.0)
        file["edges"], file["scale"], file["more/x"] = np.arange(5.0), 0.5, np.arange(4)
        file.create_dataset("ragged", (4,), h5py.vlen_dtype(np.float32))
    built = build(tmp_path / "t.h5", "--kind", "table", "--option", "vectors={'m':('g','r')}", "--split", "random:0")
    assert built.code == 0 and sorted(built.catalog["z"]) == [0, 1, 2, 3]
    assert "left out 4 columns" in built.err and "edges" not in built.catalog


def lacks(name):
    """A state.json without an entry, in a manifest that fits it, as another version may have written it."""

    def change(recipe):
        newest = write_world(recipe, recipe.folder / "checkpoints", 1)
        state = json.loads((newest / "state.json").read_text())
        del state[name]
        text = json.dumps(state)
        listed = json.loads((newest / "manifest.json").read_text())
        listed["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        del listed["sha256"]
        (newest / "state.json").write_text(text)
        (newest / "manifest.json").write_text(json.dumps(listed))
        resume.open_archive(newest)

    return change


def a_log_that_is_none(recipe):
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "run.json").write_text("[]")
    RunLog.read(recipe.folder)


def a_survey_with(change):
    def write(recipe):
        path = recipe.data.path / "survey.json"
        described = json.loads(path.read_text())
        described["shards"][0] |= change
        del described["sha256"]
        path.write_text(json.dumps(described))
        Survey.load(recipe.data.path)

    return write


def a_fill_with(name, data):
    def write(recipe):
        folder = recipe.out / "tokens"
        (folder / ".fill").mkdir(parents=True)
        (folder / name).write_bytes(data)
        if name == "probe.safetensors":
            compare_probe(folder, {"image_tokens": torch.zeros(2, 1, 1)}, "fp32")
        with TokenCacheFill(folder, TokenLayout(4, "float16", {"image_tokens": (2, 3)}), {}).prepared():
            pass

    return write


RECORDS = {
    "state.json without its run": (lacks("run"), "must be a checkpoint, got one that cannot be read: .*no 'run'"),
    "state.json without counters": (lacks("progress"), "must be a checkpoint, got one that cannot be read: 'progress'"),
    "run.json that is a list": (a_log_that_is_none, "run.json: not a run's record"),
    "survey.json with words for numbers": (a_survey_with({"count": "7"}), "survey.json: not a readable survey description"),
    "survey.json with shards elsewhere": (a_survey_with({"name": "../x.tar"}), "shards must have a file's name"),
    "plan.json cut short": (a_fill_with(".fill/plan.json", b'{"form'), "plan.json is damaged .* to fill it anew"),
    "probe.safetensors cut short": (a_fill_with("probe.safetensors", b"\x10"), "probe.safetensors is damaged .* anew"),
    "tokens.json that is a list": (lambda recipe: a_cache(recipe, "[]"), "must be a complete token cache"),
    "tokens.json of lists": (lambda recipe: a_cache(recipe, '{"samples": 1, "dtype": "float16", "shapes": []}'), "complete"),
}  # fmt: skip


def a_cache(recipe, text):
    recipe.out.mkdir()
    (recipe.out / "tokens.json").write_text(text)
    TokenCache(recipe.out, EpochOrder.of(Survey.load(recipe.data.path), "train"))


@pytest.mark.case(kind="malformed records", inputs=", ".join(RECORDS), right="refused, the file and what to do named")
@pytest.mark.parametrize(("read", "message"), RECORDS.values(), ids=RECORDS)
def test_malformed_records(recipe, read, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        read(recipe)


@pytest.mark.case(
    kind="malformed records",
    inputs="metrics.jsonl that ends in bytes that are no text",
    right="its whole lines are kept",
)
def test_a_log_that_ends_in_no_text(recipe):
    recipe.folder.mkdir(parents=True)
    lines = recipe.folder / "metrics.jsonl"
    lines.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": "x", "loss": 1}\n[1]\n{"step": 2, "lo\0\xff\xfe')
    (recipe.folder / "run.json").write_text('{"run": {"name": "r"}}')
    assert RunLog.read(recipe.folder).last("loss") == 2.5
    _keep_until(lines, 5)
    assert lines.read_bytes() == b'{"step": 1, "loss": 2.5}\n'
