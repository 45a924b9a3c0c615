"""A HATS collection as lsdb itself writes it, with a margin cache and statistics files; where lsdb is installed."""

import numpy as np
import pytest
from case_files import run
from numpy.testing import assert_allclose

from armillary.engine.data.sources.packed import PackedSurvey

lsdb = pytest.importorskip("lsdb", reason="lsdb writes the catalogue: pip install lsdb")
COUNT = 60
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # lsdb 0.11 calls pandas 3.1 so


@pytest.fixture(scope="module")
def objects():
    """Columns of a catalogue whose identifiers have more digits than a float64."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    sky = {"ra": rng.uniform(0, 360, COUNT), "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, COUNT)))}
    magnitudes = {f"mag_{band}": rng.uniform(18, 22, COUNT) for band in "gr"}
    return pandas.DataFrame(
        {"objid": 2**60 + np.arange(COUNT), **sky, **magnitudes, "redshift": rng.uniform(0, 1, COUNT)}
    )


@pytest.fixture(scope="module")
def collection(objects, tmp_path_factory):
    """Cells of two orders, and a margin of five degrees, so that many objects are written twice."""
    folder = tmp_path_factory.mktemp("hats") / "collection"
    cells = {"lowest_order": 0, "highest_order": 1, "partition_rows": 20, "margin_threshold": 18_000}
    catalogue = lsdb.from_dataframe(objects, ra_column="ra", dec_column="dec", **cells)
    catalogue.write_catalog(folder, catalog_name="objects", progress_bar=False)
    return folder


@pytest.mark.parametrize("place", ["", "objects"], ids=["the collection", "its primary table"])
def test_each_object_is_read_once(objects, collection, place, tmp_path, capsys, caplog):
    assert (collection / "collection.properties").is_file() and [*collection.glob("objects_*arcs")]
    words = ["--kind", "table", "--option", "key=objid", "vectors={'photometry': ('mag_g', 'mag_r')}"]
    code = run("data", "build", collection / place, "-o", tmp_path / "s", *words, "--no-progress", "--processes", 1)
    said = capsys.readouterr().err + caplog.text
    assert code == 0, said
    assert ("beside its primary table" in said) == (place == "")
    survey = PackedSurvey(tmp_path / "s")
    samples = {sample.key: sample for sample in map(survey.read, range(len(survey)))}
    assert len(survey) == COUNT and samples.keys() == {str(key) for key in objects["objid"]}
    for row in objects.itertuples():
        sample = samples[str(row.objid)]
        assert_allclose((sample.ra, sample.dec, sample.labels["redshift"]), (row.ra, row.dec, row.redshift), rtol=1e-12)
        assert_allclose(sample.vectors["photometry"], (row.mag_g, row.mag_r), rtol=1e-6)
