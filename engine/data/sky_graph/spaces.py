"""Where the nodes of a sky graph lie: positions on the sky as points of a flat, a spherical, a hyperbolic or a comoving space.

    space        point                                          distance, compared for the neighbours
    euclidean    (RA, Dec) in degrees                           |x - y|: the plane, as Galaxy-Walker publishes it
    spherical    unit vector                                    great circle 2 arcsin(|x - y| / 2)
    hyperbolic   exp0((RA, Dec) in radians) in the unit ball    arcosh(1 + 2 |x - y|^2 / ((1 - |x|^2) (1 - |y|^2)))
    comoving     comoving distance times unit vector, in Mpc    |x - y|

RA is in [0, 360). The plane does not close at the meridian 0 and does not shrink towards the poles, and in the ball (curvature
-1, exponential map at RA = Dec = 0) lengths along and across the direction from the origin differ: both are what equation 1
of the paper says, with its projection taken as one radian a unit. The published code names no distance for its adjacency; that
of each space is taken. The comoving space needs a redshift, which is a label to predict elsewhere.

Source: Galaxy-Walker (arXiv:2503.18578), equation 1; comoving environments: arXiv:2402.07995.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from armillary.engine.data.sources.match import unit_vectors

__all__ = ["COSMOLOGY", "SPACES", "Space", "check_positions", "comoving_mpc", "points"]

Space = Literal["euclidean", "spherical", "hyperbolic", "comoving"]
SPACES: tuple[str, ...] = get_args(Space)

COSMOLOGY = "Planck18"
"""Name of the cosmology in astropy that turns redshifts into comoving distances."""

NAMED = 5  # rows that an error lists


def check_positions(ra: np.ndarray, dec: np.ndarray) -> None:
    """Raise ValueError, naming the rows, unless every RA is in [0, 360) and every Dec in [-90, 90] degrees."""
    _refuse("ra", "in [0, 360) degrees", ra, (ra >= 0) & (ra < 360))
    _refuse("dec", "in [-90, 90] degrees", dec, (dec >= -90) & (dec <= 90))


def points(ra: np.ndarray, dec: np.ndarray, space: Space) -> np.ndarray:
    """[N, 2] or [N, 3] float64 points of positions on the sky, see above; not for the comoving space.

    Args:
        ra: [N] degrees.
        dec: [N] degrees.
        space: "euclidean", "spherical" or "hyperbolic".
    """
    if space == "spherical":
        return unit_vectors(ra, dec)
    plane = np.stack([ra, dec], axis=1).astype(np.float64)
    if space == "euclidean":
        return plane
    u = np.deg2rad(plane)
    length = np.linalg.norm(u, axis=1, keepdims=True)
    return np.divide(np.tanh(length), length, out=np.ones_like(length), where=length > 0) * u


def comoving_mpc(ra: np.ndarray, dec: np.ndarray, redshift: np.ndarray) -> np.ndarray:
    """[N, 3] float64 comoving positions in Mpc, in the cosmology `COSMOLOGY`.

    Args:
        ra: [N] degrees.
        dec: [N] degrees.
        redshift: [N].

    Raises:
        ValueError: A redshift is unknown, or not positive.
    """
    import astropy.cosmology

    redshift = np.asarray(redshift, np.float64)
    _refuse("redshift", "known and positive", redshift, np.isfinite(redshift) & (redshift > 0))
    cosmology = getattr(astropy.cosmology, COSMOLOGY)
    return unit_vectors(ra, dec) * cosmology.comoving_distance(redshift).to_value("Mpc")[:, None]


def _refuse(what: str, rule: str, values: np.ndarray, good: np.ndarray) -> None:
    bad = np.flatnonzero(~good)  # NaN is neither in nor out of a range
    if bad.size:
        few = ", ".join(f"{values[row]:g} in row {row}" for row in bad[:NAMED])
        more = ", ..." if bad.size > NAMED else ""
        raise ValueError(f"{what}: must be {rule} for a graph, got {bad.size} rows that are not: {few}{more}")
