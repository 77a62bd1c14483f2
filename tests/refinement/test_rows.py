"""Rows that own codebooks: each step against its slow meaning, and the compiled library against NumPy."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import anyquant
from anyquant.clustering import assign, kmeans
from anyquant.refinement import fallback
from anyquant.runtime import native, native_refine

REPOSITORY = Path(__file__).resolve().parents[2]
MOMENTS = ["correlated", "diagonal", "low rank", "dead columns", "massive", "zero"]
Arrays = Callable[..., np.ndarray]
Given = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray, np.ndarray]

needs_library = pytest.mark.skipif(not native.available(), reason=f"no compiled library: {native.why_not()}")


@pytest.fixture(params=[pytest.param(native_refine, marks=needs_library, id="compiled"), fallback])
def run(request: pytest.FixtureRequest) -> Callable[..., np.ndarray]:
    """Both ways to refine rows: run(moment, weights, fixed, scale, codebook, codes, alternations, cycles)."""
    function: Callable[..., np.ndarray] = request.param.refine_rows
    return function


def rows_of(weight: np.ndarray, k: int, moment: np.ndarray, *, scaled: bool = False, fixed: float = 0) -> Given:
    """What refine_rows takes, with codebooks by k-means."""
    rng = np.random.default_rng([k, *weight.shape])
    scale = np.exp(0.4 * rng.standard_normal(weight.shape[1])).astype(np.float16).astype(np.float32) if scaled else None
    values = weight if scale is None else (weight / scale).astype(np.float32)
    book = kmeans(values, None, k).astype(np.float16).astype(np.float32)
    held = np.where(rng.random(weight.shape) < fixed, weight.astype(np.float16), np.nan).astype(np.float32)
    return moment, weight, held if fixed else None, scale, book, assign(values, book)


def values_of(given: Given) -> np.ndarray:
    """float64 [rows, n]: what stands for each weight."""
    _, _, fixed, scale, book, codes = given
    values = np.take_along_axis(book, codes.astype(np.int64), axis=1)
    values = values if scale is None else values * scale
    return (values if fixed is None else np.where(np.isnan(fixed), values, fixed)).astype(np.float64)


def loss_of(given: Given) -> np.ndarray:
    error = values_of(given) - given[1]
    return np.einsum("ri,ij,rj->r", error, given[0].astype(np.float64), error)


def copy(given: Given) -> Given:
    return (*given[:4], given[4].copy(), given[5].copy())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fixed", [0, 0.2])
def test_one_cycle_is_coordinate_descent(
    scaled: bool, fixed: float, run: Callable[..., np.ndarray], moment_of: Arrays, weight_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (4, 23)), moment_of("correlated", 23)
    given = rows_of(weight, 4, moment, scaled=scaled, fixed=fixed)
    expected = copy(given)
    run(*given[:4], expected[4], expected[5], 1, 0)  # least squares alone, twice
    settled = copy(expected)
    run(*settled, 1, 1)
    # By hand: every entry is tried for every weight in turn, and the whole loss is computed anew.
    for row, j in itertools.product(range(4), range(23)):
        if expected[2] is None or np.isnan(expected[2][row, j]):
            tried = []
            for code in range(4):
                expected[5][row, j] = code
                tried.append(loss_of(expected)[row])
            expected[5][row, j] = int(np.argmin(tried))
    by_hand = loss_of(expected)
    run(*expected, 1, 0)
    np.testing.assert_array_equal(settled[5], expected[5])
    np.testing.assert_allclose(loss_of(settled), loss_of(expected), rtol=1e-12)
    assert (loss_of(settled) <= by_hand).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fixed", [0, 0.2])
def test_entries_are_the_least_squares_solution(
    scaled: bool, fixed: float, run: Callable[..., np.ndarray], moment_of: Arrays, weight_of: Arrays
) -> None:
    weight, moment = weight_of("normal", (5, 61)), moment_of("correlated", 61)
    given = rows_of(weight, 5, moment, scaled=scaled, fixed=fixed)
    moved = copy(given)
    run(*moved, 1, 0)
    root = np.linalg.cholesky(moment.astype(np.float64)).T
    for row in range(5):
        design = np.zeros((61, 5))
        free = np.ones(61, np.bool_) if given[2] is None else np.isnan(given[2][row])
        design[free, given[5][row][free]] = 1 if given[3] is None else given[3][free]
        constant = np.where(free, 0, values_of(given)[row])
        solution = np.linalg.lstsq(root @ design, root @ (given[1][row] - constant), rcond=None)[0]
        best = float(np.sum((root @ (design @ solution + constant - given[1][row])) ** 2))
        found, entries = moved[4][row][moved[5][row]], solution.astype(np.float16)[given[5][row]]
        np.testing.assert_allclose(found[free], entries[free].astype(np.float32), rtol=2.0**-10)  # one unit
        assert best <= loss_of(moved)[row] <= best * (1 + 1e-4)


def test_best_of_all_codes_and_entries(run: Callable[..., np.ndarray], weight_of: Arrays, moment_of: Arrays) -> None:
    # Two entries, six weights: all 64 assignments with their least squares entries. Descent finds a local minimum:
    # never below the best of all, and no single code can improve it.
    weight, moment = weight_of("normal", (8, 6)), moment_of("correlated", 6)
    given = rows_of(weight, 2, moment)
    run(*given, 10, 10)
    root = np.linalg.cholesky(moment.astype(np.float64)).T
    least = np.full(8, np.inf)
    for codes in itertools.product(range(2), repeat=6):
        design = np.eye(2)[list(codes)]
        for row in range(8):
            solution = np.linalg.lstsq(root @ design, root @ weight[row], rcond=None)[0]
            least[row] = min(least[row], float(np.sum((root @ (design @ solution - weight[row])) ** 2)))
    found = loss_of(given)
    assert (found >= least * (1 - 1e-9)).all()
    assert (found <= least * 1.001).sum() >= 4
    for j in range(6):
        flipped = copy(given)
        flipped[5][:, j] ^= 1
        assert (loss_of(flipped) >= found * (1 - 1e-9)).all()


def test_reported_losses_are_those_of_what_is_stored(
    run: Callable[..., np.ndarray], moment_of: Arrays, weight_of: Arrays
) -> None:
    for kind in MOMENTS:
        given = rows_of(weight_of("heavy tails", (6, 50)), 8, moment_of(kind, 50), scaled=True, fixed=0.1)
        before = loss_of(given)
        losses = run(*given, 3, 3)
        slack = 1e-12 * np.abs(given[0]).max() * (given[1].astype(np.float64) ** 2).sum()
        np.testing.assert_allclose(losses, np.stack([before, loss_of(given)], axis=1), rtol=1e-9, atol=slack)
        assert (losses[:, 1] <= losses[:, 0]).all()
        assert (given[4] == given[4].astype(np.float16)).all()


@needs_library
@pytest.mark.parametrize("k", [1, 2, 3, 8, 16, 256])
@pytest.mark.parametrize("n", [1, 5, 33, 70])
def test_numpy_gives_the_same_bytes(k: int, n: int, moment_of: Arrays, weight_of: Arrays) -> None:
    kinds = MOMENTS[:: 1 if k < 256 else 3]  # factors of 256 x 256 take their time in NumPy
    for kind, name in itertools.product(kinds, ["normal", "few values", "heavy tails"]):
        scaled, fixed = MOMENTS.index(kind) % 2 == 0, 0.2 * (name != "few values")
        one = rows_of(weight_of(name, (3, n)), k, moment_of(kind, n), scaled=scaled, fixed=fixed)
        other = copy(one)
        losses = native_refine.refine_rows(*one, 2, 2), fallback.refine_rows(*other, 2, 2)
        for a, b in (losses, (one[4], other[4]), (one[5], other[5])):
            assert a.tobytes() == b.tobytes(), (kind, name)


@needs_library
def test_large_numbers_round_as_in_numpy(moment_of: Arrays) -> None:
    # Least squares of one weight and one entry: the entry is the weight, in FP16.
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 4000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(2000, dtype=np.float32) * 2 + 1) * np.float32(2.0**-25)
    powers = np.ldexp(rng.uniform(-2, 2, 4000), rng.integers(-27, 16, 4000)).astype(np.float32)
    values = np.concatenate([patterns[np.abs(patterns) < 6e4], ties, powers[np.abs(powers) < 6e4]])[:, None]
    book, codes = np.zeros(values.shape, np.float32), np.zeros(values.shape, np.uint8)
    native_refine.refine_rows(np.eye(1, dtype=np.float32), values, None, None, book, codes, 9, 0)
    near = np.abs(book.astype(np.float64) - values)
    best = np.abs(values.astype(np.float16).astype(np.float64) - values)
    np.testing.assert_array_equal(near, best)


@needs_library
def test_the_c_interface_checks_its_arguments() -> None:
    library, rows, n, k = native.library(), 3, 19, 4
    moment, w, book = (np.zeros(size, np.float32) for size in (n * n, rows * n, rows * k))
    codes, losses = np.zeros(rows * n, np.uint8), np.zeros(rows * 2)
    size = library.aq_refine_workspace(n, k)
    memory = np.zeros(size // 8 + 1)

    def call(**changes: object) -> int:
        given: dict[str, object] = dict(
            moment=moment, moments=n * n, w=w, ws=rows * n, fixed=None, fixeds=0, scale=None, scales=0, rows=rows, n=n,
            k=k, alternations=1, cycles=1, book=book, books=rows * k, codes=codes, codess=rows * n, losses=losses,
            lossess=rows * 2, memory=memory, size=size,
        )  # fmt: skip
        pointers = [x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else x for x in
                    (given | changes).values()]  # fmt: skip
        return int(library.aq_refine_rows(*pointers))

    assert call() == call(fixed=w, fixeds=rows * n) == call(scale=w[:n], scales=n) == 0
    assert call(rows=0, ws=0, books=0, codess=0, lossess=0) == 0
    for name in ("moments", "ws", "books", "codess", "lossess"):
        assert call(**{name: 1}) == -2, name
    assert call(size=size - 1) == call(fixed=w, fixeds=n) == call(scale=w, scales=n + 1) == -2
    assert call(rows=1 << 63, n=2, moments=4, ws=0, codess=0) == call(rows=1 << 62, ws=0, books=0) == -2
    for name in ("moment", "w", "book", "codes", "losses", "memory"):
        assert call(**{name: None}) == -1, name
    assert call(fixeds=1) == call(scales=1) == call(fixed=w) == call(scale=w) == call(n=0) == call(k=0) == -1
    assert call(k=257) == call(n=1 << 25) == call(alternations=-1) == call(cycles=-1) == -1
    codes[-1] = k
    assert call() == -3
    assert library.aq_refine_workspace(0, 4) == library.aq_refine_workspace(9, 257) == 0
    with pytest.raises(ValueError, match="refused 3 rows of 19 weights and 4 entries: a code"):
        native_refine.refine_rows(
            moment.reshape(n, n), w.reshape(rows, n), None, None, book.reshape(rows, k), codes.reshape(rows, n), 1, 1
        )


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the loaded library before and after a test that loads another one."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@needs_library
@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("flags", [["-DVECTOR_UNITS=0"], ["-fsanitize=undefined", "-fno-sanitize-recover=all"]])
def test_every_build_gives_the_same_bytes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment_of: Arrays, weight_of: Arrays
) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    given = rows_of(weight_of("heavy tails", (9, 131)), 8, moment_of("massive", 131), scaled=True, fixed=0.1)
    again = copy(given)
    losses = native_refine.refine_rows(*given, 2, 3)
    (tmp_path / "_lib").mkdir()
    sources = sorted((REPOSITORY / "kernels" / "core").glob("*.cpp"))
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *flags, *sources]
    if subprocess.run([*command, "-o", tmp_path / "_lib" / native.LIBRARY], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizer runtime")
    monkeypatch.setattr(anyquant, "__path__", [str(tmp_path)])
    native._load.cache_clear()
    assert native.available(), native.why_not()
    assert native_refine.refine_rows(*again, 2, 3).tobytes() == losses.tobytes()
    assert again[4].tobytes() == given[4].tobytes()
    assert again[5].tobytes() == given[5].tobytes()
