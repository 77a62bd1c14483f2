"""The plug-in in a prebuilt ggml: rows and products of tensors of every kind, and of bytes that are none."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from anyquant import ir
from anyquant.errors import CorruptFileError
from anyquant.exporters.gguf import custom
from anyquant.runtime import ggml_plugin, native
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import Ask

PLUGIN = native.path_of(ggml_plugin.LIBRARY)
MIXED = [3, 0, 8, 1, 4, 7, 2, 5, 6]
STRAY = "anyquant: tensor ?: holds no tensor of anyquant, though its type says so; its products are not numbers"

pytestmark = pytest.mark.skipif(PLUGIN is None, reason=native.missing(ggml_plugin.LIBRARY))


def every_codebook() -> list[ir.Tensor]:
    shapes = [(0, (9, 576), MIXED), (0, (1, 2048), [3]), (0, (40, 32), [2, 0, 1]), (0, (2, 65568), [2, 3])]
    shapes += [(1, (577, 32), MIXED), (1, (40, 288), [2, 0, 1, 3])]
    shapes += [(0, (4, 12800), [bits]) for bits in range(9)] + [(1, (12801, 32), [bits]) for bits in (0, 3, 5, 8)]
    found = [codebook_tensor(shape, axis, bits) for axis, shape, bits in shapes]
    for axis, shape, bits in (shapes[0], shapes[2], shapes[4], shapes[5]):
        for scaled, outliers in ((True, 0), (False, 19), (True, 19)):
            found.append(codebook_tensor(shape, axis, bits, scaled=scaled, outliers=outliers))
    return [*found, codebook_tensor((2, 65568), 0, [2, 3], outliers=40)]


def every_block() -> list[ir.Tensor]:
    found = []
    for width in range(2, 9):
        for block in (16, 32) if width < 8 else (32,):
            for form, exponent_width in (("bfp", 0), ("log", 0), ("minifloat", 1), ("minifloat", (width + 1) // 2)):
                found.append(block_tensor(ir.BlockSpec((7, 8224), form, width, block, exponent_width)))
    return found


def every_affine() -> list[ir.Tensor]:
    pairs = [(bits, block) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256) if bits < 8 or block > 32]
    return [affine_tensor(ir.AffineSpec((7, 8224), bits, block)) for bits, block in pairs]


def small() -> list[ir.Tensor]:
    """One of each kind."""
    return [
        codebook_tensor((9, 1024), 0, MIXED, scaled=True, outliers=30),
        codebook_tensor((96, 32), 1, [2, 0, 3, 1], outliers=9),
        block_tensor(ir.BlockSpec((30, 96), "minifloat", 5, 16, 2)),
        affine_tensor(ir.AffineSpec((30, 96), 4, 32)),
    ]


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
        block_tensor(ir.BlockSpec((40, 96), "bfp", 4, 32), exponents=(-127, -120)),
        block_tensor(ir.BlockSpec((40, 96), "bfp", 4, 32), exponents=(115, 120)),
        block_tensor(ir.BlockSpec((40, 96), "log", 5, 32), exponents=(-127, -120)),
        block_tensor(ir.BlockSpec((200, 8224), "log", 8, 32), exponents=(-22, -18)),
    ]
    answer = ask([encoded(tensor) for tensor in tensors])
    for step, tensor in enumerate(tensors):
        answer.assert_of(step, tensor)


def test_threads_at_once(ask: Ask) -> None:
    """Each meets the tensors in another order, and all of them at first."""
    tensors = small() + [codebook_tensor((480, 64), 1, MIXED, seed=seed) for seed in range(4)]
    answer = ask([encoded(tensor) for tensor in tensors], threads=8)
    assert answer.errors == []
    for thread in range(8):
        for step, tensor in enumerate(tensors):
            answer.assert_of(step, tensor, thread)


def test_another_tensor_in_the_same_memory(ask: Ask) -> None:
    """At the same place, of the same sizes and of others, and the first one again; then over the beginning of it."""
    tensors = [*small(), codebook_tensor((9, 1024), 0, MIXED, scaled=True, outliers=30, seed=1), small()[0]]
    steps = [(*encoded(tensor), 1 << 16) for tensor in tensors]
    name, (_, columns), _, place = steps[-1]
    stride = columns // 32 * custom.TYPES[name][1]
    for seed, before in ((2, 8 * stride), (3, 8 * stride + 32), (4, 9 * stride)):  # on its rows and between them
        tensors.append(codebook_tensor((9, 1024), 0, MIXED, scaled=True, outliers=30, seed=seed))
        steps.append((*encoded(tensors[-1]), place - before))
    answer = ask(steps, arena=1 << 20)
    assert answer.errors == []
    for step, tensor in enumerate(tensors):
        answer.assert_of(step, tensor)


def test_memory_that_is_mapped_in_parts(ask: Ask) -> None:
    """As that of llama.cpp's --mlock is where it may lock only some."""
    tensor = codebook_tensor((64, 2048), 0, 3)
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
