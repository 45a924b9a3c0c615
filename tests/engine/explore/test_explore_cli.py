"""The command: what it refuses before any work, and a page that is served and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest

from armillary.engine.cli import main as command
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.explore.embedding_map import map_file


@pytest.fixture
def refused(capsys, survey_dir, embeddings):
    def check(message, *words, data=survey_dir, file=embeddings, port=0):
        before = set(embeddings.parent.iterdir())
        assert command(["explore", str(file), "--data", str(data), "--port", str(port), *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("armillary explore: ") and message in said and said.count("\n") == 1
        assert set(embeddings.parent.iterdir()) == before  # no map was made

    return check


def test_bad_input(refused, tmp_path, survey_dir, embeddings):
    refused("no embeddings here; make them with `armillary embed`", file=tmp_path / "none.parquet")
    refused("not a file of embeddings", file=survey_dir / "catalog.parquet")
    refused("no survey here", data=tmp_path)
    refused("colour: survey 'fifty' has no label 'mass'; it has split, redshift, kind", "--colour", "mass")
    refused(f"{tmp_path}/run: no such run or file", "--run", tmp_path / "run")
    refused("no index here (index.json is missing)", "--index", tmp_path)
    refused("map: must be auto, tsne, umap, pca or a Parquet file, got 'som'", "--map", "som")
    refused("atlas: must end in .parquet", "--atlas", tmp_path / "x.csv")
    refused("cannot listen at 192.0.2.1", "--host", "192.0.2.1")
    loaded = Embeddings.load(embeddings)
    Embeddings(loaded.key, loaded.split, loaded.vector, {"fingerprint": "f", "survey": "other"}).save(
        tmp_path / "o.parquet"
    )
    refused("holds embeddings of the survey 'other'", file=tmp_path / "o.parquet")


def test_a_taken_port(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(f"port: {port} is taken on 127.0.0.1; choose another", "--map", "tsne", port=port)


def test_a_file_for_embedding_atlas(embeddings, survey_dir, tmp_path, objects, capsys):
    out = tmp_path / "deep down" / "map.parquet"
    assert command(["explore", str(embeddings), "--data", str(survey_dir), "--map", "pca", "--atlas", str(out)]) == 0
    assert f"embedding-atlas '{out}' --x x --y y --neighbors neighbors" in capsys.readouterr().out
    rows = pq.read_table(out).to_pylist()
    loaded = Embeddings.load(embeddings)
    unit = loaded.vector / np.linalg.norm(loaded.vector, axis=1, keepdims=True)
    assert [row["key"] for row in rows] == list(loaded.key)
    assert set(rows[0]) == {"key", "split", "ra", "dec", "redshift", "kind", "name", "serial", "x", "y", "neighbors"}
    for i, row in enumerate(rows):
        ids, distances = row["neighbors"]["ids"], row["neighbors"]["distances"]
        assert len(ids) == 10 and i not in ids and distances == sorted(distances)
        np.testing.assert_allclose(distances, 1 - unit[ids] @ unit[i], atol=1e-4)
        np.testing.assert_allclose([row["x"], row["y"]], objects.point[objects.number[i]], rtol=1e-6)


BUSY = """
import sys
from armillary.engine import cli
from armillary.engine.evaluate.search.index import Index

def busy(paths):
    import torch
    x = torch.randn(400, 400)
    while True:  # most of its time inside of torch, as while a dropped file is embedded
        x @ x

if "busy" in sys.argv:
    sys.argv.remove("busy")
    Index.read_files = busy
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", ["ready", "busy"])
def test_a_page_is_served_until_it_is_interrupted(embeddings, survey_dir, index):
    words = [sys.executable, "-c", BUSY, "explore", embeddings, "--data", survey_dir, "--port", "0", "--map", "pca"]
    with subprocess.Popen(
        [*map(str, words), *(["busy"] if index == "busy" else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("49 objects of fifty at http://127.0.0.1:") and line.endswith(
                "(Ctrl-C ends it)\n"
            ), line
            with urllib.request.urlopen(line.split()[5] + "api/about", timeout=30) as reply:
                about = json.load(reply)
            assert about["count"] == 49 and about["colour"] == "redshift" and about["map"].startswith("PCA")
            assert map_file(embeddings, "pca").is_file()
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(30) == 0 and process.stdout.read() == ""
        finally:
            process.kill()
