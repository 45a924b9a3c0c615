"""Similarity search: time to build and to ask, recall and bytes of an IVF-PQ index against an exact one.

    python benchmarks/search.py                                   # 200,000 vectors of 256 dimensions
    python benchmarks/search.py --vectors 2000000 --dimensions 1024 --clusters 50000

The vectors are made up: isotropic clusters on the unit sphere, whose spread within a cluster is as large as given. Recall
is the share of the exact ten nearest neighbours that the IVF-PQ index finds among its ten, for queries that are indexed
vectors with noise. A real embedding has another geometry: compare settings with these figures, not surveys. Nothing is
printed before the exact index has agreed with a product in float64.

The bytes of a full survey at the end are computed by `IndexSettings.memory_bytes`, not measured.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from common import append_rows, csv_option, timed

from armillary.engine.evaluate.search.index import Index
from armillary.engine.evaluate.search.index_settings import IndexSettings
from armillary.engine.evaluate.search.retrieval import found_again
from armillary.engine.evaluate.search.vectors import unit

SURVEY = 76_446_849  # the Legacy Survey of Stein et al.
WIDTH = 1024  # dimensions of a ViT-L's embedding
K = 10


def make_vectors(count: int, dimensions: int, clusters: int, spread: float, seed: int) -> np.ndarray:
    """[count, dimensions] float32 unit vectors around cluster centres; `spread` is the length of the offset."""
    generator = np.random.default_rng(seed)
    centres = unit(generator.standard_normal((clusters, dimensions), np.float32))
    vectors = np.empty((count, dimensions), np.float32)
    for start in range(0, count, 65_536):
        size = min(65_536, count - start)
        offset = generator.standard_normal((size, dimensions), np.float32) * np.float32(spread / dimensions**0.5)
        vectors[start : start + size] = unit(centres[generator.integers(0, clusters, size)] + offset)
    return vectors


def check_exact(index: Index, vectors: np.ndarray, queries: np.ndarray) -> None:
    """The exact index against float64: the same similarities, so the same neighbours but for ties."""
    truth = -np.sort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), 1)[:, :K]
    error = np.abs(index.search(queries, K).similarity - truth).max()
    if error > 1e-5:
        raise SystemExit(f"the exact index is off by {error:g}")


def main() -> None:
    """Measure, print and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=2_000)
    parser.add_argument("--spread", type=float, default=0.8, help="length of the offset from a centre of length 1 (.8)")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--code-bytes", type=int, help="bytes of a code; by default the plan's")
    parser.add_argument(
        "--probes", type=int, nargs="*", help="lists to look at; by default the plan's, and 4 times as many"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    csv_option(parser, "search")
    args = parser.parse_args()
    faiss.omp_set_num_threads(args.threads)
    vectors = make_vectors(args.vectors, args.dimensions, args.clusters, args.spread, 0)
    generator = np.random.default_rng(1)
    noise = generator.standard_normal((args.queries, args.dimensions), np.float32) * np.float32(
        0.2 / args.dimensions**0.5
    )
    queries = unit(vectors[generator.integers(0, len(vectors), args.queries)] + noise)

    start = time.perf_counter()
    exact = Index.build(vectors, kind="exact")
    exact_s = time.perf_counter() - start
    check_exact(exact, vectors, queries[:8])
    truth = exact.search(queries, K).row
    plan = IndexSettings.choose(args.vectors, args.dimensions, "ivfpq", code_bytes=args.code_bytes)
    shared: dict[str, object] = {
        "benchmark": "search", "device": "cpu", "vectors": args.vectors, "dimensions": args.dimensions,
        "clusters": args.clusters, "spread": args.spread, "queries": args.queries, "k": K, "faiss": faiss.__version__,
        "faiss_threads": args.threads, "repeats": args.repeats,
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    print(f"{args.vectors:,} x {args.dimensions}, {args.queries} queries, {args.threads} threads; IVF-PQ: {plan}")
    print(f"{'index':28}{'build s':>9}{'bytes/vector':>14}{'ms/query':>10}{'recall@10':>11}")

    def tell(name: str, build_s: float, size: float, index: Index, probes: int | None) -> None:
        spent = timed(lambda: index.search(queries, K, probes=probes), args.repeats)
        ms = [1e3 * s / args.queries for s in spent]
        recall = float(found_again(index.search(queries, K, probes=probes).row, truth).mean())
        print(f"{name:28}{build_s:9.1f}{size:14.1f}{ms[0]:10.3f}{recall:11.3f}")
        rows.append(
            {**shared, "index": name, "build_s": build_s, "bytes_a_vector": size, "ms_a_query": ms[0], "p20": ms[1],
             "p80": ms[2], "recall_at_10": recall, "lists": index.plan.lists, "code_bytes": index.plan.code_bytes,
             "probes": probes or index.plan.probes, "training": index.plan.training}
        )  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="armillary-search-") as place:
        tell("exact", exact_s, 4.0 * args.dimensions, exact, None)
        start = time.perf_counter()
        ranked = Index.build(vectors, plan=plan, keep=Path(place) / "kept.npy")
        build_s = time.perf_counter() - start
        ranked.save(Path(place) / "index")
        size = (Path(place) / "index" / "index.faiss").stat().st_size / args.vectors  # without keys and kept vectors
        (Path(place) / "index" / "vectors.npy").unlink()
        codes = Index.load(Path(place) / "index")
        for probes in args.probes or (plan.probes, min(plan.lists, 4 * plan.probes)):
            tell(f"IVF-PQ, {probes} probes", build_s, size, codes, probes)
            tell(f"IVF-PQ, {probes}, re-ranked", build_s, size + 2.0 * args.dimensions, ranked, probes)
    computed = plan.memory_bytes(args.vectors) / args.vectors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"computed {computed:.1f} bytes a vector, measured {size:.1f}; peak of the process {peak:.2f} GiB")
    full = IndexSettings.choose(SURVEY, WIDTH)
    print(f"\nComputed, not measured, for {SURVEY:,} vectors of {WIDTH} dimensions: {full}")
    print(
        f"  index {full.memory_bytes(SURVEY) / 2**30:.1f} GiB ({full.memory_bytes(SURVEY) / SURVEY:.1f} bytes a vector)"
    )
    print(f"  training vectors, twice, while it is built {8 * full.training * WIDTH / 2**30:.1f} GiB")
    print(f"  vectors kept on disk in half precision {2 * SURVEY * WIDTH / 2**30:.0f} GiB")
    print(f"  an exact index would take {4 * SURVEY * WIDTH / 2**30:.0f} GiB")
    append_rows(args.csv, rows)
    print(f"appended {len(rows)} rows to {args.csv}")


if __name__ == "__main__":
    main()
