"""A spectrum encoder under the names of AstroCLIP's SpecFormer, out of a run and into one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file

from armillary.engine.weights.export import export_specformer
from armillary.engine.weights.init_weights import init_encoder, init_method
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import InputSpec
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining

SHAPE = SpecFormer(dim=16, depth=2, heads=2, window=6, step=3, positions=30)
CONFIG = SpecFormerPretraining(SHAPE, chunks=2, chunk_tokens=4)
INPUTS = InputSpec(n_global=1, pixels=60)


class Held(TrainedEncoder):
    """An encoder whose method is at hand."""

    def __init__(self, method):
        super().__init__(Path("run"), None, {"run": None})
        self._loaded = method, {}


@pytest.fixture
def trained():
    return CONFIG.build(INPUTS)


def equal_encoders(a, b):
    pairs = zip(a.encoder.state_dict().items(), b.encoder.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def test_names_go_out_and_come_in(trained, tmp_path):
    file = tmp_path / "new" / "specformer.safetensors"
    export_specformer(Held(trained), file)
    assert set(load_file(file)) == set(SpectrumTransformer(SHAPE).state_dict())
    by_init, by_fill = CONFIG.build(INPUTS), CONFIG.build(INPUTS)
    init_method(by_init, TrainedEncoder.open(file))
    init_encoder(by_fill, "spectrum", TrainedEncoder.open(file), None, toy.described_survey())
    assert not equal_encoders(CONFIG.build(INPUTS), trained)
    assert equal_encoders(by_init, trained) and equal_encoders(by_fill, trained)
    assert not list(file.parent.glob("*.tmp"))


def test_checkpoint_is_laid_out_as_lightning_writes_it(trained, tmp_path):
    export_specformer(Held(trained), tmp_path / "specformer.ckpt")
    content = torch.load(tmp_path / "specformer.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {
        "input_dim": SHAPE.window + 2,
        "embed_dim": SHAPE.dim,
        "num_layers": SHAPE.depth,
        "num_heads": SHAPE.heads,
        "max_len": SHAPE.positions,
        "slice_section_length": SHAPE.window,
        "slice_overlap": SHAPE.window - SHAPE.step,
        "dropout": 0.0,
    }
    SpectrumTransformer(SHAPE).load_state_dict(content["state_dict"])


class Settings:
    """Stands for what Lightning pickles beside the weights: settings and whole modules."""

    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_lightning_checkpoints_come_in(trained, tmp_path, capsys):
    content = {"epoch": 3, "state_dict": trained.encoder.state_dict(), "hyper_parameters": {"backbone": Settings()}}
    torch.save(content, tmp_path / "specformer.ckpt")
    fresh = CONFIG.build(INPUTS)
    init_method(fresh, TrainedEncoder.open(tmp_path / "specformer.ckpt"))
    assert equal_encoders(fresh, trained)
    assert capsys.readouterr().out == ""
    content["state_dict"]["extra"] = torch.zeros(2)
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt: does not fit the method: encoder.extra: not in the method"):
        init_method(fresh, TrainedEncoder.open(tmp_path / "other.ckpt"))


def test_refusals(trained, tmp_path):
    with pytest.raises(ValueError, match=r"x.pth: the file's name must end in .safetensors or .ckpt"):
        export_specformer(Held(trained), tmp_path / "x.pth")
    export_specformer(Held(trained), tmp_path / "x.safetensors")
    other = SpecFormerPretraining(SpecFormer(dim=16, depth=1, heads=2, window=8, step=4), 2, 4).build(INPUTS)
    with pytest.raises(
        ValueError, match=r"encoder.blocks.1.*not in the method.*data_embed.weight: \(16, 8\) in the file"
    ):
        init_method(other, TrainedEncoder.open(tmp_path / "x.safetensors"))
    wide = SpecFormerPretraining(replace(SHAPE, mlp_ratio=2.0), 2, 4).build(INPUTS)
    with pytest.raises(ValueError, match="mlp_ratio must be 4 in a file of SpecFormer.*got 2.0"):
        export_specformer(Held(wide), tmp_path / "x.ckpt")
    toy_method = toy.ToyConfig().build(InputSpec(channels=10, global_size=1))
    with pytest.raises(ValueError, match="Toy has no spectrum encoder"):
        export_specformer(Held(toy_method), tmp_path / "y.safetensors")
