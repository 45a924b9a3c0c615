"""Embeddings of images by another run enter MOSAIC as a vector of the survey and one declaration."""

import torch
from made_sources import images
from toy_answers import exported

from armillary.engine import cli
from armillary.engine.data.building.build import build
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.sources.joined import Joined, Key, Match
from armillary.engine.data.sources.packed import PackedSurvey
from armillary.engine.data.sources.tables.rows import TableRows
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.engine.data.views.stretch import ZScore
from armillary.engine.evaluate.embedding.embed import open_batches
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import BatchKey
from armillary.models.mosaic.mosaic import MOSAIC
from armillary.models.vit.vit import ViT


def test_embeddings_of_images_become_a_quantity(tmp_path):
    build(images(), tmp_path / "images", name="images", test_fraction=0.25, seed=3, processes=1, progress=False)
    survey = Survey.load(tmp_path / "images")
    views = MultiCrop(global_size=8, local_size=4, n_local=2, stretch=ZScore())
    encoder = DINOv2(vit=ViT(2, 8, 4, dim=16, depth=1, heads=2), head=Head(16, 16, 8), koleo_weight=0.0)
    run = exported(tmp_path / "dinov2.safetensors", encoder, views=views, survey=survey)
    found = tmp_path / "dinov2.parquet"
    assert cli.main(["embed", str(run), "--data", str(tmp_path / "images"), "-o", str(found), "--device", "cpu"]) == 0

    embeddings = TableRows(found, key="key", vectors={"dinov2": "vector"}, labels=())
    both = Joined(PackedSurvey(tmp_path / "images"), Match(embeddings, Key("key")))
    build(both, tmp_path / "both", name="both", test_fraction=0.25, seed=3, processes=1, progress=False)
    with_vector = Survey.load(tmp_path / "both")
    z = QuantityView(name="z", scaling="log1p")
    declared = ObjectViews(quantities=(z, QuantityView(name="dinov2", vector="dinov2", runs=4)))
    torch.manual_seed(0)
    method = MOSAIC(dim=16, depth=1, heads=2, rank=1).build(declared.input_spec(with_vector))
    view = declared.eval_view(with_vector, "cpu")
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    for epoch in range(2):
        for batch in open_batches(tmp_path / "both", "train", view, 8, torch.device("cpu")):
            batch["position"] = batch["row"]
            key = BatchKey(0, epoch, 0, len(batch["row"]))
            seen = view(batch)
            assert not seen["quantities"].isnan().any()
            loss = method.training_step(method.prepare(seen, key), {})
            loss.total.backward()
            optimizer.step()
            assert loss.total.isfinite() and set(loss.terms) == {"z", "dinov2"}
    answer = method.eval().answer(seen, ("dinov2",), ("z",), 3, 0)
    assert answer.draws["z"].isfinite().all()
