"""Questions about the objects of a packed survey, to MOSAIC and to MMAE without training: the same as about a table."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import qp
from mixed import Mixed
from plain_vectors import PlainVectors
from toy_answers import exported

from armillary.engine import cli
from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.data.views.stretch import ZScore
from armillary.engine.query.query import query
from armillary.models.masked.heads import HeadConfig
from armillary.models.mmae.token_drop import TokenDropMMAE
from armillary.models.mosaic.mosaic import MOSAIC

VIEWS = ObjectViews(
    quantities=(
        QuantityView(name="redshift", scaling="log1p"),
        QuantityView(
            name="flux_lsst",
            vector="photometry",
            errors=("photometry_err",),
            scaling="asinh",
            levels=True,
            error_floor=0.05,
        ),
        QuantityView(name="magnitude", columns=("mag_r",), errors=("err_r",)),
    )
)
CONFIG = MOSAIC(dim=16, depth=1, heads=2, scalar_head=HeadConfig("mixture", 2), rank=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey") / "plain"
    build(PlainVectors(40), folder, name="plain", test_fraction=0.25, seed=3, processes=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "mosaic.safetensors"
    return exported(file, CONFIG, views=VIEWS, survey=Survey.load(folder))


@pytest.fixture(scope="module")
def answers(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "survey.parquet"
    given, want = ["flux.lsst", "redshift"], ["magnitude", "flux_lsst"]
    done = query(run, folder, out, given=given, want=want, draws=6, keep_draws=True, batch=7)
    assert (done.rows, done.answered) == (40, 40)
    return pq.read_table(out)


def source_rows(folder):
    """Samples of the source in the order of the catalogue."""
    source = PlainVectors(40)
    return [source.read(int(key[1:])) for key in pq.read_table(folder / "catalog.parquet")["key"].to_pylist()]


def test_a_table_of_the_same_numbers_has_the_same_answers(run, folder, answers, tmp_path):
    rows = source_rows(folder)
    flux, error = (np.stack([s.vectors[name] for s in rows]).astype(float) for name in ("photometry", "photometry_err"))
    table = {"key": [s.key for s in rows], "redshift": [s.labels["redshift"] for s in rows]}
    table |= {band: flux[:, i] / 1e6 for i, band in enumerate("griz")}
    table |= {f"{band}_err": error[:, i] for i, band in enumerate("griz")}
    units = {band: "Jy" for band in "griz"} | {f"{band}_err": "Jy" for band in "griz"}
    table |= {f"{band}_err": error[:, i] / 1e6 for i, band in enumerate("griz")}
    fields = [pa.field(n, pa.array(v).type, metadata={"unit": units.get(n, "")}) for n, v in table.items()]
    pq.write_table(pa.table([pa.array(v) for v in table.values()], pa.schema(fields)), tmp_path / "t.parquet")
    want = ["magnitude", "flux_lsst"]
    query(
        run,
        tmp_path / "t.parquet",
        tmp_path / "a.parquet",
        given=["flux_lsst", "redshift"],
        want=want,
        draws=6,
        keep_draws=True,
    )
    found = pq.read_table(tmp_path / "a.parquet")
    order = np.argsort(answers["row"].to_numpy())
    assert found["key"].to_pylist() == answers["key"].take(pa.array(order)).to_pylist()
    for name in ("magnitude_median", "magnitude_draws", "flux_lsst_draws", "flux_lsst_p16"):
        theirs = np.array(answers[name].to_pylist())[order]
        np.testing.assert_allclose(np.array(found[name].to_pylist()), theirs, rtol=1e-3, atol=1e-3)
    drawn = np.array(answers["flux_lsst_draws"].to_pylist())[order]
    known = ~np.isnan(flux)
    np.testing.assert_allclose(drawn.transpose(0, 2, 1)[known], np.repeat(flux[known][:, None], 6, 1), rtol=1e-4)
    assert (drawn.std(1)[~known] > 0).all(), "a band that is not known is drawn"


def test_splits_parts_and_rows_of_which_nothing_is_known(run, folder, answers, tmp_path, capsys):
    out = tmp_path / "a.parquet"
    words = ["--given", "magnitude", "--want", "redshift", "--split", "test", "-o", str(out), "--draws", "3"]
    assert cli.main(["query", str(run), str(folder), *words]) == 0
    found = pq.read_table(out)
    assert set(found["split"].to_pylist()) == {"test"}
    unknown = [int(key[1:]) % 5 == 1 for key in found["key"].to_pylist()]
    assert any(unknown) and np.isnan(found["redshift_median"].to_numpy()).tolist() == unknown
    assert f"{sum(unknown)} rows have nothing known" in capsys.readouterr().out
    query(run, folder, out, given=["flux_lsst[2:3]"], want=["redshift"], draws=3)
    found = pq.read_table(out)
    expected = [int(key[1:]) % 4 == 1 for key in found["key"].to_pylist()]  # the i band, which some lack
    assert np.isnan(found["redshift_p84"].to_numpy()).tolist() == expected
    assert found["known_flux_lsst[2:3]"].to_pylist() == [not e for e in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": ["image"]}, "'image' is nothing that can be given"),
        ({"given": ["flux_lsst[4:9]"]}, "flux_lsst\\[4:9\\]: must be components within 0:4"),
        ({"given": ["flux_lsst[a]"]}, r"must be a name, or NAME\[FIRST:END\]"),
        ({"splits": ["validation"]}, "no samples in 'validation'; the survey has train, test"),
        ({"units": {"a": "Jy"}}, "unit: is for tables"),
        ({"keys": ["key"]}, "key: is for tables"),
    ],
)
def test_bad_questions(run, folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        query(run, folder, tmp_path / "a.parquet", **({"given": ["redshift"], "want": ["magnitude"]} | options))
    assert not list(tmp_path.iterdir())


def test_a_survey_without_what_is_given(run, tmp_path):
    class Other(PlainVectors):
        labels = {"mag_r": "mag", "err_r": "mag"}

        def read(self, index):
            sample = super().read(index)
            return sample.__class__(**(vars(sample) | {"labels": {n: sample.labels[n] for n in self.labels}}))

    build(Other(12), tmp_path / "other", name="other", processes=1, progress=False)
    with pytest.raises(ValueError, match="nothing is known of redshift in any row of"):
        query(run, tmp_path / "other", tmp_path / "a.parquet", given=["redshift", "flux_lsst"], want=["magnitude"])


class Pairs(Mixed):
    """Samples of which one in five lacks its image, and another one its spectrum."""

    labels = {"redshift": "true"}

    def read(self, index):
        sample = super().read(index)
        return replace(sample, labels={"redshift": index / 100})


def test_images_and_spectra_are_given_where_they_are(tmp_path):
    """Of a method that takes both, each object answers from what it has; without either there is no answer."""
    build(Pairs(20, with_vectors=False), tmp_path / "pairs", name="pairs", processes=1, progress=False)
    survey = Survey.load(tmp_path / "pairs")
    crop = MultiCrop(global_size=16, n_global=1, placement="centre", stretch=ZScore())
    views = ObjectViews(image=crop, spectrum=True, targets=("redshift",))
    config = TokenDropMMAE(
        patch_size=8, bin_pixels=10, token_bins=5, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2,
        rest_points=60, rest_hidden=16, highest_redshift=1.2, redshift_bins=24,
    )  # fmt: skip
    run = exported(tmp_path / "mmae.safetensors", config, views=views, survey=survey)
    found = {}
    for given in (("image",), ("spectrum",), ("image", "spectrum")):
        out = tmp_path / "a.parquet"
        query(
            run, tmp_path / "pairs", out, given=given, want=["redshift", "spectrum"], draws=4, keep_draws=True, batch=6
        )
        table = pq.read_table(out)
        found[given] = table["redshift_median"].to_numpy()
        lacking = np.array([int(key[1:]) % 5 for key in table["key"].to_pylist()])
        flags = {"image": lacking != 1, "spectrum": lacking != 2}
        answered = np.logical_or.reduce([flags[name] for name in given])
        assert np.isnan(found[given]).tolist() == (~answered).tolist()
        assert np.isnan(np.array(table["spectrum_draws"].to_pylist())).all((1, 2)).tolist() == (~answered).tolist()
        assert table[f"known_{given[0]}"].to_pylist() == flags[given[0]].tolist()
    both = found["image", "spectrum"]
    np.testing.assert_allclose(both[lacking == 1], found["spectrum",][lacking == 1], rtol=1e-4)
    np.testing.assert_allclose(both[lacking == 2], found["image",][lacking == 2], rtol=1e-4)
    with pytest.raises(ValueError, match="image and spectrum cannot come out of a table"):
        query(run, tmp_path / "a.parquet", tmp_path / "b.parquet", given=["image", "spectrum"], want=["redshift"])


def test_distributions_are_written_for_qp(run, folder, tmp_path, capsys):
    """Those that the answers' quantiles are drawn from, with rows and keys; not of vectors."""
    out, densities = tmp_path / "a.parquet", tmp_path / "p"
    arguments = ["query", str(run), str(folder), "-o", str(out), "--given", "flux_lsst", "--qp", str(densities)]
    assert cli.main([*arguments, "--want", "redshift,magnitude,flux_lsst", "--draws", "2000"]) == 0
    assert sorted(p.name for p in densities.iterdir()) == ["magnitude.hdf5", "redshift.hdf5"]
    answers = pq.read_table(out)
    for name, median in (("redshift", "zmedian"), ("magnitude", "median")):
        ensemble = qp.read(str(densities / f"{name}.hdf5"))
        assert ensemble.ancil["row"].tolist() == answers["row"].to_pylist()
        assert list(ensemble.ancil["key"]) == answers["key"].to_pylist()
        np.testing.assert_allclose(ensemble.ancil[median], answers[f"{name}_median"], rtol=1e-5)
        wide = np.subtract(*(ensemble.ppf(p)[:, 0] for p in (0.84, 0.16)))
        found = np.asarray(answers[f"{name}_p84"]) - np.asarray(answers[f"{name}_p16"])
        np.testing.assert_allclose(found, wide, rtol=0.25)  # of 2,000 draws: 3 %; the first is drawn given itself alone
    out.unlink()
    assert cli.main([*arguments, "--want", "flux_lsst"]) == 2
    assert "qp: holds distributions of numbers, but flux_lsst are vectors" in capsys.readouterr().err
    assert not out.exists()
