"""Positions on the sky for galaxies that live in groups: what neighbours on the sky can tell of a redshift or a type.

Ellipticals and lenticulars are mostly in groups, spirals mostly alone (the relation of morphology and density). A group is
a few galaxies that follow each other in redshift, so a survey of more galaxies has tighter groups. All else of the galaxies
stays as it was.

Shape legend: N galaxies.
"""

from __future__ import annotations

import numpy as np

from armillary.engine.data.simulate.population import keyed_generator

__all__ = ["MEMBERS", "group_positions"]

MEMBERS = 8
"""Galaxies of a group."""

SHARE = {True: 0.75, False: 0.35}  # of early types and of spirals that are in groups
RADIUS_DEG = 0.03  # standard deviation along each axis
GROUP_STREAM, CENTRE_STREAM = 32, 33


def group_positions(positions: np.ndarray, redshift: np.ndarray, early: np.ndarray, seed: int) -> np.ndarray:
    """[N, 2] RA and Dec in degrees with some galaxies moved into groups.

    Args:
        positions: [N, 2] RA and Dec in degrees of galaxies without groups, away from the poles.
        redshift: [N].
        early: [N] bool, True for ellipticals and lenticulars.
        seed: Keys the draws.
    """
    draws = keyed_generator(seed, GROUP_STREAM, 0).random(len(redshift))
    member = np.flatnonzero(draws < np.where(early, SHARE[True], SHARE[False]))
    member = member[np.argsort(redshift[member], kind="stable")]
    centre = member[np.arange(len(member)) // MEMBERS * MEMBERS]  # the first of each group stays where it is
    offset = keyed_generator(seed, CENTRE_STREAM, 0).normal(0, RADIUS_DEG, (len(redshift), 2))[member]
    offset[:, 0] /= np.cos(np.deg2rad(positions[centre, 1]))
    out = positions.copy()
    out[member] = positions[centre] + np.where((centre == member)[:, None], 0, offset)
    return out
