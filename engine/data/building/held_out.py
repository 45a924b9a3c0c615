"""Which splits input statistics come from, and whether the test split is what was asked for."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable

from armillary.engine.data.building.shard_assignment import ShardAssignment
from armillary.engine.data.building.splits import SplitRule
from armillary.engine.data.format.survey import BORDER

__all__ = ["HELD_OUT", "tell_border", "tell_test_share", "training_splits"]

HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "holdout", BORDER}
"""Splits that input statistics are never taken from, where there are others."""

log = logging.getLogger("armillary.data")


def training_splits(names: Iterable[str]) -> set[str]:
    """Splits that statistics are taken from."""
    there = set(names)
    if "train" in there:
        return {"train"}
    chosen = {name for name in there if name.lower() not in HELD_OUT} or there
    log.warning("no split is called train: noise and statistics are those of %s", ", ".join(sorted(chosen)))
    return chosen


def tell_test_share(layout: ShardAssignment, rule: SplitRule) -> None:
    """Log a test split that is empty, or far from the share that was asked for."""
    wanted = getattr(rule, "test_fraction", 0.0)
    counts = Counter[str]()
    for plan in layout.shards:
        counts[plan.split] += plan.rows.size
    total, test = counts.total(), counts["test"]
    spread = 5 * math.sqrt(total * wanted * (1 - wanted))  # of samples drawn one by one; whole cells vary more
    if not wanted or (test and abs(test - wanted * total) <= max(spread, 1)):
        return
    log.warning(
        "%s of %s samples are the test split, %.3g %% were asked for: whole cells of the sky go to one split, and single samples "
        "by chance; choose smaller cells (--split healpix:256), single samples (--split random:0) or a larger --test-fraction",
        *(f"{test:,}", f"{total:,}", 100 * wanted),
    )


def tell_border(layout: ShardAssignment) -> None:
    """Log how many samples lie between splits."""
    if moved := sum(plan.rows.size for plan in layout.shards if plan.split == BORDER):
        log.info(
            "%s samples lie within %.3g arcsec of one that is held out, in another cell of the sky, and are the split %s: their "
            "cutouts may overlap, and nothing is trained on them",
            *(f"{moved:,}", layout.reach_arcsec, BORDER),
        )
