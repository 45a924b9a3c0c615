"""Published files of weights embed a survey without a training run."""

import frozen_toy
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from armillary.engine import cli
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.stretch import ToRGB
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.embedding.published import PublishedEncoder
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.method import InputSpec
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer
from armillary.models.vit.vit import VisionTransformer, ViT

SPECFORMER = SpecFormer(dim=128, depth=1, heads=1, window=20, step=10, positions=60)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return frozen_toy.make_survey(tmp_path_factory.mktemp("pairs") / "survey")


def vit(**shape):
    torch.manual_seed(1)
    config = ViT(channels=3, dim=64, depth=2, heads=1, layer_scale=0.5, drop_path=0.0, **shape)
    model = VisionTransformer(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def embedded(path, survey, out):
    assert cli.main(["embed", str(path), "--data", str(survey), "-o", str(out), "--device", "cpu"]) == 0
    return Embeddings.load(out)


def images(survey, keys):
    """[N, 3, 16, 16] fluxes of samples, as they were packed."""
    source = frozen_toy.Pairs()
    return torch.stack([torch.from_numpy(source.read(int(key[1:])).image) for key in keys])


def test_a_backbone_of_dinov2_sees_normalised_pictures(make_survey, tmp_path):
    survey = make_survey(count=12)
    model = vit(image_size=28, patch_size=14, registers=2, position_offset=0.0, antialias=True)
    torch.save(model.state_dict(), tmp_path / "dinov2_vits14_reg4.pth")
    found = embedded(tmp_path / "dinov2_vits14_reg4.pth", survey, tmp_path / "e.parquet")
    assert found.vector.shape == (12, 64)
    encoder = PublishedEncoder(TrainedEncoder.open(tmp_path / "dinov2_vits14_reg4.pth"), Survey.load(survey))
    image = torch.rand(3, 3, 14, 14)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = model([(image - mean) / std]).cls[0]
        got = next(iter(encoder.method.encode({"crop": image}).values()))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_backbone_with_other_patches_sees_pictures_as_they_are(pairs, tmp_path):
    model = vit(image_size=8, patch_size=4)
    save_file({f"backbone.{k}": v for k, v in model.state_dict().items()}, tmp_path / "astrodino.safetensors")
    found = embedded(tmp_path / "astrodino.safetensors", pairs, tmp_path / "e.parquet")
    survey = Survey.load(pairs)
    flux = images(survey, found.key)[:, :, 2:10, 2:10].clone()
    with torch.no_grad():
        wanted = model([ToRGB().build(survey, torch.device("cpu"))(flux)]).cls[0]
    np.testing.assert_allclose(found.vector, wanted.numpy(), rtol=0.05, atol=0.02)  # the codec rounds fluxes


def test_specformer_and_astroclip(pairs, tmp_path):
    torch.manual_seed(2)
    spectrum = SpectrumTransformer(SPECFORMER)
    torch.save({"state_dict": spectrum.state_dict()}, tmp_path / "specformer.ckpt")
    assert embedded(tmp_path / "specformer.ckpt", pairs, tmp_path / "s.parquet").vector.shape == (40, 128)
    both = AstroCLIP(
        image=ViT(channels=3, image_size=8, patch_size=4, dim=64, depth=1, heads=1, drop_path=0.0),
        spectrum=SPECFORMER,
        embedding=32,
        freeze=False,
    ).build(InputSpec(3, 8, 1, pixels=400))
    torch.save({"state_dict": both.state_dict()}, tmp_path / "astroclip.ckpt")
    found = embedded(tmp_path / "astroclip.ckpt", pairs, tmp_path / "a.parquet")
    assert found.vector.shape == (40, 32)
    encoder = PublishedEncoder(TrainedEncoder.open(tmp_path / "astroclip.ckpt"), Survey.load(pairs))
    assert encoder.run.method.spectrum.missing == "zero"
    assert all(torch.equal(x, both.state_dict()[k]) for k, x in encoder.method.state_dict().items())


def test_what_cannot_be_embedded_is_said_before_work(pairs, make_survey, tmp_path, capsys):
    torch.save(vit(image_size=8, patch_size=4).state_dict(), tmp_path / "vit.pth")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"state_dict": SpectrumTransformer(SPECFORMER).state_dict()}, tmp_path / "spec.ckpt")
    out = ["-o", str(tmp_path / "x.parquet"), "--device", "cpu"]
    for arguments, said in (
        ([str(tmp_path / "vit.pth")], "data: must name the survey to embed"),
        ([str(tmp_path / "other.pth"), "--data", str(pairs)], "its names are none of DINOv2, SpecFormer or AstroCLIP"),
        ([str(tmp_path / "spec.ckpt"), "--data", str(make_survey(count=6))], "needs a survey with spectra"),
        ([str(tmp_path / "vit.pth"), "--data", str(make_survey(count=6, bands=("g", "i")))], "stretch.bands"),
    ):
        assert cli.main(["embed", *arguments, *out]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    blocked = ["-o", str(tmp_path / "file" / "x.parquet")]
    assert cli.main(["embed", str(tmp_path / "vit.pth"), "--data", str(pairs), *blocked]) == 2
    assert "x.parquet: cannot be written" in capsys.readouterr().err
