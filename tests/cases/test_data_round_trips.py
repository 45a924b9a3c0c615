"""What is written can be read again: exports, packed surveys, checksums."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from case_files import cutouts, noise, run
from mixed import Mixed

from armillary.engine.data.building.build import build as build_survey
from armillary.engine.data.building.splits import BySource
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.kinds import open_source


class Masked(Mixed):
    """Images, spectra and vectors in any mix, with masks, identifiers and labels whose names are those of arrays."""

    labels = {"z": "redshift", "objid": "identifier", "image": "name of a picture", "flux": "a number"}

    def read(self, index):
        sample = super().read(index)
        labels = sample.labels | {"objid": f"00{2**60 + index}", "image": f"im{index}.jpg", "flux": index / 3}
        valid = None
        if sample.image is not None and index % 2:
            valid = np.ones(sample.image.shape, bool)
            valid[:, 3:6, 2:9] = False
        return type(sample)(**{**vars(sample), "valid": valid, "labels": labels})


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("round") / "survey"
    build_survey(Masked(20), folder, name="mixed", samples_per_shard=8, progress=False)
    return folder


def again(path, folder):
    options = {"name": "mixed", "samples_per_shard": 8, "split": BySource(), "progress": False}
    return build_survey(open_source(path), folder, **options)


def same(first, second):
    """Whether two surveys hold the same bytes, noise, steps, units and labels; statistics are of unrounded pixels."""
    assert [s.sha256 for s in first.shards] == [s.sha256 for s in second.shards]
    for name in (
        "bands",
        "unit",
        "pixel_scale_arcsec",
        "sky_sigma",
        "step",
        "labels",
        "spectrum",
        "vectors",
    ):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.case(
    kind="round trips",
    inputs="a survey of images, spectra, vectors, masks and labels, exported as FITS, HDF5, Parquet, and built again",
    right="the same bytes in every shard; unit, scale, noise, steps, labels and identifiers",
)
@pytest.mark.parametrize(("form", "name"), [("fits", "out"), ("hdf5", "out.h5"), ("parquet", "out.parquet")])
def test_exports_build_the_same_survey(survey, tmp_path, form, name):
    assert run("data", "export", survey, "-o", tmp_path / name, "--format", form, "--no-progress") == 0
    same(Survey.load(survey), again(tmp_path / name, tmp_path / "again"))
    first, second = (pq.read_table(s / "catalog.parquet").drop_columns("source") for s in (survey, tmp_path / "again"))
    assert first.equals(second)


@pytest.mark.case(
    kind="round trips",
    inputs="a packed survey packed again, whole and with a cut",
    right="the same bytes; the sky is inherited",
)
def test_a_packed_survey_keeps_its_bytes_and_its_sky(survey, tmp_path, build):
    same(Survey.load(survey), again(survey, tmp_path / "again"))
    built = build(survey, "--cut", "z < 0.1", "--split", "source")
    old = {s.key: s for s in map(open_source(survey).read, range(20))}
    for key, sample in built.samples().items():
        if sample.image is not None:
            np.testing.assert_array_equal(sample.image, old[key].image)
    assert built.source.survey.sky_sigma == Survey.load(survey).sky_sigma


@pytest.mark.case(
    kind="round trips",
    inputs="a FITS cutout of an export by itself, --kind fits",
    right="no pixel lost; unit and scale kept",
)
def test_single_files_of_an_export(tmp_path, build):
    first = build(cutouts(tmp_path / "s", image=noise(0, 3, 16, 16), BUNIT="nJy"))
    run("data", "export", first.folder, "-o", tmp_path / "out", "--format", "fits", "--no-progress")
    (tmp_path / "out" / "export.json").unlink()
    second = build(tmp_path / "out", "--kind", "fits", name="again")
    assert all(s.valid is None for s in second.samples().values()) and second.source.unit == "nJy"
    assert second.source.pixel_scale_arcsec == first.source.pixel_scale_arcsec


@pytest.mark.case(
    kind="checksums",
    inputs="catalog.parquet with a label changed after the build",
    right="refused when read, and by data check",
)
def test_a_changed_catalogue_is_refused(tmp_path, build, refused, capsys):
    built = build(cutouts(tmp_path / "s"))
    path = built.folder / "catalog.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("ra"), "ra", [[1.0, 2.0, 3.0]]), path)
    assert run("data", "check", built.folder) == 1
    assert "its SHA-256 is" in " ".join(capsys.readouterr().out.split())
    for words in (("leaks",), ("stats", "-o", tmp_path / "x.png"), ("show", "-o", tmp_path / "x.png")):
        assert run("data", words[0], built.folder, *words[1:]) == 2
        assert "catalog.parquet: its SHA-256 is" in capsys.readouterr().err
    assert "catalog.parquet: its SHA-256 is" in refused(built.folder)


@pytest.mark.case(
    kind="checksums",
    inputs="a survey packed from one whose labels were corrected",
    right="another survey, not 'finished'",
)
def test_the_catalogue_belongs_to_the_inputs(tmp_path, build):
    first = build(cutouts(tmp_path / "s"))
    packed = build(first.folder, name="packed")
    assert packed.code == 0
    path = first.folder / "catalog.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("ra"), "ra", [[1.0, 2.0, 3.0]]), path)
    described = json.loads((first.folder / "survey.json").read_text())
    import hashlib

    del described["sha256"]
    described["catalog_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (first.folder / "survey.json").write_text(json.dumps(described))
    again = build(first.folder, name="packed")
    assert again.code == 2 and "holds another survey" in again.err


@pytest.mark.case(kind="exports", inputs="a damaged HDF5, Parquet and FITS export", right="exit 2, the file named")
@pytest.mark.parametrize(("form", "name"), [("fits", "out"), ("hdf5", "out.h5"), ("parquet", "out.parquet")])
def test_damaged_exports(survey, tmp_path, refused, form, name):
    run("data", "export", survey, "-o", tmp_path / name, "--format", form, "--no-progress")
    path = tmp_path / name
    victim = sorted(path.glob("m0000.fits"))[0] if form == "fits" else path
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 3])
    assert victim.name.removesuffix(".fits") in refused(path, "--kind", "export")
