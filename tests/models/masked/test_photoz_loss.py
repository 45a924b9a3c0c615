"""The loss of point redshifts: by hand, its bounds, and what it leaves out."""

import pytest
import torch

from armillary.models.masked.photoz_loss import photoz_loss

TRUE = torch.tensor([0.0, 1.0, 0.5, -0.01], dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.15, 0.3])
def test_values_by_hand(scale):
    for dz, expected in ((0.0, 0.0), (scale, 0.5), (-3 * scale, 0.9), (1e6, 1.0)):
        predicted = TRUE + dz * (1 + TRUE)
        assert photoz_loss(predicted, TRUE, scale).item() == pytest.approx(expected, rel=1e-9)


def test_gradient_and_unknown_redshifts():
    true = TRUE.clone()
    true[2] = torch.nan
    predicted = torch.tensor([0.1, 0.8, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    known = ~true.isnan()
    torch.testing.assert_close(photoz_loss(predicted, true), photoz_loss(predicted[known], true[known]))
    assert torch.autograd.gradcheck(lambda p: photoz_loss(p, true), (predicted,))
    loss = photoz_loss(predicted, torch.full_like(true, torch.nan))
    loss.backward()
    assert loss == 0 and not predicted.grad.any()
    assert not photoz_loss(torch.tensor([torch.nan, 0.0]), torch.zeros(2)).isfinite()
