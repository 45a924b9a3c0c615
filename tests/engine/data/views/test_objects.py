"""Views of whole objects, and the catalogue's columns in batches."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from mixed import Mixed

from armillary.engine.data.building.build import build
from armillary.engine.data.format.columns import Columns
from armillary.engine.data.format.survey import Survey, WaveGrid
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import ZScore
from armillary.models.method import Batch, BatchKey, InputSpec

CROP = MultiCrop(global_size=16, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=ZScore())
KEY = BatchKey(seed=1, epoch=0, first_position=0, global_batch=4)


class Whole(Mixed):
    """Every object has everything but, now and then, the label."""

    def read(self, index):
        sample = super().read(index - index % 5 if index % 5 in (1, 2) else index)
        label = {"z": float("nan") if index % 7 == 3 else index / 100}
        return replace(sample, key=f"w{index:04d}", labels=label, source=f"whole:{index}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "whole"
    build(Whole(40, with_vectors=False), folder, name="whole", test_fraction=0.25, seed=3, processes=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "lacking"
    build(
        Mixed(20, with_vectors=False), folder, name="lacking", test_fraction=0.25, seed=3, processes=1, progress=False
    )
    return folder


def known(folder, split):
    table = pq.read_table(folder / "catalog.parquet").to_pydict()
    z = np.array(table["z"], np.float64)[np.array(table["split"]) == split]
    return z[np.isfinite(z)]


def test_input_spec_says_what_the_method_gets(folder):
    views = ObjectViews(image=CROP, spectrum=True, columns=("z",), targets=("z",))
    z = known(folder, "train")
    spec = views.input_spec(Survey.load(folder))
    assert spec == InputSpec(
        channels=3,
        global_size=16,
        n_global=1,
        pixels=501,
        wave_start_angstrom=3600.0,
        wave_step_angstrom=0.8,
        columns=("z",),
        column_mean=spec.target_mean,
        column_std=spec.target_std,
        targets=("z",),
        target_mean=spec.column_mean,
        target_std=spec.column_std,
    )
    np.testing.assert_allclose((*spec.target_mean, *spec.target_std), (z.mean(), z.std()))
    alone, survey = ObjectViews(spectrum=True), Survey.load(folder)
    assert alone.input_spec(survey) == InputSpec(
        n_global=1, pixels=501, wave_start_angstrom=3600.0, wave_step_angstrom=0.8
    )
    survey = replace(survey, spectrum=replace(survey.spectrum, grid=WaveGrid("log10", 3.5, 1e-4, 501)))
    assert alone.input_spec(survey) == InputSpec(n_global=1, pixels=501)


def test_a_training_batch(folder):
    views = ObjectViews(image=CROP, spectrum=True, targets=("z",))
    survey = Survey.load(folder)
    table = pq.read_table(folder / "catalog.parquet").to_pydict()
    options = {"micro_batch": 4, "device": "cpu", "seed": 5, "modalities": views.modalities}
    with Loader(folder, views=views.build(survey, "cpu"), **options) as loader:
        batch = next(loader)
    assert set(batch) == {"row", "position", "crop", "spectrum", "spectrum_ivar", "targets"}
    assert batch["crop"].shape == (4, 3, 16, 16) and batch["spectrum"].shape == (4, 501)
    z = known(folder, "train")
    expected = (np.array(table["z"], np.float64)[batch["row"]] - z.mean()) / z.std()
    np.testing.assert_allclose(batch["targets"][:, 0], expected, rtol=1e-5)
    seen = views.eval_view(survey, "cpu")
    whole = {
        int(r): c for b in map(seen, batches(folder, "train", seen)) for r, c in zip(b["row"], b["crop"], strict=True)
    }
    for row, crop in zip(batch["row"].tolist(), batch["crop"], strict=True):
        torch.testing.assert_close(crop, whole[row])  # nothing is random in these views


def test_the_catalogue_is_read_once_until_it_changes(folder, tmp_path, monkeypatch):
    copy = tmp_path / "survey"
    shutil.copytree(folder, copy)
    replace(Survey.load(folder), catalog_sha256="").save(copy)  # as of builds before catalogues had checksums
    reads = []
    monkeypatch.setattr(
        pq, "read_table", lambda path, real=pq.read_table, **options: reads.append(path) or real(path, **options)
    )
    survey, views = Survey.load(copy), ObjectViews(columns=("z",), targets=("z",))
    mean = views.input_spec(survey).target_mean
    views.build(survey, "cpu")
    assert not views.problems(survey) and len(reads) == 1
    table = pq.read_table(copy / "catalog.parquet")
    doubled = table.set_column(table.column_names.index("z"), "z", pc.multiply(table["z"], 2.0))
    pq.write_table(doubled, copy / "catalog.parquet")
    assert views.input_spec(survey).target_mean == pytest.approx(2 * np.array(mean))


def batches(folder, split, view):
    return SequentialLoader(folder, split=split, batch=7, device="cpu", modalities=view.modalities, packed=view.packed)


def test_missing_labels_are_nan(folder):
    values = Columns.read(Survey.load(folder), ("z",)).of(torch.arange(40))
    assert int(values.isnan().sum()) == sum(i % 7 == 3 for i in range(40))


def test_columns_of_another_survey_take_the_first_ones_moments(folder):
    columns = Columns.read(Survey.load(folder), ("z",))
    raw = columns.values.double() * columns.std[0] + columns.mean[0]
    np.testing.assert_allclose(columns.scaled((0.5,), (2.0,)).values, (raw - 0.5) / 2.0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "augmented"),
    [
        ({}, False),
        ({"hflip": 0.5}, True),
        ({"jitter_px": 1}, True),
        ({"quarter_turns": True}, True),
        ({"flux_jitter": 0.1}, True),
        ({"placement": "random"}, True),
    ],
    ids=["still", "flip", "jitter", "turns", "flux", "place"],
)
def test_whether_anything_is_random(change, augmented):
    assert ObjectViews(image=replace(CROP, **change)).augmented is augmented
    assert ObjectViews(spectrum=True).augmented is False


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (ObjectViews(), "need an image, a spectrum, quantities, columns or neighbours"),
        (ObjectViews(image=replace(CROP, n_global=2)), "views.image.n_global: must be 1, one crop an object, got 2"),
        (ObjectViews(image=replace(CROP, n_local=2, local_size=8)), "views.image.n_local: must be 0"),
        (ObjectViews(image=replace(CROP, global_size=99)), "views.image.global_size: must be in 1 .. 20"),
        (ObjectViews(columns=("mass",)), r"views.columns: must be labels of the survey \(z\), got 'mass'"),
        (ObjectViews(spectrum=True, targets=("age",)), "views.targets: must be labels"),
        (
            ObjectViews(spectrum=True, spectrum_optional=True),
            "views.spectrum_optional: must be off unless there is a spectrum and something",
        ),
        (
            ObjectViews(image=CROP, spectrum_optional=True),
            "views.spectrum_optional: must be off unless there is a spectrum and something",
        ),
    ],
    ids=["nothing", "two crops", "local crops", "too large", "no such column", "no such target", "alone", "optional"],
)
def test_rules(folder, views, message):
    survey = Survey.load(folder)
    with pytest.raises(ValueError, match=message):
        views.build(survey, "cpu")


def test_a_label_must_vary_and_be_known(folder, tmp_path):
    table = pq.read_table(folder / "catalog.parquet")
    replace(Survey.load(folder), catalog_sha256="").save(tmp_path)
    for value, message in (
        (0.5, "must vary over the training split, got 'z', which is 0.5"),
        (np.nan, "unknown for all"),
    ):
        column = table.column_names.index("z")
        pq.write_table(table.set_column(column, "z", [np.full(40, value)]), tmp_path / "catalog.parquet")
        assert message in ObjectViews(targets=("z",), spectrum=True).problems(Survey.load(tmp_path))[0]


def test_a_survey_without_spectra_is_refused(tmp_path):
    build(
        Whole(10, spectra=False, with_vectors=False), tmp_path / "s", name="pictures", test_fraction=0.2, progress=False
    )
    survey = Survey.load(tmp_path / "s")
    assert ObjectViews(spectrum=True).problems(survey) == [
        "views.spectrum: needs a survey with spectra, but 'pictures' has only image"
    ]
    view = ObjectViews(image=CROP, spectrum=True).eval_view(survey, "cpu")
    assert view.modalities == ("image",)  # images can be embedded alone
    with pytest.raises(ValueError, match="survey 'pictures': has image, but the encoder reads spectrum"):
        ObjectViews(spectrum=True).eval_view(survey, "cpu")


@pytest.mark.parametrize(
    ("views", "lacks"), [(ObjectViews(image=CROP), "image"), (ObjectViews(spectrum=True), "spectrum")]
)
def test_unpaired_objects_end_a_training_run(lacking, views, lacks):
    made = views.build(Survey.load(lacking), "cpu")
    with (
        Loader(lacking, micro_batch=8, device="cpu", views=made, modalities=views.modalities) as loader,
        pytest.raises(ValueError, match=f"of catalog.parquet has no {lacks}"),
    ):
        for _ in range(2):
            next(loader)


class WithImages(Mixed):
    """Every object has an image, a fifth of them no spectrum."""

    def read(self, index):
        sample = super().read(index)
        return sample if sample.image is not None else replace(super().read(0), key=sample.key, source=sample.source)


def test_optional_spectra_may_be_missing(tmp_path):
    build(WithImages(20, with_vectors=False), tmp_path / "s", name="s", test_fraction=0.25, processes=1, progress=False)
    views = ObjectViews(image=CROP, spectrum=True, spectrum_optional=True)
    made = views.build(Survey.load(tmp_path / "s"), "cpu")
    with Loader(tmp_path / "s", micro_batch=14, device="cpu", views=made, modalities=views.modalities) as loader:
        batch = next(loader)
    assert 0 < (~batch["has_spectrum"]).sum() < 7 and batch["crop"].shape == (14, 3, 16, 16)
    assert torch.equal((batch["spectrum_ivar"] > 0).any(1), batch["has_spectrum"])
    assert not batch["spectrum"][~batch["has_spectrum"]].any()


def test_catalogue_columns_need_nothing_else(folder):
    views = ObjectViews(columns=("z",), targets=("z",))
    batch = views.build(Survey.load(folder), "cpu")(Batch(row=torch.arange(3), position=torch.arange(3)), KEY)
    assert views.modalities == () and batch["columns"].shape == (3, 1)
    assert set(batch) == {"row", "position", "columns", "targets"}
