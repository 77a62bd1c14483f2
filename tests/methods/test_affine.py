"""Affine blocks against an oracle that rounds block by block, and against what feedback promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.affine_grids import Kind, counts_side_by_side, full_range, search, side_by_side
from anyquant.allocation import Table
from anyquant.calibration import MatrixStatistics
from anyquant.checkpoint import open_checkpoint
from anyquant.errors import InputError, UsageError
from anyquant.feedback import activation_order, inverse_factor
from anyquant.ir.packing import unpack
from anyquant.job import Job, Target
from anyquant.methods.affine import BLOCKS, AffineMethod
from anyquant.planning import plan

stats = MatrixStatistics.of

METHOD = AffineMethod()
PLAIN = METHOD.settings({"feedback": False, "clip": False})
SHAPES = [(1, 1), (5, 75), (1, 64), (3, 33), (4, 1), (2, 300)]
PAIRS = list(itertools.product((2, 4, 8), BLOCKS))


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, (shape[0], 1)))).astype(np.float32)


def correlated(columns: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((1000, max(1, columns // 3)))
    inputs = causes @ rng.standard_normal((causes.shape[1], columns)) + 0.5 * rng.standard_normal((1000, columns))
    inputs *= np.exp2(rng.uniform(-3, 3, columns))
    moment: np.ndarray = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return moment


def only(bits: int, block: int, **options: object) -> dict[str, object]:
    """Settings with one level."""
    return METHOD.settings({"widths": str(bits), "blocks": str(block), **options})


def made(weight: np.ndarray, known: MatrixStatistics | None, settings: dict[str, object], level: int = 0) -> ir.Tensor:
    chosen = np.array([level], np.uint8)
    tensor = METHOD.quantize(weight, chosen, known, settings)  # type: ignore[arg-type]
    assert tensor.spec == METHOD.spec((len(weight), weight.shape[1]), chosen, settings)
    tensor.check("made")
    return tensor


def output_error(weight: np.ndarray, tensor: ir.Tensor, moment: np.ndarray, rows: Any = slice(None)) -> float:
    difference = ir.dequantize(tensor)[rows].astype(np.float64) - weight
    return float(np.einsum("ij,jk,ik->", difference, moment.astype(np.float64), difference))


def rounded(block: np.ndarray, scale: np.float16, zero: int, most: int) -> np.ndarray:
    """The codes 0..most whose values come nearest to a block, found by trying all."""
    values = (np.arange(most + 1) - zero) * np.float32(scale)
    codes: np.ndarray = np.abs(block[:, None].astype(np.float64) - values.astype(np.float64)).argmin(axis=1)
    return codes


def plain_grid(block: np.ndarray, most: int, symmetric: bool) -> tuple[np.float16, int]:
    """Scale and zero point of the whole range of a block, from their definitions."""
    low, high = float(block.min()), float(block.max())
    if symmetric:
        middle = (most + 1) // 2
        return np.float16(np.float32(low if -low >= high else high) / np.float32(-middle)), middle
    if low == high:
        return np.float16(abs(low)), int(low < 0)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float16((np.float32(high) - np.float32(low)) / np.float32(most))
    return scale, min(max(round(-low / float(scale)), 0), most)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "block"), PAIRS)
def test_rounding_is_that_of_each_block_alone(bits: int, block: int, shape: tuple[int, int], symmetric: bool) -> None:
    weight, most = weights(shape, bits + block), (1 << bits) - 1
    weight[-1, : shape[1] // 2] = np.abs(weight[-1, : shape[1] // 2])  # blocks on one side of zero
    tensor = made(weight, None, only(bits, block, feedback=False, clip=False, symmetric=symmetric))
    codes = unpack(tensor.arrays[".codes"], -(-shape[1] // block) * block, bits)
    for row, start in itertools.product(range(shape[0]), range(0, shape[1], block)):
        part = weight[row, start : start + block]
        scale, zero = plain_grid(part, most, symmetric)
        assert tensor.arrays[".scale"][row, start // block] == scale
        assert tensor.arrays[".zero"][row, start // block] == zero
        values = (codes[row, start : start + len(part)].astype(np.int64) - zero) * np.float64(scale)
        wanted = (rounded(part, scale, zero, most) - zero) * np.float64(scale)
        # As near as can be; where two codes are equally near, either.
        assert np.allclose(np.abs(values - part), np.abs(wanted - part), rtol=0, atol=1e-6 * float(abs(scale)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.333251953125, -65504.0, 65504.0, 2.0**-24, -(2.0**-20), 1e-30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_blocks_come_out_as_fp16_has_them(bits: int, value: float, symmetric: bool) -> None:
    weight = np.full((2, 21), value, np.float32)
    known = stats(correlated(21))
    settings = [
        only(bits, 16, feedback=False, clip=False, symmetric=symmetric),
        only(bits, 16, symmetric=symmetric),
        only(bits, 16, order="activation", symmetric=symmetric),
        only(bits, 16, order="none", clip=False, symmetric=symmetric),
    ]
    if symmetric and value and abs(value) / 2 ** (bits - 1) < 2.0**-24:
        return  # the scale would have to be below the least FP16
    for each in settings:
        assert np.array_equal(ir.dequantize(made(weight, known, each)), weight.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_and_large_weights_keep_finite_scales(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for size in (1e-38, 1e-8, 1e-6, 1.0, 65000.0):
        weight = (rng.uniform(-1, 1, (3, 40)) * size).astype(np.float32)
        known = stats(correlated(40))
        for settings in (PLAIN | {"widths": str(bits), "blocks": "16"}, only(bits, 16)):
            values = ir.dequantize(made(weight, known, settings))
            # Feedback moves values, and clipping cuts them, but not by more than the range of a block.
            assert np.abs(values - weight).max() <= 2.0**-23 + 2.1 * size
        exact = ir.dequantize(made(weight, None, only(bits, 16, feedback=False, clip=False)))
        step = np.maximum((weight.max() - weight.min()) / ((1 << bits) - 1), 2.0**-24)
        # Half a step, the rounding of the zero point, and that of a subnormal scale times the greatest code.
        assert np.abs(exact - weight).max() <= 1.01 * step + ((1 << bits) - 1) * 2.0**-25


@pytest.mark.parametrize("weight", [65520.0, -1e30])
def test_weights_beyond_fp16_are_refused(weight: float) -> None:
    matrix = weights((3, 40))
    matrix[1, 33] = weight
    for use in (lambda: METHOD.errors(matrix, None, PLAIN), lambda: made(matrix, None, PLAIN)):
        with pytest.raises(InputError, match=r"the weight .* at \[1, 33\] does not fit into FP16 .*method block"):
            use()


def tried(block: np.ndarray, counts: np.ndarray, bits: int) -> float:
    """The least weighted error of one block over all zero points and a thousand scales."""
    most = (1 << bits) - 1
    reach = max(block.max(), 0) - min(block.min(), 0)
    scales = np.unique((np.linspace(0.3, 1.1, 1000) * reach / most).astype(np.float16)).astype(np.float64)
    best = np.inf
    for zero in range(most + 1):
        k = np.clip(np.rint(block[:, None] / scales), -zero, most - zero)
        best = min(best, float((counts[:, None] * (k * scales - block[:, None]) ** 2).sum(axis=0).min()))
    return best


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_finds_nearly_the_best_grid(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.standard_normal((32, 60)).astype(np.float32)
    counts = np.exp2(rng.uniform(-3, 3, (32, 60))).astype(np.float32)
    kind = Kind(bits)
    whole = full_range(values, kind)
    grid, errors = search(values, counts, kind)
    coarse = search(values, counts, kind, coarse=True)[1]

    def measured(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        found = []
        for i in range(60):
            codes = rounded(values[:, i], scale[i], int(zero[i]), kind.most)
            difference = (codes - int(zero[i])) * np.float64(scale[i]) - values[:, i]
            found.append((counts[:, i] * difference**2).sum())
        return np.array(found)

    assert np.allclose(measured(grid.scale, grid.zero), errors, rtol=1e-4)
    plain = measured(whole.scale, whole.zero)
    assert (errors <= plain * 1.0001).all()
    assert (coarse <= plain * 1.0001).all()
    best = np.array([tried(values[:, i].astype(np.float64), counts[:, i], bits) for i in range(60)])
    assert errors.sum() < 1.1 * best.sum()
    assert errors.sum() < coarse.sum() < 0.95 * plain.sum()


def test_the_search_does_not_depend_on_how_blocks_are_cut_up() -> None:
    values = weights((16, 5000), 3)
    counts = np.exp2(np.random.default_rng(4).uniform(-3, 3, (16, 5000))).astype(np.float32)
    grid, errors = search(values, counts, Kind(2))
    for i in (0, 1, 2047, 2048, 4999):
        alone, error = search(values[:, [i]].copy(), counts[:, [i]].copy(), Kind(2))
        assert (alone.scale[0], alone.zero[0]) == (grid.scale[i], grid.zero[i])
        assert np.isclose(error[0], errors[i])


def test_blocks_side_by_side() -> None:
    spec = ir.AffineSpec((2, 20), 4, 16)
    part = np.arange(40, dtype=np.float32).reshape(2, 20)
    beside = side_by_side(part, spec)
    assert beside.shape == (16, 4)
    assert beside[:, 0].tolist() == list(range(16))
    assert beside[:, 3].tolist() == [36, 37, 38, 39, *[39] * 12]
    counts = counts_side_by_side(part[:1], spec, 2)
    assert counts[:, 3].tolist() == counts[:, 1].tolist() == [16, 17, 18, 19, *[0] * 12]


@pytest.mark.parametrize("order", ["auto", "activation", "blocks", "none"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 64), (8, 256)])
def test_feedback_lowers_the_output_error(bits: int, block: int, clip: bool, order: str) -> None:
    weight, moment = weights((24, 203)), correlated(203)
    known = stats(moment)
    without = made(weight, known, only(bits, block, feedback=False, clip=clip))
    with_it = made(weight, known, only(bits, block, clip=clip, order=order))
    assert output_error(weight, with_it, moment) < 0.7 * output_error(weight, without, moment)


def test_with_activation_order_scales_are_those_of_the_weights() -> None:
    weight, known = weights((6, 75)), stats(correlated(75))
    with_it = made(weight, known, only(4, 32, order="activation", clip=False))
    without = made(weight, known, only(4, 32, feedback=False, clip=False))
    for suffix in (".scale", ".zero"):
        assert np.array_equal(with_it.arrays[suffix], without.arrays[suffix])
    assert not np.array_equal(with_it.arrays[".codes"], without.arrays[".codes"])


@pytest.mark.parametrize("by_gradients", [False, True])
def test_with_short_blocks_the_order_that_loses_less_is_taken(by_gradients: bool) -> None:
    taken = set()
    for seed in range(12):
        weight, moment = weights((5, 64), seed), correlated(64, seed)
        rows = np.exp2(np.random.default_rng(seed).uniform(-1, 1, 5)).astype(np.float32) if by_gradients else None
        known, loss = stats(moment, rows), {}
        for order in ("blocks", "activation"):
            tensor = made(weight, known, only(2, 16, order=order))
            counts = np.ones(5) if rows is None else rows
            loss[order] = sum(
                count * output_error(weight[[row]], tensor, moment, [row]) for row, count in enumerate(counts)
            )
        better = min(loss, key=lambda order: loss[order])
        automatic, chosen = (made(weight, known, only(2, 16, order=order)) for order in ("auto", better))
        assert all(np.array_equal(automatic.arrays[suffix], chosen.arrays[suffix]) for suffix in chosen.arrays)
        taken.add(better)
    assert taken == {"blocks", "activation"}
    long = [made(weight, known, only(4, 128, order=order)).arrays[".codes"] for order in ("auto", "activation")]
    assert np.array_equal(*long)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("order", ["activation", "blocks", "none"])
def test_independent_inputs_leave_rounding(order: str, clip: bool) -> None:
    power = np.exp2(np.random.default_rng(0).uniform(-3, 3, 75)).astype(np.float32)
    weight, known = weights((6, 75)), stats(np.diag(power))
    with_it = made(weight, known, only(4, 32, order=order, clip=clip, damping=0.0))
    without = made(weight, known, only(4, 32, feedback=False, clip=clip))
    assert np.array_equal(ir.dequantize(with_it), ir.dequantize(without))


def test_a_matrix_without_statistics_is_rounded() -> None:
    weight = weights((6, 75))
    assert np.array_equal(
        ir.dequantize(made(weight, None, only(4, 32))), ir.dequantize(made(weight, None, only(4, 32, feedback=False)))
    )


def promised(
    weight: np.ndarray, known: MatrixStatistics | None, bits: int, block: int, settings: dict[str, object]
) -> float:
    """The weighted error of rounding, weight by weight: what ``errors`` is to sum up without ranges searched."""
    columns = weight.shape[1]
    diagonal = known.diagonal.astype(np.float64) if known else np.ones(columns)
    counts = np.broadcast_to(np.maximum(diagonal, 1e-4 * diagonal.mean()), weight.shape).copy()
    shared = 0.3
    if known and known.fisher() is not None:
        fisher = known.fisher().astype(np.float64)  # type: ignore[union-attr]
        fisher = fisher + shared * fisher.mean(axis=0)
        counts = np.maximum(fisher, 1e-4 * fisher.mean())
    if known and settings["feedback"]:
        order = activation_order(known.diagonal)
        left = np.empty(columns)
        left[order] = np.diag(inverse_factor(known.full()[np.ix_(order, order)], 0.01)) ** -2.0
        counts *= left / np.maximum(diagonal, 1e-4 * diagonal.mean())
    if known and known.gradient() is not None:
        gradient = known.gradient().astype(np.float64)  # type: ignore[union-attr]
        counts *= (gradient + shared * gradient.mean())[:, None]
    tensor = made(weight, None, only(bits, block, feedback=False, clip=False))
    total = float((counts * (ir.dequantize(tensor).astype(np.float64) - weight) ** 2).sum())
    if known and (known.gradient() is not None or known.fisher() is not None):
        return total
    whole = np.broadcast_to(np.maximum(diagonal, 1e-4 * diagonal.mean()), weight.shape)
    return total * weight.size / float((whole * weight.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("importance", ["none", "activation", "gradient", "fisher"])
@pytest.mark.parametrize("shape", [(5, 75), (1, 33), (4, 1)])
def test_errors_are_what_rounding_loses(shape: tuple[int, int], importance: str, feedback: bool) -> None:
    weight, rng = weights(shape), np.random.default_rng(2)
    gradients = {"gradient": rng.uniform(0, 2, shape[0]), "fisher": rng.uniform(0, 2, shape)}.get(importance)
    known = stats(correlated(shape[1]), None if gradients is None else gradients.astype(np.float32))
    statistics = None if importance == "none" else known
    settings = METHOD.settings({"clip": False, "feedback": feedback})
    found = METHOD.errors(weight, statistics, settings)  # type: ignore[arg-type]
    levels = METHOD.levels(shape, settings)
    assert found.shape == (1, levels.count)
    for level in range(levels.count):
        spec = METHOD.spec(shape, np.array([level], np.uint8), settings)
        wanted = promised(weight, statistics, spec.bits, spec.block, settings)
        assert np.isclose(found[0, level], wanted, rtol=1e-3, atol=1e-9 * found.max())


def test_searched_errors_are_lower() -> None:
    weight, known = weights((20, 300)), stats(correlated(300))
    fine, plain = ({"clip": clip} for clip in (True, False))
    searched = METHOD.errors(weight, known, METHOD.settings(fine))  # type: ignore[arg-type]
    whole = METHOD.errors(weight, known, METHOD.settings(plain))  # type: ignore[arg-type]
    assert (searched <= whole * 1.0001).all()
    few = [METHOD.spec((20, 300), np.array([i], np.uint8), METHOD.settings({})).bits == 2 for i in range(whole.size)]
    assert (searched[0, few] < 0.9 * whole[0, few]).all()


def not_padded(specs: list[ir.AffineSpec]) -> list[ir.AffineSpec]:
    """Those that take fewer bytes than shorter blocks of their width."""
    return [a for a in specs if all(a.nbytes < b.nbytes for b in specs if a.bits == b.bits and a.block > b.block)]


@pytest.mark.parametrize("shape", [*SHAPES, (576, 1536), (7, 4096)])
@pytest.mark.parametrize("options", [{}, {"blocks": "64"}, {"widths": "4,8"}, {"blocks": "16", "widths": "2"}])
def test_levels_cost_what_their_specs_do(shape: tuple[int, int], options: dict[str, object]) -> None:
    settings = METHOD.settings(options)
    levels = METHOD.levels(shape, settings)
    assert levels.units == 1
    specs = [METHOD.spec(shape, np.array([i], np.uint8), settings) for i in range(levels.count)]
    assert levels.nbytes == tuple(spec.nbytes for spec in specs)
    assert levels.code_bytes == tuple(
        shape[0] * -(-spec.shape[1] // spec.block) * spec.block * spec.bits // 8 for spec in specs
    )
    Table(levels.nbytes, np.zeros((1, levels.count)))  # strictly ascending
    assert {spec.bits for spec in specs} <= {int(width) for width in str(settings["widths"]).split(",")}
    if settings["blocks"] == "auto":
        assert all(spec.block == 16 or spec.block // 2 < shape[1] for spec in specs)
        if shape[1] >= 256 and len(str(settings["widths"])) == 5:
            every = [ir.AffineSpec(shape, bits, block) for bits, block in PAIRS]
            assert specs == sorted(not_padded(every), key=lambda spec: spec.nbytes)
            assert len(specs) == len(every) or shape[1] % 256
    else:
        assert {str(spec.block) for spec in specs} == {settings["blocks"]}


def test_of_equal_bytes_the_shorter_block() -> None:
    # 33 columns: 3 blocks of 16 in 2 bits take 12 + 9 bytes, 1 block of 64 in 2 bits 16 + 3, in 4 bits 32 + 3.
    settings = METHOD.settings({})
    specs = [
        METHOD.spec((1, 33), np.array([i], np.uint8), settings) for i in range(METHOD.levels((1, 33), settings).count)
    ]
    found = {spec.nbytes: spec.block for spec in specs}
    # One of 2 blocks of 32 would take 22 bytes in 2 bits, for longer blocks than those of 16.
    every = not_padded([ir.AffineSpec((1, 33), bits, block) for bits, block in PAIRS if block <= 64])
    assert found == {n: min(s.block for s in every if s.nbytes == n) for n in {s.nbytes for s in every}}


def test_a_target_beyond_all_takes_the_best_there_is(tiny_checkpoint: Callable[..., Path]) -> None:
    """Rows of 144 in blocks of 256 would take more bytes than in blocks of 16, and lose more."""
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama", hidden=144, num_attention_heads=4)))
    job = Job("affine", Target(size=10**9), {"feedback": False, "clip": False})
    found = {e.spec for e in plan(checkpoint, job).model.entries.values() if isinstance(e.spec, ir.AffineSpec)}
    assert {(spec.bits, spec.block) for spec in found} == {(8, 16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "3"}, "option widths"),
        ({"blocks": "48"}, "option blocks of the method affine is '48', must be auto, 16, 32, 64, 128 or 256"),
        ({"blocks": 32}, "option blocks"),
        ({"order": "random"}, "option order"),
        ({"damping": 2.0}, "option damping"),
        ({"actorder": True}, "has no option 'actorder'"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHOD.settings(options)


def test_profiles_and_what_they_need() -> None:
    paper = METHOD.settings({"profile": "paper"})
    assert (paper["order"], paper["clip"], paper["blocks"], paper["damping"]) == ("activation", False, "128", 0.01)
    assert paper["feedback"] is True
    assert METHOD.needs_statistics(METHOD.settings({}))
    assert METHOD.needs_statistics(METHOD.settings({"feedback": False}))
    assert not METHOD.needs_statistics(PLAIN)


@pytest.mark.parametrize("settings", [{}, {"order": "activation"}, {"feedback": False}], ids=str)
def test_the_same_every_time_and_nothing_changed(settings: dict[str, object]) -> None:
    weight, known = weights((9, 75)), stats(correlated(75))
    copies = weight.copy(), known.full()
    first, second = (made(weight, known, METHOD.settings(settings), level=3) for _ in range(2))
    assert all(np.array_equal(first.arrays[k], second.arrays[k]) for k in first.arrays)
    assert np.array_equal(weight, copies[0])
    assert np.array_equal(known.full(), copies[1])


def test_a_dead_input_does_no_harm() -> None:
    weight, moment = weights((6, 75)), correlated(75)
    dead = [0, 31, 74]
    moment[dead, :] = moment[:, dead] = 0
    for order in ("activation", "blocks", "none"):
        tensor = made(weight, stats(moment), only(8, 32, order=order))
        assert np.abs(ir.dequantize(tensor) - weight)[:, dead].max() < 0.05 * np.abs(weight).max()
    nothing = stats(np.zeros((75, 75), np.float32))
    assert np.array_equal(
        ir.dequantize(made(weight, nothing, only(4, 32))), ir.dequantize(made(weight, None, only(4, 32)))
    )


@pytest.fixture(scope="module")
def real_matrix(real_gguf: Path) -> tuple[np.ndarray, MatrixStatistics]:
    """Rows of a matrix of SmolLM2, and the moment of inputs as correlated as those of a norm: its own embeddings."""
    checkpoint = open_checkpoint(str(real_gguf))
    weight = checkpoint.read("model.layers.12.self_attn.q_proj.weight")[:96]
    inputs = checkpoint.read("model.embed_tokens.weight")[1000:4000]
    inputs = inputs / np.sqrt((inputs**2).mean(axis=1, keepdims=True))
    inputs *= checkpoint.read("model.layers.12.input_layernorm.weight")
    return weight, stats((inputs.T @ inputs / len(inputs)).astype(np.float32))


def test_levels_of_a_real_matrix_are_ranked_as_feedback_ranks_them(
    real_matrix: tuple[np.ndarray, MatrixStatistics],
) -> None:
    weight, known = real_matrix
    settings = METHOD.settings({"widths": "2,4"})
    promised_errors = METHOD.errors(weight, known, settings)[0]  # type: ignore[arg-type]
    measured = np.array(
        [
            output_error(weight, made(weight, known, settings, level), known.full())
            for level in range(len(promised_errors))
        ]
    )
    ratio = measured / promised_errors
    assert ratio.max() / ratio.min() < 1.5


@pytest.mark.parametrize("order", ["activation", "blocks", "none"])
def test_searched_ranges_lower_the_output_error_of_few_bits(
    order: str, real_matrix: tuple[np.ndarray, MatrixStatistics]
) -> None:
    weight, known = real_matrix
    searched, whole = (made(weight, known, only(2, 64, clip=clip, order=order)) for clip in (True, False))
    assert output_error(weight, searched, known.full()) < 0.8 * output_error(weight, whole, known.full())


def test_feedback_halves_the_output_error_of_a_real_matrix(real_matrix: tuple[np.ndarray, MatrixStatistics]) -> None:
    weight, known = real_matrix
    for bits in (2, 4):
        rounded, better = (made(weight, known, only(bits, 32, feedback=feedback)) for feedback in (False, True))
        assert output_error(weight, better, known.full()) < 0.7 * output_error(weight, rounded, known.full())
