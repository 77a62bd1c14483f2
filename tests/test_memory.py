"""Memory of quantizing: it goes with the largest block, not with the model; and the tool that measures it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MIB = 1 << 20


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no /proc, by which memory is measured")
    found: list[ModuleType] = []
    for name, known in (("measure", "measure"), ("benchmark_memory", "anyquant_tools_benchmark_memory")):
        spec = importlib.util.spec_from_file_location(known, repository / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module  # the second imports the first; dataclasses look their module up there
        spec.loader.exec_module(module)
        found.append(module)
    return found[1]


def program(tool: ModuleType, folder: Path, text: str) -> Any:
    return tool.watch([sys.executable, "-c", text], folder / "log.txt", os.environ)


@pytest.mark.slow
def test_what_is_allocated_is_seen_and_what_is_mapped_from_a_file_is_not(tool: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a" * (96 * MIB))
    wait = "import time; time.sleep(1.5)"
    bare = program(tool, tmp_path, wait)
    filled = program(tool, tmp_path, f"a = b'a' * {96 * MIB}\n{wait}")
    mapped = program(
        tool, tmp_path, f"import mmap; f = open({str(file)!r}); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        f"sum(m[i] for i in range(0, len(m), 4096))\n{wait}"
    )  # fmt: skip
    assert 95 * MIB < filled.anonymous - bare.anonymous < 104 * MIB
    assert 90 * MIB < filled.proportional - bare.proportional < 110 * MIB
    assert mapped.anonymous - bare.anonymous < 8 * MIB
    assert mapped.proportional - bare.proportional > 90 * MIB


@pytest.mark.slow
def test_memory_of_children_counts(tool: ModuleType, tmp_path: Path) -> None:
    child = f"a = b'a' * {64 * MIB}; import time; time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert program(tool, tmp_path, parent).anonymous > 64 * MIB


def test_a_failing_run_says_what_it_said(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\n(?s:.*)no such thing"):
        program(tool, tmp_path, "import sys; print('no such thing'); sys.exit(3)")


def made_up(tool: ModuleType, name: str, net: tuple[int, int], files: int = 0) -> Any:
    """A growth of a model of 100 MiB to one of 400; what it has in MiB, 200 of them imports."""
    peaks = tuple(tool.Peak((200 + own) * MIB, (300 + own + files * i) * MIB, 1.0) for i, own in enumerate(net))
    bare = tool.Peak(200 * MIB, 250 * MIB, 1.0)
    return tool.Growth(name, peaks, (bare, bare), (100 * MIB, 400 * MIB))


def test_the_verdict(tool: ModuleType) -> None:
    flat, grown = made_up(tool, "flat", (50, 90), files=300), made_up(tool, "grown", (50, 110))
    assert flat.net == (50 * MIB, 90 * MIB)
    assert flat.share == pytest.approx(40 / 300)
    assert flat.share_with_files == pytest.approx(340 / 300)
    assert grown.share == pytest.approx(0.2)
    said: list[str] = []
    assert tool.report([flat], 0.15, said.append)
    assert not tool.report([flat, grown], 0.15, said.append)
    assert [row[5] for row in tool.lines([flat, grown], 0.15)] == ["PASS", "FAIL"]


def test_cmpq_has_to_take_a_quarter_of_skim(tool: ModuleType) -> None:
    skim, fisher = made_up(tool, "skim", (200, 200)), made_up(tool, "skim fisher", (400, 400))
    said: list[str] = []
    assert tool.report([skim, fisher, made_up(tool, "cmpq", (50, 50))], 0.15, said.append)
    assert [line for line in said if "PASS" in line and "cmpq takes" in line] == [
        "cmpq takes 0.25 (1x) and 0.25 (4x) of skim, gradients of rows: PASS",
        "cmpq takes 0.12 (1x) and 0.12 (4x) of skim, gradients of weights: PASS",
    ]
    assert not tool.report([skim, fisher, made_up(tool, "cmpq", (50, 51))], 0.15, said.append)


@pytest.mark.slow
def test_models_are_of_the_bytes_that_are_said(tool: ModuleType, tmp_path: Path) -> None:
    from anyquant.checkpoint import open_checkpoint

    shape = tool.Shape(hidden=64, mlp=96, vocabulary=300)
    nbytes = tool.write_model(tmp_path / "model", shape, 3, shard="100KB")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert nbytes == 4 * shape.values(3) == sum(info.nbytes for info in checkpoint.tensors.values())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_memory_goes_with_the_largest_block(tool: ModuleType, tmp_path: Path) -> None:
    """What is held on four times as many blocks; and what a run takes that does hold the model, as a control."""
    bench = tool.Bench(tmp_path, tool.Shape(320, 960), (2, 8), windows=4, window=64, held=True)
    added = bench.models[8] - bench.models[2]
    assert added > 30 * MIB
    cmpq = ("--method", "cmpq", "--bits", "2.5", "--set", "palette=2,3")
    small, large = (bench.quantize(cmpq, depth)[0].anonymous for depth in (2, 8))
    assert large - small < 0.2 * added
    # A text sampled from the model itself needs all of the model, in FP32.
    whole = bench.quantize(cmpq, 8, source="self")[0].anonymous
    assert whole - small > 0.5 * added
