"""What holds for both products with an epilogue: the up-projection and the gradient of the down-projection."""

import pytest
import torch
from products import ACTIVATIONS, COMPILED, PATHS, PRODUCTS, assert_compiles, force_path

CASES = {  # (M, depth, H, E), bias, row scale
    "odd": ((37, 19, 45, 2), True, True),
    "whole columns": ((40, 32, 64, 2), True, True),
    "half a tile of depth": ((40, 24, 64, 2), True, True),
    "one expert, bias": ((33, 40, 72, 1), True, False),
    "one expert, bias, whole columns": ((33, 40, 64, 1), True, False),
    "one expert, scale": ((5, 8, 64, 1), False, True),
    "one expert, scale, broken columns": ((5, 8, 72, 1), False, True),
    "bare": ((35, 16, 64, 2), False, False),
    "ones": ((1, 1, 1, 1), True, True),
}
of_both = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
@of_both
def test_equals_the_reference(product, path, activation, case, device, monkeypatch, poison_empty):
    force_path(monkeypatch, product.module, path)
    product.check(product.inputs(case[0], activation, device, torch.float32, *case[1:]))


@pytest.mark.parametrize("name", ["odd", "whole columns", "half a tile of depth"])
@pytest.mark.parametrize("path", PATHS)
@of_both
def test_half_precision(product, path, name, device, monkeypatch, poison_empty):
    """float16: the interpreter multiplies bit patterns for bfloat16, which the GPU test covers."""
    force_path(monkeypatch, product.module, path)
    shape, *terms = CASES[name]
    product.check(product.inputs(shape, "gelu", device, torch.float16, *terms))


@pytest.mark.slow
@pytest.mark.parametrize("kernel, activation, vit, architectures", COMPILED.values(), ids=COMPILED)
@of_both
def test_compiles_without_spilling(product, kernel, activation, vit, architectures):
    assert_compiles(product.module, kernel, activation, vit, architectures)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
@of_both
def test_training_shape(product, path, activation, monkeypatch):
    force_path(monkeypatch, product.module, path)
    for scale in (True, False):
        product.check(product.inputs((8000, 1024, 4096, 3), activation, "cuda", torch.bfloat16, True, scale))
