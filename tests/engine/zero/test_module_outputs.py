"""What ZeRO-3 finds in the outputs of modules: tensors in dataclasses, and in those that are mappings besides."""

from dataclasses import dataclass

import pytest
import torch

from armillary.engine.zero.deepspeed_engine import _see_into_dataclasses
from armillary.models.method import Losses


@pytest.fixture
def apply(monkeypatch):
    """DeepSpeed's function with our extension, for this test only."""
    from deepspeed.runtime.zero import parameter_offload, utils

    for module in (utils, parameter_offload):
        monkeypatch.setattr(module, "apply_to_tensors_only", utils.apply_to_tensors_only)
    _see_into_dataclasses()
    _see_into_dataclasses()  # a second time does nothing
    return lambda value: utils.apply_to_tensors_only(lambda t: t * 5, value)


def test_an_output_of_transformers_changes_alike_by_attribute_item_and_place(apply):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    out = apply(outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1), torch.ones(1))))
    assert out.last_hidden_state.tolist() == out["last_hidden_state"].tolist() == out[0].tolist() == [5.0, 5.0]
    assert [x.item() for x in out.hidden_states] == [x.item() for x in out["hidden_states"]] == [5.0, 5.0]


@dataclass(frozen=True)
class Frozen:
    inner: dict
    name: str = "a"


def test_dataclasses_in_any_nesting(apply):
    original = Frozen({"x": [Losses(torch.ones(()), {"y": torch.ones(())})]})
    found = apply((original, torch.ones(1)))
    losses = found[0].inner["x"][0]
    assert (losses.total.item(), losses.terms["y"].item(), found[1].item(), found[0].name) == (5.0, 5.0, 5.0, "a")
    assert original is not found[0]
