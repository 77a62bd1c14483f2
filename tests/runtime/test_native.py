from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anyquant
from anyquant.errors import MachineError
from anyquant.ir import packing
from anyquant.runtime import native, native_kmeans

if TYPE_CHECKING:
    from tests.conftest import RunDriver

REPOSITORY = Path(__file__).resolve().parents[2]

needs_library = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


def pack_slowly(values: np.ndarray, bits: int) -> np.ndarray:
    rows, columns = values.shape
    codes = np.zeros((rows, -(-columns * bits // 8)), np.uint8)
    for row in range(rows):
        for column in range(columns):
            for bit in range(bits):
                position = column * bits + bit
                codes[row, position // 8] |= (int(values[row, column]) >> bit & 1) << position % 8
    return codes


@st.composite
def codes_of_a_width(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(0, 8))
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 41))
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint16)
    return values.astype(np.uint8), bits


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the loaded library before and after a test that loads it differently."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_the_library_is_built_where_there_is_a_compiler() -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no C++ compiler or no CMake: the install is pure Python")
    assert native.available(), native.why_not()


@needs_library
def test_three_bits_by_hand() -> None:
    # 5, 1, 7 -> 101, 001, 111, least significant bit first: 1 11 001 101 -> 0b11001101, then the last bit of 7.
    packed = native.pack_bits(np.array([[5, 1, 7]], np.uint8), 3)
    assert packed.tolist() == [[0b11001101, 0b1]]


@needs_library
@given(codes_of_a_width())
def test_same_bytes_as_bit_by_bit(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = native.pack_bits(values, bits)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, pack_slowly(values, bits))
    np.testing.assert_array_equal(native.unpack_bits(packed, values.shape[1], bits), values)


@needs_library
@given(codes_of_a_width())
def test_same_bytes_as_the_numpy_oracle(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = native.pack_bits(values, bits)
    np.testing.assert_array_equal(packed, packing.pack_numpy(values, bits))
    np.testing.assert_array_equal(packing.unpack_numpy(packed, values.shape[1], bits), values)


@needs_library
def test_padding_bits_are_ignored() -> None:
    packed = native.pack_bits(np.full((3, 5), 5, np.uint8), 3)
    packed[:, -1] |= 0x80
    assert native.unpack_bits(packed, 5, 3).tolist() == [[5] * 5] * 3


@needs_library
def test_strided_arrays_are_read_in_c_order() -> None:
    values = np.arange(48, dtype=np.uint8).reshape(6, 8) % 16
    for view in (values.T, values[:, ::2], values[::-1]):
        np.testing.assert_array_equal(native.pack_bits(view, 4), pack_slowly(view, 4))
    codes = native.pack_bits(values, 4)
    np.testing.assert_array_equal(native.unpack_bits(codes[::2], 8, 4), values[::2])


@needs_library
@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("column", [0, 7, 8, 10])
def test_codes_that_do_not_fit_are_refused(bits: int, column: int) -> None:
    values = np.zeros((2, 11), np.uint8)
    values[1, column] = 1 << bits
    with pytest.raises(ValueError, match="does not fit"):
        native.pack_bits(values, bits)


@needs_library
@pytest.mark.parametrize("bits", [-1, 9, 64])
def test_widths_outside_0_to_8_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.8"):
        native.pack_bits(np.zeros((1, 8), np.uint8), bits)
    with pytest.raises(ValueError, match=r"0\.\.8"):
        native.unpack_bits(np.zeros((1, 8), np.uint8), 8, bits)


@needs_library
@pytest.mark.parametrize("columns", [-1, 0, 8, 11, 100])
def test_rows_of_another_length_are_refused(columns: int) -> None:
    with pytest.raises(ValueError, match="need rows of"):
        native.unpack_bits(np.zeros((2, 4), np.uint8), columns, 3)


@needs_library
def test_other_dtypes_and_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        native.pack_bits(np.zeros((2, 8), np.int64), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uint8"):
        native.unpack_bits(np.zeros(8, np.uint8), 8, 8)


@needs_library
@pytest.mark.parametrize("bits", range(9))
def test_the_c_interface_checks_lengths_itself(bits: int) -> None:
    library, rows, columns = native.library(), 3, 19
    width = (columns * bits + 7) // 8
    values, codes = (ctypes.c_uint8 * (rows * columns + 8))(), (ctypes.c_uint8 * (rows * width + 8))()
    n, m = rows * columns, rows * width
    assert library.aq_pack_bits(values, n, rows, columns, bits, codes, m) == 0
    assert library.aq_unpack_bits(codes, m, rows, columns, bits, values, n) == 0
    for wrong_n, wrong_m in [(n - 1, m), (n + 1, m), (n, m + 1), (0, m)]:
        assert library.aq_pack_bits(values, wrong_n, rows, columns, bits, codes, wrong_m) == -2
        assert library.aq_unpack_bits(codes, wrong_m, rows, columns, bits, values, wrong_n) == -2
    # Products that wrap around to the right length in 64 bits.
    assert library.aq_pack_bits(values, 0, 1 << 32, 1 << 32, bits, codes, 0) == -2
    assert library.aq_unpack_bits(None, m + 1, rows, columns, bits, values, n) == -1
    assert library.aq_pack_bits(values, n, rows, columns, 9, codes, m) == -1


def test_without_the_library_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> None:
    monkeypatch.setattr(anyquant, "__path__", [str(tmp_path)])
    assert not native.available()
    assert "was not built" in native.why_not()
    assert not native.install()
    with pytest.raises(MachineError, match="was not built"):
        native.pack_bits(np.zeros((1, 8), np.uint8), 1)


def test_a_damaged_library_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> None:
    (tmp_path / "_lib").mkdir()
    (tmp_path / "_lib" / native.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(anyquant, "__path__", [str(tmp_path)])
    assert not native.available()
    assert "cannot be used" in native.why_not()


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert not native.available()
    assert f"interface version {native.ABI_VERSION - 1}" in native.why_not()


def test_the_environment_switches_it_off() -> None:
    script = (
        "from anyquant.runtime import native; from anyquant.ir import packing; import numpy as np;"
        "print(native.available(), native.install(), native.why_not(), packing.pack(np.eye(3, dtype=np.uint8), 2))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ANYQUANT_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.split("\n")[0].startswith("False False switched off by ANYQUANT_NATIVE=0 [[")


@needs_library
def test_install_plugs_in_the_compiled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    # monkeypatch puts back whatever backend was there, whichever test runs next.
    monkeypatch.setattr(packing, "_pack", packing.pack_numpy)
    monkeypatch.setattr(packing, "_unpack", packing.unpack_numpy)
    calls: list[str] = []

    def count(name: str, *arguments: object) -> None:
        calls.append(name)
        original(name, *arguments)  # type: ignore[arg-type]

    original = native._call
    monkeypatch.setattr(native, "_call", count)
    assert native.install()
    values = np.arange(60, dtype=np.uint8).reshape(4, 15) % 32
    packed = packing.pack(values, 5)
    np.testing.assert_array_equal(packed, packing.pack_numpy(values, 5))
    np.testing.assert_array_equal(packing.unpack(packed, 15, 5), values)
    assert calls == ["aq_pack_bits", "aq_unpack_bits"]


@needs_library
def test_the_c_interface_of_clustering_checks_its_arguments() -> None:
    library, rows, n, k = native.library(), 3, 19, 4
    values, weights = (ctypes.c_float * (rows * n))(), (ctypes.c_float * (rows * n))()
    out, codes = (ctypes.c_double * (rows * k))(), (ctypes.c_uint8 * (rows * n))()
    book, ks = (ctypes.c_float * (rows * k))(), (ctypes.c_int32 * 2)(2, 5)
    size = library.aq_kmeans_workspace(n)
    memory = (ctypes.c_double * (size // 8 + 1))()

    def errors(**changes: object) -> int:
        given = dict(values=values, v=rows * n, weights=weights, w=n, rows=rows, n=n, ks=ks, q=2, out=out, o=rows * 2)
        return int(library.aq_kmeans_errors(*(given | dict(memory=memory, size=size) | changes).values()))

    def kmeans(**changes: object) -> int:
        given = dict(values=values, v=rows * n, weights=None, w=0, rows=rows, n=n, k=k, out=out, o=rows * k)
        return int(library.aq_kmeans(*(given | dict(memory=memory, size=size) | changes).values()))

    def assign(**changes: object) -> int:
        given = dict(values=values, v=rows * n, rows=rows, n=n, book=book, b=rows * k, k=k, codes=codes, c=rows * n)
        return int(library.aq_assign(*(given | changes).values()))

    assert errors() == errors(w=rows * n) == errors(weights=None, w=0) == kmeans() == assign() == 0
    assert errors(v=rows * n - 1) == errors(o=rows * 2 - 1) == errors(w=n + 1) == errors(size=size - 1) == -2
    assert errors(rows=1 << 62, n=4, v=0, w=4) == errors(rows=1 << 63, q=2, o=0, v=0) == -2
    assert errors(weights=None) == errors(w=0) == errors(n=0, v=0) == errors(ks=None) == errors(memory=None) == -1
    assert [errors(ks=(ctypes.c_int32 * 2)(*pair)) for pair in [(0, 1), (2, 2), (5, 2), (2, 257)]] == [-1] * 4
    assert kmeans(o=rows * k + 1) == kmeans(v=0) == -2
    assert kmeans(k=0, o=0) == kmeans(k=257, o=rows * 257) == kmeans(out=None) == -1
    assert assign(v=0) == assign(b=rows * k + 1) == assign(c=0) == -2
    assert assign(k=0, b=0) == assign(k=257, b=rows * 257) == assign(book=None) == -1
    assert library.aq_kmeans_workspace(0) == library.aq_kmeans_workspace(1 << 40) == 0


@needs_library
@pytest.mark.slow
def test_every_vector_unit_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal((20, 700)), rng.integers(-99, 99, (20, 700))]).astype(np.float32)
    weights, ks = rng.lognormal(0, 2, 700).astype(np.float32), np.array([2, 7, 16, 99, 256], np.int32)
    errors, centroids = native_kmeans.kmeans_errors(values, weights, ks), native_kmeans.kmeans(values, None, 16)
    (tmp_path / "_lib").mkdir()
    sources = sorted((REPOSITORY / "kernels" / "core").glob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-DVECTOR_UNITS=0"]
    subprocess.run([compiler, *flags, *sources, "-o", tmp_path / "_lib" / native.LIBRARY], check=True)
    monkeypatch.setattr(anyquant, "__path__", [str(tmp_path)])
    native._load.cache_clear()
    assert native.available(), native.why_not()
    assert native_kmeans.kmeans_errors(values, weights, ks).tobytes() == errors.tobytes()
    assert native_kmeans.kmeans(values, None, 16).tobytes() == centroids.tobytes()


DRIVER = r"""
#include <cstdlib>
#include <cstring>
#include <vector>

#include "anyquant_core.h"

// Buffers of the exact size, each in an allocation of its own: the sanitizer sees one byte too much.
int main() {
  for (int bits = 0; bits <= 8; ++bits)
    for (size_t cols = 0; cols < 40; ++cols)
      for (size_t rows = 0; rows < 4; ++rows) {
        const size_t n = rows * cols, m = rows * ((cols * bits + 7) / 8);
        std::vector<uint8_t> values(n), back(n, 0xAA), codes(m, 0xAA);
        for (size_t i = 0; i < n; ++i) values[i] = static_cast<uint8_t>((i * 37 + 11) & ((1u << bits) - 1));
        if (aq_pack_bits(values.data(), n, rows, cols, bits, codes.data(), m) != AQ_OK) return 1;
        if (aq_unpack_bits(codes.data(), m, rows, cols, bits, back.data(), n) != AQ_OK) return 2;
        if (n && std::memcmp(values.data(), back.data(), n) != 0) return 3;
        if (aq_unpack_bits(codes.data(), m + 1, rows, cols, bits, back.data(), n) == AQ_OK) return 4;
      }
  for (size_t cols = 1; cols < 700; cols = cols * 5 / 4 + 1)
    for (unsigned kind = 0; kind < 6; ++kind) {
      const size_t rows = 2, n = rows * cols;
      std::vector<float> values(n), weights(kind % 2 ? n : cols);
      unsigned state = kind + 1;
      for (float& x : values) {
        state = state * 1664525u + 1013904223u;
        x = kind < 2 ? static_cast<float>(state >> 8) : kind < 4 ? static_cast<float>(state >> 28) : 0.f;
        if (kind == 3 && state >> 28 == 5) x = 1e9f;
      }
      for (float& w : weights) w = static_cast<float>((state = state * 1664525u + 1013904223u) >> 30);
      const std::vector<int32_t> ks = {1, 2, 3, 8, 16, 100, 256};
      std::vector<double> errors(rows * ks.size()), centroids(rows * 16), memory(aq_kmeans_workspace(cols) / 8);
      std::vector<uint8_t> codes(n);
      if (aq_kmeans_errors(values.data(), n, kind ? weights.data() : nullptr, kind ? weights.size() : 0, rows, cols,
                           ks.data(), ks.size(), errors.data(), errors.size(), memory.data(), memory.size() * 8))
        return 5;
      if (aq_kmeans(values.data(), n, nullptr, 0, rows, cols, 16, centroids.data(), centroids.size(), memory.data(),
                    memory.size() * 8))
        return 6;
      const std::vector<float> codebook(centroids.begin(), centroids.end());
      if (aq_assign(values.data(), n, rows, cols, codebook.data(), codebook.size(), 16, codes.data(), n)) return 7;
    }
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_the_buffers_under_sanitizers(tmp_path: Path, run_driver: RunDriver) -> None:
    (tmp_path / "driver.cpp").write_text(DRIVER)
    # The kernels of products have a driver of their own: tests/kernels.
    sources = [path for path in sorted((REPOSITORY / "kernels" / "core").glob("*.cpp")) if "matmul" not in path.name]
    done = run_driver(tmp_path / "driver.cpp", sources, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    assert done.returncode == 0, done.stderr
