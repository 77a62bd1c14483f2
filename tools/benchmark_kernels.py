"""Products with packed matrices beside torch's, in one run: medians of interleaved repeats, and their ratios.

    python tools/benchmark_kernels.py [--shapes 4096x4096,11008x4096,4096x11008] [--threads 2] [--repeats 21]

Every matrix comes in as many copies as fill --rotate bytes, and each call takes the next one, so that weights come from
memory and not from a cache, as they do in a model. Codes are random: time does not depend on them. Absolute times mean
little on a shared machine; ratios are of the same run. With ANYQUANT_CPU=avx2 in the environment we do without AVX-512.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from anyquant import ir
from anyquant.runtime import native
from anyquant.runtime.native_matmul import PackedMatrix, best_level
from anyquant.testing import codebook_tensor

Shape = tuple[int, int]
DTYPES = {"FP32": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16}


def random_matrix(shape: Shape, axis: int, widths: Sequence[int], outliers: float = 0.0) -> ir.Tensor:
    """A codebook matrix of random codes; channels have the widths in any order.

    Args:
        shape: [out, in].
        axis: whether rows (0) or columns (1) have codebooks.
        widths: bits of channels.
        outliers: part of the weights.
    """
    bits = np.resize(np.array(widths, np.uint8), shape[axis])
    np.random.default_rng(0).shuffle(bits)
    return codebook_tensor(shape, axis, bits, outliers=int(outliers * shape[0] * shape[1]))


@dataclass(frozen=True)
class Contender:
    """Something that multiplies.

    Attributes:
        name: of its row.
        nbytes: of the matrix, as it lies in memory.
        calls: products with copies of the matrix, to be made in turn.
    """

    name: str
    nbytes: int
    calls: Sequence[Callable[[], object]]


def packed(name: str, tensor: ir.Tensor, batch: int, threads: int, rotate: int) -> Contender:
    """Our kernels on a tensor."""
    matrix, library = PackedMatrix(tensor), native.library()
    x = np.random.default_rng(1).standard_normal((batch, matrix.shape[1])).astype(np.float32)
    y = torch.empty(batch, matrix.shape[0])
    activations = torch.from_numpy(x)
    first = torch.from_numpy(matrix.packed)
    # The layout knows no addresses: copies of the bytes are copies of the matrix.
    copies = [first, *(first.clone() for _ in range(rotate // matrix.nbytes))]
    workspace = torch.empty(library.aq_matmul_workspace(first.data_ptr(), batch), dtype=torch.uint8)

    def call(copy: torch.Tensor) -> Callable[[], object]:
        return lambda: native.call(
            "aq_matmul", name, copy.data_ptr(), activations.data_ptr(), batch, workspace.data_ptr(), workspace.numel(),
            y.data_ptr(), threads,
        )  # fmt: skip

    return Contender(name, matrix.nbytes, [call(copy) for copy in copies])


def dense(name: str, dtype: torch.dtype, shape: Shape, batch: int, rotate: int) -> Contender:
    """torch's linear on weights of a dtype."""
    weight = torch.randn(shape).to(dtype)
    x = torch.randn(batch, shape[1]).to(dtype)
    copies = [weight, *(weight.clone() for _ in range(rotate // weight.nbytes))]

    def call(copy: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.nn.functional.linear(x, copy)

    return Contender(f"torch {name}", weight.nbytes, [call(copy) for copy in copies])


def medians(contenders: Sequence[Contender], repeats: int) -> dict[str, float]:
    """Seconds of each, the median of interleaved calls.

    Each follows one that is not timed: of another contender, threads may still be looking for more to do.
    """
    turns = [cycle(contender.calls) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for turn, taken in zip(turns, times, strict=True):
            next(turn)()
            call = next(turn)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return {each.name: statistics.median(taken) for each, taken in zip(contenders, times, strict=True)}


def reading() -> Contender:
    """torch, as it sums up what no cache holds: what memory gives."""
    memory = torch.ones(128 << 20)
    return Contender("torch.sum", memory.nbytes, [lambda: memory.sum()])


def single(shape: Shape, threads: int, repeats: int, rotate: int) -> list[str]:
    """Rows of a table: batch 1, all contenders."""
    ours = [
        *((f"rows, {bits} bits", 0, [bits], 0.0) for bits in (4, 3, 2)),
        *((f"columns, {bits} bits", 1, [bits], 0.0) for bits in (4, 3, 2)),
        ("rows, 2, 3 and 4 bits, .5 % outliers", 0, [2, 3, 4], 0.005),
        ("columns, 2 and 4 bits", 1, [2, 4], 0.0),
    ]
    contenders = [
        packed(name, random_matrix(shape, axis, bits, part), 1, threads, rotate) for name, axis, bits, part in ours
    ]
    contenders += [dense(name, dtype, shape, 1, rotate) for name, dtype in DTYPES.items()]
    memory = reading()
    found = medians([*contenders, memory], repeats)
    best = min(found[f"torch {name}"] for name in DTYPES)
    most = memory.nbytes / found[memory.name]
    return [
        f"| {shape[0]} x {shape[1]} | {each.name} | {each.nbytes / 1e6:.2f} | {1e3 * found[each.name]:.3f} | "
        f"{best / found[each.name]:.2f} | {100 * each.nbytes / found[each.name] / most:.0f} |"
        for each in contenders
    ] + [f"| {shape[0]} x {shape[1]} | {memory.name}, {most / 1e9:.1f} GB/s | | | | 100 |"]


def batches(shape: Shape, threads: int, repeats: int, rotate: int) -> list[str]:
    """Rows of a table: 4 bits, several rows of activations, by the time of one; and torch's FP32 on as many."""
    lines = []
    for axis, name in ((0, "rows"), (1, "columns")):
        tensor = random_matrix(shape, axis, [4])
        sizes = (1, 2, 4, 8, 128)
        # Apart: torch's threads look for more to do for longer than one of our calls takes.
        ours = [packed(f"{batch}", tensor, batch, threads, rotate) for batch in sizes]
        theirs = [dense(f"FP32 {batch}", torch.float32, shape, batch, rotate) for batch in sizes]
        found = medians(ours, repeats) | medians(theirs, max(5, repeats // 3))
        for batch in sizes:
            own, other = found[f"{batch}"], found[f"torch FP32 {batch}"]
            lines.append(
                f"| {shape[0]} x {shape[1]} | {name}, 4 bits | {batch} | {1e3 * own:.2f} | {own / found['1']:.2f} | "
                f"{other / own:.2f} |"
            )
    return lines


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--rotate", type=float, default=256e6, help="bytes of copies of each matrix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [(int(out), int(columns)) for out, columns in (s.split("x") for s in arguments.shapes.split(","))]
    print(f"{best_level().name}, {arguments.threads} threads\n")
    print("| matrix | | MB | ms | of torch's best dtype, times as fast | % of torch.sum's bandwidth |")
    print("|---|---|---:|---:|---:|---:|")
    for shape in shapes:
        lines = single(shape, arguments.threads, arguments.repeats, int(arguments.rotate))
        print("\n".join(lines), flush=True)
    print("\n| matrix | | rows of activations | ms | times one row | times as fast as torch's FP32 |")
    print("|---|---|---:|---:|---:|---:|")
    print("\n".join(batches(shapes[0], arguments.threads, arguments.repeats, int(arguments.rotate))), flush=True)


if __name__ == "__main__":
    main()
