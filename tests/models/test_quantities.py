"""Scalings of quantities: there and back, errors to first order, unknown values, and the way through JSON."""

import dataclasses
import json
import math

import pytest
import torch

from armillary.models.method import InputSpec
from armillary.models.quantities import Answer, Quantity, Scaling, ScalingKind

KINDS: tuple[ScalingKind, ...] = ("linear", "log10", "log1p", "asinh", "shape")


def some_values(seed: int = 0) -> torch.Tensor:
    """[64, 5] float64, positive, over two orders of magnitude."""
    return torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).exp() * 3


def fitted(kind: ScalingKind, values: torch.Tensor) -> Scaling:
    return Scaling.fitted(kind, values, (0.5, 1.0, 2.0, 1.0, 1.0) if kind == "asinh" else ())


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_mean_0_and_variance_1_and_go_back(kind: ScalingKind) -> None:
    values = some_values()
    scaling = fitted(kind, values)
    entries = scaling(values)
    assert entries.shape == (64, scaling.entries) == (64, 6 if kind == "shape" else 5)
    assert entries.mean(0).abs().max() < 1e-12 and (entries.std(0, correction=0) - 1).abs().max() < 1e-12
    torch.testing.assert_close(scaling.inverse(entries), values, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_first_order(kind: ScalingKind) -> None:
    values = some_values(1)
    scaling = fitted(kind, values)
    step = torch.zeros_like(values)
    step[:, 2] = 1e-6
    moved = scaling(values + step) - scaling(values)
    errors = scaling.errors(values, step)
    place = 3 if kind == "shape" else 2  # a step of one component moves the mean as well, which first order leaves out
    if kind != "shape":
        torch.testing.assert_close(errors, moved, rtol=1e-4, atol=1e-12)
    else:
        assert bool(errors[:, 0].isnan().all())
        torch.testing.assert_close(errors[:, place], step[:, 2] / values.mean(1) / scaling.std[place])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_levels_of_runs_go_back_and_tell_nothing_of_other_runs(kind: ScalingKind) -> None:
    values = torch.cat([some_values(2), some_values(3)[:, :1]], dim=1)
    scaling = Scaling.fitted(kind, values, (0.5,) * 6 if kind == "asinh" else (), levels=2)
    entries = scaling(values)
    assert entries.shape == (64, scaling.entries) == (64, 8)
    assert (entries.square().mean(0) - 1).abs().max() < 1e-9
    torch.testing.assert_close(scaling.inverse(entries), values, rtol=1e-6, atol=1e-6)
    runs = entries.view(64, 2, 4)
    assert (runs[..., 1:] * torch.tensor(scaling.std, dtype=torch.float64).view(2, 4)[:, 1:]).sum(
        -1
    ).abs().max() < 1e-9  # around the level
    other = values.clone()
    other[:, 3:] = math.nan
    torch.testing.assert_close(scaling(other).view(64, 2, 4)[:, 0], runs[:, 0])
    assert scaling(other).view(64, 2, 4)[:, 1].isnan().all()
    errors = scaling.errors(values, torch.full_like(values, 1e-3)).view(64, 2, 4)
    assert errors[..., 0].isnan().all() and (errors[..., 1:] > 0).all()


@pytest.mark.parametrize("levels", [4, 6, -1], ids=["not equal", "of one", "negative"])
def test_runs_of_levels_are_equal(levels: int) -> None:
    with pytest.raises(ValueError, match="must be equal runs of two or more"):
        Scaling.fitted("linear", some_values().repeat(1, 2)[:, :6], levels=levels)


def test_what_has_no_value_is_unknown() -> None:
    values = some_values()
    values[0, 1], values[1, 1] = math.nan, -1.0
    assert fitted("log10", values)(values)[:2, 1].isnan().all()
    assert fitted("asinh", values)(values)[:2, 1].isnan().tolist() == [True, False]
    shape = fitted("shape", values)
    entries = shape(values)
    assert entries[0].isnan().tolist() == [False, False, True, False, False, False]
    assert shape(-values)[2].isnan().all()


def test_a_quantity_that_cannot_be_scaled_is_refused() -> None:
    constant = some_values()
    constant[:, 3] = 0.1
    with pytest.raises(ValueError, match="entry 3: is the same"):
        Scaling.fitted("linear", constant)
    with pytest.raises(ValueError, match="entry 3: has no known value"):
        Scaling.fitted("log10", constant.index_fill(1, torch.tensor([3]), -1.0))


def test_inputs_go_through_json() -> None:
    quantity = Quantity("sed", "Jy", ("a", "b"), (4000.0, 5000.0), Scaling("asinh", (0.0, 1.0), (1.0, 2.0), (0.1, 0.2)))
    inputs = InputSpec(columns=("x",), quantities=(quantity, Quantity("redshift")))
    assert InputSpec.from_json(json.loads(json.dumps(dataclasses.asdict(inputs)))) == inputs


def test_an_answer_gives_quantiles_of_its_draws() -> None:
    draws = torch.arange(101.0)[None, :, None].expand(2, -1, 3)
    answer = Answer({"redshift": draws}, {"redshift": draws.median(1).values})
    assert answer.quantile("redshift", 0.16).tolist() == [[16.0] * 3] * 2
