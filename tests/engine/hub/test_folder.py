"""Folders for Hugging Face: opened by transformers, in a process that cannot import armillary, to the same embeddings."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import frozen_toy
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from armillary.engine import cli
from armillary.engine.config.config_json import to_json
from armillary.engine.config.run import Data, Optim, Run, Training
from armillary.engine.config.schedule import Constant, Schedules
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.stretch import AsinhWhiten, Identity, ToRGB, ZScore
from armillary.engine.weights.export import export_encoder
from armillary.engine.weights.trained_encoder import TrainedEncoder, encoder_tensors
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.vit.transformers_names import from_transformers, to_transformers
from armillary.models.vit.vit import VisionTransformer, ViT

transformers = pytest.importorskip("transformers")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # two ways to sum in float32; embeddings are of order 1
SIDE = 8
VIT = ViT(channels=3, image_size=12, patch_size=4, dim=32, depth=2, heads=2, layer_scale=0.5, drop_path=0.0)
SPECTRUM = SpecFormer(dim=32, depth=2, heads=2, mlp_ratio=2, window=20, step=10, positions=60)
SMALL = Head(prototypes=8, hidden=8, bottleneck=8)
IMAGE = MultiCrop(global_size=SIDE, placement="centre", stretch=ToRGB())
PAIR_VIEWS = ObjectViews(image=replace(IMAGE, n_global=1), spectrum=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return frozen_toy.make_survey(tmp_path_factory.mktemp("pairs") / "survey")


@pytest.fixture
def export(tmp_path, pairs):
    """Writes an encoder of a method with random weights as armillary exports them; returns the file."""

    def write(method, views, record=True):
        survey = Survey.load(pairs)
        run = Run(
            name="mine",
            method=method,
            views=views,
            data=Data(path=pairs),
            optim=Optim(lr=1e-3),
            schedule=Schedules(learning_rate=Constant(), weight_decay=Constant(0.0)),
            train=Training(steps=1, global_batch=1, micro_batch=1, precision="fp32"),
        )
        inputs = views.input_spec(survey)
        torch.manual_seed(2)
        built = method.build(inputs)
        with torch.no_grad():
            for p in built.parameters():
                p.normal_(std=0.2)
        source = type("Source", (), {"is_published": False, "path": tmp_path})()
        source.record = {
            "run": to_json(run),
            "inputs": json.loads(json.dumps(vars(inputs), default=list)),
            "pixels": survey.pixels().to_json(),
            "step": 7,
            "commit": "abc",
        }
        source.weights = lambda: encoder_tensors(built)
        export_encoder(source, tmp_path / "teacher.safetensors")
        return tmp_path / "teacher.safetensors"

    return write


def written(file, out, *options):
    assert cli.main(["export", str(file), "-o", str(out), "--format", "hf", *options]) == 0
    return out


ALONE = """
import sys
sys.modules["armillary"] = None  # as where it is not installed
import numpy, torch
from transformers import AutoImageProcessor, AutoModel
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    given = {k: torch.from_numpy(v) for k, v in numpy.load(folder + "/given.npz").items()}
    model = AutoModel.from_pretrained(folder, trust_remote_code=kind != "Dinov2Model").eval()
    assert type(model).__name__ == kind, type(model)
    if "image" in given:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        given["pixel_values"] = processor(given.pop("image").numpy())["pixel_values"]
    with torch.no_grad():
        out = model(**given)
    numpy.savez(folder + "/got.npz", **{k: v for k, v in out.items() if v is not None})
"""


def opened_alone(folders, tmp_path):
    """What models give of GIVEN.npz in their folders, in a process without armillary; by folder."""
    words = [str(word) for folder, kind in folders.items() for word in (folder, kind)]
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [{k: torch.from_numpy(v) for k, v in np.load(folder / "got.npz").items()} for folder in folders]


def fluxes(count=3, side=13):
    return np.random.default_rng(1).normal(0.3, 0.5, (count, 3, side, side)).astype(np.float32)


def spectra(count=3):
    rng = np.random.default_rng(2)
    flux = rng.normal(3, 1, (count, frozen_toy.GRID.count)).astype(np.float32)
    ivar = np.ones_like(flux)
    ivar[0, 40:90] = 0
    return flux, ivar


def model_input(encoder, image):
    views = encoder.run.views
    view = views.eval_view(encoder.pixels, "cpu").image
    return view(torch.from_numpy(image))


@pytest.mark.slow
def test_transformers_opens_every_folder_without_armillary(export, tmp_path):
    image, (flux, ivar) = fluxes(), spectra()
    image[0, 1, 6, 6] = np.nan
    methods = {
        "Dinov2Model": (DINOv2(vit=VIT, head=SMALL), IMAGE, {"image": image}),
        "SpecFormerModel": (
            SpecFormerPretraining(SPECTRUM, 1, 1), ObjectViews(spectrum=True), {"spectrum": flux, "ivar": ivar},
        ),
        "AstroCLIPModel": (
            AstroCLIP(image=VIT, spectrum=SPECTRUM, freeze=False, embedding=24, heads=2),
            PAIR_VIEWS,
            {"image": image, "spectrum": flux, "ivar": ivar},
        ),
    }  # fmt: skip
    encoders = {}
    for kind, (method, views, given) in methods.items():
        encoders[kind] = TrainedEncoder.open(export(method, views))
        assert encoders[kind].method is not None  # read before the next takes its place
        folder = written(encoders[kind].path, tmp_path / kind)
        np.savez(folder / "given.npz", **given)
    dinov2, specformer, astroclip = opened_alone({tmp_path / kind: kind for kind in methods}, tmp_path)

    encoder = encoders["Dinov2Model"]
    crop = model_input(encoder, np.nan_to_num(image))
    seen = encoder.method.get_submodule("teacher.backbone")([crop])
    torch.testing.assert_close(dinov2["pooler_output"], seen.cls[0], **CLOSE)
    torch.testing.assert_close(dinov2["last_hidden_state"][:, 1:], seen.patches[0], **CLOSE)

    batch = {"spectrum": torch.from_numpy(flux), "spectrum_ivar": torch.from_numpy(ivar)}
    wanted = encoders["SpecFormerModel"].method.encode(batch)
    torch.testing.assert_close(specformer["pooler_output"], wanted["mean"], **CLOSE)
    config = json.loads((tmp_path / "SpecFormerModel/config.json").read_text())
    np.testing.assert_allclose(config["wave_angstrom"], frozen_toy.GRID.angstrom())

    wanted = encoders["AstroCLIPModel"].method.encode(batch | {"crop": crop})
    torch.testing.assert_close(astroclip["image_embeds"], wanted["image"], **CLOSE)
    torch.testing.assert_close(astroclip["spectrum_embeds"], wanted["spectrum"], **CLOSE)


@pytest.mark.parametrize("tokens", ["positioned", "all"])
def test_other_tokens_of_an_alignment(export, tmp_path, tokens):
    method = AstroCLIP(image=VIT, spectrum=SPECTRUM, freeze=False, embedding=24, heads=2, image_tokens=tokens)
    file = export(method, PAIR_VIEWS)
    model = transformers.AutoModel.from_pretrained(written(file, tmp_path / "hf"), trust_remote_code=True).eval()
    encoder = TrainedEncoder.open(file)
    crop = model_input(encoder, fluxes())
    with torch.no_grad():
        torch.testing.assert_close(model(crop).image_embeds, encoder.method.encode({"crop": crop})["image"], **CLOSE)


def test_the_card_says_what_a_stranger_has_to_know(export, tmp_path):
    folder = written(export(DINOv2(vit=VIT, head=SMALL), IMAGE), tmp_path / "hf", "--licence", "cc-by-4.0")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: cc-by-4.0\n")
    for said in (
        "bands g, r, z",
        "nanomaggy",
        "for 7 steps",
        "None were measured",
        "at least 8 x 8 pixels of 0.262 arcsec",
    ):
        assert said in card


@pytest.mark.parametrize("stretch", [AsinhWhiten(), ZScore(), Identity(2.0)], ids=["asinh", "zscore", "identity"])
def test_every_stretch_has_its_numbers_in_the_folder(export, tmp_path, stretch):
    file = export(DINOv2(vit=VIT, head=SMALL), replace(IMAGE, stretch=stretch))
    folder = written(file, tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = fluxes()
    crop = model_input(TrainedEncoder.open(file), image)
    torch.testing.assert_close(processor(image)["pixel_values"], crop, **CLOSE)
    with pytest.raises(ValueError, match=r"images: must be \[B, 3, H, W\] fluxes of g, r, z in nanomaggy"):
        processor(image[:, :2])


def test_registers_and_another_gelu(tmp_path):
    torch.manual_seed(3)
    encoder = VisionTransformer(replace(VIT, image_size=SIDE, registers=2, gelu="tanh")).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4,
        num_register_tokens=2, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    renamed = to_transformers(encoder.state_dict())
    assert set(renamed) == names
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in renamed.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    crop = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(model(crop).pooler_output, encoder([crop]).cls[0], **CLOSE)
    back = from_transformers(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(back[name], value) for name, value in encoder.state_dict().items())
    assert set(back) == set(encoder.state_dict())


def test_figures_of_an_evaluation_stand_in_the_card(export, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"task": "properties", "features": "DINOv2", "target": "redshift", "model": "kNN", "metric": "R2"}
    (tmp_path / "run/evaluation").mkdir(parents=True)
    file = export(DINOv2(vit=VIT, head=SMALL), IMAGE)
    (tmp_path / "run/export").mkdir()
    file.rename(tmp_path / "run/export/teacher.safetensors")
    rows = [
        row | {"value": 0.8125, "error": 0.01, "stratum": "all"},
        row | {"value": 0.1, "error": 0.01, "stratum": "faint"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "run/evaluation/metrics.parquet")
    card = (written(tmp_path / "run", tmp_path / "hf") / "README.md").read_text()
    assert "| properties | DINOv2 | redshift | kNN | R2 | 0.8125 +- 0.01 |" in card
    assert "faint" not in card and "0.1 " not in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "hf", "--push", "mine"], "push: must be OWNER/NAME of a repository, got 'mine'"),
        (["--format", "hf", "--licence", "mit\nx: y"], "licence: must be a licence as the hub calls it"),
        (["--push", "a/b"], "push, licence: must be left out without --format hf"),
        ([], "x: the file's name must end in .safetensors"),
        (["--format", "onnx"], "x: the file's name must end in .onnx"),
    ],
)
def test_bad_options_are_refused(export, tmp_path, capsys, options, said):
    file = export(DINOv2(vit=VIT, head=SMALL), IMAGE)
    assert cli.main(["export", str(file), "-o", str(tmp_path / "x"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_has_no_form_there_is_refused(export, tmp_path, capsys):
    file = export(DINOv2(vit=replace(VIT, mlp_ratio=2.5), head=SMALL), IMAGE)
    assert cli.main(["export", str(file), "-o", str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert "mlp_ratio must be a whole number in a Dinov2Model, got 2.5" in capsys.readouterr().err
    assert not Path(tmp_path / "hf").exists()


@pytest.mark.slow
def test_onnx_gives_the_same_embeddings(export, tmp_path, capfd):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    image, spectrum = replace(VIT, depth=1), replace(SPECTRUM, depth=1)  # the exporter takes seconds for each block
    file = export(AstroCLIP(image=image, spectrum=spectrum, freeze=False, embedding=24, heads=2), PAIR_VIEWS)
    assert cli.main(["export", str(file), "-o", str(tmp_path / "mine.onnx"), "--format", "onnx"]) == 0
    assert capfd.readouterr().err == ""
    session = runtime.InferenceSession(tmp_path / "mine.onnx", providers=["CPUExecutionProvider"])
    encoder = TrainedEncoder.open(file)
    (flux, ivar), crop = spectra(5), model_input(encoder, fluxes(5))
    image, spectrum = session.run(None, {"pixel_values": crop.numpy(), "spectrum": flux, "ivar": ivar})
    batch = {"crop": crop, "spectrum": torch.from_numpy(flux), "spectrum_ivar": torch.from_numpy(ivar)}
    wanted = encoder.method.encode(batch)
    torch.testing.assert_close(torch.from_numpy(image), wanted["image"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(spectrum), wanted["spectrum"], rtol=1e-4, atol=1e-4)
