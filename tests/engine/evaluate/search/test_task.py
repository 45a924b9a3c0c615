import math
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from html_page import Page
from markupsafe import Markup

from armillary.engine.data.format.spectra import Spectrum
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.evaluate.embedding.cutouts import read_cutouts, read_spectra
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.search.pictures import Tile, draw_objects, spectrum_tile, tile_row
from armillary.engine.evaluate.search.task import SearchOptions, search
from armillary.engine.evaluate.study.study import FeatureSet, Study

QUICK = SearchOptions(resamples=20, queries=2, answers=3)


def feature_set(pairs_dir, name, modality, space="", noise=0.0, dimensions=6, kept=None):
    """Vectors that hold the key's number, so that partners are close, and noise of each set's own."""
    table = pq.read_table(pairs_dir / "catalog.parquet", columns=["key", "split"])
    keys, splits = (np.array(table[n].to_pylist(), object) for n in ("key", "split"))
    vectors = np.array([np.random.default_rng([1, int(k[5:])]).normal(size=dimensions) for k in keys], np.float32)
    own = np.random.default_rng([len(name), *name.encode()])
    vectors += noise * own.normal(size=vectors.shape).astype(np.float32)
    chosen = slice(None) if kept is None else kept(splits)
    return FeatureSet(name, modality, Embeddings(keys[chosen], splits[chosen], vectors[chosen], {}), space)


def aligned(pairs_dir, noise=0.5):
    return [feature_set(pairs_dir, f"A {m}", m, "A", noise) for m in ("image", "spectrum")]


def value_of(outcome, features, target, metric, model=""):
    found = [
        m for m in outcome.measures if (m.features, m.target, m.metric, m.model) == (features, target, metric, model)
    ]
    assert len(found) == 1
    return found[0]


def test_four_pairs_of_a_shared_space(pairs_dir):
    study = Study.open(pairs_dir, [*aligned(pairs_dir), feature_set(pairs_dir, "U image", "image")])
    outcome = search(study, QUICK)
    count = Survey.load(pairs_dir).count("test")
    for features in ("A image > A spectrum", "A spectrum > A image"):
        recalls = [value_of(outcome, features, "partner", f"recall@{k}") for k in (1, 5, 10)]
        assert 0 < recalls[0].value <= recalls[1].value <= recalls[2].value <= 1
        assert all(m.samples == count for m in recalls) and recalls[0].error > 0
        assert value_of(outcome, features, "partner", "recall@5", "chance").value == 5 / count
        assert value_of(outcome, features, "partner", "median rank", "chance").value == (count + 1) / 2
        assert value_of(outcome, features, "partner", "median rank").value < count / 4
        assert value_of(outcome, features, "partner", "MRR").value > recalls[0].value
    searched = {m.features for m in outcome.measures}
    assert searched == {
        "A image > A image", "A image > A spectrum", "A spectrum > A image", "A spectrum > A spectrum", "U image > U image"
    }  # fmt: skip
    assert all(m.target == "redshift" for m in outcome.measures if m.features == "U image > U image")
    table = pq.read_table(pairs_dir / "catalog.parquet")
    redshift = table["redshift"].to_numpy()[np.array(table["split"].to_pylist()) == "test"]
    known = value_of(outcome, "U image > U image", "redshift", "nmad@1").samples
    assert known == np.isfinite(redshift).sum() < count
    assert len(outcome.lines) == 2
    assert re.fullmatch(
        rf"image → spectrum: recall@10 \d\.\d\d ± \d\.\d\d against chance {10 / count:.3f} \(N = {count}\)",
        outcome.lines[0],
    )


def test_page_shows_numbers_scatter_and_objects(pairs_dir):
    outcome = search(Study.open(pairs_dir, [*aligned(pairs_dir), feature_set(pairs_dir, "U image", "image")]), QUICK)
    assert [re.match(r"<h2>(.*?)</h2>", s)[1] for s in outcome.sections] == [
        "Similarity search", "Is the best answer at the same redshift?", "What the search finds"
    ]  # fmt: skip
    for section in outcome.sections:
        Page(section)
    panel = outcome.sections[2]
    assert panel.count('class="row neighbours"') == 2 * 4  # two objects, four searches; the unaligned set has no panel
    assert panel.count("<figure") == 2 * 4 * (1 + 3)
    assert panel.count("data:image/png") == panel.count("<polyline") == 2 * 4 * (1 + 3) / 2
    assert panel.count("query<") == 8 and "z 0." in panel
    assert "chance" in outcome.sections[0] and "U image, within" in outcome.sections[0]


def test_same_vectors_find_every_partner(pairs_dir):
    outcome = search(Study.open(pairs_dir, aligned(pairs_dir, 0.0)), QUICK)
    for metric in ("recall@1", "MRR", "median rank", "ndcg@10"):
        assert value_of(outcome, "A image > A spectrum", "partner", metric).value == 1
    assert outcome.sections[2].count(", partner") >= 2 * 2


def test_a_space_where_redshift_rules_agrees_in_redshift(pairs_dir):
    table = pq.read_table(pairs_dir / "catalog.parquet")
    keys, splits = (np.array(table[n].to_pylist(), object) for n in ("key", "split"))
    turned = np.nan_to_num(table["redshift"].to_numpy()) * 3
    vectors = np.stack([np.cos(turned), np.sin(turned)], 1).astype(np.float32)
    outcome = search(Study.open(pairs_dir, [FeatureSet("z", "image", Embeddings(keys, splits, vectors, {}))]), QUICK)
    assert value_of(outcome, "z > z", "redshift", "ndcg@10").value > 0.95
    assert value_of(outcome, "z > z", "redshift", "ndcg@10", "chance").value < 0.7
    nmad, chance = (value_of(outcome, "z > z", "redshift", "nmad@1", m).value for m in ("", "chance"))
    assert nmad < 0.02 < 0.05 < chance


def test_order_of_the_embeddings_does_not_matter(pairs_dir):
    sets = aligned(pairs_dir)
    outcome = search(Study.open(pairs_dir, sets), QUICK)
    order = np.random.default_rng(0).permutation(60)
    e = sets[1].embeddings
    sets[1] = replace(sets[1], embeddings=Embeddings(e.key[order], e.split[order], e.vector[order], {}))
    again = search(Study.open(pairs_dir, sets), QUICK)
    assert [(m.value, m.error) for m in again.measures] == [(m.value, m.error) for m in outcome.measures]


def test_only_objects_with_both_are_compared(pairs_dir):
    def without_a_few(splits):
        return np.flatnonzero((splits != "test") | (np.cumsum(splits == "test") > 4))

    sets = [aligned(pairs_dir)[0], feature_set(pairs_dir, "A spectrum", "spectrum", "A", 0.5, kept=without_a_few)]
    outcome = search(Study.open(pairs_dir, sets), QUICK)
    count = Survey.load(pairs_dir).count("test")
    assert value_of(outcome, "A image > A spectrum", "partner", "recall@1").samples == count - 4
    assert f"{count - 4} to {count} test samples" in outcome.sections[0]


def test_without_the_label_partners_are_still_judged(pairs_dir):
    study = Study.open(pairs_dir, aligned(pairs_dir))
    for options in (replace(QUICK, label=""), replace(QUICK, label="log_mstar"), replace(QUICK, label="kind")):
        outcome = search(study, options)
        assert {m.target for m in outcome.measures} == {"partner"}
        assert len(outcome.sections) == 2
    assert "must be numbers" in outcome.sections[0]


def test_numbers_need_no_shards(make_study):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 4))
    study = make_study({"redshift": rng.uniform(0, 1, 80)}, {"x": ("image", vectors, "", ())}, train=40)
    outcome = search(study, QUICK)
    assert value_of(outcome, "x > x", "redshift", "ndcg@10").samples == 40
    assert "shards of the survey are not on this machine" in outcome.sections[2]


def test_two_spaces_are_told_apart(pairs_dir):
    sets = aligned(pairs_dir) + [feature_set(pairs_dir, f"T {m}", m, "twin", 5.0) for m in ("image", "spectrum")]
    outcome = search(Study.open(pairs_dir, sets), QUICK)
    assert [line.partition(":")[0] for line in outcome.lines] == [
        "A image → A spectrum", "A spectrum → A image", "T image → T spectrum", "T spectrum → T image"
    ]  # fmt: skip
    assert not any("A" in m.features and "T" in m.features for m in outcome.measures)


def test_bad_studies(pairs_dir):
    other = feature_set(pairs_dir, "A spectrum", "spectrum", "A", dimensions=5)
    with pytest.raises(ValueError, match="share the space 'A', but have 6 and 5 dimensions"):
        search(Study.open(pairs_dir, [aligned(pairs_dir)[0], other]), QUICK)
    predictions = feature_set(pairs_dir, "P", "image", dimensions=1)
    with pytest.raises(ValueError, match="no embeddings, only predictions"):
        search(Study.open(pairs_dir, [replace(predictions, targets=("redshift",))]), QUICK)
    few = feature_set(
        pairs_dir, "F", "image", kept=lambda s: np.r_[np.flatnonzero(s == "train"), np.flatnonzero(s == "test")[:11]]
    )
    with pytest.raises(ValueError, match="12 test samples or more must have F, got 11"):
        search(Study.open(pairs_dir, [few]), QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"queries": -1}, "queries"),
        ({"answers": 0}, "answers"),
        ({"resamples": 1}, "resamples"),
    ],
    ids=["tolerance", "queries", "answers", "resamples"],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=f"{message}: must be"):
        SearchOptions(**change)


def test_cutouts_and_spectra_of_rows_are_those_of_the_survey(pairs_dir):
    source = PackedSurvey(pairs_dir)
    rows = [17, 3, 17]
    for row, (image, valid), spectrum in zip(
        rows, read_cutouts(pairs_dir, rows), read_spectra(pairs_dir, rows), strict=True
    ):
        sample = source.read(row)
        np.testing.assert_array_equal(image, sample.image)
        assert valid is None
        np.testing.assert_array_equal(spectrum.flux, sample.spectrum.flux)
        np.testing.assert_array_equal(spectrum.ivar, sample.spectrum.ivar)


def test_objects_without_a_modality(survey_dir, pairs_dir):
    with pytest.raises(ValueError, match="row 2 of catalog.parquet has no spectrum"):
        read_spectra(survey_dir, [2])
    with pytest.raises(ValueError, match="has no spectra"):
        draw_objects(survey_dir, Survey.load(survey_dir), "spectrum", [0])


def test_spectrum_tile_shows_the_line_where_it_is():
    wave = np.linspace(4000.0, 5990.0, 200)
    flux = np.where(np.abs(wave - 5000) < 30, 10.0, 1.0).astype(np.float32)
    points = re.search(r'points="([^"]*)"', spectrum_tile(wave, Spectrum(flux, np.ones(200, np.float32))))[1]
    xy = np.array([[float(v) for v in p.split(",")] for p in points.split()])
    assert abs(xy[xy[:, 1].argmin(), 0] - 120 * (5000 - 4000) / 1990) < 3
    nothing = spectrum_tile(wave, Spectrum(flux * 0, np.zeros(200, np.float32)))
    assert "polyline" not in nothing and "nan" not in nothing


def test_captions_are_escaped():
    row = tile_row([Tile(Markup("<b></b>"), ("z < 1", "", "q"), True)], 3)
    assert "z &lt; 1<br>q" in row and 'class="query"' in row and "--n:3" in row
    assert math.isclose(row.count("<figure"), 1)
