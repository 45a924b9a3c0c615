"""Crops made straight from blobs, under Triton's interpreter, against decoding, cropping and stretching one by one."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from armillary.engine.data.format import codec
from armillary.engine.data.format.shards import ShardWriter, write_index
from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.data.views.crops import EvalInput
from armillary.engine.data.views.multi_crop import ASTROCLIP_RELEASED, LogNormal, MultiCrop
from armillary.engine.data.views.stretch import AsinhWhiten, Identity, ToRGB, ZScore
from armillary.engine.embed import cli
from armillary.engine.evaluate.embedding.embed import Pipeline, embed
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.weights.trained_encoder import TrainedEncoder

SHAPE = (3, 14, 13)
SPLITS = {"train": 8, "test": 5}
BROKEN = 2  # row of the training split whose blob fails its checksum
EVAL = MultiCrop(global_size=9, stretch=ToRGB(), impl="triton")
TRAIN = MultiCrop(
    global_size=8,
    local_size=5,
    n_local=2,
    placement="centre",
    jitter_px=2,
    quarter_turns=True,
    stretch=ZScore(),
    impl="triton",
)


def pack(folder: Path, name: str, broken: bool = False) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    records, row = [], 0
    for split, count in SPLITS.items():
        with ShardWriter(folder / f"{split}-000000.tar", split) as writer:
            for _ in range(count):
                image = (rng.normal(size=SHAPE) * 0.02).astype(np.float32)
                image[:, 5:8, 4:9] += 2.0
                valid = rng.random(SHAPE) < 0.9 if row % 3 == 0 else None
                blob = bytearray(codec.encode(image, [0.002] * 3 if name == "bitplane" else None, valid))
                if broken and row == BROKEN:
                    blob[-7] ^= 0x40
                writer.add(f"g{row:03d}", {"img": bytes(blob)})
                row += 1
        write_index(writer.path, writer.members)
        records.append(writer.record)
    covariance = tuple(tuple(1.0 if i == j else 0.4 for j in range(3)) for i in range(3))
    statistics = Statistics((0.01, 0.02, 0.03), (0.5, 0.6, 0.7), (0.1,) * 3, covariance, 8)
    noise = (0.02,) * 3
    steps = (0.002,) * 3 if name == "bitplane" else ()
    survey = Survey(
        "toy", ("g", "r", "z"), *SHAPE[1:], 0.262, "nanomaggy", name, noise, steps, tuple(records), statistics
    )
    survey.save(folder)
    return folder


@pytest.fixture(scope="module", params=["bitplane", "float16"])
def folder(request, tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("survey") / request.param, request.param)


def flat(batch):
    return {"pixels": batch["crop"].flatten(1)}


def embedded(folder, view, split="test", **options):
    loader = SequentialLoader(folder, split=split, batch=3, device="cpu", reader="webdataset", **options)
    return embed({"": Pipeline(view, flat)}, loader)


@pytest.mark.parametrize("stretch", [ToRGB(), AsinhWhiten(), ZScore(), Identity(255.0)], ids=lambda s: type(s).__name__)
def test_an_embedding_run_gives_the_same_from_blobs(folder, stretch):
    survey = Survey.load(folder)
    view = replace(EVAL, stretch=stretch).eval_view(survey, "cpu")
    plain = replace(EVAL, stretch=stretch, impl="auto").eval_view(survey, "cpu")
    assert view.packed and not plain.packed
    rows, fused = embedded(folder, view, packed=True)
    expected_rows, expected = embedded(folder, plain)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(fused[""], expected[""], rtol=2e-6, atol=2e-6)


def test_the_view_takes_images_too(folder):
    _, fused = embedded(folder, EVAL.eval_view(Survey.load(folder), "cpu"))
    _, expected = embedded(folder, replace(EVAL, impl="reference").eval_view(Survey.load(folder), "cpu"))
    np.testing.assert_array_equal(fused[""], expected[""])


def test_corrupt_samples_are_left_out_of_packed_batches(tmp_path):
    folder = pack(tmp_path / "s", "bitplane", broken=True)
    survey = Survey.load(folder)
    view, plain = EVAL.eval_view(survey, "cpu"), replace(EVAL, impl="auto").eval_view(survey, "cpu")
    with pytest.raises(codec.CorruptBlob, match="g002"):
        embedded(folder, view, "train", packed=True)
    rows, fused = embedded(folder, view, "train", packed=True, on_corrupt="skip")
    assert rows.tolist() == [row for row in range(8) if row != BROKEN]
    np.testing.assert_allclose(fused[""], embedded(folder, plain, "train", on_corrupt="skip")[1][""], atol=2e-6)


def test_training_views_give_the_same_from_blobs(folder):
    survey = Survey.load(folder)
    batches = {}
    for impl in ("triton", "auto"):
        views = replace(TRAIN, impl=impl).build(survey, "cpu")
        assert views.packed == (impl == "triton")
        options = {"micro_batch": 4, "device": "cpu", "reader": "webdataset", "seed": 5, "views": views}
        with Loader(folder, **options) as loader:
            batches[impl] = [dict(batch) for batch in islice(loader, 1)]
    for fused, expected in zip(*batches.values(), strict=True):
        assert fused.keys() == expected.keys() == {"row", "position", "global_crops", "local_crops"}
        for name in fused:
            torch.testing.assert_close(fused[name], expected[name], rtol=1e-6, atol=1e-6)


QUALITY = LogNormal((0.3,) * 3, (0.1,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"impl": "reference"},
        {"impl": "auto"},  # on a CPU
        {"rotation": "any", "quarter_turns": False},
        {"flux_jitter": 0.1},
        {"sky_noise_max": 0.5},
        {"psf": QUALITY, "blur_probability": (0.0, 0.0, 0.5)},
        {"noise": QUALITY, "noise_probability": (0.0, 0.0, 0.5)},
    ],
    ids=lambda c: "-".join(c),
)
def test_views_that_change_pixels_are_given_images(folder, change):
    assert TRAIN.build(Survey.load(folder), "cpu").packed
    assert not replace(TRAIN, **change).build(Survey.load(folder), "cpu").packed


def test_recipes_choose_the_implementation(folder):
    survey = Survey.load(folder)
    assert ASTROCLIP_RELEASED.impl == "auto"
    assert replace(TRAIN, impl="cuda").problems(survey) == [
        "views.impl: must be one of auto, reference, triton, got 'cuda'"
    ]


def test_the_command_hands_blobs_to_a_view_that_wants_them(folder, tmp_path, monkeypatch):
    survey = Survey.load(folder)
    pq.write_table(pa.table({"key": [f"g{i:03d}" for i in range(13)]}), folder / "catalog.parquet")
    real, decoded, vectors = EvalInput.decode, [], {}
    monkeypatch.setattr(EvalInput, "decode", lambda self, *blobs: decoded.append(self.side) or real(self, *blobs))
    for impl, packed in (("reference", False), ("triton", True)):
        view = replace(EVAL, impl=impl).eval_view(survey, "cpu")
        encoder = Encoder(SimpleNamespace(encode=flat, readouts=dict), view, {}, None)
        monkeypatch.setattr(TrainedEncoder, "open", lambda folder: SimpleNamespace(path=folder, is_published=False))
        monkeypatch.setattr(Encoder, "load", lambda *_, encoder=encoder, **__: encoder)
        assert cli.embed(tmp_path, tmp_path / f"{impl}.parquet", data=folder, batch=4, device="cpu") == 0
        assert bool(decoded) == packed
        vectors[impl] = Embeddings.load(tmp_path / f"{impl}.parquet").vector
    np.testing.assert_allclose(vectors["triton"], vectors["reference"], atol=2e-6)
