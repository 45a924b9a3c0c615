"""Survey recipes, from files to a matched, cut, split and checked survey."""

from dataclasses import replace

import numpy as np
import pytest
from made_sources import catalogue, images, spectra

from armillary.engine.data.building.build import build
from armillary.engine.data.building.survey_recipe import Key, Preparation, Read, Sky, With, start
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.check import check_survey
from armillary.engine.data.sources.kinds import KINDS, open_source
from armillary.engine.data.sources.options import parse_options
from armillary.engine.data.sources.packed import PackedSurvey


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Three packed surveys, and the recipe that joins them."""
    root = tmp_path_factory.mktemp("sources")
    flux = np.geomspace(1, 1000, 30)
    for name, source in (
        ("images", images(flux_z=flux)),
        ("spectra", spectra([3, 5, 7, 11, 13, 17, 19, 23, 29])),
        ("masses", catalogue([5, 7, 11, 13, 17])),
    ):
        build(source, root / name, name=name, progress=False)
    return Preparation(
        name="pairs",
        first=Read("packed", root / "images", cuts=("mag(flux_z) < 21.5",)),
        matches=(
            With(Read("packed", root / "spectra"), Sky(1.0)),
            With(Read("packed", root / "masses"), Key("targetid"), required=False, name="masses"),
        ),
        split="healpix:256",
        test_fraction=0.4,
        samples_per_shard=3,
    )


def test_a_recipe_becomes_a_survey(recipe, tmp_path, capsys):
    assert (
        start(recipe, ["--out", str(tmp_path / "s"), "--processes", "1", "--no-progress", "--cuts", "mass < 117"]) == 0
    )
    out = capsys.readouterr().out
    assert "objects matched, median separation 0.2 arcsec" in out and "mass < 117.0: removed" in out
    survey = Survey.load(tmp_path / "s")
    assert survey.modalities == ("image", "spectrum", "vectors") and not check_survey(tmp_path / "s")
    packed = PackedSurvey(tmp_path / "s")
    keys = {packed.read(i).key for i in range(len(packed))}
    assert keys == {f"images{i}" for i in (5, 7, 11, 13)}
    assert any("mag(flux_z) < 21.5" in k for k in survey.provenance["build"]["inputs"])


def test_every_problem_is_told_before_anything_is_read(recipe, tmp_path, capsys):
    wrong = replace(recipe, first=Read("packd", tmp_path / "none", cuts=("z",)), cuts=("mass",), split="half")
    assert start(wrong, ["--out", str(tmp_path / "s")]) == 2
    text = capsys.readouterr().err
    for part in ("first.kind: must be module:class or one of", "first.path: must be an existing", "first.cuts: cut 'z'", "cuts: cut 'mass'", "split: must be"):  # fmt: skip
        assert part in text
    assert not (tmp_path / "s").exists()


def test_options_from_the_command_line():
    assert parse_options(["rows=(0, 5)", "name=a=b", "zero_is_missing=False", "size=64", "unit=nanomaggy"]) == {
        "rows": (0, 5),
        "name": "a=b",
        "zero_is_missing": False,
        "size": 64,
        "unit": "nanomaggy",
    }
    for texts, match in (
        (["size"], "must be NAME=VALUE"),
        (["a b=1"], "must be NAME"),
        (["a=1", "a=2"], "given twice"),
    ):
        with pytest.raises(ValueError, match=match):
            parse_options(texts)


def test_every_kind_can_be_loaded(tmp_path):
    for kind in KINDS.values():
        assert callable(kind.load()) and kind.what
    with pytest.raises(ValueError, match="kind: must be auto, module:class or one of images, "):
        open_source(tmp_path, "stars")
