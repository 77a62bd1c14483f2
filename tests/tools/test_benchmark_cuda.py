"""The benchmark of the CUDA kernels, which run in the emulator here: what is measured, and what is concluded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from anyquant.runtime.cuda import linear
from tests.kernels.cuda.machine import TorchOnEmulator

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("benchmark_cuda")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated(benchmark: ModuleType, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> TorchOnEmulator:
    from gpu import contenders

    gpu = TorchOnEmulator(kernels)
    monkeypatch.setattr(linear, "machine", lambda device: gpu)
    monkeypatch.setattr(contenders, "machine", lambda device: gpu)
    return gpu


def by_the_clock(contenders: Mapping[str, Sequence[Callable[[], object]]], rounds: int) -> dict[str, Any]:
    """A stopwatch without a GPU."""
    from gpu.timing import summary

    found = {}
    for name, calls in contenders.items():
        taken = []
        for turn in range(rounds):
            start = time.perf_counter()
            calls[turn % len(calls)]()
            taken.append(time.perf_counter() - start)
        found[name] = summary(taken)
    return found


def test_everything_is_measured(benchmark: ModuleType, emulated: TorchOnEmulator) -> None:
    from gpu.contenders import BF16, FP16, NAIVE, OURS, PEERS

    told: list[int] = []
    found = benchmark.benchmark(
        CPU, [(64, 128)], [1, 8], 2, 10_000, by_the_clock, lambda so_far: told.append(len(so_far["rows"])), 1 << 20
    )
    rows = {(row["batch"], row["name"]): row for row in found["rows"]}
    assert told[0] < told[1] == len(rows)
    assert {name for batch, name in rows if batch == 1} >= {*OURS, FP16, BF16, NAIVE}
    ours = [row for row in rows.values() if row["name"] in OURS]
    assert len(ours) == len(OURS) + 2
    for row in ours:
        assert 0 < row["relative_error"] < 1e-3
        assert row["same_bits"]
        assert row["seconds"] > 0
    assert rows[8, "columns, 4 bits"]["nbytes"] == rows[1, "columns, 4 bits"]["nbytes"] > 64 * 128 / 2
    for name, (package, _) in PEERS.items():
        assert package in (rows[1, name]["problem"] or package)
    lines = benchmark.lines_of(found)
    assert any("rows, 2 to 4 bits, .5 % outliers" in line for line in lines)
    assert any(line.endswith("| not measured |") for line in lines)  # batch 2048


def test_a_wrong_product_is_noticed(
    benchmark: ModuleType, emulated: TorchOnEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import contenders
    from gpu.targets import verdicts

    right = linear.CodebookLinear._product
    monkeypatch.setattr(contenders, "OURS", {"rows, 4 bits": (0, [4], 0.0)})
    monkeypatch.setattr(benchmark, "OURS", contenders.OURS)
    calls = iter(range(1000))
    monkeypatch.setattr(linear.CodebookLinear, "_product", lambda self, x: right(self, x) * (1.01 + next(calls) / 100))
    found = benchmark.benchmark(CPU, [(32, 128)], [1], 2, 1, by_the_clock, lambda so_far: None, 1 << 20)
    rows = [benchmark.Row(**row) for row in found["rows"]]
    judged = {verdict.target: verdict.holds for verdict in verdicts(rows, found["bandwidth"])}
    assert judged["relative error at most 0.001"] is False
    assert judged["the same bits from run to run"] is False


def row(name: str, batch: int, microseconds: float | None, nbytes: int = 30_000_000, **others: Any) -> Any:
    from gpu.targets import Row

    return Row((8192, 8192), batch, name, nbytes, None if microseconds is None else microseconds / 1e6, 0.0, **others)


def test_targets(benchmark: ModuleType) -> None:
    from gpu.targets import table, verdict_table, verdicts

    four = "rows, 4 bits"
    rows = [
        row(four, 1, 15.0, relative_error=1e-4, same_bits=True), row("rows, 3 bits", 1, 20.0, 21_000_000),
        row("rows, 2 to 4 bits, .5 % outliers", 1, 20.0, 17_900_000), row(four, 8, 22.5), row(four, 16, 30.0),
        row(four, 2048, 1000.0), row("torch FP16", 1, 45.0, 134_000_000), row("torch FP16", 16, 44.0),
        row("torch FP16", 2048, 910.0), row("bitsandbytes NF4", 1, None, problem="not installed"),
    ]  # fmt: skip
    found = {verdict.target.removeprefix("8192 x 8192, "): verdict for verdict in verdicts(rows, 3e12)}
    assert {target: verdict.holds for target, verdict in found.items()} == {
        "rows, 4 bits, batch 1: 0.65 of a copy's bandwidth": True,  # 2 of 3 TB/s
        "rows, 3 bits, batch 1: 0.55 of a copy's bandwidth": False,
        "rows, 2 bits, batch 1: 0.45 of a copy's bandwidth": None,
        "mixed widths and outliers, batch 1: 0.85 of the bandwidth of 3 bits": True,
        "4 bits, batch 1 at least 1/1.5 as long as batch 8": True,
        "4 bits, batch 16: 1.5 times as fast as FP16": False,
        "4 bits, batch 2048: 0.9 times as fast as FP16": True,
        "4 bits, batch 1: faster than bitsandbytes NF4": None,
        "relative error at most 0.001": True,
        "the same bits from run to run": True,
    }
    lines = verdict_table([*found.values()])
    assert lines[2].endswith("| 0.67 | holds |")
    lines = table(rows, 3e12)
    assert "| 8192 x 8192 | 1 | rows, 4 bits | 30.0 | 15.0 | 0 % | 3.00 | 67 % | 1.0e-04 |" in lines
    assert any("not run: not installed" in line for line in lines)
    assert asdict(rows[0])["shape"] == (8192, 8192)


def test_copies_are_larger_than_the_cache(benchmark: ModuleType) -> None:
    from gpu.contenders import copies

    for nbytes in (1, 7, 100, 101):
        assert copies(nbytes, 100) * nbytes > 100
        assert (copies(nbytes, 100) - 1) * nbytes <= 100


def test_summary_of_times(benchmark: ModuleType) -> None:
    from gpu.timing import summary

    found = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.seconds, found.spread) == (3.0, pytest.approx(2 / 3))


def test_peers_that_break(benchmark: ModuleType, emulated: TorchOnEmulator, tmp_path: Path) -> None:
    """A peer that cannot be made, or cannot be timed, leaves its reason, and the others are measured."""
    from gpu import contenders

    def unmade(shape: Any, device: Any, rotate: int) -> Any:
        raise RuntimeError("no kernel for this")

    def unmultiplied(shape: Any, device: Any, rotate: int) -> Any:
        def products(batch: int) -> Any:
            raise ValueError("no such batch")

        return products

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.PEERS, "broken", ("broken", unmade))
        patch.setitem(contenders.PEERS, "later", ("later", unmultiplied))

        def stopwatch(calls: Mapping[str, Any], rounds: int) -> dict[str, Any]:
            return {
                **by_the_clock(calls, rounds),
                **({"torch BF16": "not on this GPU"} if "torch BF16" in calls else {}),
            }

        found = benchmark.benchmark(CPU, [(32, 128)], [1], 2, 1, stopwatch, lambda so_far: None, 1 << 20)
    problems = {row["name"]: row["problem"] for row in found["rows"] if row["problem"]}
    assert problems["broken"] == "RuntimeError: no kernel for this"
    assert problems["later"] == "ValueError: no such batch"
    assert problems["torch BF16"] == "not on this GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark_cuda"])
    assert benchmark.main() == 6
    assert "GPU" in capsys.readouterr().err
