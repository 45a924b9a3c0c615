from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.views.draws import origins
from armillary.engine.data.views.multi_crop import ASTROCLIP_PAPER, ASTROCLIP_RELEASED, LogNormal, MultiCrop
from armillary.engine.data.views.stretch import AsinhWhiten, Identity, ToRGB
from armillary.models.method import BatchKey, InputSpec

KEY = BatchKey(seed=3, epoch=1, first_position=0, global_batch=64)
PLAIN = MultiCrop(global_size=8, hflip=0.0, vflip=0.0, stretch=Identity())
DEMO = MultiCrop(
    global_size=24,
    placement="centre",
    jitter_px=3,
    quarter_turns=True,
    flux_jitter=0.5,
    sky_noise_max=0.5,
    stretch=AsinhWhiten(),
)


def survey(height=20, width=None, bands=("g", "r", "z")):
    c = len(bands)
    rows = tuple(tuple(1.0 if i == j else 0.4 for j in range(c)) for i in range(c))
    statistics = Statistics((0.0,) * c, (1.0,) * c, (0.1,) * c, rows, 10)
    sky = tuple(0.004 * (i + 1) for i in range(c))
    return Survey("s", tuple(bands), height, width or height, 0.262, "nanomaggy", "bitplane", sky, sky, (), statistics)


def a_batch(s, n=6, start=0, **more):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(64, len(s.bands), s.height, s.width, generator=generator) * 0.05
    rows = torch.arange(start, start + n)
    return {"image": images[rows], "row": rows, "position": rows.clone(), **more}


def quality(c, shape=0.3):
    return LogNormal((shape,) * c, (0.1,) * c, (1.0,) * c)


def full(c=3):
    """Every operation at once."""
    return MultiCrop(
        global_size=15,
        local_size=7,
        n_local=3,
        psf=quality(c),
        noise=quality(c),
        blur_probability=(0.9, 0.5, 0.5),
        noise_probability=(0.9, 0.5, 0.5),
        flux_jitter=0.2,
        sky_noise_max=1.0,
        stretch=AsinhWhiten(),
    )


VARIANTS = {
    "all": full(),
    "turns": replace(full(), quarter_turns=True, placement="centre", jitter_px=2),
    "rotation": replace(full(), rotation="any"),
}


@pytest.mark.parametrize("views", VARIANTS.values(), ids=VARIANTS)
def test_views_do_not_depend_on_how_the_global_batch_is_split(views):
    s = survey()
    apply = views.build(s, "cpu")
    whole = apply(a_batch(s, 12), KEY)
    for parts in ([(0, 12)], [(0, 6), (6, 6)], [(0, 1), (1, 7), (8, 4)]):
        pieces = [apply(a_batch(s, n, start), KEY) for start, n in parts]
        for name, crops in (("global_crops", 2), ("local_crops", 3)):
            joined = torch.cat([p[name].view(crops, -1, *p[name].shape[1:]) for p in pieces], dim=1)
            assert torch.equal(joined.flatten(0, 1), whole[name])


@pytest.mark.parametrize("views", VARIANTS.values(), ids=VARIANTS)
def test_seed_and_epoch_key_the_views(views):
    s = survey()
    apply = views.build(s, "cpu")
    first = apply(a_batch(s), KEY)["global_crops"]
    assert torch.equal(first, apply(a_batch(s), KEY)["global_crops"])
    for other in (replace(KEY, seed=4), replace(KEY, epoch=2)):
        assert not torch.equal(first, apply(a_batch(s), other)["global_crops"])
    same = apply(a_batch(s), replace(KEY, global_batch=32))["global_crops"]
    assert torch.equal(first, same)  # the views of a sample know nothing of its batch
    halves = first.view(2, 6, -1)
    assert not torch.equal(halves[0], halves[1])


def test_the_batch_that_comes_out():
    s = survey()
    batch = a_batch(s, valid=torch.ones(6, 3, 20, 20, dtype=torch.bool))
    before = batch["image"].clone()
    out = full().build(s, "cpu")(batch, KEY)
    assert set(out) == {"row", "position", "global_crops", "local_crops"}
    assert out["global_crops"].shape == (12, 3, 15, 15) and out["local_crops"].shape == (18, 3, 7, 7)
    assert out["global_crops"].dtype == torch.float32
    assert torch.equal(batch["image"], before) and "valid" in batch  # the caller's batch is left alone
    assert full().input_spec(s) == InputSpec(3, 15, 2, 7, 3)
    assert "local_crops" not in PLAIN.build(s, "cpu")(a_batch(s), KEY)
    assert PLAIN.input_spec(s) == InputSpec(3, 8) == PLAIN.input_spec(3)


@pytest.mark.parametrize("turns", [False, True], ids=["flips", "flips and turns"])
def test_crops_are_exact_copies_of_the_pixels_drawn(turns):
    s = survey(18, 23)
    views = replace(PLAIN, hflip=0.5, vflip=0.5, quarter_turns=turns, n_local=2, local_size=5)
    batch = a_batch(s, 30)
    out = views.build(s, "cpu")(batch, KEY)
    for kind, name, crops, size in (("global", "global_crops", 2, 8), ("local", "local_crops", 2, 5)):
        draws = views.draw(s, batch["position"].numpy(), KEY, kind)
        assert set(draws.orientation) == set(range(16 if turns else 4))
        for n in range(30 * crops):
            top, left = draws.origin[n]
            expected = batch["image"][n % 30, :, top : top + size, left : left + size]
            if draws.orientation[n] & 1:
                expected = expected.flip(2)
            if draws.orientation[n] & 2:
                expected = expected.flip(1)
            expected = torch.rot90(expected, int(draws.orientation[n]) >> 2, (1, 2))
            assert torch.equal(out[name][n], expected)


def test_placement_reaches_every_origin_and_no_other():
    u = np.random.default_rng(0).random((4000, 2))
    anywhere = origins(u, (9, 12), 7, None)
    assert anywhere.min(0).tolist() == [0, 0] and anywhere.max(0).tolist() == [2, 5]
    counts = np.bincount(anywhere[:, 1], minlength=6)
    assert counts.min() > 0.8 * 4000 / 6
    centre = origins(u, (20, 21), 8, 3)
    assert centre.min(0).tolist() == [3, 3] and centre.max(0).tolist() == [9, 9]
    assert origins(u, (8, 9), 8, 3).max(0).tolist() == [0, 1]  # clipped to the cutout
    assert (origins(u, (20, 20), 8, 0) == 6).all()
    edges = np.array([[2.0**-33, 1 - 2.0**-33]])
    assert origins(edges, (9, 12), 7, None).tolist() == [[0, 5]]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_happen_with_their_probability(probability):
    views = replace(PLAIN, hflip=probability, vflip=1 - probability)
    draws = views.draw(survey(), np.arange(5000), KEY, "global")
    assert (draws.orientation & 1).mean() == pytest.approx(probability, abs=0.02)
    assert (draws.orientation >> 1).mean() == pytest.approx(1 - probability, abs=0.02)


@pytest.mark.parametrize("preset", [ASTROCLIP_RELEASED, ASTROCLIP_PAPER], ids=["released", "paper"])
def test_blur_and_noise_happen_with_the_presets_probabilities(preset):
    s, positions = survey(152), np.arange(4000)
    kinds = {kind: preset.draw(s, positions, KEY, kind) for kind in ("global", "local")}
    per_crop = preset.blur_probability[0], preset.blur_probability[1], *[preset.blur_probability[2]] * 8
    for name in ("blur", "noise"):
        level = np.concatenate([getattr(kinds[k], name) for k in ("global", "local")]).reshape(10, 4000, 3)
        # Half of the bands of a chosen crop are degraded, independently.
        assert (level > 0).mean(1) == pytest.approx(np.repeat(np.array(per_crop)[:, None] / 2, 3, 1), abs=0.03)
    both = ((kinds["local"].blur > 0).any(1) & (kinds["local"].noise > 0).any(1)).mean()
    assert both == pytest.approx((0.5 * 0.875) ** 2, abs=0.02)


def test_widths_have_the_published_distribution():
    s = survey(152)
    views = replace(ASTROCLIP_RELEASED, blur_probability=(1.0,) * 3, noise_probability=(1.0,) * 3)
    draws = views.draw(s, np.arange(20000), KEY, "global")
    published = {
        "blur": ([1.149, 1.101, 1.089], [2.27, 2.27, 2.31]),
        "noise": ([0.0023, 0.0039, 0.0090], [0.0048, 0.0085, 0.0183]),
    }
    for name, (mean, percentile) in published.items():
        width = getattr(draws, name)
        assert (width > 0).mean(0) == pytest.approx(0.5, abs=0.01)
        assert [w[w > 0].mean() for w in width.T] == pytest.approx(mean, rel=0.03)
        assert np.percentile(width, 99, axis=0) == pytest.approx(percentile, rel=0.04)


def test_blur_then_noise_then_stretch_as_drawn():
    s = survey()
    quiet = replace(full(), noise=None, noise_probability=(), sky_noise_max=0.0, stretch=Identity(), hflip=0, vflip=0)
    batch = a_batch(s, 8)
    out = quiet.build(s, "cpu")(batch, KEY)["global_crops"]
    draws = quiet.draw(s, batch["position"].numpy(), KEY, "global")
    assert draws.gain is not None and (draws.blur > 0).any() and (draws.blur == 0).any()
    for n in range(16):
        top, left = draws.origin[n]
        for c in range(3):
            plane = batch["image"][n % 8, c, top : top + 15, left : left + 15].double().numpy()
            expected = gaussian_filter(plane, draws.blur[n, c], mode="reflect", truncate=4.0) * draws.gain[n]
            assert np.abs(out[n, c].numpy() - expected).max() < 1e-6


def test_noise_has_the_level_drawn():
    s = survey(120)
    views = replace(DEMO, global_size=120, jitter_px=0, flux_jitter=0.0, stretch=Identity())
    batch = a_batch(s, 12)
    batch["image"] = torch.zeros_like(batch["image"])
    out = views.build(s, "cpu")(batch, KEY)["global_crops"]
    level = views.draw(s, batch["position"].numpy(), KEY, "global").noise
    np.testing.assert_allclose(out.std((2, 3)).numpy(), level, rtol=0.03)
    np.testing.assert_allclose(level / level[:, :1], np.tile([1.0, 2.0, 3.0], (24, 1)))  # the sky noise of the survey
    assert 0 < (level[:, 0] / 0.004).min() and (level[:, 0] / 0.004).max() < 0.5


def test_noise_on_top_of_sky_noise_adds_in_quadrature():
    s, n = survey(), np.arange(50)
    both = replace(full(), noise_probability=(1.0, 1.0, 1.0)).draw(s, n, KEY, "global").noise
    only = replace(full(), noise_probability=(1.0, 1.0, 1.0), sky_noise_max=0.0).draw(s, n, KEY, "global").noise
    sky = replace(full(), noise=None, noise_probability=()).draw(s, n, KEY, "global").noise
    np.testing.assert_allclose(both, np.hypot(only, sky))


def test_flux_factor_is_lognormal_and_common_to_all_bands():
    gain = DEMO.draw(survey(30), np.arange(20000), KEY, "global").gain
    assert np.log(gain).mean() == pytest.approx(0, abs=0.01) and np.log(gain).std() == pytest.approx(0.5, rel=0.02)


def test_rotation_samples_the_whole_cutout_about_the_crops_centre():
    s = survey(16, 20)
    views = replace(PLAIN, hflip=0.5, vflip=0.5, rotation="any")
    batch = a_batch(s, 12)
    out = views.build(s, "cpu")(batch, KEY)["global_crops"]
    draws = views.draw(s, batch["position"].numpy(), KEY, "global")
    assert draws.angle.min() < 1 and draws.angle.max() > 5
    offset = np.arange(8) - 3.5
    for n in range(24):
        dy, dx = np.meshgrid(offset, offset, indexing="ij")
        cos, sin = np.cos(draws.angle[n]), np.sin(draws.angle[n])
        x = (cos * dx - sin * dy) * (-1 if draws.orientation[n] & 1 else 1) + draws.origin[n, 1] + 3.5
        y = (sin * dx + cos * dy) * (-1 if draws.orientation[n] & 2 else 1) + draws.origin[n, 0] + 3.5
        for c in range(3):
            plane = batch["image"][n % 12, c].double().numpy()
            expected = map_coordinates(plane, [y, x], order=1, mode="reflect")
            assert np.abs(out[n, c].numpy() - expected).max() < 1e-5


def test_rotation_by_quarter_circles_is_a_quarter_turn(monkeypatch):
    s, batch = survey(16), None
    views = replace(PLAIN, hflip=0.5, vflip=0.5, rotation="any")
    batch = a_batch(s, 8)
    plain = replace(views, rotation="none").build(s, "cpu")(batch, KEY)["global_crops"]
    turns = np.arange(16) % 4
    draw = MultiCrop.draw
    monkeypatch.setattr(MultiCrop, "draw", lambda *a: replace(draw(*a), angle=turns * np.pi / 2))
    out = views.build(s, "cpu")(batch, KEY)["global_crops"]
    for n in range(16):
        assert (out[n] - torch.rot90(plain[n], int(turns[n]), (1, 2))).abs().max() < 1e-5


def test_pixels_without_data_enter_as_blank_sky():
    s = survey()
    valid = torch.rand(6, 3, 20, 20) > 0.3
    batch = a_batch(s, valid=valid)
    zeroed = a_batch(s)
    zeroed["image"] = torch.where(valid, zeroed["image"], 0.0)
    batch["image"] = torch.where(valid, batch["image"], torch.nan)
    apply = full().build(s, "cpu")
    assert torch.equal(apply(batch, KEY)["global_crops"], apply(zeroed, KEY)["global_crops"])
    embed = full().eval_input(s, "cpu")
    assert torch.equal(embed(batch["image"], valid), embed(zeroed["image"], None))


@pytest.mark.parametrize("size, top, left", [(8, 5, 6), (7, 5, 7), (None, 5, 6), (18, 0, 1), (1, 8, 10)])
def test_embedding_input_is_the_centre_and_nothing_random(size, top, left):
    s = survey(18, 21)
    image = a_batch(s)["image"]
    before = image.clone()
    out = PLAIN.eval_input(s, "cpu", size)(image, None)
    side = 8 if size is None else size
    assert torch.equal(out, image[:, :, top : top + side, left : left + side])
    stretched = replace(PLAIN, stretch=ToRGB()).eval_input(s, "cpu", size)(image, None)
    assert torch.equal(stretched, ToRGB().build(s, torch.device("cpu"))(out))
    assert torch.equal(image, before)


@pytest.mark.parametrize("bands", [("r",), ("u", "g", "r", "i", "z")], ids=["one band", "five bands"])
def test_other_numbers_of_bands_and_single_samples(bands):
    s = survey(17, 19, bands)
    out = full(len(bands)).build(s, "cpu")(a_batch(s, 1), KEY)
    assert out["global_crops"].shape == (2, len(bands), 15, 15) and out["local_crops"].shape == (3, len(bands), 7, 7)
    assert out["global_crops"].isfinite().all()


def test_crops_as_large_as_the_cutout():
    s = survey(15)
    batch = a_batch(s)
    assert torch.equal(replace(PLAIN, global_size=15).build(s, "cpu")(batch, KEY)["global_crops"][:6], batch["image"])


def test_presets_and_the_demo_fit_their_surveys():
    assert ASTROCLIP_RELEASED.problems(survey(152)) == ASTROCLIP_PAPER.problems(survey(152)) == []
    assert DEMO.problems(survey(30)) == []
    out = ASTROCLIP_PAPER.build(survey(152), "cpu")(a_batch(survey(152), 2), KEY)
    assert out["global_crops"].shape == (4, 3, 144, 144) and out["local_crops"].shape == (16, 3, 60, 60)


BAD = {
    "global_size: must be in 1 .. 20, the side of the survey's cutouts, got 21": {"global_size": 21},
    "global_size: must be in 1 .. 20, the side of the survey's cutouts, got 0": {"global_size": 0},
    "local_size: must be in 1 .. 20, the side of the survey's cutouts, got 0": {"local_size": 0},
    "n_global: must be >= 1, got 0": {"n_global": 0, "blur_probability": (0.5,), "noise_probability": (0.5,)},
    "n_local: must be >= 0, got -1": {"n_local": -1},
    "placement: must be one of random, centre, got 'corner'": {"placement": "corner"},
    "jitter_px: must be >= 0, got -1": {"placement": "centre", "jitter_px": -1},
    'jitter_px: must be 0 with placement "random", got 2': {"jitter_px": 2},
    "rotation: must be one of none, any, got 'half'": {"rotation": "half"},
    'quarter_turns: must be off with rotation "any", got True': {"rotation": "any", "quarter_turns": True},
    "hflip: must be a probability in [0, 1], got -0.1": {"hflip": -0.1},
    "vflip: must be a probability in [0, 1], got 1.5": {"vflip": 1.5},
    "flux_jitter: must be finite and >= 0, got -1.0": {"flux_jitter": -1.0},
    "sky_noise_max: must be finite and >= 0, got nan": {"sky_noise_max": float("nan")},
    "blur_probability: must be 3 probabilities, one a global crop and one for all local crops, got (0.5,)": {
        "blur_probability": (0.5,)
    },
    "noise_probability: must be empty without views.noise, got (0.9, 0.5, 0.5)": {"noise": None},
    "psf.loc: must be one finite number a band ('g', 'r', 'z'), got (0.1, 0.1)": {
        "psf": LogNormal((0.3,) * 3, (0.1,) * 2, (1.0,) * 3)
    },
    "stretch.divide_by: must be > 0, got 0.0": {"stretch": Identity(divide_by=0.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_problems_name_field_rule_and_value(message):
    assert replace(full(), **BAD[message]).problems(survey()) == [f"views.{message}"]


def test_unusable_views_are_not_built():
    with pytest.raises(ValueError, match="views.global_size: must be in 1 .. 12"):
        full().build(survey(12), "cpu")
    with pytest.raises(ValueError, match="views.psf.shape: must be one positive number a band"):
        full(3).eval_input(survey(bands=("r",)), "cpu")
    with pytest.raises(ValueError, match="size must be in 1 .. 20, .*got 21"):
        full().eval_input(survey(), "cpu", 21)
    dark = replace(survey(), sky_sigma=())
    assert "views.sky_noise_max: needs the survey's sky noise in every band, got ()" in full().problems(dark)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda image: image.double(), "image: must be float32, got torch.float64"),
        (lambda image: image.half(), "image: must be float32, got torch.float16"),
        (lambda image: image[:, :2], r"image: must be \[B, 3, H, W\]"),
        (lambda image: image[0], r"image: must be \[B, 3, H, W\]"),
        (lambda image: image[..., :10], "H, W >= 15"),
        (lambda image: image[..., :18], "cutouts are 20 x 20 pixels"),
    ],
    ids=["float64", "float16", "bands", "dimensions", "too small", "other size"],
)
def test_images_of_another_kind_are_refused(change, message):
    s = survey()
    batch = a_batch(s)
    batch["image"] = change(batch["image"])
    with pytest.raises(ValueError, match=message):
        full().build(s, "cpu")(batch, KEY)


@pytest.mark.gpu
@pytest.mark.parametrize("views", VARIANTS.values(), ids=VARIANTS)
def test_a_gpu_gives_the_views_of_a_cpu(views):
    s = survey()
    batch = a_batch(s, valid=torch.rand(6, 3, 20, 20) > 0.1)
    expected = views.build(s, "cpu")(batch, KEY)
    got = views.build(s, "cuda")({k: v.cuda() for k, v in batch.items()}, KEY)
    for name in ("global_crops", "local_crops"):
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=1e-5, atol=1e-5)


def test_objects_without_images_are_refused():
    s = survey()
    batch = a_batch(s, n=2) | {"row": torch.tensor([7, 8]), "has_image": torch.tensor([True, False])}
    with pytest.raises(ValueError, match="row 8 of catalog.parquet has no image; build"):
        full().build(s, "cpu")(batch, KEY)
    with pytest.raises(ValueError, match="views: need images to crop"):
        full().build(survey(bands=()), "cpu")
