"""Checkpoints of vision-language models: opened without weights, filled, named by hash; what is missing is said."""

import json

import pytest
import torch
from tiny_vlm import INPUTS, SIDES, galaxies, key, write_checkpoint
from transformers import AutoModelForImageTextToText

from armillary.models.galaxy_walker import vlm as vlms
from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.stage2 import GalaxyWalker


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each family, written when it is asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family) / "vlm", family)
        return made[family]

    return get


@pytest.mark.parametrize("family", vlms.FAMILIES)
def test_a_checkpoint_is_opened_without_weights_and_filled(checkpoints, family):
    """The adapted model with a gate of 1 computes what transformers computes from the same folder."""
    folder = checkpoints(family)
    assert len(list(folder.glob("*.safetensors"))) > 1
    adapter = GeometryAdapter(every=2, start=1.0)
    method = GalaxyWalker(base=folder, image_side=SIDES[family], adapter=adapter).build(INPUTS)
    names = dict(method.named_parameters())
    base = method.base()
    assert base is not None and base.sha256 == vlms.hashes(folder)
    assert {n for n, p in names.items() if p.is_meta} == base.names
    assert not any(names[n].requires_grad for n in base.names)
    assert method.flops_per_sample() > 0 and method.activation_bytes(4, 2) > 0  # need no weights
    method.materialise(torch.device("cpu"), torch.float32, read=True)
    assert not any(t.is_meta for t in (*method.parameters(), *method.buffers()))

    batch = method.prepare(galaxies(3), key(3))
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    method.eval()
    with torch.no_grad():
        hidden = method.reader(batch).hidden
        method.reader.vlm = theirs
        assert torch.equal(method.reader(batch).hidden, hidden)
    tied = method.reader.vlm.lm_head.weight is method.reader.vlm.get_input_embeddings().weight
    assert tied


def test_ranks_that_do_not_read_only_get_storage(checkpoints):
    method = GalaxyWalker(base=checkpoints("qwen2_vl"), image_side=56).build(INPUTS)
    own = {n: p.detach().clone() for n, p in method.named_parameters() if not p.is_meta}
    method.materialise(torch.device("cpu"), torch.bfloat16, read=False)
    for name, p in method.named_parameters():
        assert p.dtype == (torch.float32 if name in own else torch.bfloat16)
        assert name not in own or torch.equal(p, own[name])


def test_the_euclidean_expert_has_the_pretrained_layer(checkpoints):
    """Also where the checkpoint has the names of before transformers 5."""
    folder = checkpoints("qwen2_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    method = GalaxyWalker(base=folder, image_side=56, adapter=GeometryAdapter(every=3)).build(INPUTS)
    for block in (0, 3):
        wanted = model.model.language_model.layers[block].mlp.state_dict()
        assert all(torch.equal(vlms.read_mlp(folder, block)[k], v) for k, v in wanted.items())
        experts = method.reader.vlm.model.language_model.layers[block].mlp.experts
        assert torch.equal(experts.up_weight[0, 0], wanted["gate_proj.weight"])
        assert torch.equal(experts.down_weight[0], wanted["down_proj.weight"])
    with pytest.raises(ValueError, match=r"hold no tensor named \*layers.9.mlp"):
        vlms.read_mlp(folder, 9)


def test_folders_that_cannot_be_opened(checkpoints, tmp_path):
    good = checkpoints("qwen2_vl")

    def problems(folder):
        return GalaxyWalker(base=folder, image_side=56).problems(INPUTS)

    assert problems(good) == []
    assert problems(tmp_path / "none") == [
        f"base: {tmp_path / 'none'}: must be the folder of a checkpoint, with a config.json; none can be read there"
    ]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (problem,) = problems(tmp_path)
    assert problem.endswith("must be a model of qwen2_vl, qwen2_5_vl, qwen3_vl, got 'llama'")
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        if (good / name).is_file():
            (tmp_path / name).write_bytes((good / name).read_bytes())
    (problem,) = problems(tmp_path)
    assert "must hold the weights as safetensors" in problem and "is missing" in problem
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (problem,) = problems(tmp_path)
    assert "must say which file holds which tensor" in problem
    for file in good.glob("model*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    (problem,) = problems(tmp_path)
    assert problem.endswith("must hold the model's tokenizer (tokenizer.json); there is none")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    good = checkpoints("qwen2_vl")
    tensors = {k: v for file in good.glob("*.safetensors") for k, v in load_file(file).items()}
    gone = next(k for k in tensors if "q_proj.weight" in k)
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    method = GalaxyWalker(base=tmp_path, image_side=56).build(INPUTS)
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model, e.g. .*q_proj.weight"):
        method.materialise(torch.device("cpu"), torch.float32, read=True)
