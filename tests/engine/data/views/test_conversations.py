"""Views of conversations: right answers from votes, embeddings by key, and what they refuse."""

import numpy as np
import pytest
import torch

from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.source import Sample
from armillary.engine.data.views.conversations import ConversationViews, options_of, right_answers
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.stretch import ToRGB
from armillary.engine.data.views.vector_files import read_vectors
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.models.method import BatchKey

VOTES = [  # smooth, disk, votes on it; bar yes, no, votes
    (0.7, 0.3, 40, 0.5, 0.5, 12),  # too few were asked about a bar
    (0.2, 0.8, 40, 0.9, 0.1, 32),
    (0.2, 0.8, 50, 0.1, 0.9, 40),
    (np.nan, np.nan, np.nan, np.nan, np.nan, np.nan),  # nobody looked
    (1.0, 0.0, 20, np.nan, np.nan, 0),
    (0.0, 1.0, 30, 0.0, 1.0, 15),  # half were asked
]
NAMES = (
    "smooth-or-featured_smooth",
    "smooth-or-featured_disk",
    "smooth-or-featured_votes",
    "bar_yes",
    "bar_no",
    "bar_votes",
)


class Voted:
    pixel_scale_arcsec, unit, bands = 0.262, "nanomaggy", ("g", "r", "z")
    labels = {"redshift": "true"} | dict.fromkeys(NAMES, "votes")

    def __len__(self):
        return len(VOTES)

    def read(self, index):
        labels = {"redshift": 0.1 * index, **dict(zip(NAMES, VOTES[index], strict=True))}
        image = np.random.default_rng(index).normal(index, 0.1, (3, 16, 16)).astype(np.float32)
        return Sample(f"g{index}", image, None, 10.0 * index, 0.0, labels, f"made {index}")


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voted") / "survey"
    build(Voted(), folder, name="voted", test_fraction=0.0, progress=False)
    return Survey.load(folder)


@pytest.fixture(scope="module")
def order(survey):
    """Index of the galaxy in each row of the catalogue."""
    import pyarrow.parquet as pq

    return [int(k[1:]) for k in pq.read_table(survey.folder / "catalog.parquet")["key"].to_pylist()]


def vectors(path, galaxies, width):
    keys = np.array([f"g{i}" for i in galaxies], object)
    values = np.array(galaxies, np.float32)[:, None] + np.arange(width, dtype=np.float32) / 100
    Embeddings(keys, np.full(len(keys), "train", object), values).save(path)
    return path


def test_right_answers(survey, order):
    assert options_of(survey, "bar") == ("yes", "no") and options_of(survey, "rings") == ()
    asked = right_answers(survey, "bar", asked=0.5)
    assert dict(zip(order, asked.tolist(), strict=True)) == {0: -1, 1: 0, 2: 1, 3: -1, 4: -1, 5: 1}
    many = right_answers(survey, "bar", asked=0.0, min_votes=34)
    assert dict(zip(order, many.tolist(), strict=True)) == {0: -1, 1: -1, 2: 1, 3: -1, 4: -1, 5: -1}
    first = right_answers(survey, "smooth-or-featured", asked=0.5)
    assert dict(zip(order, first.tolist(), strict=True)) == {0: 0, 1: 1, 2: 1, 3: -1, 4: 0, 5: 1}


def test_vectors_come_by_key_and_are_nan_where_there_are_none(survey, order, tmp_path):
    found = read_vectors(vectors(tmp_path / "v.parquet", [5, 0, 2], 3), survey)
    assert found.shape == (6, 3) and found.dtype == torch.float32
    for row, galaxy in enumerate(order):
        wanted = torch.arange(3) / 100 + galaxy if galaxy in (5, 0, 2) else torch.full((3,), torch.nan)
        torch.testing.assert_close(found[row], wanted, equal_nan=True)


def views(tmp_path, **changes):
    settings = {
        "image": MultiCrop(global_size=12, n_global=1, placement="centre", hflip=0.0, vflip=0.0, stretch=ToRGB()),
        "spectrum": vectors(tmp_path / "s.parquet", [0, 1, 2, 3, 5], 4),
        "geometry": vectors(tmp_path / "g.parquet", range(6), 6),
        "targets": ("redshift",),
        "questions": ("bar", "smooth-or-featured"),
    }
    return ConversationViews(**(settings | changes))


def test_batches(survey, order, tmp_path):
    chosen = views(tmp_path)
    assert chosen.problems(survey) == [] and chosen.modalities == ("image",)
    spec = chosen.input_spec(survey)
    assert (spec.spectrum_features, spec.geometry_features, spec.spaces) == (4, 2, 3)
    assert (spec.questions, spec.options) == (("bar", "smooth-or-featured"), ("yes|no", "smooth|disk"))
    assert (spec.channels, spec.n_global, spec.n_local) == (3, 1, 0)
    rows = torch.tensor([order.index(4), order.index(2)])
    batch = {"row": rows, "position": torch.arange(2), "image": torch.rand(2, 3, 16, 16)}
    made = chosen.build(survey, "cpu")(batch, BatchKey(0, 0, 0, 2))
    assert made["crop"].shape == (2, 3, 12, 12)
    assert made["spectrum_vector"][0].isnan().all() and made["spectrum_vector"][1, 0] == 2
    assert made["geometry_vectors"].shape == (2, 3, 2) and made["geometry_vectors"][1, 2, 0] == pytest.approx(2.04)
    assert made["answers"].tolist() == [[-1, 0], [1, 1]]
    assert made["targets"][1] < made["targets"][0]
    shown = chosen.eval_view(survey, "cpu")(batch)
    assert {"crop", "spectrum_vector", "geometry_vectors"} <= set(shown) and "answers" not in shown
    torch.testing.assert_close(shown["geometry_vectors"], made["geometry_vectors"])


def test_embeddings_alone_need_no_images(survey, tmp_path):
    chosen = views(tmp_path, image=None, questions=())
    assert chosen.modalities == () and not chosen.augmented and chosen.input_spec(survey).channels == 0
    batch = {"row": torch.tensor([1]), "position": torch.tensor([0])}
    assert set(chosen.build(survey, "cpu")(batch, BatchKey(0, 0, 0, 1))) == {
        "row", "position", "spectrum_vector", "geometry_vectors", "targets",
    }  # fmt: skip
    assert "geometry_vectors" in chosen.eval_view(survey, "cpu")(batch)


def test_broken_rules(survey, tmp_path):
    def problems(**changes):
        return " ".join(views(tmp_path, **changes).problems(survey))

    assert (
        "views.questions: must be questions of which the survey has votes (smooth-or-featured, bar), got 'rings'"
        in problems(questions=("rings",))
    )
    assert "views.spaces: must divide the 6 numbers of a vector" in problems(spaces=4)
    assert "views.spectrum: " in problems(spectrum=tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("x")
    assert "not a file of embeddings" in problems(geometry=tmp_path / "text.parquet")
    other = tmp_path / "other.parquet"
    Embeddings(np.array(["a", "b"], object), np.array(["train"] * 2, object), np.ones((2, 6), np.float32)).save(other)
    assert "holds vectors of none of the galaxies" in problems(geometry=other)
    assert "views.targets: must be labels of the survey" in problems(targets=("mass",))
    assert "views.asked: must be a share within 0 and 1, got 2" in problems(asked=2.0)
    assert "views.image.n_global: must be 1" in problems(image=MultiCrop(global_size=12, n_global=2, stretch=ToRGB()))
    with pytest.raises(ValueError, match="views.spaces"):
        views(tmp_path, spaces=4).build(survey, "cpu")
