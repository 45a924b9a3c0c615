"""Groups: who moves, how far, and that redshifts within a group are alike."""

import numpy as np
import pytest

from armillary.engine.data.simulate.groups import MEMBERS, RADIUS_DEG, group_positions


def test_groups_are_near_in_redshift_and_on_the_sky():
    rng = np.random.default_rng(0)
    n = 2000
    positions = np.stack([rng.uniform(170, 190, n), rng.uniform(-5, 5, n)], 1)
    redshift, early = rng.uniform(0, 0.6, n), rng.random(n) < 0.4
    before = positions.copy()
    out = group_positions(positions, redshift, early, 7)
    assert (positions == before).all() and (group_positions(positions, redshift, early, 7) == out).all()
    moved = (out != positions).any(1)
    # All members but the first of each group move: 7 in 8 of .75 and .35. Four deviations of 800 draws are .06.
    assert moved[early].mean() == pytest.approx(0.75 * 7 / 8, abs=0.065)
    assert moved[~early].mean() == pytest.approx(0.35 * 7 / 8, abs=0.065)
    rows = np.flatnonzero(moved)
    apart = np.linalg.norm(out[rows][:, None] - out[None], axis=2)
    near = apart < 5 * RADIUS_DEG
    spread = [redshift[near[i]].std() for i in range(0, len(rows), 50)]
    assert np.median(spread) < 0.1 * redshift.std()
    assert np.median(near.sum(1)) >= MEMBERS - 1
