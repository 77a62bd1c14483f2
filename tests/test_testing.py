"""What the random tensors of anyquant.testing promise to those who test with them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor, ggml_tensor


def test_the_seed_decides() -> None:
    def digests(seed: int) -> list[str]:
        made = (
            codebook_tensor((9, 40), 1, [0, 3, 8], scaled=True, outliers=7, seed=seed),
            block_tensor(ir.BlockSpec((3, 40), "bfp", 4, 32), seed),
            affine_tensor(ir.AffineSpec((3, 40), 4, 32), seed),
            ggml_tensor(ir.GGMLSpec((3, 64), "Q5_1"), seed),
        )
        return [ir.tensor_digest(tensor) for tensor in made]

    assert digests(1) == digests(1)
    assert not set(digests(1)) & set(digests(2))


@pytest.mark.parametrize(("columns", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_widths_in_turn_and_outliers(columns: int, dtype: type) -> None:
    tensor = codebook_tensor((5, columns), 0, [2, 0, 3], outliers=400)
    assert tensor.arrays[".bits"].tolist() == [2, 0, 3, 2, 0]
    assert tensor.arrays[".outlier_index"].dtype == dtype
    assert np.abs(tensor.arrays[".outlier_value"].astype(np.float32)).mean() > 3  # beside a normal distribution's 0.8
    assert codebook_tensor((2, 3), 1, 4).arrays[".bits"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(("form", "exponent_width"), [("bfp", 0), ("minifloat", 2), ("log", 0)])
def test_blocks(form: str, exponent_width: int) -> None:
    tensor = block_tensor(ir.BlockSpec((50, 70), form, 4, 32, exponent_width), exponents=(-3, 5))
    exponents, values = tensor.arrays[".exponents"], ir.dequantize(tensor)
    assert set(np.delete(exponents.ravel(), -1)) == set(range(-3, 5))
    assert (exponents[-1, -1] == ir.ZERO_BLOCK) == (form != "log") == (not values[-1, 64:].any())
    assert values.min() < 0 < values.max()


def test_exponents_that_fp32_does_not_hold() -> None:
    with pytest.raises(CorruptFileError, match="least of FP32"):
        block_tensor(ir.BlockSpec((50, 64), "log", 8, 32), exponents=(-100, -99))


def test_affine() -> None:
    tensor = affine_tensor(ir.AffineSpec((50, 70), 2, 16))
    assert set(tensor.arrays[".zero"].ravel()) == {0, 1, 2, 3}
    assert tensor.arrays[".scale"].min() < 0 < tensor.arrays[".scale"].max()


@pytest.mark.parametrize("name", ir.GGML_TYPES)
def test_stock_blocks(name: str) -> None:
    """Values of both signs, whose size is not left to chance."""
    values = ir.dequantize(ggml_tensor(ir.GGMLSpec((8, 2048), name)))
    assert values.min() < 0 < values.max()
    assert 1e-3 < np.sqrt((values.astype(np.float64) ** 2).mean()) < 20


def test_no_test_framework_is_needed() -> None:
    code = "import anyquant.testing, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pytest", "hypothesis", "torch"} & set(done.stdout.split())
