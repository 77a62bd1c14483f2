"""A small file with tensors of every kind of ours, a thousand mutants of it, and a process that opens them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import GGUFExporter, container, custom
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import Header, StoredTensor, parse, string
from anyquant.testing import affine_tensor, block_tensor, codebook_tensor

DRIVER = Path(__file__).with_name("driver.py")
MUTANTS = 1000
HIDDEN, HEADS, FFN, VOCABULARY = 64, 4, 96, 64


def dense(shape: tuple[int, ...], dtype: str = "F32") -> ir.Tensor:
    values = np.random.default_rng(len(shape)).standard_normal(shape).astype(ir.DENSE_DTYPES[dtype])
    return ir.Tensor(ir.DenseSpec(shape, dtype), {".dense": values})


def tensors() -> dict[str, ir.Tensor]:
    """A llama of one layer. No stock type is multiplied for which llama.cpp rounds activations to 8 bits."""
    square, wide, narrow, layer = (HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN), "model.layers.0"
    return {
        "model.embed_tokens.weight": block_tensor(ir.BlockSpec((VOCABULARY, HIDDEN), "bfp", 8, 32), 0, (-3, 2)),
        f"{layer}.input_layernorm.weight": dense((HIDDEN,)),
        f"{layer}.self_attn.q_proj.weight": codebook_tensor(square, 0, [2, 3, 0, 1], scaled=True, outliers=30),
        f"{layer}.self_attn.k_proj.weight": codebook_tensor(square, 1, [2, 0, 3], outliers=20),
        f"{layer}.self_attn.v_proj.weight": affine_tensor(ir.AffineSpec(square, 2, 16)),
        f"{layer}.self_attn.o_proj.weight": block_tensor(ir.BlockSpec(square, "minifloat", 4, 16, 2), 0, (-3, 2)),
        f"{layer}.post_attention_layernorm.weight": dense((HIDDEN,)),
        f"{layer}.mlp.gate_proj.weight": block_tensor(ir.BlockSpec(wide, "log", 3, 32), 0, (-3, 2)),
        f"{layer}.mlp.up_proj.weight": dense(wide, "F16"),
        f"{layer}.mlp.down_proj.weight": codebook_tensor(narrow, 0, [1, 2], scaled=True),
        "norm.weight": dense((HIDDEN,)),  # a name that the file has to say
        "lm_head.weight": affine_tensor(ir.AffineSpec((VOCABULARY, HIDDEN), 4, 16)),
    }


@dataclass(frozen=True)
class Original:
    """The file that all others are made of, and where what is in it lies."""

    data: bytes
    header: Header
    places: dict[str, StoredTensor]

    @property
    def own(self) -> list[str]:
        """Names of the tensors in types of ours."""
        return [name for name, place in self.places.items() if place.type in custom.TYPES]

    def is_harmless(self, data: bytes) -> bool:
        """Whether only bytes differ that nobody looks at: after the end of a blob, and between tensors."""
        end = max(place.offset + place.nbytes for place in self.places.values())
        looked_at = [slice(0, self.header.data_start), *map(self.meant, self.places)]
        return end <= len(data) <= len(self.data) and all(data[part] == self.data[part] for part in looked_at)

    def meant(self, name: str) -> slice:
        """The bytes of a tensor that somebody looks at."""
        place = self.places[name]
        size = struct.unpack_from("<Q", self.data, place.offset + 24)[0] if name in self.own else place.nbytes
        return slice(place.offset, place.offset + size)

    def after(self, name: str) -> int:
        """Where a key, or a tensor's name, ends in the header."""
        return self.data.index(string(name)) + len(string(name))


@pytest.fixture(scope="module")
def original(save_ir: Callable[..., ir.Model], tmp_path_factory: pytest.TempPathFactory) -> Original:
    sizes = {"context_length": 64, "embedding_length": HIDDEN, "block_count": 1, "feed_forward_length": FFN}
    # Without head_count_kv no tensor contradicts another number of heads.
    sizes |= {"attention.head_count": HEADS, "rope.dimension_count": HIDDEN // HEADS, "vocab_size": VOCABULARY}
    tokens = b"".join(string(f"<{i}>") for i in range(VOCABULARY))
    keys = {
        "general.architecture": container.string_value("llama"),
        "general.alignment": container.uint32_value(32),
        **{f"llama.{key}": container.uint32_value(size) for key, size in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, 1e-5),
        "tokenizer.ggml.model": container.string_value("no_vocab"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, VOCABULARY) + tokens,
        "tokenizer.ggml.scores": struct.pack(f"<IIQ{VOCABULARY}f", 9, 6, VOCABULARY, *range(VOCABULARY)),
    }
    folder = tmp_path_factory.mktemp("original")
    config = {"model_type": "llama", "num_attention_heads": HEADS, "hidden_size": HIDDEN}
    files = {"source.gguf": container.header_bytes(keys, [])}
    model = save_ir(folder / "ir", tensors(), config, kind="gguf", files=files)
    GGUFExporter().export(model, folder / "x.gguf", ExportOptions())
    data = (folder / "x.gguf").read_bytes()
    header = parse(data, "x.gguf")
    return Original(data, header, header.stored(container.TYPES))


@dataclass
class Mutant:
    """Bytes of a file, and what was done to them; forged: to a blob that has checksums which fit."""

    data: bytearray
    done: list[str] = field(default_factory=list)
    forged: bool = False

    def flip(self, rng: np.random.Generator, begin: int, end: int) -> None:
        for at in rng.integers(begin, end, rng.integers(1, 4)).tolist():
            bit = int(rng.integers(8))
            self.data[at] ^= 1 << bit
            self.done.append(f"bit {bit} of byte {at}")

    def lie(self, rng: np.random.Generator, at: int, code: str) -> None:
        (was,) = struct.unpack_from("<" + code, self.data, at)
        near = [was + 1, was + 2, was + 32, was + 64, was - 1, was - 32, was - 64, was * 2, was // 2]
        any_of = [0, 1, 2, 3, 8, 9, 64, 255, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, *near, *custom.NUMBERS]
        size = struct.calcsize(code)
        value = any_of[rng.integers(len(any_of))] % 256**size
        self.data[at : at + size] = value.to_bytes(size, "little")
        self.done.append(f"{value} for {was} at {at}")


def other_bits(mutant: Mutant, rng: np.random.Generator, original: Original) -> None:
    """Anywhere, in the header, in the header of a blob, or in any of it."""
    place = original.places[rng.choice(original.own)]
    ends = [(0, len(mutant.data)), (0, original.header.data_start)]
    ends += [(place.offset, place.offset + size) for size in (custom.HEADER_BYTES, place.nbytes)]
    mutant.flip(rng, *ends[rng.integers(4)])


def other_length(mutant: Mutant, rng: np.random.Generator, original: Original) -> None:
    """Cut anywhere, or with bytes that are missing or too many there; one in four of them in the header."""
    end, data_start = len(mutant.data), original.header.data_start
    at = int(rng.integers([0, 0, data_start, end - 300][rng.integers(4)], end + 1))
    at = int(rng.integers(data_start)) if rng.integers(4) == 0 else at
    few = int(rng.choice([1, 8, 32, 64, 1000]))
    old, new = [(end, 0), (end, 0), (few, 0), (0, few)][rng.integers(4)]
    mutant.data[at : at + old] = rng.bytes(new)
    mutant.done.append(f"{new} bytes for {old} at {at}")


def other_numbers(mutant: Mutant, rng: np.random.Generator, original: Original) -> None:
    """Counts, lengths, types, values, dimensions and offsets of the header."""
    places = [(4, "I"), (8, "Q"), (16, "Q")]
    for key, value in original.header.values.items():
        at = original.after(key)
        places += [(at - len(string(key)), "Q"), (at, "I"), (at + 4, "I"), (at + 4, "I")]
        places += [(at + 4, "Q"), (at + 8, "Q")] if value[0] in (8, 9) else []  # lengths of strings and of arrays
    for name, place in original.places.items():
        at, sides = original.after(name), len(place.shape)
        places += [(at - len(string(name)), "Q"), (at, "I"), (at + 4 + 8 * sides, "I"), (at + 8 + 8 * sides, "Q")]
        places += [(at + 4 + 8 * side, "Q") for side in range(sides)]
    for i in rng.integers(0, len(places), rng.integers(1, 3)):
        mutant.lie(rng, *places[i])


BLOB_FIELDS = [(24, "Q"), (32, "Q"), (40, "Q"), (48, "I"), (52, "B"), (53, "B"), (54, "B"), (55, "B"), (56, "I")]
BLOB_FIELDS += [(at, "Q") for at in range(64, 192, 8)]


def other_blob(mutant: Mutant, rng: np.random.Generator, original: Original) -> None:
    """Fields of a blob's header, and bytes of its data, with checksums that fit them."""
    name = str(rng.choice(original.own))
    place, end, mutant.forged = original.places[name], original.meant(name).stop, True
    for at in rng.integers(place.offset + custom.HEADER_BYTES, end, rng.integers(0, 4)).tolist():
        mutant.data[at] = rng.integers(256)
        mutant.done.append(f"byte {at} of {name}")
    for i in rng.integers(0, len(BLOB_FIELDS), rng.integers(0 if mutant.done else 1, 3)):
        mutant.lie(rng, place.offset + BLOB_FIELDS[i][0], BLOB_FIELDS[i][1])
    blob = memoryview(mutant.data)[place.offset : place.offset + place.nbytes]
    used = min(max(struct.unpack_from("<Q", blob, 24)[0], custom.HEADER_BYTES), place.nbytes)
    struct.pack_into("<II", blob, 16, 0, zlib.crc32(blob[custom.HEADER_BYTES : used]))
    struct.pack_into("<I", blob, 16, zlib.crc32(blob[: custom.HEADER_BYTES]))


KINDS = [other_bits, other_bits, other_length, other_numbers, other_blob]


@pytest.fixture(scope="module")
def mutants(original: Original) -> list[Mutant]:
    """A thousand; the same every time."""
    made = [Mutant(bytearray(original.data)) for _ in range(MUTANTS)]
    for number, mutant in enumerate(made):
        KINDS[number % len(KINDS)](mutant, np.random.default_rng(number), original)
        mutant.done.insert(0, f"mutant {number}")
    return made


class Child:
    """The driver's process, and another one where that ended."""

    def __init__(self, folder: Path) -> None:
        self.path, self._log = folder / "mutant.gguf", folder / "stderr.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, what: str, data: bytes | bytearray) -> dict[str, Any]:
        """What the driver answers of a file of these bytes; {"died": code} where it does not."""
        self.path.write_bytes(data)
        if self._process is None or self._process.poll() is not None:
            self.close()
            environment, pipe = {**os.environ, "GGML_NO_BACKTRACE": "1"}, subprocess.PIPE
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(DRIVER)], stdin=pipe, stdout=pipe, stderr=log, env=environment
                )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({what: str(self.path)}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"died": self._process.wait()}
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    made = Child(tmp_path)
    yield made
    made.close()
