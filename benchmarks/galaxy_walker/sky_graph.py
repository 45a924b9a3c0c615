"""Sky graphs: seconds to find and join neighbours, edges and isolated nodes, peak memory.

    python benchmarks/galaxy_walker/sky_graph.py                                        # 105,172 and 1,000,000 made-up positions
    python benchmarks/galaxy_walker/sky_graph.py --nodes 10000000 --spaces spherical
    python benchmarks/galaxy_walker/sky_graph.py --catalog vollim_dr7_cbp_102709.fits.gz        # columns ra and dec of a table

Made-up positions are uniform over a sky of 14,000 square degrees (RA 0 to 360, Dec above 18.8 degrees); real galaxies
cluster. The time is that of `connect`: from positions in memory to the sparse matrix, without the file; on a busy machine the
processor's says more. Peak memory is that of the process, the largest graph so far included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import scipy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.engine.data.sky_graph.build import connect
from armillary.engine.data.sky_graph.graph import GraphOptions

SINE = 0.3221  # of the least declination: 14,000 of the sky's 41,253 square degrees lie above it


def uniform(count: int) -> tuple[np.ndarray, np.ndarray]:
    """RA and Dec in degrees."""
    rng = np.random.default_rng(0)
    return rng.uniform(0, 360, count), np.rad2deg(np.arcsin(rng.uniform(SINE, 1, count)))


def catalog(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """RA and Dec of a table, whatever the case of its columns."""
    from astropy.table import Table

    table = Table.read(path)
    names = {name.lower(): name for name in table.colnames}
    return np.asarray(table[names["ra"]], np.float64), np.asarray(table[names["dec"]], np.float64)


def main() -> None:
    """Measure, print and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[105_172, 1_000_000])
    parser.add_argument("--catalog", type=Path, help="a table of positions in place of made-up ones")
    parser.add_argument("--spaces", nargs="+", default=["euclidean", "spherical", "hyperbolic"])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    csv_option(parser, "sky_graph")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(
        f"{'positions':32}{'space':12}{'nodes':>12}{'edges a node':>14}{'isolated':>10}{'seconds':>9}{'CPU s':>8}{'peak GiB':>10}"
    )
    for count in [0] if args.catalog else args.nodes:
        ra, dec = catalog(args.catalog) if args.catalog else uniform(count)
        name = args.catalog.name if args.catalog else "uniform"
        for space in args.spaces:
            start, used = time.perf_counter(), time.process_time()
            indptr, _, _ = connect(ra, dec, GraphOptions(space=space, k=args.k), threads=args.threads)
            seconds, used = time.perf_counter() - start, time.process_time() - used
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            isolated = int((np.diff(indptr) == 1).sum())
            edges = indptr[-1] / len(ra)
            print(
                f"{name:32}{space:12}{len(ra):12,}{edges:14.2f}{isolated:10,}{seconds:9.2f}{used:8.2f}{peak:10.2f}",
                flush=True,
            )
            rows.append(
                {"benchmark": "sky_graph", "device": "cpu", "scipy": scipy.__version__, "positions": name, "space": space,
                 "nodes": len(ra), "k": args.k, "tree_threads": args.threads, "edges": int(indptr[-1]),
                 "isolated": isolated, "seconds": seconds, "cpu_s": used, "peak_gib": peak}
            )  # fmt: skip
    append_rows(args.csv, rows)
    print(f"appended {len(rows)} rows to {args.csv}")


if __name__ == "__main__":
    main()
