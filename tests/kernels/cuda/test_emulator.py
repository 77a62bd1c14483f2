"""What the emulator notices: mistakes planted in the kernels, and each of its checks by a kernel of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from anyquant import ir
from anyquant.runtime.cuda.products import Type
from anyquant.testing import codebook_tensor
from tests.kernels.cuda.emulated import KERNELS_CUDA, Emulator, EmulatorError, Written
from tests.kernels.cuda.machine import EmulatedGpu, expanded, multiplied

KERNELS = """
#include "platform.cuh"
AQ_KERNEL(64) block_sum(const float* x, float* y) {
  AQ_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);
  store_shared(sums + thread_index(), load(x + block_x() * 64 + thread_index()));
  for (u32 half = 32; half; half /= 2) {
    sync_block();
    if (thread_index() >= half) continue;
    store_shared(sums + thread_index(), load_shared(sums + thread_index()) + load_shared(sums + thread_index() + half));
  }
  if (thread_index() == 0) store(y + block_x(), load_shared(sums));
}
AQ_KERNEL(32) lane_xor(const float* x, float* y) {
  store(y + thread_index(), from_lane_xor(load(x + thread_index()), 5));
}
AQ_KERNEL(32) products(const u32* a, const u32* b, const float* c, float* d) {
  u32 own[4], other[2];
  float sum[4];
  for (u32 i = 0; i < 4; ++i) own[i] = load(a + 4 * thread_index() + i), sum[i] = load(c + 4 * thread_index() + i);
  for (u32 i = 0; i < 2; ++i) other[i] = load(b + 2 * thread_index() + i);
  multiply_add(sum, own, other);
  for (u32 i = 0; i < 4; ++i) store(d + 4 * thread_index() + i, sum[i]);
}
AQ_KERNEL(32) to_halves(const float* x, u16* y, u32 count) {
  for (u32 i = thread_index(); i < count; i += 32) store(y + i, float_to_half(load(x + i)));
}
AQ_KERNEL(32) to_floats(const u16* x, float* y, u32 count) {
  for (u32 i = thread_index(); i < count; i += 32) store(y + i, half_to_float(load(x + i)));
}
// Each of these does one thing wrong.
AQ_KERNEL(64) missed_barrier() {
  if (thread_index() < 40) sync_block();
}
AQ_KERNEL(32) missed_warp_barrier() {
  if (thread_index() < 31) sync_warp();
}
AQ_KERNEL(32) different_barriers() {
  if (thread_index() < 16) sync_warp();
  else from_lane_xor(1.0f, 1);
}
AQ_KERNEL(32) load_outside(const float* x, float* y) { store(y + thread_index(), load(x + thread_index() + 1)); }
AQ_KERNEL(32) load_out_of_line(const float* x, float* y) {
  const uint4* four = reinterpret_cast<const uint4*>(x + 1);
  store(y + thread_index(), bits_to_float(load_once(four).x));
}
AQ_KERNEL(32) store_outside(const float* x, float* y) { store(y + thread_index() + 1, load(x + thread_index())); }
AQ_KERNEL(32) store_to_input(float* x, float* y) { store(x + thread_index(), 0.0f); }
AQ_KERNEL(32) store_twice(const float* x, float* y) { store(y + thread_index() / 2, load(x + thread_index())); }
AQ_KERNEL(32) load_output(const float* x, float* y) { store(y, load(y + thread_index())); }
AQ_KERNEL(32) shared_outside(const float* x, float* y) {
  AQ_SHARED(memory);
  store_shared(reinterpret_cast<float*>(memory) + 64 + thread_index(), 1.0f);
}
AQ_KERNEL(32) shared_never_written(const float* x, float* y) {
  AQ_SHARED(memory);
  store(y + thread_index(), load_shared(reinterpret_cast<float*>(memory) + thread_index()));
}
AQ_KERNEL(64) race_in_a_warp(const float* x, float* y) {
  AQ_SHARED(memory);
  float* own = reinterpret_cast<float*>(memory);
  store_shared(own + thread_index(), 1.0f);
  store(y + thread_index(), load_shared(own + (thread_index() ^ 1)));
}
AQ_KERNEL(64) race_of_warps(const float* x, float* y) {
  AQ_SHARED(memory);
  float* own = reinterpret_cast<float*>(memory);
  store_shared(own + thread_index(), 1.0f);
  sync_warp();
  store(y + thread_index(), load_shared(own + (thread_index() ^ 32)));
}
AQ_KERNEL(64) race_after_reading(const float* x, float* y) {
  AQ_SHARED(memory);
  float* own = reinterpret_cast<float*>(memory);
  store_shared(own + thread_index(), 1.0f);
  sync_block();
  store(y + thread_index(), load_shared(own));
  if (thread_index() == 63) store_shared(own, 2.0f);
}
"""
WRONG = {
    "missed_barrier": "sync_block",
    "missed_warp_barrier": "sync_warp",
    "different_barriers": "from_lane_xor",
    "load_outside": "a load of 4 bytes is in no memory",
    "load_out_of_line": "a load of 16 bytes is out of line",
    "store_outside": "a store of 4 bytes is in no memory",
    "store_to_input": "constant",
    "store_twice": "another thread wrote",
    "load_output": "written meanwhile",
    "shared_outside": "shared memory at byte 256 of 256",
    "shared_never_written": "never written",
    "race_in_a_warp": "race",
    "race_of_warps": "race",
    "race_after_reading": "race",
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cu").write_text(KERNELS)
    # What they do wrong needs no parameter that is used.
    return Emulator([folder / "kernels.cu"], {}, folder, flags=["-Wno-unused-parameter"])


@pytest.mark.parametrize("kernel", WRONG)
def test_mistakes_end_the_launch(emulator: Emulator, kernel: str) -> None:
    threads = 32 if "AQ_KERNEL(32) " + kernel in KERNELS else 64
    x, y = np.zeros(threads, np.float32), np.zeros(threads, np.float32)
    with pytest.raises(EmulatorError, match=WRONG[kernel]) as caught:
        emulator.launch(kernel, (1, 1), threads, 256, x, Written(y))
    assert str(caught.value).startswith(f"{kernel}, block (0, 0), thread ")


def test_sums_of_blocks(emulator: Emulator) -> None:
    x, y = np.arange(192, dtype=np.float32), np.zeros(3, np.float32)
    emulator.launch("block_sum", (3, 1), 64, 256, x, Written(y))
    assert (y == x.reshape(3, 64).sum(axis=1)).all()


def test_lanes(emulator: Emulator) -> None:
    x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    emulator.launch("lane_xor", (1, 1), 32, 0, x, Written(y))
    assert (y == x[np.arange(32) ^ 5]).all()


def test_tensor_cores(emulator: Emulator) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    of_a, of_b = np.zeros((32, 4, 2), np.float16), np.zeros((32, 2, 2), np.float16)
    of_c, of_d = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    for lane in range(32):  # the tables of PTX's manual, m16n8k16
        group, in_group = divmod(lane, 4)
        for i in range(8):
            row = group + (0 if i in (0, 1, 4, 5) else 8)
            of_a[lane, i // 2, i % 2] = a[row, in_group * 2 + i % 2 + (8 if i >= 4 else 0)]
        for i in range(4):
            of_b[lane, i // 2, i % 2] = b[in_group * 2 + i % 2 + (8 if i >= 2 else 0), group]
            of_c[lane, i] = c[group + (8 if i >= 2 else 0), in_group * 2 + i % 2]
    emulator.launch("products", (1, 1), 32, 0, of_a, of_b, of_c, Written(of_d))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    for lane in range(32):
        group, in_group = divmod(lane, 4)
        for i in range(4):
            assert of_d[lane, i] == np.float32(exact[group + (8 if i >= 2 else 0), in_group * 2 + i % 2])


def test_halves(emulator: Emulator) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    floats = np.zeros(every.size, np.float32)
    emulator.launch("to_floats", (1, 1), 32, 0, every, Written(floats), every.size)
    expected = every.view(np.float16).astype(np.float32)
    assert np.array_equal(floats, expected, equal_nan=True)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 50000, np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        between = (expected[:-1].astype(np.float64) + expected[1:]) / 2  # ties
        values = np.concatenate([expected, between.astype(np.float32), bits.view(np.float32)])
        rounded = values.astype(np.float16)
    halves = np.zeros(values.size, np.uint16)
    emulator.launch("to_halves", (1, 1), 32, 0, values, Written(halves), values.size)
    same = (halves == rounded.view(np.uint16)) | (np.isnan(rounded) & np.isnan(halves.view(np.float16)))
    assert same.all()


PLANTED = [
    ("packed.cuh", "word[w] >> shift : funnel(word[w], word[w + 1], shift)", "word[w] >> shift : word[w] >> shift"),
    ("packed.cuh", "load_once(group + i * LANES + lane)", "load_once(group + i * LANES + (lane ^ 1))"),
    ("lookup.cuh", "(entry >> BITS) * TILE + lane", "(entry >> BITS) * TILE"),
    ("lookup.cuh", "i < WORDS; i +=", "i < WORDS / 2; i +="),
    ("lookup.cuh", "i += LANES) {\n      const u32 column", "i += 2 * LANES) {\n      const u32 column"),
    ("gemv.cu", "    sync_block();\n    for (u32 group = thread_index()", "    for (u32 group = thread_index()"),
    ("gemv.cu", "        sync_warp();\n        add_step", "        add_step"),
    ("gemv.cu", "group * GROUP < m.cols; group += warps", "group * GROUP + GROUP <= m.cols; group += warps"),
    ("gemv.cu", "for (u32 w = 0; w < warps; ++w)", "for (u32 w = 0; w < 1; ++w)"),
    ("gemm.cu", "const u32* lower = upper + 8 * ROW_WORDS;", "const u32* lower = upper + 7 * ROW_WORDS;"),
    ("gemm.cu", "  sync_warp();\n#pragma unroll\n  for (u32 k", "#pragma unroll\n  for (u32 k"),
    ("gemm.cu", "multiply_add(sums.of[1][n], a[1], b);", "if (lane) multiply_add(sums.of[1][n], a[1], b);"),
    ("gemm.cu", "total[k] *= load(factor + i / TILE);", "total[k] *= load(factor + i % TILE);"),
    ("expand.cu", "load_shared(tile + row * (STEP + 1) + lane)", "load_shared(tile + row * STEP + lane)"),
]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED, ids=[f"{number}-{name}" for number, (name, _, _) in enumerate(PLANTED)])
def test_planted_mistakes_are_noticed(planted: tuple[str, str, str], tmp_path: Path) -> None:
    name, right, wrong = planted
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS_CUDA, kernels)
    text = (kernels / name).read_text()
    assert text.count(right) >= 1, f"{name} has changed: {right}"
    (kernels / name).write_text(text.replace(right, wrong))
    gpu = EmulatedGpu(tmp_path, kernels)
    # Widths that cross words; more outliers in a row than lanes; more groups of columns than warps, the last not whole.
    tensor = codebook_tensor((40, 1200), 0, [3, 4], scaled=True, outliers=2000)
    weight = ir.dequantize(tensor)
    x = np.random.default_rng(0).standard_normal((5, weight.shape[1])).astype(np.float32)
    x *= np.array([1, 100, 1, 1, 1], np.float32)[:, None]
    exact = x @ weight.T
    try:
        if name == "expand.cu":
            good = ir.digest(expanded(gpu, tensor, Type.FP32)) == ir.digest(weight)
        else:
            good = all(
                np.abs(multiplied(gpu, tensor, x[:rows], kind) - exact[:rows]).max() < 2e-2 * np.abs(exact).max()
                and np.abs(multiplied(gpu, tensor, x[:1], kind) - exact[:1]).max() < 2e-2 * np.abs(exact[:1]).max()
                for rows, kind in [(4, Type.FP32), (5, Type.FP16)]
            )
    except EmulatorError:
        good = False
    assert not good
