"""Checkpoints and portable exports: exactness, atomicity, refusals."""

import hashlib
import json
import random
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from plain import FACTS, flip, progress, scrambled, write_world
from safetensors.torch import load_file, save_file

from armillary.engine.config.config_json import to_json
from armillary.engine.weights import checkpoint, portable, resume, verify
from armillary.engine.weights.checkpoint import Progress
from armillary.engine.weights.tensors import Archive, Entry, write_tensors
from armillary.engine.weights.verify import CheckpointError, check_files, check_seal
from armillary.engine.zero.partition import persistent_buffers
from armillary.engine.zero.processes import Ranks


def everything(layout):
    """All that a checkpoint promises to keep, as one dictionary."""
    found = {f"{k}/{f.name}": t.clone() for f in layout.fragments for k, t in layout.state(f).items()}
    found |= {n: p.detach().clone() for n, p in layout.method.named_parameters() if "student" not in n}
    return found | {n: b.clone() for n, b in persistent_buffers(layout.method).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folder(run):
    return run.folder / "checkpoints"


@pytest.fixture
def saved(run, folder, one_process):
    """A checkpoint at step 3 and the layout it is of."""
    layout = scrambled(run)
    layout.refresh_teacher()
    return checkpoint.save(folder, layout, progress(), run, FACTS), layout


def test_everything_comes_back(run, saved):
    path, layout = saved
    torch.rand(3), np.random.rand(2), random.random()  # noqa: NPY002
    draws = torch.rand(4), np.random.rand(4), random.random()  # noqa: NPY002
    other = scrambled(run, seed=2)
    assert not same(everything(other), everything(layout))
    got = resume.load(path, other)
    assert same(everything(other), everything(layout)) and got == progress()
    assert other.applied_steps == 2
    resume.load_random(path, 0)
    torch.rand(3), np.random.rand(2), random.random()  # noqa: NPY002
    again = torch.rand(4), np.random.rand(4), random.random()  # noqa: NPY002
    assert torch.equal(draws[0], again[0]) and (draws[1] == again[1]).all() and draws[2] == again[2]


def test_no_scratch_and_no_teacher_is_stored(saved):
    keys = set(load_file(saved[0] / "shard-00000.safetensors"))
    assert "buffer/center" in keys and "buffer/scratch" not in keys
    assert not any("teacher" in k for k in keys)
    assert {"rng/torch", "rng/numpy"} <= keys and "ema/extra" not in keys


def test_newest_are_kept_and_temporary_ones_cleaned(run, folder, saved):
    (folder / "tmp-step-00000009").mkdir()
    for step in (4, 5, 6):
        checkpoint.save(folder, saved[1], progress(step), run, FACTS)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["latest", "step-00000005", "step-00000006"]
    assert checkpoint.latest(folder).name == "step-00000006"


def test_the_one_that_latest_names_is_never_deleted(folder, saved):
    for step in (7, 8, 9):
        (folder / f"step-{step:08d}").mkdir()
    checkpoint._retain(folder, keep=1)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000003", "step-00000009"]


def test_a_complete_one_that_latest_never_named_is_replaced(run, folder, saved):
    (folder / "step-00000004").mkdir()
    (folder / "step-00000004" / "junk").write_text("")
    checkpoint.save(folder, saved[1], progress(4), run, FACTS)
    resume.open_archive(folder / "step-00000004")
    assert not (folder / "step-00000004" / "junk").exists()


def test_saving_the_same_step_again_changes_nothing(run, folder, saved):
    before = (saved[0] / "manifest.json").stat().st_mtime_ns
    assert checkpoint.save(folder, scrambled(run, seed=7), progress(), run, FACTS) == saved[0]
    assert (saved[0] / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("at", ["write_tensors", "_write_text"])
def test_a_failed_write_leaves_the_former_one(run, folder, saved, monkeypatch, at):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, at, full)
    with pytest.raises(CheckpointError, match="rank 0: .*No space left on device.*step-00000003 is intact"):
        checkpoint.save(folder, saved[1], progress(4), run, FACTS)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000003"]
    resume.open_archive(saved[0])


def test_the_first_failed_write_says_so(run, folder, one_process, monkeypatch):
    monkeypatch.setattr(checkpoint, "_write_shard", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(CheckpointError, match="broken.*there is no earlier one"):
        checkpoint.save(folder, scrambled(run), progress(), run, FACTS)


def test_there_is_no_latest_in_an_empty_folder(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def grow(path):
    with open(path, "ab") as f:
        f.write(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: grow(p / "shard-00000.safetensors"), "must have .* bytes, got"),
        (lambda p: flip(p / "shard-00000.safetensors"), "SHA-256 differs"),
        (lambda p: flip(p / "shard-00000.safetensors", 3), "SHA-256 differs"),
        (lambda p: flip(p / "state.json", 0), "SHA-256 differs"),
        (lambda p: (p / "state.json").unlink(), "is missing"),
        (lambda p: (p / "shard-00000.safetensors").unlink(), "is missing"),
        (lambda p: (p / "manifest.json").unlink(), "must list the checkpoint's files"),
        (lambda p: (p / "manifest.json").write_text("{"), "must list the checkpoint's files"),
        (lambda p: (p / "manifest.json").write_text("{}"), "must list state.json, got nothing"),
        (lambda p: (p / "manifest.json").write_text("[]"), "must list the checkpoint's files .*got a list"),
        (lambda p: (p / "manifest.json").write_text('{"state.json": 3}'), "must list the checkpoint's files"),
        (lambda p: flip(p / "manifest.json", 40), "damaged"),
    ],
)
def test_damage_is_found_and_the_newest_whole_one_named(run, folder, saved, damage, message):
    for step in (4, 5):
        checkpoint.save(folder, saved[1], progress(step), run, FACTS)
    damage(folder / "step-00000005")
    with pytest.raises(
        CheckpointError, match=f"{message}.*the newest whole one is step-00000004: delete .*step-00000005"
    ):
        resume.open_archive(checkpoint.latest(folder))
    flip(folder / "step-00000004" / "state.json")
    with pytest.raises(CheckpointError, match="no other checkpoint of this run is whole"):
        resume.open_archive(folder / "step-00000005")


def test_a_header_that_cannot_be_read_is_damage(run, folder, saved):
    """Also where its hash was not to be compared yet: the newest whole one is named."""
    for step in (4, 5):
        checkpoint.save(folder, saved[1], progress(step), run, FACTS)
    shard = folder / "step-00000005" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"data_offsets", b"data_ofgsets", 1))
    with pytest.raises(CheckpointError, match="shard-00000.safetensors: its SHA-256 differs.*is step-00000004: delete"):
        resume.open_archive(folder / "step-00000005", hashed=["state.json"])


def test_a_checkpoint_that_its_run_deletes_is_not_damaged(folder, saved, monkeypatch):
    real = verify.sha256_of
    monkeypatch.setattr(verify, "sha256_of", lambda path: (shutil.rmtree(saved[0]), real(path)))
    with pytest.raises(CheckpointError, match="was deleted while it was read, as a run that is under way does"):
        resume.open_archive(saved[0])


def test_a_rank_reads_the_hashes_of_its_own_file(run, folder, one_process):
    path = write_world(run, folder, 2)
    flip(path / "shard-00001.safetensors")
    resume.agree(path, 0, verify=True)
    resume.agree(path, 1, verify=False)
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors: its SHA-256 differs"):
        resume.agree(path, 1, verify=True)


def test_ranks_that_found_different_checkpoints_stop(folder, saved, monkeypatch):
    def gather(into, own):
        into[:] = [own, ("none", None)]

    monkeypatch.setattr(resume.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(resume.dist, "all_gather_object", gather)
    with pytest.raises(CheckpointError, match="rank 0 step-00000003; rank 1 none"):
        resume.agree(saved[0], 0, verify=True)


@pytest.mark.parametrize("text", [None, "", "step-00000009", "../step-00000005", "\0", "."])
def test_a_lost_pointer_costs_nothing(run, folder, saved, text):
    checkpoint.save(folder, saved[1], progress(12), run, FACTS)
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)
    assert checkpoint.latest(folder) == folder / "step-00000012"
    check_files(folder / "step-00000012")


def test_a_file_beside_a_checkpoint_is_none_of_it(run, folder):
    path = write_world(run, folder, 2)
    shutil.copy(path / "shard-00000.safetensors", path / "shard-00002.safetensors")
    (path / "shard-00003.safetensors").write_bytes(b"not listed, not checked, not read")
    archive, _ = resume.open_archive(path)
    assert [file.name for file in archive.files] == ["shard-00000.safetensors", "shard-00001.safetensors"]


def test_a_manifest_has_a_seal_of_its_own(saved):
    """A bit of any of its bytes counts; manifests of before, which have none, are still read."""
    listed = saved[0] / "manifest.json"
    whole = listed.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        listed.write_bytes(damaged)
        assert verify._damage(saved[0], []) is not None, bytes(damaged)
    older = json.loads(whole)
    del older["sha256"]
    listed.write_text(json.dumps(older))
    resume.open_archive(saved[0])


def test_a_manifest_names_files_of_its_own_folder(run, folder):
    path = write_world(run, folder, 1)
    records = json.loads((path / "manifest.json").read_text().replace("shard-00000", "../shard-00000"))
    del records["sha256"]
    (path / "manifest.json").write_text(json.dumps(records))
    with pytest.raises(CheckpointError, match="must name files of its own folder, got '../shard-00000.safetensors'"):
        resume.open_archive(path)


def test_another_format_is_refused(saved):
    state = json.loads((saved[0] / "state.json").read_text()) | {"format": 99}
    text = json.dumps(state)
    (saved[0] / "state.json").write_text(text)
    manifest = json.loads((saved[0] / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    del manifest["sha256"]
    (saved[0] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint format 99"):
        resume.open_archive(saved[0])


def test_other_parameters_are_refused_by_name_and_nothing_is_touched(run, saved):
    wide = scrambled(replace(run, method=replace(run.method, width=25, frozen_input=True)))
    before = everything(wide)
    with pytest.raises(CheckpointError) as error:
        resume.load(saved[0], wide)
    text = str(error.value)
    assert "weight/student.stem.weight: (24, 10) in the checkpoint, (25, 10) in the method" in text
    assert "frozen/projection.weight: not in the checkpoint" in text
    assert same(everything(wide), before)
    frozen = scrambled(replace(run, method=replace(run.method, frozen_input=True)))
    checkpoint.save(saved[0].parent, frozen, progress(4), run, FACTS)
    with pytest.raises(CheckpointError, match="frozen/projection.bias: not in the method"):
        resume.load(saved[0].parent / "step-00000004", scrambled(run))


def state_of(run, world=2):
    return {"run": json.loads(json.dumps(to_json(run))), "world": world, "survey": FACTS["survey"]}


def test_the_same_run_may_continue(run, folder):
    longer = replace(
        run, train=replace(run.train, steps=99), telemetry=replace(run.telemetry, every_steps=1), name="renamed"
    )
    assert resume.same_run_problems(state_of(run), run, 2, FACTS, folder) == []
    assert resume.same_run_problems(state_of(run), longer, 2, FACTS, folder) == []
    on_gpus = state_of(replace(run, device="auto"))
    assert resume.same_run_problems(on_gpus, replace(run, device="cuda"), 2, FACTS, folder) == []
    assert resume.same_run_problems(on_gpus, replace(run, device="cpu"), 2, FACTS, folder)[0].startswith("device:")


def test_another_run_is_refused_field_by_field(run, folder):
    other = replace(run, optim=replace(run.optim, lr=9.0), seed=6, train=replace(run.train, zero_stage=3))
    found = resume.same_run_problems(state_of(run), other, 2, FACTS, folder)
    assert [p.split(":")[0] for p in found] == ["optim.lr", "seed", "name"]
    assert "0.02, as in" in found[0] and "got 9.0" in found[0]
    (found,) = resume.same_run_problems(state_of(run), run, 2, FACTS | {"survey": "0"}, folder)
    assert found.startswith("data.path: must be the survey that")


def test_other_labels_or_statistics_are_refused(run, folder):
    inputs = {"targets": ["redshift"], "target_mean": [0.1]}
    state = state_of(run) | {"inputs": inputs, "pixels": {"sky_sigma": [1.0, 2.0]}}
    same = FACTS | {"inputs": {"targets": ("redshift",), "target_mean": (0.1,)}, "pixels": {"sky_sigma": [1.0, 2.0]}}
    assert resume.same_run_problems(state, run, 2, same, folder) == []
    moved = same | {"inputs": inputs | {"target_mean": (0.2,)}, "pixels": {"sky_sigma": [1.0, 3.0]}}
    labels, pixels = resume.same_run_problems(state, run, 2, moved, folder)
    assert "the inputs that" in labels and "another target_mean: [0.2], was [0.1]" in labels
    assert "the pixel statistics that" in pixels and "another sky_sigma: [1.0, 3.0], was [1.0, 2.0]" in pixels


@pytest.mark.parametrize("place", [-3, 40])
def test_an_export_whose_data_differ_is_refused(run, folder, tmp_path, place):
    file = tmp_path / "portable.safetensors"
    portable.export_portable(write_world(run, folder, 2), file)
    portable.open_portable(file)
    flip(file, place)
    with pytest.raises(CheckpointError, match="portable.safetensors"):
        portable.open_portable(file)


@pytest.mark.parametrize("what", ["checkpoint", "file"])
def test_what_is_restored_is_hashed_once_among_the_ranks(run, folder, tmp_path, monkeypatch, what):
    path = write_world(run, folder, 3)
    if what == "file":
        portable.export_portable(path, tmp_path / "portable.safetensors")
    path, damaged = (
        (path, path / "shard-00002.safetensors") if what == "checkpoint" else 2 * (tmp_path / "portable.safetensors",)
    )
    hashed, said = [], []
    for name in ("sha256_of", "_unsealed"):
        real = getattr(verify, name)
        monkeypatch.setattr(verify, name, lambda path, *rest, real=real: hashed.append(path.name) or real(path, *rest))
    monkeypatch.setattr(portable, "agree_all", lambda found, error, rule: said.append((found, error)))
    for rank in range(4):
        portable.agree(path, "--restore", Ranks(rank, rank, 4))
    assert sorted(hashed) == (sorted(verify.listed_files(path)) if what == "checkpoint" else [path.name])
    assert len(set(said)) == 1 and said[0][1] is None
    flip(damaged, -3)
    said.clear()
    for rank in range(4):
        portable.agree(path, "--restore", Ranks(rank, rank, 4))
    assert [damaged.name in str(error) for _, error in said].count(True) == 1
    portable.agree(tmp_path / "nowhere", "--init-from", Ranks(0, 0, 1))
    assert "--init-from: " in said[-1][1]


def test_a_seal_does_not_cover_itself(tmp_path):
    entries = [Entry.of("a", torch.arange(5.0)), Entry.of("b", torch.ones(2, 2))]
    write_tensors(tmp_path / "x.safetensors", entries, {"note": 'a seal looks so: "sha256": "'}, seal=True)
    archive = Archive([tmp_path / "x.safetensors"])
    check_seal(tmp_path / "x.safetensors", archive.metadata[0])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], torch.ones(2, 2))
    flip(tmp_path / "x.safetensors", -1)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        check_seal(tmp_path / "x.safetensors", archive.metadata[0])


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3), (4, 1)])
def test_other_ranks_or_stages_are_pointed_to_the_portable_way(run, folder, world, stage):
    other = replace(run, train=replace(run.train, zero_stage=stage))
    (found,) = resume.same_run_problems(state_of(run), other, world, FACTS, folder)
    assert "2 ranks under ZeRO-2" in found and f"got {world} under ZeRO-{stage}" in found
    assert "--format portable" in found and "--restore FILE" in found


@pytest.mark.parametrize("was", [1, 2, 5])
@pytest.mark.parametrize("now", [1, 3, 40])
def test_portable_fits_any_number_of_ranks(run, folder, tmp_path, was, now):
    """More ranks than some parameters have elements: pieces may be empty."""
    run = replace(run, method=replace(run.method, frozen_input=True))
    file = tmp_path / "out" / "portable.safetensors"
    portable.export_portable(write_world(run, folder, was), file)
    whole = load_file(file)
    expected = scrambled(run)
    for rank in range(now):
        layout = scrambled(run, seed=3, rank=rank, world=now)
        got, state = portable.restore(file, layout)
        assert got == progress() and state["world"] == was and layout.applied_steps == 2
        for f in layout.fragments:
            for kind, tensor in layout.state(f).items():
                assert torch.equal(tensor, whole[f"{kind}/{f.name}"].reshape(-1)[f.start : f.start + f.length])
    reference = {f"{k}/{f.name}": t.reshape(f.shape) for f in expected.fragments for k, t in expected.state(f).items()}
    assert all(torch.equal(whole[k], v) for k, v in reference.items())
    assert torch.equal(whole["frozen/projection.weight"], expected.method.projection.weight)
    assert not any(k.startswith("rng/") for k in whole)


def test_portable_reads_run_and_checkpoint_folders_too(run, folder):
    path = write_world(run, folder, 3)
    for source in (path, run.folder, folder):
        layout = scrambled(run, seed=3)
        assert portable.restore(source, layout)[0] == progress()
        assert same(everything(layout), everything(restored(run, path)))


def restored(run, path):
    layout = scrambled(run, seed=4)
    portable.restore(path, layout)
    return layout


def test_portable_refuses_what_it_is_not(run, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path / "other.safetensors", tmp_path / "text.safetensors"):
        with pytest.raises(CheckpointError, match="not a portable export"):
            portable.open_portable(path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        portable.open_portable(tmp_path)


def test_changes_are_listed(run):
    other = replace(run, name="other", train=replace(run.train, zero_stage=3, micro_batch=4))
    assert portable.changes(state_of(run), other) == [
        "  train.micro_batch: was 2, now 4",
        "  train.zero_stage: was 2, now 3",
    ]


def test_progress_is_plain_json():
    assert Progress(**json.loads(json.dumps(asdict(progress())))) == progress()
