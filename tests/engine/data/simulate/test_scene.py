import numpy as np
import pytest

galsim = pytest.importorskip("galsim", reason="the simulation needs GalSim")

from armillary.engine.data.simulate.scene import Scene  # noqa: E402


def test_scene_is_galsims_own_drawing():
    galaxy = galsim.Sersic(4, half_light_radius=0.8).shear(q=0.7, beta=30 * galsim.degrees)
    scene = Scene(72, 0.262, np.array([1.2, 1.5]))
    scene.add(galaxy, np.array([3.0, 5.0]), 0.3, -1.2)
    scene.add(None, np.array([1.0, 2.0]), 10.0, 20.5)
    drawn = scene.image()
    for c, (fwhm, flux, star) in enumerate([(1.2, 3.0, 1.0), (1.5, 5.0, 2.0)]):
        psf = galsim.Moffat(beta=3.5, fwhm=fwhm)
        image = galsim.ImageD(72, 72, scale=0.262)
        galsim.Convolve(flux * galaxy, psf).drawImage(image, offset=(0.3, -1.2))
        (star * psf).drawImage(image, offset=(10, 20.5), add_to_image=True)
        np.testing.assert_allclose(drawn[c], image.array, atol=1e-4 * image.array.max())


def test_points_are_sources_drawn_one_by_one():
    blob = galsim.Gaussian(half_light_radius=0.3).shear(q=0.5, beta=40 * galsim.degrees)
    places, weights = np.array([[1.0, -2.0], [-3.5, 0.4], [0.0, 0.0]]), np.array([0.2, 0.5, 0.3])
    flux = np.array([2.0, 7.0])
    together, single = (Scene(48, 0.262, np.array([1.0, 1.4])) for _ in range(2))
    together.add_points(blob, places, weights, flux, 0.4, -0.7)
    for (right, up), weight in zip(places / 0.262, weights, strict=True):
        single.add(blob, flux * weight, 0.4 + right, -0.7 + up)
    np.testing.assert_allclose(together.image(), single.image(), atol=1e-12)
