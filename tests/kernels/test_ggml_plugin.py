"""The plug-in in a prebuilt ggml: rows and products of tensors of every kind, and of bytes that are none."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import custom
from anyquant.ir import packing
from anyquant.runtime import native

DRIVER = Path(__file__).with_name("ggml_driver.py")
PLUGIN = native.path_of("libanyquant_ggml.so")
SENTINEL = np.float32(12345)
MIXED = [3, 0, 8, 1, 4, 7, 2, 5, 6]
STRAY = "anyquant: tensor ?: holds no tensor of anyquant, though its type says so; its products are not numbers"

pytestmark = pytest.mark.skipif(PLUGIN is None, reason=native.missing("libanyquant_ggml.so"))


def codebook(
    shape: tuple[int, int], axis: int, bits: Any, *, scaled: bool = False, outliers: int = 0, seed: int = 0
) -> ir.Tensor:
    rng, widths = np.random.default_rng(seed), np.resize(np.asarray(bits, np.uint8), shape[axis])
    spec = ir.CodebookSpec.from_bits(shape, axis, widths, input_scale=scaled, outliers=outliers)
    codes = [packing.pack(rng.integers(0, 1 << b, (1, shape[1 - axis]), np.uint8), b)[0] for b in widths.tolist()]
    entries = [np.sort(rng.standard_normal(1 << b)) for b in widths.tolist()]
    arrays = {".bits": widths, ".codes": np.concatenate(codes), ".codebook": np.concatenate(entries).astype(np.float16)}
    if scaled:
        arrays[".input_scale"] = rng.uniform(0.5, 2, shape[1]).astype(np.float16)
    if outliers:
        row, column = np.divmod(np.sort(rng.choice(spec.numel, outliers, replace=False)), shape[1])
        arrays[".outlier_indptr"] = np.searchsorted(row, np.arange(shape[0] + 1)).astype(np.uint32)
        arrays[".outlier_index"] = column.astype(np.uint16 if shape[1] <= 65536 else np.uint32)
        arrays[".outlier_value"] = rng.standard_normal(outliers).astype(np.float16)
    return ir.Tensor(spec, arrays)


def blocks(spec: ir.BlockSpec, exponents: tuple[int, int] = (-20, 20)) -> ir.Tensor:
    rng, sign = np.random.default_rng(spec.width), 1 << (spec.width - 1)
    codes = rng.integers(0, 2 * sign, (spec.shape[0], spec.blocks, spec.block))
    shared = rng.integers(*exponents, codes.shape[:2])
    if spec.format != "log":
        codes[codes == sign] = 0  # no negative zero
        codes[-1, -1] = 0
        shared[~codes.any(axis=2)] = ir.ZERO_BLOCK
    stored = packing.pack(codes.reshape(spec.shape[0], -1).astype(np.uint8), spec.width)
    return ir.Tensor(spec, {".codes": stored, ".exponents": shared.astype(np.int8)})


def affine(spec: ir.AffineSpec) -> ir.Tensor:
    rng = np.random.default_rng(spec.bits)
    codes = rng.integers(0, 1 << spec.bits, (spec.shape[0], spec.blocks * spec.block), np.uint8)
    codes[:, spec.shape[1] :] = 0
    zero = rng.integers(0, 1 << spec.bits, (spec.shape[0], spec.blocks), np.uint8)
    scale = rng.standard_normal(zero.shape).astype(np.float16)
    return ir.Tensor(spec, {".codes": packing.pack(codes, spec.bits), ".scale": scale, ".zero": zero})


def every_codebook() -> list[ir.Tensor]:
    shapes = [(0, (9, 576), MIXED), (0, (1, 2048), [3]), (0, (40, 32), [2, 0, 1]), (0, (2, 65568), [2, 3])]
    shapes += [(1, (577, 32), MIXED), (1, (40, 288), [2, 0, 1, 3])]
    shapes += [(0, (4, 12800), [bits]) for bits in range(9)] + [(1, (12801, 32), [bits]) for bits in (0, 3, 5, 8)]
    found = [codebook(shape, axis, bits) for axis, shape, bits in shapes]
    for axis, shape, bits in (shapes[0], shapes[2], shapes[4], shapes[5]):
        found += [
            codebook(shape, axis, bits, scaled=scaled, outliers=n) for scaled, n in ((True, 0), (False, 19), (True, 19))
        ]
    return [*found, codebook((2, 65568), 0, [2, 3], outliers=40)]


def every_block() -> list[ir.Tensor]:
    found = []
    for width in range(2, 9):
        for block in (16, 32) if width < 8 else (32,):
            for form, exponent_width in (("bfp", 0), ("log", 0), ("minifloat", 1), ("minifloat", (width + 1) // 2)):
                found.append(blocks(ir.BlockSpec((7, 8224), form, width, block, exponent_width)))
    return found


def every_affine() -> list[ir.Tensor]:
    pairs = [(bits, block) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256) if bits < 8 or block > 32]
    return [affine(ir.AffineSpec((7, 8224), bits, block)) for bits, block in pairs]


def small() -> list[ir.Tensor]:
    """One of each kind."""
    return [
        codebook((9, 1024), 0, MIXED, scaled=True, outliers=30),
        codebook((96, 32), 1, [2, 0, 3, 1], outliers=9),
        blocks(ir.BlockSpec((30, 96), "minifloat", 5, 16, 2)),
        affine(ir.AffineSpec((30, 96), 4, 32)),
    ]


class Answer:
    """What the driver's process found out."""

    def __init__(self, folder: Path, steps: list[dict[str, Any]], errors: list[str]) -> None:
        self.about: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        with np.load(folder / "answer.npz") as arrays:
            self._arrays = dict(arrays)
        self._steps, self.errors = steps, errors

    def values(self, step: int, thread: int = 0) -> np.ndarray:
        """Of all rows; nothing was written beside them."""
        found, columns = self._arrays[f"{thread}/{step}/values"], self._steps[step]["columns"]
        assert (found[:, columns:] == SENTINEL).all()
        values: np.ndarray = found[:, :columns]
        return values

    def products(self, step: int, thread: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[row], of one row of activations; [row, activations] of pairs' first and second; none is written beside."""
        single, pairs = (self._arrays[f"{thread}/{step}/{what}"] for what in ("single", "pairs"))
        assert (single[:, 1:] == SENTINEL).all()
        assert (pairs[:, :, 2:] == SENTINEL).all()
        return single[:, 0], pairs[:, :, 0], pairs[:, :, 1]

    def is_nan(self, step: int) -> bool:
        """Whether nothing is a number; otherwise all is."""
        found = np.concatenate([np.isnan(array).ravel() for array in (self.values(step), *self.products(step))])
        assert found.all() or not found.any()
        return bool(found.all())

    def assert_of(self, step: int, tensor: ir.Tensor, thread: int = 0) -> None:
        """Values to the last bit, products near those in FP64."""
        weight = ir.dequantize(tensor)
        assert ir.digest(self.values(step, thread)) == ir.digest(weight), (step, tensor.spec)
        x = np.random.default_rng(weight.shape[1]).standard_normal((2, weight.shape[1])).astype(np.float32)
        weights, inputs = weight.astype(np.float64), x.astype(np.float64)
        exact, limit = weights @ inputs.T, 1e-6 * (np.abs(weights) @ np.abs(inputs.T)) + 1e-42
        single, first, second = self.products(step, thread)
        apart = len(exact) - len(first)
        assert (np.abs(single - exact[:, 0]) <= limit[:, 0]).all(), (step, tensor.spec)
        assert (np.abs(first - exact[: len(first)]) <= limit[: len(first)]).all(), (step, tensor.spec)
        assert (np.abs(second - exact[apart:]) <= limit[apart:]).all(), (step, tensor.spec)


Ask = Callable[..., Answer]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """ask([(name of the type, shape, blob, place or None), ...], environment, **request) -> what the driver found."""
    found = importlib.util.find_spec("libggml")
    folders = [
        Path(folder) / sub for folder in (found and found.submodule_search_locations) or () for sub in ("lib64", "lib")
    ]
    folder = next((folder for folder in folders if (folder / "libggml-cpu.so").is_file()), None)
    if folder is None:
        pytest.skip("libggml-python is not installed")
    libraries = [str(folder / f"libggml-{part}.so") for part in ("base", "cpu")]

    def run(tensors: list[Any], environment: dict[str, str] | None = None, **request: Any) -> Answer:
        steps = []
        for name, (rows, columns), blob, *at in tensors:
            number = custom.TYPES[name][0]
            steps.append(
                {"number": number, "rows": rows, "columns": columns, "bytes": len(blob), "at": (at or [None])[0]}
            )
        (tmp_path / "request.json").write_text(json.dumps({"steps": steps, **request}))
        (tmp_path / "blobs.bin").write_bytes(b"".join(blob.tobytes() for _, _, blob, *_ in tensors))
        command = [sys.executable, str(DRIVER), str(tmp_path), str(PLUGIN), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
        assert done.returncode == 0, done.stderr[-3000:]
        return Answer(tmp_path, steps, done.stderr.splitlines())

    return run


def encoded(tensor: ir.Tensor, name: str = "w") -> tuple[str, tuple[int, int], np.ndarray]:
    """What the driver takes."""
    tensor.check(name)
    spec = tensor.spec
    assert isinstance(spec, custom.Held)
    chosen = custom.type_for(spec)
    assert chosen is not None
    return chosen, spec.shape, custom.encode(name, tensor, chosen)


def test_registering_adds_the_types_and_nothing_else(ask: Ask) -> None:
    answer = ask([])
    assert answer.about["registered"] == [1, 1]
    assert answer.about["backend"] is None
    assert answer.errors == []
    assert answer.about["rights after"] == answer.about["rights before"]
    before, after = answer.about["before"], answer.about["after"]
    assert before[2]["name"] == "q4_0"
    for name, (number, size) in custom.TYPES.items():
        entry = after[number]
        assert not before[number]["bytes"]
        assert entry["name"] == name.lower().replace("_", ".").replace("anyquant.", "anyquant_")
        assert (entry["block"], entry["bytes"], entry["quantized"]) == (32, size, True)
        assert (entry["interleaved"], entry["from_float"], entry["cpu_from_float"]) == (0, None, None)
        assert entry["to_float"]
        assert entry["cpu_vec_dot"]
        assert (entry["cpu_activations"], entry["cpu_rows"]) == (0, 2)
    others = [number for number in range(len(before)) if number not in custom.NUMBERS]
    assert [after[number] for number in others] == [before[number] for number in others]


@pytest.mark.parametrize("number", [4, 38])
def test_a_ggml_that_uses_a_number_is_left_alone(ask: Ask, number: int) -> None:
    answer = ask([], occupied=number)
    assert answer.about["registered"] == [0, 0]
    assert answer.about["message"] == "a number that was given up is in use"
    assert answer.about["after"] == answer.about["before"]
    assert answer.errors[0] == "anyquant: nothing was changed in this ggml: a number that was given up is in use"


def test_without_a_ggml_it_says_so() -> None:
    program = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).anyquant_ggml_register())"
    done = subprocess.run([sys.executable, "-c", program, str(PLUGIN)], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert re.fullmatch("anyquant: no tensor types were added: there is no ggml .*\n", done.stderr)


@pytest.mark.parametrize("level", ["", "avx2", "scalar"])
@pytest.mark.parametrize("make", [every_codebook, every_block, every_affine])
def test_every_kind(ask: Ask, make: Callable[[], list[ir.Tensor]], level: str) -> None:
    """All tensors are there at a time, each at the end of its memory."""
    tensors = make()
    answer = ask([encoded(tensor) for tensor in tensors], {"ANYQUANT_CPU": level})
    assert answer.errors == []
    for step, tensor in enumerate(tensors):
        answer.assert_of(step, tensor)


def test_the_ends_of_the_exponents(ask: Ask) -> None:
    """Scales that are no normal FP32 numbers, and values up to the largest."""
    tensors = [
        blocks(ir.BlockSpec((40, 96), "bfp", 4, 32), (-127, -120)),
        blocks(ir.BlockSpec((40, 96), "bfp", 4, 32), (115, 120)),
        blocks(ir.BlockSpec((40, 96), "log", 5, 32), (-127, -120)),
        blocks(ir.BlockSpec((200, 8224), "log", 8, 32), (-22, -18)),
    ]
    answer = ask([encoded(tensor) for tensor in tensors])
    for step, tensor in enumerate(tensors):
        answer.assert_of(step, tensor)


def test_threads_at_once(ask: Ask) -> None:
    """Each meets the tensors in another order, and all of them at first."""
    tensors = small() + [codebook((480, 64), 1, MIXED, seed=seed) for seed in range(4)]
    answer = ask([encoded(tensor) for tensor in tensors], threads=8)
    assert answer.errors == []
    for thread in range(8):
        for step, tensor in enumerate(tensors):
            answer.assert_of(step, tensor, thread)


def test_another_tensor_in_the_same_memory(ask: Ask) -> None:
    """At the same place, of the same sizes and of others, and the first one again; then over the beginning of it."""
    tensors = [*small(), codebook((9, 1024), 0, MIXED, scaled=True, outliers=30, seed=1), small()[0]]
    steps = [(*encoded(tensor), 1 << 16) for tensor in tensors]
    name, (_, columns), _, place = steps[-1]
    stride = columns // 32 * custom.TYPES[name][1]
    for seed, before in ((2, 8 * stride), (3, 8 * stride + 32), (4, 9 * stride)):  # on its rows and between them
        tensors.append(codebook((9, 1024), 0, MIXED, scaled=True, outliers=30, seed=seed))
        steps.append((*encoded(tensors[-1]), place - before))
    answer = ask(steps, arena=1 << 20)
    assert answer.errors == []
    for step, tensor in enumerate(tensors):
        answer.assert_of(step, tensor)


def test_memory_that_is_mapped_in_parts(ask: Ask) -> None:
    """As that of llama.cpp's --mlock is where it may lock only some."""
    tensor = codebook((64, 2048), 0, 3)
    answer = ask([encoded(tensor)], split=True)
    assert answer.errors == []
    answer.assert_of(0, tensor)


def test_damage_is_not_a_number_and_named_once(ask: Ask) -> None:
    """Damaged data is said of its tensor; without a header nobody knows whose bytes they are."""
    tensors = [encoded(tensor, f"blk.{i}.w") for i, tensor in enumerate(small())]
    for _, _, blob in tensors[:3]:
        blob[blob.size // 3] ^= 1
    answer = ask(tensors)
    assert [answer.is_nan(step) for step in range(4)] == [True, True, True, False]
    damaged = "the checksum of its data differs; its products are not numbers"
    assert answer.errors == [f"anyquant: tensor blk.{i}.w: {damaged}" for i in range(3)]


def test_foreign_bytes_are_not_numbers(ask: Ask) -> None:
    rng = np.random.default_rng(0)
    foreign = [("ANYQUANT_3_5", (10, 64), fill(280)) for fill in (rng.bytes, bytes, lambda n: b"AQTENSOR" * (n // 8))]
    name, shape, blob = encoded(small()[0])
    other = next(key for key in custom.TYPES if key != name)
    wrong = (other, shape, np.resize(blob, shape[0] * shape[1] // 32 * custom.TYPES[other][1]))
    headless = blob.copy()
    headless[20] ^= 1
    tensors = [(kind, size, np.frombuffer(data, np.uint8)) for kind, size, data in foreign]
    answer = ask([*tensors, wrong, (name, shape, headless), (name, shape, blob)])
    assert [answer.is_nan(step) for step in range(6)] == [True] * 5 + [False]
    answer.assert_of(5, small()[0])
    assert set(answer.errors) == {STRAY, "anyquant: and so on"}  # after twenty


def test_any_flipped_bits_are_not_numbers_or_harmless(ask: Ask) -> None:
    """Of headers and of data; harmless after the end of what is used, whose bytes belong to nobody."""
    rng, tensors = np.random.default_rng(0), small()
    steps, harmless, place = [], [], 0
    for i in range(300):
        name, shape, blob = encoded(tensors[i % 4], f"tensor {i}")
        flipped, (used,) = blob.copy(), struct.unpack_from("<Q", blob.data, 24)
        places = rng.integers(0, 256 if i % 3 == 0 else blob.size, rng.integers(1, 4))
        flipped[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
        steps.append((name, shape, flipped, place))
        place += -(-blob.size // 32) * 32  # one after the other, as in a file
        harmless.append(bool((flipped[:used] == blob[:used]).all()))
    assert 5 < sum(harmless) < 100
    answer = ask(steps, arena=place)
    for step, fine in enumerate(harmless):
        assert answer.is_nan(step) is not fine
        if fine:
            answer.assert_of(step, tensors[step % 4])


FIELDS = [(24, "Q"), (52, "B"), (53, "B"), (54, "B"), (55, "B"), (56, "I"), *((at, "Q") for at in range(64, 192, 8))]


def forged(rng: np.random.Generator, blob: np.ndarray) -> np.ndarray:
    """Some other bytes of data and fields of the header, and checksums that fit them."""
    blob = blob.copy()
    for at in rng.integers(256, blob.size, rng.integers(0, 4)):
        blob[at] = rng.integers(0, 256)
    for offset, code in (FIELDS[i] for i in rng.integers(0, len(FIELDS), rng.integers(0, 3))):
        was = struct.unpack_from(f"<{code}", blob.data, offset)[0]
        other = [0, 1, 2, 3, 9, 64, 255, was + 1, was + 2, was + 64, was - 1, was - 64, 2**40, 2**63 - 1]
        struct.pack_into(f"<{code}", blob.data, offset, int(rng.choice(other)) % 256 ** struct.calcsize(code))
    used = max(256, min(struct.unpack_from("<Q", blob.data, 24)[0], blob.size))
    struct.pack_into("<II", blob.data, 16, 0, zlib.crc32(blob[256:used].data))
    struct.pack_into("<I", blob.data, 16, zlib.crc32(blob[:256].data))
    return blob


def test_forged_blobs_do_no_harm(ask: Ask) -> None:
    """No crash, and what Python reads as a tensor has these very values, or none where only the plug-in refuses."""
    rng, blobs = np.random.default_rng(1), [encoded(tensor) for tensor in small()]
    steps = [(name, shape, forged(rng, blob)) for name, shape, blob in blobs * 100]
    answer, taken = ask(steps), 0
    for step, (_, shape, blob) in enumerate(steps):
        try:
            tensor = custom.decode("w", shape, blob)
        except CorruptFileError:
            continue
        if not answer.is_nan(step):
            answer.assert_of(step, tensor)
            taken += 1
    assert 50 < taken < 300
