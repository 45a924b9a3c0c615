import numpy as np
import pytest
from PIL import Image

from armillary.engine import cli
from armillary.engine.data.building.build import build
from armillary.engine.data.inspect import stats
from armillary.engine.data.inspect.stats import draw_statistics, summarise_labels
from armillary.engine.data.sources.surveys.images import Pictures


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    root = tmp_path_factory.mktemp("stats")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,ra,dec,z,type,constant,empty"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / "in" / f"p{i:02d}.png")
        z = "" if i == 3 else f"{i / 40}"
        lines.append(f"p{i:02d},{9 * i},{i - 20},{z},{'S' if i % 3 else 'E'},1,")
    (root / "in" / "labels.csv").write_text("\n".join(lines) + "\n")
    build(Pictures(root / "in"), root / "out", name="tiny", progress=False)
    return root / "out"


def test_numbers(survey):
    z, kind, constant, *_ = summarise_labels(survey)
    assert z.known == 39 and z.percentiles[0] == 0 and z.percentiles[-1] == 39 / 40
    assert kind.known == 40 and kind.most == (("S", 26), ("E", 14))
    assert constant.percentiles == (1.0,) * 5
    assert sum(s.known for s in summarise_labels(survey, "train") if s.name == "type") < 40


def test_pictures(survey, tmp_path):
    draw_statistics(survey, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1430, 792)  # sky and redshifts, and one row for the one other label that varies
        assert np.asarray(picture.convert("L")).std() > 5
    draw_statistics(survey, tmp_path / "b.pdf", labels=["z", "type", "constant"])
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")


def test_a_survey_without_positions_has_no_sky(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / "in" / f"p{i}.png")
    build(Pictures(tmp_path / "in"), tmp_path / "out", name="nowhere", progress=False)
    monkeypatch.setattr(stats, "_draw_sky", None)
    draw_statistics(tmp_path / "out", tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("options", "match"), [({"labels": ["mass"]}, "labels: no 'mass'"), ({"split": "half"}, "no samples in 'half'")]
)
def test_what_is_refused(survey, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        draw_statistics(survey, tmp_path / "x.png", **options)


def test_commands(survey, tmp_path, capsys):
    assert cli.main(["data", "stats", str(survey), "-o", str(tmp_path / "s.png")]) == 0
    assert (
        cli.main(["data", "export", str(survey), "-o", str(tmp_path / "x.h5"), "--format", "hdf5", "--no-progress"])
        == 0
    )
    assert cli.main(["data", "kinds"]) == 0
    assert cli.main(["data", "leaks", str(survey)]) == 0
    out = capsys.readouterr().out
    for part in ("wrote 40 samples", "stein", "share nothing", "type: S 26, E 14"):
        assert part in out
