"""What neighbours on the sky tell of real galaxies: redshifts and types of SDSS, votes of Galaxy Zoo 2; and what a leak adds.

    python benchmarks/galaxy_walker/sky_catalogues.py --data CATALOGUES -o runs/sky-catalogues        # a quarter of an hour of a core

CATALOGUES holds vollim_dr7_cbp_102709.fits.gz (120,606 SDSS galaxies at z < .107: RA, Dec, redshift), hubble_42914.csv.gz (Hubble
types, matched within 3 arcsec) and gz2_stripe82_votes.fits.gz (19,761 galaxies with votes). Stage 1 of Galaxy-Walker
(`models/galaxy_walker/stage1.py`, narrow, one space) predicts a label from what else is known of the galaxy and its neighbours:

    redshift (R2)    type
    hubble (F1)      redshift; elliptical, lenticular or spiral
    smooth (F1)      how many people voted; smooth or not by most votes

on two splits, each without neighbours, with them, and with shuffled ones:

    tiles     a fifth of HEALPix tiles of 3.4 square degrees, a buffer of 10 arcmin; galaxies see those of their own split, no labels
    random    a random fifth; galaxies also see labels of neighbours: of training galaxies (leak-free), or of all of them
              (published: one graph over training and test galaxies). The difference of these two is the leak.

Settings were fixed before the runs and not tuned. Intervals as in the task `ablation`. Predictions of a run are kept as soon as it is
trained, and a table's rows go into the CSV as soon as its runs are: the same command goes on where an earlier one was ended. Writes
report.html at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from astropy.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.engine.atomic_file import atomic_open
from armillary.engine.config.randomness import seed_everything
from armillary.engine.data.building.build import build
from armillary.engine.data.building.sky_graph import build_graph
from armillary.engine.data.building.splits import ByHealpix, ByRandom
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.catalog_loader import CatalogLoader, SequentialCatalogLoader
from armillary.engine.data.sky_graph.graph import GraphOptions, Mode, graph_file
from armillary.engine.data.sources.match import match_sky
from armillary.engine.data.sources.tables.rows import TableRows
from armillary.engine.data.views.neighbours import Neighbours
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.evaluate.ablation.task import compare
from armillary.engine.evaluate.ablation.variants import RunResult
from armillary.engine.evaluate.page.html import header, write_page
from armillary.models.galaxy_walker.stage1 import Stage1

BATCH, LR = 256, 3e-3
TYPES = {"E": 0, "S0": 1, "S": 2}


class Label(NamedTuple):
    """A label, in which survey, and what else is known."""

    survey: str
    known: tuple[str, ...]
    classes: int = 0


LABELS = {
    "redshift": Label("sdss", ("hubble",)),
    "hubble": Label("sdss", ("redshift",), 3),
    "smooth": Label("gz2", ("people",), 2),
}


def sdss(folder: Path) -> pa.Table:
    """RA, Dec, redshift and type: 0 elliptical, 1 lenticular, 2 spiral, NaN where unknown."""
    galaxies = Table.read(folder / "vollim_dr7_cbp_102709.fits.gz")
    types = Table.read(folder / "hubble_42914.csv.gz", format="csv")
    place = [np.asarray(t[c], np.float64) for t in (galaxies, types) for c in ("ra", "dec")]
    matched = match_sky(*place, 3.0)
    code = [TYPES["S0"] if t == "S0" else TYPES["E"] if t.startswith("E") else TYPES["S"] for t in types["hubble"]]
    hubble = np.full(len(galaxies), np.nan)
    hubble[matched.left] = np.array(code, float)[matched.right]
    return pa.table(
        {"ra": place[0], "dec": place[1], "redshift": np.asarray(galaxies["z"], np.float64), "hubble": hubble}
    )


def gz2(folder: Path) -> pa.Table:
    """RA, Dec, how many people voted, and whether most of them call the galaxy smooth."""
    votes = Table.read(folder / "gz2_stripe82_votes.fits.gz")
    smooth = np.asarray(votes["t01_smooth_or_features_a01_smooth_fraction"]) > 0.5
    ra = np.asarray(votes["ra"], np.float64) % 360
    people = np.asarray(votes["total_classifications"], np.float64)
    dec = np.asarray(votes["dec"], np.float64)
    return pa.table({"ra": ra, "dec": dec, "smooth": smooth.astype(np.float64), "people": people})


class Variant(NamedTuple):
    """How neighbours are seen."""

    mode: Mode
    shuffled: bool = False
    neighbours: bool = True
    labels: bool = False

    @property
    def graph(self) -> GraphOptions:
        """Of its neighbours."""
        buffer = 10.0 if self.mode == "inductive" else 0.0
        return GraphOptions(mode=self.mode, buffer_arcmin=buffer, shuffle_seed=0 if self.shuffled else None)

    def view(self, label: str) -> Neighbours:
        """What the model sees."""
        fan_outs = (5, 5) if self.neighbours else (0, 0)
        shown = (label,) if self.labels else ()
        return Neighbours(graphs=(self.graph.name,), columns=LABELS[label].known, shown=shown, fan_outs=fan_outs)


VARIANTS = {
    "tiles": {
        "none": Variant("inductive", neighbours=False),
        "inductive": Variant("inductive"),
        "inductive, shuffled": Variant("inductive", shuffled=True),
    },
    "random": {
        "none": Variant("leak-free", neighbours=False, labels=True),
        "leak-free": Variant("leak-free", labels=True),
        "leak-free, shuffled": Variant("leak-free", shuffled=True, labels=True),
        "published": Variant("published", labels=True),
    },
}


def surveys(folder: Path, out: Path, wanted: Collection[str]) -> Iterator[tuple[str, str, Path]]:
    """Name, split and folder of each wanted survey with its graphs; made where they are not there yet."""
    for name, table in (("sdss", sdss), ("gz2", gz2)):
        if name not in wanted:
            continue
        path = out / f"{name}.parquet"
        if not path.is_file():
            pq.write_table(table(folder), path)
        columns = [c for c in pq.read_schema(path).names if c not in ("ra", "dec")]
        for split, rule in (("tiles", ByHealpix(0.2, nside=32)), ("random", ByRandom(0.2))):
            survey = out / f"{name}-{split}"
            source = TableRows(path, labels=columns, vectors={"measured": tuple(columns)})
            build(source, survey, name=f"{name}-{split}", split=rule, samples_per_shard=40_000, progress=False)
            for options in {variant.graph for variant in VARIANTS[split].values()}:
                if not graph_file(survey, options.name).is_file():
                    graph, _ = build_graph(survey, options)
                    each = graph.edges / graph.nodes
                    print(
                        f"{name} {options.name}: {each:.2f} edges a node, {graph.left_out.sum():,} left out", flush=True
                    )
            yield name, split, survey


def predictions(folder: Path, label: str, neighbours: Neighbours, steps: int, seed: int) -> np.ndarray:
    """Predicted labels of the test galaxies, in the order of their rows."""
    survey, count = Survey.load(folder), LABELS[label].classes
    views = ObjectViews(neighbours=neighbours, targets=(label,))
    seed_everything(seed)
    config = Stage1(
        hidden=32, out=16, tokens=16, spaces=("spherical",), dropout=0.0, head=32, classes=(label,) if count else (), class_counts=(count,) * bool(count)
    )  # fmt: skip
    method = config.build(views.input_spec(survey))
    optimizer = torch.optim.AdamW(method.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with CatalogLoader(folder, micro_batch=BATCH, device="cpu", seed=seed, views=views.build(survey, "cpu")) as loader:
        for _, batch in zip(range(steps), loader, strict=False):
            loss = method(batch, {}).total
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    method.eval()
    view = views.eval_view(survey, "cpu")
    rows, values = [], []
    for batch in SequentialCatalogLoader(folder, split="test", batch=2048, device="cpu"):
        rows.append(batch["row"].numpy())
        values.append(method.encode(view(batch))["prediction"][:, 0].numpy())
    return np.concatenate(values)[np.concatenate(rows).argsort()]


def main() -> None:
    """Build, train, write the page and the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the catalogues")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/sky-catalogues"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    csv_option(parser, "sky_catalogues")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, split, folder in surveys(args.data, args.out, {LABELS[label].survey for label in args.labels}):
        catalogue = pq.read_table(folder / "catalog.parquet")
        test = np.flatnonzero(catalogue["split"].to_numpy(zero_copy_only=False) == "test")
        for label in (x for x in args.labels if LABELS[x].survey == name):
            start, runs = time.process_time(), []
            kept = args.out / f"{name}-{split}-{label}-{args.steps}-steps"
            kept.mkdir(exist_ok=True)
            for about, variant in VARIANTS[split].items():
                for seed in args.seeds:
                    file = kept / f"{about}-{seed}.npy"
                    if not file.is_file():
                        with atomic_open(file) as opened:
                            np.save(opened, predictions(folder, label, variant.view(label), args.steps, seed))
                    runs.append(RunResult(file.stem, seed, {"neighbours": about}, {label: np.load(file)}, {}))
            truth = {label: catalogue[label].to_numpy()[test]}
            outcome = compare(runs, truth, resamples=300)
            if split == "random":
                chosen = [r for r in runs if r.settings["neighbours"] in ("leak-free", "published")]
                print("the leak:", *compare(chosen, truth, resamples=300).lines, flush=True)
            for measure in outcome.measures:
                print(f"{name} {split:10} {measure.features:42} {measure.target:9} {measure.metric:15} {measure.value:+.4f} ± {measure.error:.4f}  n {measure.samples:,}", flush=True)  # fmt: skip
            if not (written := kept / "in-csv").is_file():
                append_rows(args.csv, [
                    {"benchmark": "sky_catalogues", "device": "cpu", "survey": name, "split": split, "steps": args.steps,
                     "seeds": len(args.seeds), "variant": measure.features, "label": label, "metric": measure.metric,
                     "value": measure.value, "error": measure.error, "samples": measure.samples}
                    for measure in outcome.measures
                ])  # fmt: skip
                written.touch()
            print(f"{name} {split} {label}: {time.process_time() - start:.0f} CPU s", flush=True)
            title = f"{label} of {name}, split {split}"
            sections += [s.replace("What is each setting worth?", title, 1) for s in outcome.sections]
    head = header(
        "Neighbours on the sky", "Real catalogues; settings as in benchmarks/galaxy_walker/sky_catalogues.py."
    )
    write_page(args.out / "report.html", "Neighbours on the sky", head, sections)
    print(f"report: {args.out / 'report.html'}; rows are in {args.csv}")


if __name__ == "__main__":
    main()
