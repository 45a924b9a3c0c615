"""`armillary embed` into a folder of parts: killed, continued, by one process and by two, and searched like one file."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import fork_server
import numpy as np
import psutil
import pytest
import torch

from armillary.engine import cli
from armillary.engine.data.format.embedding_files import EmbeddingFiles
from armillary.engine.embed.parts import Parts
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.exclusive import exclusive
from armillary.models.vit.vit import VisionTransformer, ViT

MAIN = Path(__file__).parents[3] / "armillary" / "__main__.py"
COUNT, ROWS = 40, 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published file of a small vision transformer: no training is needed."""
    torch.manual_seed(1)
    config = ViT(channels=3, dim=64, depth=1, heads=1, image_size=8, patch_size=4, layer_scale=0.5, drop_path=0.0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(VisionTransformer(config).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    import frozen_toy

    return frozen_toy.make_survey(tmp_path_factory.mktemp("pairs") / "survey")


@pytest.fixture
def command(weights, survey):
    """Arguments of the command for a place to write to."""

    def arguments(out, *more, rows=ROWS):
        sizes = ["--part-rows", str(rows), "--batch", "4", "--device", "cpu"]
        return ["embed", str(weights), "--data", str(survey), "-o", str(out), *sizes, *map(str, more)]

    return arguments


@pytest.fixture
def whole(command, tmp_path):
    """The same embeddings in one file."""
    assert cli.main(command(tmp_path / "whole.parquet")) == 0
    return Embeddings.load(tmp_path / "whole.parquet")


def contents(folder):
    """The bytes of everything that is there to stay."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def finish(started):
    said = [process.communicate(120)[0] for process in started]
    return [process.returncode for process in started], said


def test_parts_read_as_one_file_in_the_surveys_order(command, whole, tmp_path):
    assert cli.main(command(tmp_path / "parts")) == 0
    found = Embeddings.load(tmp_path / "parts")
    assert list(found.key) == list(whole.key) and list(found.split) == list(whole.split)
    np.testing.assert_array_equal(found.vector, whole.vector)
    assert found.metadata == whole.metadata
    parts = EmbeddingFiles.open(tmp_path / "parts").parts
    assert len(parts) >= COUNT // ROWS and not (tmp_path / "parts" / ".fill").exists()


@pytest.mark.dist
def test_killed_and_continued_on_another_number_of_ranks_it_has_the_same_bytes(command, tmp_path):
    assert cli.main(command(tmp_path / "undisturbed", rows=1)) == 0
    out = tmp_path / "killed"
    started = fork_server.start(MAIN, command(out, rows=1), world=2, at_once=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob(".fill/part-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    finish(started)
    done = {p.stem: p.stat().st_mtime_ns for p in out.glob(".fill/part-*.json")}
    assert 3 <= len(done) < COUNT, "killed in the middle"
    (out / ".part-000099.parquet.elsewhere-1.tmp").write_text("half")
    assert cli.main(command(out, rows=1)) == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    written = {p.stem: p.stat().st_mtime_ns for p in out.glob("part-*.parquet")}
    assert all(written[name] <= when for name, when in done.items()), "what was finished is not computed again"


@pytest.mark.dist
def test_two_ranks_give_the_bytes_of_one_and_agree_on_what_is_wrong(command, tmp_path, capsys):
    assert cli.main(command(tmp_path / "one")) == 0
    local = ["--local_rank=0", *command(tmp_path / "two")]  # as the deepspeed launcher starts a module
    codes, said = finish(fork_server.start(MAIN, local, world=2, at_once=True))
    assert codes == [0, 0], said
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    codes, said = finish(fork_server.start(MAIN, command(tmp_path / "x.parquet"), world=2, at_once=True))
    assert codes == [2, 2] and "out: must be a folder for 2 processes" in said[0] and not said[1]
    codes, said = finish(
        fork_server.start(MAIN, command(tmp_path / "two", "--precision", "bf16"), world=2, at_once=True)
    )
    assert codes == [2, 2] and "precision 'fp32' there, 'bf16' here" in said[0] and not said[1]


@pytest.mark.dist
def test_under_torchrun_a_killed_rank_costs_the_part_it_was_at(command, tmp_path, capsys):
    assert cli.main(command(tmp_path / "one", rows=1)) == 0
    out, torchrun = tmp_path / "two", Path(sys.executable).with_name("torchrun")

    options = ["--nproc-per-node", "2", "--master-port", fork_server.free_port(), "-m", "armillary"]
    started = fork_server.start(torchrun, [*options, *command(out, rows=1)], world=0)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".fill/part-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks = psutil.Process(started[0].pid).children()
    ranks[1].kill()
    codes, said = finish(started)
    assert codes == [1] and len(ranks) == 2, said
    assert 3 <= len(list(out.glob(".fill/part-*.json"))) < COUNT, "killed in the middle"
    assert cli.main(command(out, rows=1)) == 0 and "parts are there" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.dist
def test_ranks_that_see_different_things_do_not_start(command, weights, tmp_path):
    script = tmp_path / "apart.py"
    other = torch.load(weights)
    torch.save({k: v + 1 for k, v in other.items()}, tmp_path / "other.pth")
    changed = command(tmp_path / "out")
    changed[1] = str(tmp_path / "other.pth")
    choose = f"words = {command(tmp_path / 'out')!r} if os.environ['RANK'] == '0' else {changed!r}"
    script.write_text(f"import os, sys\nfrom armillary.engine import cli\n{choose}\nsys.exit(cli.main(words))\n")
    codes, said = finish(fork_server.start(script, world=2, at_once=True))
    assert codes == [2, 2] and "embeddings: must be the same for all processes" in said[0]
    assert not (tmp_path / "out").exists()


def test_search_over_parts_is_search_over_one_file(command, whole, tmp_path, capsys):
    assert cli.main(command(tmp_path / "parts")) == 0
    answers = []
    for path in (tmp_path / "whole.parquet", tmp_path / "parts"):
        capsys.readouterr()
        assert cli.main(["search", str(path), "--query", str(whole.key[5]), "-k", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and str(whole.key[5]) in answers[0]


def test_the_same_command_mends_a_finished_folder(command, tmp_path, capsys):
    out = tmp_path / "parts"
    assert cli.main(command(out)) == 0
    before = contents(out)
    capsys.readouterr()
    assert cli.main(command(out)) == 0  # nothing to do
    assert "embeddings of 64 dimensions" in capsys.readouterr().out and contents(out) == before
    flipped = bytearray(before["part-000001.parquet"])
    flipped[50] ^= 1
    (out / "part-000001.parquet").write_bytes(flipped)
    (out / "part-000002.parquet").unlink()
    assert cli.main(["search", str(out), "--query", "k1"]) == 2
    assert "part-000002.parquet: missing; copy it again, or run the same" in capsys.readouterr().err
    assert cli.main(command(out)) == 0
    said = capsys.readouterr().out
    assert "part-000001.parquet: damaged" in said and "part-000002.parquet: missing" in said
    assert contents(out) == before


def test_patches_are_embedded_with_their_grid(command, whole, tmp_path):
    assert cli.main(command(tmp_path / "patches.parquet", "--readout", "patches")) == 0
    files = EmbeddingFiles.open(tmp_path / "patches.parquet")
    side, other, dim = map(int, files.metadata["grid"].split(" x "))
    assert side == other and dim == 64 and files.dimensions == side * side * dim
    assert files.keys().to_pylist() == whole.key.tolist()


def test_folders_of_something_else_are_refused_before_work(command, weights, tmp_path, capsys):
    out = tmp_path / "parts"
    assert cli.main(command(out)) == 0
    before = contents(out)
    for more, said in (
        (["--split", "test"], "holds other embeddings (splits"),
        (["--untrained"], "trained 'true' there, 'false' here"),
        (["--part-rows", "9"], "part_rows 8 there, 9 here"),
        (["--readout", "nothing"], "'nothing' is none of this encoder's embeddings"),
        (["--batch", "0"], "batch: must be positive, got 0"),
        (["--split", "moon"], "split: no samples in 'moon'"),
    ):
        words = command(out)
        for flag in more[::2]:
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        assert cli.main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert contents(out) == before
    with exclusive(out):
        assert cli.main(command(out)) == 2
    assert "in use by" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert cli.main(command(tmp_path / "mine")) == 2
    assert "must be a new folder or one of embeddings" in capsys.readouterr().err
    assert cli.main(command(weights)) == 2
    assert "must end in .parquet, or be a folder" in capsys.readouterr().err


def test_an_unfinished_journal_of_another_survey_is_refused(command, tmp_path, capsys):
    out = tmp_path / "parts"
    out.mkdir()
    Parts(out, {"train": 3}, 2, {"survey": "another"}).prepare(4)
    assert cli.main(command(out)) == 2
    assert "survey 'another' there" in capsys.readouterr().err
    assert cli.main(["search", str(out), "--query", "k1"]) == 2
    assert "not finished; run the same" in capsys.readouterr().err


def test_a_full_disk_is_said_before_work(tmp_path):
    parts = Parts(tmp_path, {"train": 10**6}, 1000, {})
    full = shutil.disk_usage(tmp_path)._replace(free=10**9)
    with pytest.raises(
        OSError, match=r"3.9 GiB are needed for 1,000,000 embeddings of 1024 dimensions, but .* has 0.9 GiB"
    ):
        parts.prepare(1024, lambda _: full)
    assert not list(tmp_path.iterdir())


def test_a_lost_part_of_an_unfinished_folder_is_made_again(tmp_path):
    parts = Parts(tmp_path, {"train": 5, "test": 2}, 2, {})
    assert [(p.split, p.places) for p in parts.all] == [
        ("train", range(0, 2)), ("train", range(2, 4)), ("train", range(4, 5)), ("test", range(0, 2)),
    ]  # fmt: skip
    parts.prepare(None)
    for part in parts.all[:3]:
        parts.path(part).write_bytes(b"x" * 10)
        parts.done(part, len(part.places), 4)
    parts.done(parts.all[3], 0, 0)  # none of its objects has what the encoder reads
    parts.path(parts.all[1]).write_bytes(b"x")
    assert len(parts.prepare(None)) == 1 and parts.pending() == [parts.all[1]]
    parts.path(parts.all[1]).write_bytes(b"y" * 10)
    parts.done(parts.all[1], 2, 4)
    assert parts.finish() == (5, 4) == parts.finish()
    assert [p["name"] for p in json.loads((tmp_path / "embeddings.json").read_text())["parts"]] == [
        p.name for p in parts.all[:3]
    ]


def test_parts_of_different_widths_or_without_rows_are_no_embeddings(tmp_path):
    parts = Parts(tmp_path, {"train": 2}, 1, {})
    parts.prepare(None)
    for part in parts.all:
        parts.path(part).write_bytes(b"x")
        parts.done(part, 1, 4 + part.number)
    with pytest.raises(ValueError, match=r"have \[4, 5\] dimensions"):
        parts.finish()
    for part in parts.all:
        parts.done(part, 0, 0)
    with pytest.raises(ValueError, match="nothing to embed"):
        parts.finish()
