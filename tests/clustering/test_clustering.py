"""What clustering promises: centroids, codes, weights, rows, and clear words for bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anyquant import clustering
from anyquant.runtime import native

WIDTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
Example = Callable[[str, str, int, int, int], tuple[np.ndarray, np.ndarray | None]]

needs_library = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


def error_of(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    nearest = np.abs(values[:, None].astype(np.float64) - centroids).min(axis=1)
    return float((weights * nearest**2).sum())


@pytest.mark.parametrize("weighting", ["none", "mild", "some zero", "1e-6 to 1e6"])
@pytest.mark.parametrize("kind", ["normal", "integers", "many scales", "far from zero"])
def test_centroids_have_the_error_and_none_is_idle(kind: str, weighting: str, backend: str, example: Example) -> None:
    values, weights = example(kind, weighting, 3, 90, 6)
    weighed = np.ones(90) if weights is None else weights.astype(np.float64)
    for k in (1, 2, 7, 16, 64, 128):
        errors, centroids = clustering.kmeans_errors(values, weights, [k])[:, 0], clustering.kmeans(values, weights, k)
        assert (np.diff(centroids) >= 0).all()
        for row, error, entries in zip(values, errors, centroids, strict=True):
            present = row[weighed > 0]
            distinct = np.unique(present).size
            assert np.unique(entries).size == min(k, distinct)
            assert (entries[min(k, distinct) :] == entries[-1]).all()
            nearest = np.abs(present[:, None].astype(np.float64) - entries).argmin(axis=1)
            assert np.unique(nearest).size == min(k, distinct)
            assert error_of(row, weighed, entries) == pytest.approx(error, rel=1e-9, abs=1e-12 * float(error.max()))


def test_a_weight_counts_like_so_many_elements(backend: str) -> None:
    rng = np.random.default_rng(0)
    values, times = rng.standard_normal((1, 60)).astype(np.float32), rng.integers(0, 4, 60)
    repeated = np.repeat(values, times, axis=1)
    np.testing.assert_allclose(
        clustering.kmeans_errors(values, times.astype(np.float32), WIDTHS),
        clustering.kmeans_errors(repeated, None, WIDTHS),
        rtol=1e-12,
        atol=1e-12,
    )
    # Weight 0 is absence, to the bit; no weight at all is the same as none given.
    there = times > 0
    some, all_zero = times.astype(np.float32), np.zeros(60, np.float32)
    assert (clustering.kmeans(values, some, 8) == clustering.kmeans(values[:, there], some[there], 8)).all()
    assert (clustering.kmeans(values, all_zero, 8) == clustering.kmeans(values, None, 8)).all()


def test_one_centroid_is_the_mean_and_enough_are_the_values(backend: str) -> None:
    values = np.array([[3, -0.0, 1, 0.0, 3]], np.float32)
    assert clustering.kmeans(values, None, 1).tolist() == [[1.4]]
    assert clustering.kmeans(values, None, 5).tolist() == [[0, 1, 3, 3, 3]]
    assert not np.signbit(clustering.kmeans(values, None, 5)).any()
    assert clustering.kmeans_errors(values, None, [1, 2, 3, 256]).tolist() == [pytest.approx([9.2, 2 / 3, 0, 0])]


def test_more_centroids_never_leave_more(backend: str, example: Example, kinds: list[str]) -> None:
    values = np.concatenate([example(kind, "none", 1, 80, 9)[0] for kind in kinds])
    errors = clustering.kmeans_errors(values, example("normal", "mild", 1, 80, 9)[1], list(range(1, 100)))
    assert (np.diff(errors) <= 1e-15 * errors[:, :1]).all()
    for row, left in zip(values, errors, strict=True):
        assert (left[np.unique(row).size - 1 :] == 0).all()


def test_rows_do_not_depend_on_each_other(backend: str, example: Example) -> None:
    values, weights = example("normal", "mild", 6, 130, 2)
    together = clustering.kmeans_errors(values, weights, WIDTHS)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda row: clustering.kmeans_errors(row[None], weights, WIDTHS), values))
    assert together.tobytes() == np.concatenate(parts).tobytes()
    strided = np.asfortranarray(values)[::2]
    assert clustering.kmeans_errors(strided, weights, WIDTHS).tobytes() == together[::2].tobytes()


@pytest.fixture
def three_rows() -> np.ndarray:
    return np.array([[0, 0.25, 0.5, 0.75, 1, 7, -7]] * 3, np.float32)


def test_codes_by_hand(backend: str, three_rows: np.ndarray) -> None:
    codebook = np.array([[0, 0.5, 1, 1], [1, 1, 1, 1], [-1, -1, 2, 2]], np.float16)
    codes = clustering.assign(three_rows, codebook)
    # 0.25 and 0.75 lie between two entries, 7 beyond a repeated one: the lower code.
    assert codes.tolist() == [[0, 0, 1, 1, 2, 2, 0], [0] * 7, [0, 0, 0, 2, 2, 2, 0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 2, 3, 16, 31, 255, 256])
def test_codes_are_nearest(k: int, dtype: type[np.floating], backend: str) -> None:
    rng = np.random.default_rng(k)
    codebook = np.sort(rng.integers(-40, 40, (3, k)) / 8, axis=1).astype(dtype)
    values = (rng.integers(-100, 100, (3, 200)) / 16).astype(np.float32)
    distances = np.abs(values[:, :, None].astype(np.float64) - codebook[:, None, :])
    np.testing.assert_array_equal(clustering.assign(values, codebook), distances.argmin(axis=2))


def test_nothing_to_do(backend: str) -> None:
    none = np.zeros((0, 5), np.float32)
    assert clustering.kmeans_errors(none, None, [1, 2]).shape == (0, 2)
    assert clustering.kmeans_errors(np.zeros((2, 5), np.float32), None, []).shape == (2, 0)
    assert clustering.kmeans(none, None, 4).shape == (0, 4)
    assert clustering.assign(none, np.zeros((0, 3), np.float16)).shape == (0, 5)
    assert clustering.assign(np.zeros((3, 0), np.float32), np.zeros((3, 3), np.float16)).shape == (3, 0)


VALUES = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("values", "weights", "ks", "told"),
    [
        (VALUES.astype(np.float64), None, [1], "float64"),
        (VALUES[0], None, [1], r"\[3\]"),
        (VALUES[:, :0], None, [1], "2 rows of no element"),
        (
            VALUES + np.array([0, np.nan, 0], np.float32),
            None,
            [1],
            r"2 non-finite numbers, the first at index \[0, 1\]",
        ),
        (VALUES, np.ones(3), [1], "float64"),
        (VALUES, np.ones(2, np.float32), [1], r"\[3\] or \[2, 3\]"),
        (VALUES, np.ones((3, 3), np.float32), [1], r"\[3, 3\]"),
        (VALUES, np.array([1, -2, 1], np.float32), [1], r"-2.0, at index \[1\]"),
        (VALUES, np.array([1, np.inf, 1], np.float32), [1], "weights holds 1 non-finite"),
        (VALUES, None, [0], r"1\.\.256, not 0"),
        (VALUES, None, [257], "not 257"),
        (VALUES, None, [4, 2], "ascend"),
        (VALUES, None, [2, 2], "ascend"),
    ],
)
def test_bad_input_is_refused(
    values: np.ndarray, weights: np.ndarray | None, ks: list[int], told: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=told):
        clustering.kmeans_errors(values, weights, ks)
    if len(ks) == 1:
        with pytest.raises(ValueError, match=told):
            clustering.kmeans(values, weights, ks[0])


@pytest.mark.parametrize(
    ("codebook", "told"),
    [
        (np.zeros((2, 4)), "float16 or float32"),
        (np.zeros((3, 4), np.float16), "2 rows, the codebook 3"),
        (np.zeros((2, 0), np.float16), "not 0"),
        (np.zeros((2, 257), np.float16), "not 257"),
        (np.array([[0, 1], [1, 0]], np.float16), "row 1 of the codebook"),
        (np.array([[0, 1], [1, np.inf]], np.float32), "codebook holds 1 non-finite"),
    ],
)
def test_bad_codebooks_are_refused(codebook: np.ndarray, told: str, backend: str) -> None:
    with pytest.raises(ValueError, match=told):
        clustering.assign(VALUES, codebook)


@needs_library
def test_switched_off_and_without_heavy_imports_the_bytes_are_the_same() -> None:
    script = (
        "import hashlib, sys; import numpy as np; from anyquant import clustering;"
        "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules), 'a heavy import';"
        "from anyquant.runtime import native; print(native.available());"
        "x = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32);"
        "e = clustering.kmeans_errors(x, None, [2, 8, 64]); c = clustering.kmeans(x, None, 16).astype(np.float16);"
        "print(hashlib.sha256(e.tobytes() + c.tobytes() + clustering.assign(x, c).tobytes()).hexdigest())"
    )
    on, off = (
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "ANYQUANT_NATIVE": switch},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for switch in ("1", "0")
    )
    assert (on[0], off[0]) == ("True", "False")
    assert on[1] == off[1]
