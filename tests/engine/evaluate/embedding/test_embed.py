import json
import types
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.evaluate.embedding.embed import Pipeline, embed, embed_readouts
from armillary.engine.evaluate.embedding.embeddings import Embeddings, stack_splits
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.probes.baselines import PixelPCA, asinh_pixels
from armillary.engine.weights.tensors import state_digest
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch, InputSpec


def plain(batch):
    return Batch(row=batch["row"], crop=batch["image"])


def mean_encoder(batch):
    x = batch["crop"]
    return {"mean": x.mean((2, 3)), "top": x.amax((2, 3))}


def make_batches(count=10, size=4, rows=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 6, 6, generator=generator)
    rows = torch.arange(count) if rows is None else rows
    return images, [
        Batch(row=rows[i : i + size], image=images[i : i + size]) for i in range(0, count, size)
    ]  # the last batch is short


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return Embeddings(
        np.array(["a", "b", "c"], object),
        np.array(["train", "test", "train"], object),
        rng.normal(size=(3, 4)).astype(np.float32),
        {"run": "x", "readout": "cls"},
    )


def test_file_gives_back_what_was_saved(embeddings, tmp_path):
    path = tmp_path / "deep" / "e.parquet"
    embeddings.save(path)
    loaded = Embeddings.load(path)
    np.testing.assert_array_equal(loaded.vector, embeddings.vector)
    assert loaded.vector.dtype == np.float32
    assert list(loaded.key) == ["a", "b", "c"]
    assert list(loaded.split) == ["train", "test", "train"]
    assert loaded.metadata == embeddings.metadata
    assert list(path.parent.iterdir()) == [path]


def test_file_is_plain_parquet(embeddings, tmp_path):
    embeddings.save(tmp_path / "e.parquet")
    schema = pq.read_schema(tmp_path / "e.parquet")
    assert schema.names == ["key", "split", "vector"]
    assert schema.field("vector").type == pa.list_(pa.float32(), 4)


def test_alignment_follows_the_keys(embeddings):
    np.testing.assert_array_equal(embeddings.aligned(np.array(["c", "a"])), embeddings.vector[[2, 0]])
    with pytest.raises(ValueError, match="1 of 2 samples have none, e.g. 'nobody'"):
        embeddings.aligned(np.array(["a", "nobody"]))


def test_bad_embeddings():
    key = np.array(["a", "a"], object)
    with pytest.raises(ValueError, match="keys repeat"):
        Embeddings(key, key, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="need N keys"):
        Embeddings(key[:1], key, np.zeros((2, 3), np.float32))


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="armillary embed"):
        Embeddings.load(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a file of embeddings"):
        Embeddings.load(tmp_path / "text.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a file of embeddings"):
        Embeddings.load(tmp_path / "other.parquet")


def test_one_pass_serves_all_encoders():
    images, batches = make_batches()
    served = iter(batches)
    rows, vectors = embed({"a": Pipeline(plain, mean_encoder), "b": Pipeline(plain, mean_encoder, "top")}, served)
    np.testing.assert_array_equal(rows, np.arange(10))
    np.testing.assert_allclose(vectors["a"], images.mean((2, 3)))
    np.testing.assert_allclose(vectors["b"], images.amax((2, 3)))
    assert vectors["a"].dtype == np.float32
    assert not list(served)


def test_mask_reaches_the_view():
    images, batches = make_batches(4)
    batches[0]["valid"] = images > 0

    def masked(batch):
        return Batch(row=batch["row"], crop=batch["image"].masked_fill(~batch["valid"], 0))

    _, vectors = embed({"a": Pipeline(masked, mean_encoder)}, batches)
    np.testing.assert_allclose(vectors["a"], images.clamp(min=0).mean((2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("encode", "readout", "message"),
    [
        (mean_encoder, "cls", "'cls' is none of this encoder's embeddings"),
        (lambda x: {"e": x["crop"]}, None, r"must be \[4, D\]"),
        (lambda x: {"e": x["crop"].mean((2, 3))[:2]}, None, r"must be \[4, D\], got \(2, 3\)"),
        (
            lambda x: {"e": x["crop"].mean((2, 3)).index_fill(0, torch.tensor([1]), float("nan"))},
            None,
            "catalogue row 1",
        ),
    ],
)
def test_unusable_embeddings(encode, readout, message):
    with pytest.raises(ValueError, match=message):
        embed({"a": Pipeline(plain, encode, readout)}, make_batches(4)[1])


def test_objects_that_lack_a_modality():
    """Every embedding covers the objects that have what it needs, and no others."""

    def encode(batch):
        return {m: batch[k].flatten(1)[:, :2] for m, k in (("image", "crop"), ("spectrum", "spectrum")) if k in batch}

    images, spectra = torch.randn(6, 1, 2, 2), torch.randn(6, 5)
    has_image = torch.tensor([True, True, False, True, False, True])
    has_spectrum = torch.tensor([True, False, True, True, True, False])
    batch = Batch(
        row=torch.arange(10, 16),
        image=images,
        spectrum=spectra,
        spectrum_ivar=torch.ones(6, 5),
        has_image=has_image,
        has_spectrum=has_spectrum,
    )
    pipeline = Pipeline(EvalView(lambda image, valid: image, spectrum=True), encode)
    found = embed_readouts(pipeline, [batch])
    for name, flags, of in (("image", has_image, images), ("spectrum", has_spectrum, spectra)):
        rows, vectors = found[name]
        order = np.argsort(rows)
        np.testing.assert_array_equal(rows[order], 10 + np.flatnonzero(flags))
        np.testing.assert_array_equal(vectors[order], of[flags].flatten(1)[:, :2])
    assert list(embed_readouts(pipeline._replace(readout="spectrum"), [batch])) == ["spectrum"]
    with pytest.raises(ValueError, match=r"'cls' is none of this encoder's embeddings, \['image', 'spectrum'\]"):
        embed_readouts(pipeline._replace(readout="cls"), [batch])
    with pytest.raises(ValueError, match="nothing to embed"):
        embed_readouts(pipeline, [])


def test_nothing_to_embed():
    with pytest.raises(ValueError, match="nothing to embed"):
        embed({"a": Pipeline(plain, mean_encoder)}, [])


def test_digest_sees_names_values_and_types():
    def build(bias=0.0):
        torch.manual_seed(0)
        layer = nn.Linear(2, 2)
        nn.init.constant_(layer.bias, bias)
        return layer

    def digest(module):
        return state_digest(module.state_dict())

    assert digest(build()) == digest(build())
    assert len({digest(m) for m in (build(), build(1.0), build().double(), nn.Sequential(build()))}) == 4
    assert digest(nn.BatchNorm1d(3))  # buffers of other types and no dimensions


def test_keys_come_from_the_catalogue(survey_dir):
    catalogue = pq.read_table(survey_dir / "catalog.parquet").to_pydict()
    e = stack_splits(
        survey_dir,
        {
            "test": (np.array([5, 2]), np.ones((2, 3), np.float32)),
            "train": (np.array([9]), np.zeros((1, 3), np.float32)),
        },
        {"run": "x"},
    )
    assert list(e.key) == [catalogue["key"][i] for i in (5, 2, 9)]
    assert list(e.split) == ["test", "test", "train"]


def test_pca_is_scikit_learns_on_flattened_inputs():
    from sklearn.decomposition import PCA

    images, _ = make_batches(40)
    images *= torch.logspace(0, -3, 108).view(3, 6, 6)  # components that differ
    batches = [Batch(row=torch.arange(40), image=images)]
    pixels = images.flatten(1).numpy()
    model = PixelPCA.fit(batches, plain, components=5)
    expected = PCA(5, svd_solver="full").fit(pixels)
    np.testing.assert_allclose(
        np.abs(model(Batch(crop=images))["pca"].numpy()), np.abs(expected.transform(pixels)), rtol=2e-2, atol=2e-2
    )
    assert model.explained == pytest.approx(expected.explained_variance_ratio_.sum(), rel=1e-2)


def test_pca_is_fitted_on_the_first_samples_only():
    images, batches = make_batches(40, 16)
    model = PixelPCA.fit(batches, plain, components=3, samples=20)
    np.testing.assert_allclose(model.mean, images[:20].flatten(1).mean(0), atol=1e-6)


def test_pca_of_few_or_equal_samples():
    images, batches = make_batches(3, 2)
    assert PixelPCA.fit(batches, plain)(Batch(crop=images))["pca"].shape == (3, 2)
    same = [Batch(row=torch.arange(4), image=torch.ones(4, 3, 6, 6))]
    assert torch.isfinite(PixelPCA.fit(same, plain)(Batch(crop=torch.ones(4, 3, 6, 6)))["pca"]).all()
    with pytest.raises(ValueError, match="two training samples or more, got 1"):
        PixelPCA.fit(make_batches(1)[1], plain)
    with pytest.raises(ValueError, match="components: must be at least 1"):
        PixelPCA.fit(batches, plain, components=0)


def test_asinh_pixels_scale_by_noise_or_spread():
    statistics = Statistics((0, 0), (2.0, 4.0), (0, 0), ((1, 0), (0, 1)), 1)
    survey = Survey("s", ("a", "b"), 2, 2, None, "nanomaggy", "float16", (0.5, 0.0), (), (), statistics)
    image = torch.full((1, 2, 2, 2), 6.0)
    row = torch.arange(1)
    out = asinh_pixels(survey)(Batch(row=row, image=image))["crop"]
    np.testing.assert_allclose(out[0, :, 0, 0], np.arcsinh([6 / 1.5, 6 / 4]), rtol=1e-6)
    valid = torch.ones_like(image, dtype=torch.bool)
    valid[0, 0, 0, 0] = False
    assert asinh_pixels(survey)(Batch(row=row, image=image, valid=valid))["crop"][0, 0, 0, 0] == 0


def test_untrained_twin_is_built_anew(survey_dir):
    """The trained encoder comes from the run's export, its twin from the run's configuration and seed."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def encode(self, x):
            return {"e": self.layer(x["crop"].mean((2, 3)))}

        def base(self):
            return None

    spec, view = [], EvalView(lambda image, valid: image)
    views = types.SimpleNamespace(modalities=("image",), eval_view=lambda survey, device: view)
    built = types.SimpleNamespace(build=lambda inputs: spec.append(inputs) or Net())
    survey, device = Survey.load(survey_dir), torch.device("cpu")
    encoder = TrainedEncoder(survey_dir, None, {"run": None})
    encoder.run = types.SimpleNamespace(name="r", seed=3, views=views, method=built)
    encoder.pixels, encoder.inputs = survey.pixels(), InputSpec(3, 6)
    trained = Net()
    nn.init.zeros_(trained.layer.weight)
    encoder._loaded = trained, {}

    before = torch.get_rng_state()
    loaded = Encoder.load(encoder, survey, device)
    about = loaded.metadata
    assert loaded.pipeline().encode(Batch(crop=torch.ones(1, 3, 2, 2)))["e"].equal(trained.layer.bias[None])
    assert about["trained"] == "true"
    twins = [Encoder.load(encoder, survey, device, trained=False) for _ in range(2)]
    assert spec == [InputSpec(3, 6)] * 2
    assert twins[0].metadata == twins[1].metadata
    assert twins[0].metadata["encoder"] != about["encoder"]
    assert torch.equal(before, torch.get_rng_state())
    json.dumps(about)

    # another survey is stretched as the training one was, and refused where that has no meaning
    fitted = []
    views.eval_view = lambda survey, device: fitted.append(survey) or view
    other = replace(survey, name="other", sky_sigma=tuple(9 * s for s in survey.sky_sigma), height=99)
    Encoder.load(encoder, other, device)
    assert fitted[0].sky_sigma == survey.sky_sigma and fitted[0].height == 99
    for change, match in [
        ({"bands": ()}, "other: has , but r embeds image"),
        ({"bands": survey.bands[::-1]}, "other: bands: the encoder was trained on"),
        ({"unit": "count"}, "other: unit: the encoder was trained on"),
        ({"pixel_scale_arcsec": 99.0}, "other: pixel_scale_arcsec: the encoder was trained at"),
    ]:
        with pytest.raises(ValueError, match=match):
            Encoder.load(encoder, replace(other, **change), device)
