"""A simulated survey with known redshifts: GalSim galaxies seen through DECam filters at the Legacy Survey's depth.

It needs no download: the templates come with GalSim, the filter curves with speclite. Galaxy i is drawn from its own
generator, keyed by (seed, i), so that any subset is reproducible and processes can share the work.

Shape legend: C bands, H x W pixels.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from armillary.engine.data.simulate.groups import group_positions
from armillary.engine.data.simulate.population import (
    DEFAULT_SEED,
    Population,
    draw_population,
    half_light_radius,
    keyed_generator,
)
from armillary.engine.data.simulate.scene import Scene
from armillary.engine.data.sources.source import Rows, Sample

__all__ = ["LEGACY", "Band", "SimulatedSurvey"]


@dataclass(frozen=True)
class Band:
    """Observing conditions of one band.

    Attributes:
        name: Band name in the survey.
        filter: speclite's name of the transmission curve.
        fwhm_arcsec: Median delivered seeing.
        depth_mag: AB magnitude of a point source at five sigma.
    """

    name: str
    filter: str
    fwhm_arcsec: float
    depth_mag: float

    def sky_sigma(self, pixel_scale_arcsec: float) -> float:
        """Sky noise of a pixel in nanomaggies.

        A point source is measured with a Gaussian PSF of s pixels: sigma_source = sqrt(4 pi) s sigma_pixel.
        """
        pixels = self.fwhm_arcsec / 2.3548 / pixel_scale_arcsec
        return float(10 ** (-0.4 * (self.depth_mag - 22.5)) / 5 / (np.sqrt(4 * np.pi) * pixels))


LEGACY = (
    Band("g", "decam2014-g", 1.30, 24.0),
    Band("r", "decam2014-r", 1.20, 23.4),
    Band("z", "decam2014-z", 1.10, 22.5),
)
"""Nominal depth and seeing of the DESI Legacy Survey's DECam part (Dey et al. 2019)."""

ELECTRONS_PER_NANOMAGGY = 6000.0
"""Of the right order for the survey's 134 to 200 s (Dey et al. 2019) and 30 to 44 electrons/s a nanomaggy."""

GALAXIES_PER_ARCMIN2 = 4.0  # neighbours brighter than FAINTEST
STARS_PER_ARCMIN2 = 2.0
FAINTEST = 22.0  # in the last band
NEIGHBOUR_POOL = 2048  # shapes and colours that neighbours borrow; of fixed size, so that `count` changes no image
BRIGHTEST_NEIGHBOUR = 16.0
CLEARANCE_ARCSEC = 4.0  # from the centre to the nearest neighbour
SURROUND_ARCSEC = 5.0  # neighbours this far outside the frame still shine into it
KNOTTY_ARCSEC = 1.2  # spirals with larger disks show knots
POPULATION_STREAM, POOL_STREAM, IMAGE_STREAM, PATCH_STREAM = range(4)


class SimulatedSurvey:
    """A `Source` of simulated galaxies.

    Args:
        count: Galaxies.
        seed: Keys the population and every image.
        size: Side of a cutout in pixels.
        magnitude_limit: Faintest AB magnitude in the last band.
        bands: Observing conditions; the last band sets the magnitude limit.
        pixel_scale_arcsec: Arcseconds a pixel.
        grouped: Put some galaxies into groups on the sky, see `groups`; else positions tell nothing.

    Raises:
        ModuleNotFoundError: GalSim or speclite is not installed.
        ValueError: `count`, `size` or `pixel_scale_arcsec` is not positive, `seed` is negative, no bands are given, or
            no galaxy is as bright as the magnitude limit.
    """

    unit = "nanomaggy"
    labels = {
        "redshift": "cosmological redshift",
        "magnitude_z": "AB magnitude in the z band, all of the galaxy's light",
        "bulge_fraction": "share of the bulge in the z band's light",
        "half_light_radius_arcsec": "major-axis half-light radius in z before the PSF, arcsec",
        "early_type": "1 for ellipticals and lenticulars, 0 for spirals",
        "axis_ratio": "minor over major axis, light-weighted in z",
    }

    def __init__(
        self,
        count: int,
        *,
        seed: int = DEFAULT_SEED,
        size: int = 72,
        magnitude_limit: float = 19.5,
        bands: tuple[Band, ...] = LEGACY,
        pixel_scale_arcsec: float = 0.262,
        grouped: bool = False,
    ) -> None:
        for name in ("galsim", "speclite"):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"simulated surveys need {name}: pip install 'armillary[sim]'")
        for field, value, least in (
            ("count", count, 1),
            ("size", size, 8),
            ("seed", seed, 0),
            ("bands", len(bands), 1),
        ):
            if value < least:
                raise ValueError(f"{field}: must be at least {least}, got {value}")
        if not pixel_scale_arcsec > 0:
            raise ValueError(f"pixel_scale_arcsec: must be positive, got {pixel_scale_arcsec}")
        self.seed, self.size, self.magnitude_limit = seed, size, magnitude_limit
        self.conditions = bands
        self.bands = tuple(b.name for b in bands)
        self.pixel_scale_arcsec: float | None = pixel_scale_arcsec
        self._scale = pixel_scale_arcsec
        filters = tuple(b.filter for b in bands)
        self.population = draw_population(
            count, seed, filters=filters, magnitude_limit=magnitude_limit, stream=POPULATION_STREAM
        )
        self._pool = draw_population(
            NEIGHBOUR_POOL, seed, filters=filters, magnitude_limit=FAINTEST, stream=POOL_STREAM
        )
        self._radius = half_light_radius(self.population)
        self._places: np.ndarray | None = None
        if grouped:
            scattered = np.array([self._scattered(index) for index in range(count)])
            self._places = group_positions(scattered, self.population.redshift, self.population.early, seed)
        self._sky_sigma = np.array([b.sky_sigma(pixel_scale_arcsec) for b in bands])

    def __len__(self) -> int:
        """Number of galaxies."""
        return len(self.population)

    def __repr__(self) -> str:
        """Every argument."""
        return (
            f"{type(self).__name__}(count={len(self)}, seed={self.seed}, size={self.size}, "
            f"magnitude_limit={self.magnitude_limit}, bands={self.conditions}, "
            f"pixel_scale_arcsec={self.pixel_scale_arcsec}, grouped={self._places is not None})"
        )

    def read(self, index: int) -> Sample:
        """Draw galaxy `index` with neighbours and noise.

        Raises:
            IndexError: There is no such galaxy.
        """
        rng, scene = self._start(index)
        self._add_neighbours(scene, rng)
        image = scene.image()
        sigma = self._sky_sigma * rng.uniform(0.85, 1.2, len(self.bands))  # exposures differ over the sky
        variance = sigma[:, None, None] ** 2 + np.maximum(image, 0) / ELECTRONS_PER_NANOMAGGY
        image += rng.standard_normal(image.shape) * np.sqrt(variance)
        ra, dec = self._position(index)
        return Sample(
            key=self._key(index),
            image=image.astype(np.float32),
            valid=None,
            ra=ra,
            dec=dec,
            labels=self._label(index),
            source=f"simulation seed {self.seed}, galaxy {index}",
        )

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels of galaxies [start, stop), without drawing them."""
        values = [
            {"ra": ra, "dec": dec, **self._label(i)} for i in range(start, stop) for ra, dec in [self._position(i)]
        ]
        columns = {name: np.array([v[name] for v in values], np.float64) for name in ("ra", "dec", *self.labels)}
        return Rows([self._key(i) for i in range(start, stop)], {**columns})

    def inputs(self) -> dict[str, str]:
        """Everything that determines the images."""
        versions = {name: importlib.metadata.version(name) for name in ("galsim", "speclite", "numpy")}
        return {"simulation": repr(self), **versions}

    def noiseless(self, index: int) -> np.ndarray:
        """[C, H, W] float64 nanomaggies: the galaxy that `read` draws, with its PSF, alone and without noise.

        Raises:
            IndexError: There is no such galaxy.
        """
        return self._start(index)[1].image()

    def _start(self, index: int) -> tuple[np.random.Generator, Scene]:
        """A scene with nothing but the target in it, off the centre by a third of a pixel or so."""
        import galsim

        if not 0 <= index < len(self):
            raise IndexError(f"galaxy {index}: this simulated survey has {len(self)}")
        rng = keyed_generator(self.seed, IMAGE_STREAM, index)
        seeing = np.exp(0.08 * rng.standard_normal(len(self.bands)))
        scene = Scene(self.size, self._scale, np.array([b.fwhm_arcsec for b in self.conditions]) * seeing)

        p = self.population
        angle = rng.uniform(0, 180) * galsim.degrees
        x, y = rng.normal(0, 0.3, 2)
        bulge, disk = _profiles(p, index, angle)
        share = 0.0  # of the disk's light in star-forming knots
        if not p.early[index] and p.radius_disk[index] > KNOTTY_ARCSEC:
            number, share = int(rng.integers(8, 30)), rng.uniform(0.05, 0.25)
            draws = galsim.BaseDeviate(int(rng.integers(1, 1 << 31)))
            knots = galsim.RandomKnots(number, half_light_radius=p.radius_disk[index], rng=draws)
            scene.add(knots.shear(q=p.axis_disk[index], beta=angle), p.flux_disk[index] * share, x, y)
        share += self._structure(scene, index, angle, x, y)
        scene.add(bulge, p.flux_bulge[index], x, y)
        scene.add(disk, p.flux_disk[index] * (1 - share), x, y)
        return rng, scene

    def _structure(self, scene: Scene, index: int, angle: Any, x: float, y: float) -> float:
        """Draw what a kind of survey adds to the disk, and return its share of the disk's light."""
        return 0.0

    def _add_neighbours(self, scene: Scene, rng: np.random.Generator) -> None:
        """Galaxies and stars around the target, also just outside the frame."""
        import galsim

        side = self.size * self._scale + 2 * SURROUND_ARCSEC
        for density, is_star in ((GALAXIES_PER_ARCMIN2, False), (STARS_PER_ARCMIN2, True)):
            for _ in range(rng.poisson(density * (side / 60) ** 2)):
                x, y = rng.uniform(-side / 2, side / 2, 2)
                magnitude = FAINTEST - rng.exponential(1.7 if is_star else 1.1)  # counts ~ 10^(.26 m), 10^(.4 m)
                k, angle = int(rng.integers(NEIGHBOUR_POOL)), rng.uniform(0, 180) * galsim.degrees
                steps = rng.uniform(0.1, 1.2, len(self.bands) - 1)  # a star's colours
                if np.hypot(x, y) < CLEARANCE_ARCSEC or magnitude < BRIGHTEST_NEIGHBOUR:
                    continue
                place = x / self._scale, y / self._scale
                flux = 10 ** (-0.4 * (magnitude - 22.5))
                if is_star:
                    fainter = np.append(np.cumsum(steps[::-1])[::-1], 0)
                    scene.add(None, flux * 10 ** (-0.4 * fainter), *place)
                else:
                    bulge, disk = _profiles(self._pool, k, angle)
                    dimming = flux / self._pool.flux()[k, -1]
                    scene.add(bulge, self._pool.flux_bulge[k] * dimming, *place)
                    scene.add(disk, self._pool.flux_disk[k] * dimming, *place)

    def _key(self, index: int) -> str:
        return f"sim{self.seed}-{index:08d}"

    def _position(self, index: int) -> tuple[float, float]:
        """RA and Dec in degrees."""
        if self._places is None:
            return self._scattered(index)
        return float(self._places[index, 0]), float(self._places[index, 1])

    def _scattered(self, index: int) -> tuple[float, float]:
        """RA and Dec in degrees: uniform on a patch of 20 x 10 degrees around (180, 0)."""
        u, v = keyed_generator(self.seed, PATCH_STREAM, index).random(2)
        edge = np.sin(np.deg2rad(5.0))
        return 170.0 + 20.0 * u, float(np.rad2deg(np.arcsin(edge * (2 * v - 1))))

    def _label(self, index: int) -> dict[str, float | str]:
        p = self.population
        return {
            "redshift": float(p.redshift[index]),
            "magnitude_z": float(22.5 - 2.5 * np.log10(p.flux()[index, -1])),
            "bulge_fraction": float(p.bulge_fraction()[index]),
            "half_light_radius_arcsec": float(self._radius[index]),
            "early_type": float(p.early[index]),
            "axis_ratio": float(p.axis_ratio()[index]),
        }


def _profiles(population: Population, index: int, angle: Any) -> tuple[Any, Any]:
    """Bulge and disk of unit flux."""
    import galsim

    p = population
    bulge = galsim.Sersic(p.sersic_bulge[index], half_light_radius=p.radius_bulge[index])
    disk = galsim.Exponential(half_light_radius=p.radius_disk[index])
    return bulge.shear(q=p.axis_bulge[index], beta=angle), disk.shear(q=p.axis_disk[index], beta=angle)
