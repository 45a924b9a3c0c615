"""The page of `armillary explore` with millions of made-up points: seconds to load, frames a second, memory of the server.

    python benchmarks/explore/page.py SURVEY EMBEDDINGS                      # five million
    python benchmarks/explore/page.py SURVEY EMBEDDINGS --points 100000 --shots FOLDER      # also screenshots

A point is an object of the survey with noise on its embedding (16 principal components), its labels and its place in the
map; its cutout is the object's own. The browser is a headless Chromium that draws WebGL on the processor, so frames a second
are a lower bound for a machine with a GPU. The map is zoomed by the wheel at every frame for six seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.embedding_files import EmbeddingFiles, EmbeddingWriter
from armillary.engine.data.format.survey import Survey
from armillary.engine.explore.embedding_map import open_map

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from chromium import Browser, Page

LABELS = 4
WIDTH = 16
ZOOM = """
new Promise((done) => {
  const overlay = document.getElementById("overlay");
  const frames = [];
  const begin = performance.now();
  const step = (now) => {
    frames.push(now);
    const wheel = { deltaY: 40 * Math.sin(frames.length / 8), clientX: 480, clientY: 360, bubbles: true, cancelable: true };
    overlay.dispatchEvent(new WheelEvent("wheel", wheel));
    if (performance.now() - begin < 6000) requestAnimationFrame(step);
    else done(frames);
  };
  requestAnimationFrame(step);
})
"""


def make_points(survey_dir: Path, embeddings: Path, count: int, folder: Path) -> None:
    """A survey whose catalogue has `count` rows over the shards of another, its embeddings and their map."""
    survey, files = Survey.load(survey_dir), EmbeddingFiles.open(embeddings)
    catalogue = read_catalog(survey)
    place = {key: row for row, key in enumerate(catalogue["key"].to_pylist())}
    rows = np.array([place[key] for key in files.keys().to_pylist()])
    rng = np.random.default_rng(0)
    of = np.sort(rng.integers(0, len(rows), count))
    vectors = np.concatenate(list(files.chunks())).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors -= vectors.mean(0)
    axes = np.linalg.svd(vectors, full_matrices=False)[2][:WIDTH]
    reduced = (vectors @ axes.T).astype(np.float32)
    point = open_map(files).point[of] + rng.normal(size=(count, 2)) * np.abs(rng.normal(size=(count, 1))) * 1.6
    key = pa.array(np.char.mod("made-%08d", np.arange(count)).tolist())
    numeric = [name for name in survey.labels if pa.types.is_floating(catalogue.schema.field(name).type)][:LABELS]
    columns = {"key": key}
    for name in ("split", "shard", "index", "offset", "size", "source", "ra", "dec", *numeric):
        columns[name] = catalogue[name].combine_chunks().take(pa.array(rows[of]))
    (folder / "survey").mkdir()
    for shard in survey.shards:
        for name in (shard.name, Path(shard.name).with_suffix(".idx").name):
            (folder / "survey" / name).symlink_to((survey_dir / name).resolve())
    pq.write_table(pa.table(columns), folder / "survey" / "catalog.parquet", row_group_size=1 << 17)
    labels = {name: survey.labels[name] for name in numeric}
    replace(survey, name=f"made-up-{count}", labels=labels, catalog_sha256="").save(folder / "survey")
    with EmbeddingWriter(folder / "e.parquet", {"run": "made up"}) as file:
        for start in range(0, count, 65_536):
            piece = reduced[of[start : start + 65_536]]
            file.write(key[start : start + len(piece)], "made", piece + 0.02 * rng.normal(size=piece.shape))
    table = {"key": key, "x": pa.array(point[:, 0].astype(np.float32)), "y": pa.array(point[:, 1].astype(np.float32))}
    pq.write_table(pa.table(table), folder / "map.parquet")


def memory_gib(process: int) -> tuple[float, float]:
    """Memory of a process now, and at most so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {
        line.split(":")[0]: float(line.split()[1]) / 2**20 for line in lines if line.startswith(("VmRSS", "VmHWM"))
    }
    return found["VmRSS"], found["VmHWM"]


def lasso(page: Page) -> float:
    """Seconds from the end of a lasso to the answer."""
    shift = {"button": "left", "modifiers": 8}
    corners = [(420 + 90 * math.cos(a), 350 + 90 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40)]
    page.mouse("mousePressed", *corners[0], clickCount=1, **shift)
    for corner in corners[1:]:
        page.mouse("mouseMoved", *corner, buttons=1, **shift)
    begin = time.perf_counter()
    page.mouse("mouseReleased", *corners[-1], clickCount=1, **shift)
    page.wait("document.getElementById('status').textContent.includes('selected')")
    return time.perf_counter() - begin


def measure(url: str, shots: Path | None) -> dict[str, object]:
    """Drive the page."""
    found: dict[str, object] = {}

    def shoot(name: str) -> None:
        if shots is not None:
            time.sleep(4)
            page.screenshot(shots / f"{name}.png")

    with Browser() as browser:
        page = browser.open(url)
        page.wait("document.getElementById('points')")
        page.evaluate(
            "document.getElementById('points').addEventListener('drawn', () => (window.drawn ??= performance.now()))"
        )
        page.wait("window.drawn", 120)
        page.wait("document.body.dataset.ready === 'yes'", 120)
        found["first whole picture, s"] = page.evaluate("window.drawn") / 1e3
        shoot("dark")
        frames = np.diff(page.evaluate(ZOOM))[10:]  # the first ones find out how many points to draw
        found["frames a second, zooming"] = 1e3 / frames.mean()
        found["median frame, ms"] = float(np.median(frames))
        page.evaluate("document.getElementById('overlay').focus()")
        page.press("0")
        time.sleep(2)
        found["lasso, s"] = lasso(page)
        found["status"] = page.text("#status")
        shoot("lasso")
        begin = time.perf_counter()
        page.evaluate(
            "(() => { const input = document.querySelector('.range input'); input.value = input.placeholder * 2;"
            "input.dispatchEvent(new Event('change')); })()"
        )
        found["filter, s"] = time.perf_counter() - begin
        page.click("#clear")
        page.theme("light")
        shoot("light")
        found["complaints"] = page.complaints()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("survey", type=Path)
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--points", type=int, default=5_000_000)
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_points(arguments.survey, arguments.embeddings, arguments.points, folder)
        words = [sys.executable, "-m", "armillary", "explore", folder / "e.parquet", "--data", folder / "survey"]
        words += ["--map", folder / "map.parquet", "--port", "0"]
        begin = time.perf_counter()
        with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                found: dict[str, object] = {"server answers, s": time.perf_counter() - begin}
                found["load of the machine"] = os.getloadavg()[0]
                found |= measure(line.split()[5], arguments.shots)
                found["server, GiB now and at most"] = memory_gib(server.pid)
            finally:
                server.kill()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
