"""Products with codebook matrices on an NVIDIA GPU beside torch's and peers', in one run, and what was aimed at.

    python tools/benchmark_cuda.py [--shapes 8192x8192,11008x4096] [--batches 1,8,16,2048] [--rounds 15] [--json FILE]

Every matrix comes in as many copies as fill four times the L2 cache, and calls take them in turn, so that weights come
from memory, as in a model. A contender is a CUDA graph of 20 calls or more; replays of all of them take turns, and a
time is the median of --rounds. Activations are FP16. Bandwidth is that of a copy of 1 GiB on the device, read and
written bytes together, in the same run. The peers bitsandbytes and gemlite take part where they are installed. Codes
are random: time does not depend on them. Exit code 6: there is no GPU that the kernels run on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu.contenders import BF16, FP16, OURS, PEERS, Contender, Ours, Products, Shape, dense, peer_versions
from gpu.targets import Row, table, verdict_table, verdicts
from gpu.timing import Stopwatch, on_gpu

from anyquant.errors import AnyquantError
from anyquant.runtime.cuda.launcher import require_gpu

COPY, COPIED = "copy", 1 << 30
EVERY_BATCH = ("rows, 4 bits", "columns, 4 bits")
"""Those of ours that are timed with more than one row of activations."""


def benchmark(
    device: torch.device, shapes: Sequence[Shape], batches: Sequence[int], rounds: int, rotate: int,
    stopwatch: Stopwatch, tell: Callable[[dict[str, Any]], None], copied: int = COPIED,
) -> dict[str, Any]:  # fmt: skip
    """Measure it all.

    Args:
        device: where.
        shapes: [out, in] of matrices.
        batches: rows of activations.
        rounds: of which medians are taken.
        rotate: bytes that the copies of a matrix fill.
        stopwatch: takes the times.
        tell: called with what there is so far, after each batch of each shape.
        copied: bytes of the copy that bandwidth is that of.

    Returns:
        {"bandwidth": bytes per second, "rows": a list of Row, as dictionaries}.
    """
    found: dict[str, Any] = {"bandwidth": _bandwidth(device, rounds, stopwatch, copied), "rows": []}
    for shape in shapes:
        problems: dict[str, str] = {}
        ours = {name: Ours(name, shape, device, rotate) for name in OURS}
        others: dict[str, Products] = {name: dense(name, shape, device, rotate) for name in (FP16, BF16)}
        for name, (_, make) in PEERS.items():
            try:
                others[name] = make(shape, device, rotate)
            except Exception as error:  # of a peer, whatever it is
                problems[name] = f"{type(error).__name__}: {error}"
        for batch in batches:
            contenders = _contenders(ours, others, batch, problems)
            rows = _measured(shape, batch, contenders, rounds, stopwatch)
            rows += [Row(shape, batch, name, 0, problem=problem) for name, problem in problems.items()]
            found["rows"] += [asdict(row) for row in rows]
            tell(found)
    return found


def _bandwidth(device: torch.device, rounds: int, stopwatch: Stopwatch, copied: int) -> float:
    """Bytes that a copy reads and writes, per second."""
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> torch.Tensor:
        return target.copy_(source)

    time = stopwatch({COPY: [copy]}, rounds)[COPY]
    if isinstance(time, str):
        raise AnyquantError(f"a copy on {device} could not be timed: {time}")
    return 2 * copied / time.seconds


def _contenders(
    ours: dict[str, Ours], others: dict[str, Products], batch: int, problems: dict[str, str]
) -> list[Contender]:
    contenders = [each.products(batch) for name, each in ours.items() if batch == 1 or name in EVERY_BATCH]
    four = ours["rows, 4 bits"]
    contenders += [four.dequantized(batch)] + ([four.naive(batch)] if batch == 1 else [])
    for name, products in others.items():
        if name not in problems:
            try:
                contenders.append(products(batch))
            except Exception as error:  # likewise
                problems[name] = f"{type(error).__name__}: {error}"
    return contenders


def _measured(
    shape: Shape, batch: int, contenders: Sequence[Contender], rounds: int, stopwatch: Stopwatch
) -> list[Row]:
    errors, same = {}, {}
    for each in contenders:
        if each.exact is not None:
            y = each.calls[0]()
            assert isinstance(y, torch.Tensor)
            errors[each.name] = float((y.double() - each.exact).norm() / each.exact.norm())
            # Copies hold the same matrix.
            same[each.name] = all(torch.equal(y, call()) for call in [*each.calls, each.calls[0]])  # type: ignore[arg-type]
    times = stopwatch({each.name: each.calls for each in contenders}, rounds)
    rows = []
    for each in contenders:
        time = times[each.name]
        if isinstance(time, str):
            rows.append(Row(shape, batch, each.name, each.nbytes, problem=time))
            continue
        rows.append(
            Row(shape, batch, each.name, each.nbytes, time.seconds, time.spread, errors.get(each.name),
                same.get(each.name))
        )  # fmt: skip
    return rows


def about(device: torch.device) -> dict[str, Any]:
    """The GPU, and what was measured on it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "peers": peer_versions(),
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """Tables in Markdown of what was measured."""
    rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"]]
    bandwidth = found["bandwidth"]
    return [
        f"A copy: {bandwidth / 1e9:,.0f} GB/s.", "", *table(rows, bandwidth), "",
        *verdict_table(verdicts(rows, bandwidth)),
    ]  # fmt: skip


def main() -> int:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8192x8192,11008x4096")
    parser.add_argument("--batches", default="1,8,16,2048")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="what was measured so far is written here, too")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    try:
        require_gpu(device)
    except AnyquantError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    machine = about(device)

    def tell(found: dict[str, Any]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps({"about": machine, **found}), encoding="utf-8")

    shapes = [(int(out), int(columns)) for out, columns in (s.split("x") for s in arguments.shapes.split(","))]
    batches = [int(batch) for batch in arguments.batches.split(",")]
    found = benchmark(device, shapes, batches, arguments.rounds, 4 * machine["l2_bytes"], on_gpu, tell)
    print(f"{machine['gpu']}, torch {machine['torch']}, {machine['peers']}", *lines_of(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
