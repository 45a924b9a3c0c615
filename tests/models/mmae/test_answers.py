"""Questions to both MMAE methods: joint draws, keyed by row and seed, of what is known; and what is refused."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from pair_batches import INPUTS as PLAIN_INPUTS
from pair_batches import batch_for

from armillary.models.method import Batch, InputSpec
from armillary.models.mmae.mmae import MMAE
from armillary.models.mmae.pairs import NORMALISED
from armillary.models.mmae.token_drop import TokenDropMMAE
from armillary.models.quantities import Quantity

INPUTS = replace(PLAIN_INPUTS, wave_start_angstrom=3600.0, wave_step_angstrom=90.0)
POINT = MMAE(patch_size=4, bin_pixels=5, token_bins=3, dim=16, depth=1, fusion_depth=1, heads=2)
DENSITY = TokenDropMMAE(
    patch_size=4, bin_pixels=5, token_bins=3, dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2,
    rest_points=60, rest_hidden=16, highest_redshift=1.2, redshift_bins=24,
)  # fmt: skip
ALL = ("redshift", "spectrum", "image")


def build(config, inputs=INPUTS):
    torch.manual_seed(0)
    return config.build(inputs).eval()


def pairs(method, size=6):
    batch = batch_for(method, size, prepared=False)
    batch["row"] = 100 + torch.arange(size)
    return batch


def rows(batch, chosen):
    return Batch(**{k: v[chosen] for k, v in batch.items()})


both = pytest.mark.parametrize("config", [POINT, DENSITY], ids=["published", "improved"])


@both
def test_questions_say_units_and_wavelengths(config):
    asked = build(config).questions()
    assert asked.given == ("image", "spectrum")
    redshift, spectrum, image = asked.want
    assert (redshift.name, redshift.unit, redshift.size) == ("redshift", "", 1)
    # Bins of 5 pixels, 90 angstrom apart, from the first pixel's centre at 3600 on.
    assert (spectrum.unit, spectrum.size) == (NORMALISED, 12)
    assert spectrum.axis == pytest.approx([3600 + 90 * (5 * i + 2) for i in range(12)])
    assert image.size == 2 * 8 * 8 and image.components[65] == "1,0,1"
    assert Quantity.from_json(json.loads(json.dumps(asdict(spectrum)))) == spectrum
    uneven = build(POINT, PLAIN_INPUTS).questions().want[1]
    assert uneven.axis == () and uneven.components[0] == "bin 0"


def test_draws_are_those_of_p_of_z_with_the_spectrum_at_each():
    method = build(DENSITY)
    batch = pairs(method)
    answer = method.answer(batch, ("image", "spectrum"), ALL, 400, 3)
    shapes = {name: tuple(draws.shape) for name, draws in answer.draws.items()}
    assert shapes == {"redshift": (6, 400, 1), "spectrum": (6, 400, 12), "image": (6, 400, 128)}
    shown = torch.zeros(6, 4, dtype=torch.bool)
    seen = method.reconstruct(batch, shown, shown)
    z = answer.draws["redshift"][..., 0]
    u = seen.density.cdf(z.double())
    # Uniform, if the draws are those of p(z): the largest distance of 400 has a probability of 1e-3 above .097.
    distance = (u.sort(1).values - torch.linspace(0, 1, 400, dtype=u.dtype)).abs().amax()
    assert distance < 0.12
    torch.testing.assert_close(answer.median["redshift"][:, 0], seen.redshift)
    torch.testing.assert_close(answer.draws["spectrum"][:, 7], seen.spectra(z[:, 7:8])[:, 0])
    torch.testing.assert_close(answer.median["image"], seen.image().flatten(1))
    assert answer.quantile("redshift", 0.16).shape == (6, 1)


def test_a_method_without_p_of_z_says_one_thing():
    method = build(POINT)
    answer = method.answer(pairs(method), ("image",), ALL, 3, 0)
    for name, draws in answer.draws.items():
        assert torch.equal(draws, answer.median[name][:, None].expand(-1, 3, -1)), name
    torch.testing.assert_close(answer.median["redshift"], method.encode(pairs(method))["image_redshift"])


@both
def test_draws_depend_on_row_and_seed_alone(config):
    method = build(config)
    batch = pairs(method)

    def ask(part, seed=5):
        return method.answer(part, ("image", "spectrum"), ("redshift",), 4, seed).draws["redshift"]

    whole = ask(batch)
    order = torch.tensor([4, 0, 2])
    torch.testing.assert_close(ask(rows(batch, order)), whole[order])
    if config is DENSITY:
        assert not torch.allclose(ask(batch, 6), whole)


@both
def test_what_is_not_given_or_not_known_is_not_looked_at(config):
    method = build(config)
    batch = pairs(method)
    alone = method.answer(batch, ("image",), ("redshift", "spectrum"), 2, 0)
    poisoned = Batch(**batch | {"spectrum": torch.full_like(batch["spectrum"], torch.nan)})
    torch.testing.assert_close(method.answer(poisoned, ("image",), ("redshift", "spectrum"), 2, 0).draws, alone.draws)
    without = Batch(**{k: v for k, v in batch.items() if not k.startswith("spectrum")})
    torch.testing.assert_close(method.answer(without, ("image",), ("redshift", "spectrum"), 2, 0).draws, alone.draws)
    batch["has_spectrum"] = torch.arange(6) % 2 == 0
    batch["spectrum"][1::2] = batch["spectrum_ivar"][1::2] = 0
    mixed = method.answer(batch, ("image", "spectrum"), ("redshift",), 2, 0).draws["redshift"]
    torch.testing.assert_close(mixed[1::2], alone.draws["redshift"][1::2])
    assert not torch.allclose(mixed[::2], alone.draws["redshift"][::2])
    if config is DENSITY:
        foretold = method.answer(rows(batch, batch["has_spectrum"]), ("spectrum",), ("image",), 2, 0)
        assert foretold.median["image"].isfinite().all()


def change(name, where, value):
    def changed(batch):
        batch[name] = batch[name].clone()
        batch[name][where] = value

    return changed


@both
@pytest.mark.parametrize(
    ("spoil", "question", "text"),
    [
        (change("crop", (2, 0, 3, 3), float("nan")), {}, "image: pixels must be finite; .* row 102 breaks this, 1 of 6 do"),
        (change("spectrum", (3, 60), float("inf")), {}, "spectrum: flux must be finite where .* row 103"),
        (change("spectrum_ivar", (4, 1), -1.0), {}, "spectrum_ivar: must be finite and at least 0; row 104"),
        (change("spectrum_ivar", (4, 1), float("nan")), {}, "spectrum_ivar: must be finite and at least 0; row 104"),
        (lambda b: b.pop("spectrum"), {}, "spectrum: is given, but the batch has none"),
        (lambda b: b.pop("crop"), {}, "image: is given, but the batch has no `crop`"),
        (lambda b: b.pop("row"), {}, "row: missing from the batch"),
        (lambda b: b.update(crop=b["crop"][:, :1]), {}, r"crop: must be \[B, 2, 8, 8\] as built for, got \(6, 1, 8, 8\)"),
        (lambda b: b.update(spectrum=b["spectrum"][:, :-1]), {}, r"spectrum: must be \[B, 67\]"),
        (lambda b: None, {"given": ()}, "given: must be one or more of image, spectrum, got none"),
        (lambda b: None, {"given": ("image", "sed")}, "given: must be one or more of .*, got image, sed"),
        (lambda b: None, {"want": ("mass",)}, "want: must be one or more of redshift, spectrum, image, got mass"),
        (lambda b: None, {"draws": 0}, "draws: must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_questions_and_bad_data_are_refused(config, spoil, question, text):
    method = build(config)
    batch = pairs(method)
    spoil(batch)
    asked = {"given": ("image", "spectrum"), "want": ("redshift",), "draws": 2, "seed": 0} | question
    with pytest.raises(ValueError, match=text):
        method.answer(batch, **asked)


def test_a_sample_of_which_nothing_is_known_is_refused():
    improved, published = build(DENSITY), build(POINT)
    batch = pairs(improved)
    batch["spectrum_ivar"][[1, 4]] = 0
    with pytest.raises(ValueError, match=r"row 101: what is given \(spectrum\) is not known, as for 2 of 6 samples"):
        improved.answer(batch, ("spectrum",), ("redshift",), 1, 0)
    with pytest.raises(ValueError, match="given: must have 'image', without which MMAEMethod was never trained"):
        published.answer(batch, ("spectrum",), ("redshift",), 1, 0)
    batch["has_image"] = torch.arange(6) != 3
    with pytest.raises(ValueError, match="row 103: its image is not known, as for 1 of 6 samples"):
        published.answer(batch, ("image", "spectrum"), ("redshift",), 1, 0)


def test_inputs_survive_their_record():
    assert InputSpec.from_json(json.loads(json.dumps(asdict(INPUTS)))) == INPUTS
