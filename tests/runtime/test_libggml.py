"""ggml's quantizer as a library: the same blocks as the gguf package's where that has any, and what is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import InputError, MachineError, MissingDependency
from anyquant.runtime import libggml

pytest.importorskip("libggml")
gguf = pytest.importorskip("gguf")

# IQ1 and IQ2 build tables for up to a minute before their first block: see the slow test.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
QUICK = [name for name in ir.GGML_TYPES if name not in SLOW]


def random_rows(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-6, 3, (rows, 1)))).astype(np.float32)


def same_values(blocks: np.ndarray, name: str) -> np.ndarray:
    """The values of blocks, by the library and by the oracle, which must agree bit for bit but for the sign of zero."""
    values = libggml.library().dequantize(blocks, name)
    oracle = ir.dequantize_blocks(blocks, name)
    np.testing.assert_array_equal((values + 0).view(np.uint32), (oracle + 0).view(np.uint32))
    return values


def test_all_types_are_there_and_have_gguf_s_numbers() -> None:
    library = libggml.library()
    assert set(library.numbers) == set(ir.GGML_TYPES)
    for name, number in library.numbers.items():
        assert gguf.GGMLQuantizationType[name] == number
    assert library is libggml.library()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_without_importances_as_gguf_s_own_quantizer(name: str) -> None:
    weight = random_rows(5, 768)
    weight[1] = 0
    weight[2, :300] = -0.25
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(libggml.library().quantize(weight, name), expected)


def check_type(name: str) -> None:
    """Values, errors, and independence of the rows of a type."""
    library, length = libggml.library(), ir.GGML_TYPES[name][0]
    weight = random_rows(4, 3 * length)
    importance = np.exp2(np.random.default_rng(1).uniform(-5, 5, weight.shape[1])).astype(np.float32)
    lost = {}
    for kind, given in {"none": None, "given": importance}.items():
        blocks = library.quantize(weight, name, given)
        assert blocks.shape == (4, 3 * ir.GGML_TYPES[name][1])
        difference = weight - same_values(blocks, name)
        lost[kind] = float((importance * difference**2).sum() / (importance * weight**2).sum())
        # Rows are independent of each other, and a matrix of importances is one vector after another.
        np.testing.assert_array_equal(library.quantize(weight[2:3], name, given), blocks[2:3])
        if given is not None:
            whole = np.broadcast_to(given, weight.shape)
            np.testing.assert_array_equal(library.quantize(weight[::-1], name, whole)[::-1], blocks)
    bits = 8 * ir.GGML_TYPES[name][1] // length if name != "TQ2_0" else 1  # ternary, whatever its bits
    assert lost["given"] < {1: 0.7, 2: 0.15, 3: 0.05, 4: 0.02, 5: 0.01}.get(bits, 0.002)
    if name not in ("Q8_0", "MXFP4", "TQ1_0", "TQ2_0"):  # these take no importances
        assert lost["given"] < lost["none"]


@pytest.mark.parametrize("name", QUICK)
def test_every_type(name: str) -> None:
    check_type(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_type_with_tables(name: str) -> None:
    if name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):
        assert libggml.library().needs_importance(name)
        weight = random_rows(2, 256)
        expected = libggml.library().quantize(weight, name, np.ones(256, np.float32))
        np.testing.assert_array_equal(libggml.library().quantize(weight, name), expected)
    check_type(name)


@pytest.mark.parametrize("name", QUICK)
def test_odd_rows_give_finite_values(name: str) -> None:
    library, spike = libggml.library(), np.eye(1, 256, 7, dtype=np.float32)[0]
    rows = np.stack([np.zeros(256), np.full(256, 0.3), np.full(256, -0.3), spike, spike * 1e3 + 1e-6, spike * 1e-30])
    for importance in (None, np.zeros(256, np.float32), spike, np.full(256, 1e-38, np.float32)):
        for row in rows.astype(np.float32):
            values = same_values(library.quantize(row[None], name, importance), name)
            assert np.isfinite(values).all()
            assert row.any() or not values.any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ3_S"])
def test_threads_quantize_as_one_does(name: str) -> None:
    library, weight = libggml.library(), random_rows(40, 512)
    importance = np.linspace(0.5, 2, 512, dtype=np.float32)
    expected, together = library.quantize(weight, name, importance), threading.Barrier(4)

    def part(number: int) -> np.ndarray:
        together.wait(timeout=30)
        return library.quantize(weight[10 * number : 10 * number + 10], name, importance)

    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal(np.concatenate(list(pool.map(part, range(4)))), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_would_end_the_process_are_refused(bad: float) -> None:
    weight = random_rows(3, 64)
    weight[2, 5] = bad
    with pytest.raises(InputError, match=r"the weight .* at \[2, 5\] is not finite or beyond 1e\+09.* \(1 in all\)"):
        libggml.library().quantize(weight, "Q4_0")
    importance = np.ones(64, np.float32)
    importance[3] = bad
    with pytest.raises(InputError, match=r"the importance .* at \[3\]"):
        libggml.library().quantize(weight[:2], "Q4_0", importance)


def test_weights_beyond_the_scales_are_refused() -> None:
    weight = random_rows(3, 64)
    weight[1, 40] = 1e7  # its scale would be 1.25e6
    with pytest.raises(InputError, match=r"weights at \[1, 32:64\], up to 1e\+07, are too large for .* Q4_0"):
        libggml.library().quantize(weight, "Q4_0")


def test_other_shapes_are_refused() -> None:
    library, weight = libggml.library(), random_rows(2, 64)
    with pytest.raises(ValueError, match="rows of 64 are not a multiple of Q4_K's block length 256"):
        library.quantize(weight, "Q4_K")
    with pytest.raises(ValueError, match="expected float32"):
        library.quantize(weight.astype(np.float64), "Q4_0")
    with pytest.raises(ValueError, match=r"of shape \[0, 64\]"):
        library.quantize(weight[:0], "Q4_0")
    with pytest.raises(ValueError, match=r"importances float32 \[64\] or \[2, 64\], not float32 of shape \[32\]"):
        library.quantize(weight, "Q4_0", np.ones(32, np.float32))
    with pytest.raises(ValueError, match="least importance is -1"):
        library.quantize(weight, "Q4_0", np.full(64, -1, np.float32))
    with pytest.raises(ValueError, match="whole blocks of 18 bytes"):
        library.dequantize(np.zeros((1, 17), np.uint8), "Q4_0")
    assert library.dequantize(np.zeros((0, 36), np.uint8), "Q4_0").shape == (0, 64)
    with pytest.raises(MachineError, match="has no type Q9_9; it has Q4_0"):
        library.needs_importance("Q9_9")


def test_a_build_with_other_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = libggml.library().path
    monkeypatch.setitem(ir.GGML_TYPES, "Q4_K", (256, 148))
    with pytest.raises(MachineError, match="blocks of 256 weights in 144 bytes for Q4_K, anyquant knows 256 in 148"):
        libggml.Library(path)


def test_a_file_that_is_no_ggml_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "libggml-base.so"
    text.write_text("no library")
    with pytest.raises(MachineError, match=r"libggml-base\.so cannot be used: .*Install libggml-python again"):
        libggml.Library(text)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "_find", lambda: None)
    monkeypatch.setattr(libggml, "_loaded", None)
    assert not libggml.available()
    with pytest.raises(MissingDependency, match=r"pip install 'anyquant\[ggml\]'"):
        libggml.library()
