"""Tokens of images and spectra: patches and their inverse, and each layer from its definition."""

import pytest
import torch

from armillary.models.masked.tokenisers import ImagePatches, SpectrumPatches, to_image, to_patches


def test_patches_lie_row_by_row_and_back():
    image = torch.arange(2 * 3 * 12 * 12).view(2, 3, 12, 12)
    patches = to_patches(image, 4)
    assert patches.shape == (2, 9, 3, 4, 4)
    assert torch.equal(patches[:, 5], image[:, :, 4:8, 8:12])
    assert torch.equal(to_image(patches), image)


def test_tokens_of_an_image():
    layer = ImagePatches(3, 12, 4, 10).double()
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    weight = layer.projection.weight.flatten(1)
    expected = to_patches(image, 4).flatten(2) @ weight.T + layer.projection.bias + layer.position
    torch.testing.assert_close(layer(image), expected)


@pytest.mark.parametrize("pixels", [12, 14])
def test_tokens_of_a_spectrum_leave_out_what_fills_none(pixels):
    layer = SpectrumPatches(pixels, 4, 10).double()
    spectrum = torch.randn(2, pixels, dtype=torch.float64)
    linear = spectrum[:, :12].view(2, 3, 4) @ layer.projection.weight.T + layer.projection.bias + layer.position
    expected = torch.nn.functional.layer_norm(linear, (10,))
    torch.testing.assert_close(layer(spectrum), expected)
    assert torch.equal(layer(spectrum), layer(torch.cat([spectrum[:, :12], torch.randn(2, pixels - 12)], 1)))
