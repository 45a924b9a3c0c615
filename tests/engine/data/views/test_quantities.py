"""Quantities of a survey as entries of a batch: sources, units, scalings, errors, noise, what is unknown, bad input."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from plain_vectors import ERROR, PlainVectors

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantities import QuantityReader
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.data.views.stretch import ZScore
from armillary.models.method import Batch, BatchKey

Z = QuantityView(name="redshift", scaling="log1p")
FLUX = QuantityView(
    name="flux", vector="photometry", errors=("photometry_err",), scaling="asinh", levels=True, noise="redrawn"
)
COLOURS = QuantityView(name="mags", columns=("mag_g", "mag_r"), errors=("err_g", "err_r"))
VIEWS = ObjectViews(quantities=(Z, FLUX, COLOURS))


def make(folder, source, **options):
    build(source, folder, name=folder.name, test_fraction=0.25, seed=3, processes=1, progress=False, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("quantities") / "plain", PlainVectors(60))


@pytest.fixture(scope="module")
def survey(folder):
    return Survey.load(folder)


def truths(folder):
    """Index in the source of every row."""
    return np.array([int(key[1:]) for key in pq.read_table(folder / "catalog.parquet")["key"].to_pylist()])


def whole(folder, view, split="train"):
    batches = [view(b) for b in SequentialLoader(folder, split=split, batch=16, device="cpu", modalities=("vectors",))]
    return {k: torch.cat([b[k] for b in batches]) for k in ("row", "quantities", "quantity_errors")}


def test_inputs_say_names_units_components_and_scalings(survey):
    z, flux, mags = VIEWS.input_spec(survey).quantities
    assert (z.name, z.components, z.scaling.kind, z.scaling.entries) == ("redshift", ("value",), "log1p", 1)
    assert (flux.unit, flux.components, flux.scaling.entries) == ("uJy", ("g", "r", "i", "z"), 5)
    assert flux.scaling.softening == pytest.approx([2 * ERROR] * 4) and flux.scaling.levels == 1
    assert (mags.components, mags.scaling.kind) == (("mag_g", "mag_r"), "linear")
    assert VIEWS.modalities == ("vectors",) and VIEWS.augmented


def test_entries_go_back_to_what_the_survey_holds(folder, survey):
    stored = ObjectViews(quantities=(Z, replace(FLUX, noise="stored"), COLOURS))
    found = whole(folder, stored.eval_view(survey, "cpu"))
    source = PlainVectors(60)
    z, flux, mags = stored.input_spec(survey).quantities
    for row, entries, errors in zip(*found.values(), strict=True):
        sample = source.read(truths(folder)[row])
        np.testing.assert_allclose(flux.scaling.inverse(entries[1:6]), sample.vectors["photometry"], rtol=1e-4)
        np.testing.assert_allclose(z.scaling.inverse(entries[:1]), sample.labels["redshift"], rtol=1e-4)
        assert mags.scaling.inverse(entries[6:])[1] == pytest.approx(sample.labels["mag_r"], rel=1e-5, nan_ok=True)
        assert errors[6] * mags.scaling.std[0] == pytest.approx(0.01, rel=1e-4) and errors[:2].isnan().all()
    assert found["quantities"].isnan().any() and found["quantities"][:, [0, 6, 7]].nanmean(0).abs().max() < 1e-4


def test_noise_is_keyed_by_position_in_training_and_by_row_in_evaluation(folder, survey):
    seen = VIEWS.eval_view(survey, "cpu")
    once, again = whole(folder, seen), whole(folder, seen)
    assert torch.equal(once["quantities"].nan_to_num(), again["quantities"].nan_to_num())
    flux = VIEWS.input_spec(survey).quantities[1]
    truth = np.stack([PlainVectors(60).read(i).vectors["photometry"] for i in truths(folder)[once["row"]]])
    noise = (flux.scaling.inverse(once["quantities"][:, 1:6].double()).numpy() - truth) / ERROR
    noise = noise[np.isfinite(noise)]
    assert abs(noise.mean()) < 0.35 and 0.75 < noise.std() < 1.25  # 4.5 sigma of 170 draws

    def epoch(micro_batch, rank=0, world=1, count=1):
        made = VIEWS.build(survey, "cpu")
        options = {"seed": 5, "modalities": ("vectors",), "rank": rank, "world": world}
        found = {}
        with Loader(folder, micro_batch=micro_batch, device="cpu", views=made, **options) as loader:
            for batch, _ in zip(loader, range(count), strict=False):
                found |= dict(zip(batch["position"].tolist(), batch["quantities"], strict=True))
        return found

    whole_epoch = epoch(40)
    halves = epoch(10, 0, 2, 2) | epoch(10, 1, 2, 2)
    assert set(halves) == set(whole_epoch)
    assert all(torch.equal(halves[p].nan_to_num(), whole_epoch[p].nan_to_num()) for p in halves)
    batch = next(iter(SequentialLoader(folder, split="train", batch=8, device="cpu", modalities=("vectors",))))
    made = VIEWS.build(survey, "cpu")
    two = [made(batch, BatchKey(5, e, 0, 8))["quantities"][:, 1:6].nan_to_num() for e in (0, 1)]
    assert not torch.isclose(two[0], two[1])[two[0] != 0].any()


def test_units_are_converted_and_components_chosen_by_name(folder, survey):
    view = replace(FLUX, unit="nJy", components=("i", "g"), noise="stored", scaling="linear", levels=False)
    reader = QuantityReader((view,), survey)
    found = whole(folder, ObjectViews(quantities=(view,)).eval_view(survey, "cpu"))
    source = PlainVectors(60)
    for row, entries, _ in zip(*found.values(), strict=True):
        flux = source.read(truths(folder)[row]).vectors["photometry"]
        np.testing.assert_allclose(reader.quantities[0].scaling.inverse(entries), 1e3 * flux[[2, 0]], rtol=1e-4)


def test_another_survey_is_read_with_the_first_ones_scaling_unit_and_components(folder, survey, tmp_path):
    trained = ObjectViews(quantities=(replace(FLUX, noise="stored"),))
    other = make(tmp_path / "nano", PlainVectors(60, unit="nJy", bands=("z", "i", "r", "y")))
    view = trained.eval_view(Survey.load(other), "cpu")
    view = replace(view, quantities=view.quantities.scaled(trained.input_spec(survey).quantities))
    here, there = whole(folder, trained.eval_view(survey, "cpu")), whole(other, view)
    assert torch.equal(here["row"], there["row"])
    scaling = trained.input_spec(survey).quantities[0].scaling
    flux = scaling.inverse(there["quantities"])
    torch.testing.assert_close(
        flux[:, 1:], scaling.inverse(here["quantities"])[:, 1:], rtol=1e-4, atol=1e-4, equal_nan=True
    )
    assert flux[:, 0].isnan().all()  # it has no g
    with pytest.raises(
        ValueError, match="'photometry' has the components a, b, c, d, but 'flux' was trained on g, r, i, z"
    ):
        other = make(tmp_path / "named", PlainVectors(8, bands=("a", "b", "c", "d")))
        view = trained.eval_view(Survey.load(other), "cpu")
        whole(other, replace(view, quantities=view.quantities.scaled(trained.input_spec(survey).quantities)))


def test_images_may_be_missing_beside_quantities(tmp_path):
    folder = make(tmp_path / "s", PlainVectors(24, images=True))
    crop = MultiCrop(global_size=8, n_global=1, placement="centre", stretch=ZScore())
    views = ObjectViews(image=crop, image_optional=True, quantities=(replace(FLUX, noise="stored"),))
    with Loader(
        folder, micro_batch=12, device="cpu", views=views.build(Survey.load(folder), "cpu"), modalities=views.modalities
    ) as loader:
        batch = next(loader)
    assert 0 < batch["has_image"].sum() < 12
    assert batch["crop"].flatten(1).any(1).tolist() == batch["has_image"].tolist()


def rules(survey, *quantities):
    return "\n".join(ObjectViews(quantities=quantities).problems(survey))


@pytest.mark.parametrize(
    ("quantity", "message"),
    [
        (
            replace(FLUX, vector="sed"),
            r"flux.vector: must be a vector of the survey \(photometry, photometry_err\), got 's",
        ),
        (QuantityView(name="mass"), "mass.columns: must be labels of the survey"),
        (replace(FLUX, components=("g", "u")), r"components of vector 'photometry' \(4: g, r, i, z ...\), got 'u'"),
        (replace(FLUX, errors=()), "flux.noise: needs errors"),
        (replace(FLUX, errors=(), noise="stored"), "flux.softening: must be given for asinh without errors"),
        (replace(FLUX, unit="mag"), "flux.unit: 'uJy' cannot be converted to 'mag'"),
        (replace(FLUX, unit="photons"), "flux.unit: 'photons' is not a unit"),
        (replace(FLUX, runs=3), "flux.runs: must divide its 4 components, got 3"),
        (replace(FLUX, runs=4), "flux.levels: must be off under shape and with runs of one"),
        (replace(FLUX, axis=(1.0, 3.0, 2.0, 4.0)), "flux.axis: must be 4 increasing numbers"),
        (replace(FLUX, axis=(1.0, 3.0)), "flux.axis: must be 4 increasing numbers"),
        (replace(COLOURS, errors=("err_g",)), "mags.errors: must be one column a component, 2"),
        (replace(Z, name="a b"), "name: must be letters"),
        (replace(Z, name="image", columns=("redshift",)), "names of their own, got 'image'"),
        (QuantityView(name="never"), "quantity 'never': is unknown for all 46 samples of the training split"),
        (QuantityView(name="same"), "quantity 'same': entry 0: is the same"),
        (QuantityView(name="negative", scaling="log10"), "log10 has no value for 3. of 46 samples, .* use asinh"),
        (QuantityView(name="mag_g", errors=("bad_err",)), "errors must not be negative, but are in row"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named_before_work(survey, quantity, message):
    with pytest.raises(ValueError, match=message):
        ObjectViews(quantities=(quantity,)).build(survey, "cpu")


def test_two_of_a_name_are_refused(survey):
    assert "must have names of their own, got 'redshift' again" in rules(survey, Z, Z)


def test_an_object_of_which_nothing_is_known_is_named(folder, survey, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    replace(survey, catalog_sha256="").save(copy)
    table = pq.read_table(copy / "catalog.parquet")
    z = table["redshift"].to_numpy().copy()
    z[7] = math.nan
    place = table.column_names.index("redshift")
    pq.write_table(table.set_column(place, "redshift", pa.array(z)), copy / "catalog.parquet")
    assert "nothing is known of 1 of 46 samples, first row 7 of catalog.parquet" in rules(Survey.load(copy), Z)
    reader = QuantityReader((Z,), Survey.load(copy)).scaled(ObjectViews(quantities=(Z,)).input_spec(survey).quantities)
    with pytest.raises(ValueError, match="nothing is known of row 7 of catalog.parquet"):
        reader.add(Batch(row=torch.arange(9), position=torch.arange(9)), None)
