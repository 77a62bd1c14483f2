"""The plug-in where memory changes between products: other models, damaged copies, beginnings that are gone."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from anyquant import ir
from anyquant.exporters.gguf import custom
from anyquant.runtime import ggml_plugin, native
from anyquant.testing import codebook_tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import Ask

SHAPE = (64, 64)
pytestmark = pytest.mark.skipif(native.path_of(ggml_plugin.LIBRARY) is None, reason=native.missing(ggml_plugin.LIBRARY))


def encoded(tensor: ir.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    assert isinstance(tensor.spec, custom.Held)
    name = custom.type_for(tensor.spec)
    assert name is not None
    return name, tensor.spec.shape, custom.encode("w", tensor, name)


@pytest.mark.parametrize(("section", "damage"), [(0, 0x80), (2, 0x01), (5, 0xFF)])  # widths, entries, columns
def test_a_damaged_copy_in_the_same_memory(ask: Ask, section: int, damage: int) -> None:
    """Its values are not numbers, though its header is the same; products stay those of the whole one, or are none."""
    tensor = codebook_tensor(SHAPE, 1, 3, outliers=64)
    name, shape, blob = encoded(tensor)
    offset, size = struct.unpack_from("<QQ", blob.data, 64 + 16 * section)
    damaged = blob.copy()
    damaged[offset + 9 : offset + size] ^= damage
    answer = ask([(name, shape, blob, 0), (name, shape, damaged, 0)], arena=1 << 16)
    answer.assert_of(0, tensor)
    assert np.isnan(answer.values(1)).all()
    first, second = answer.products(0)[0], answer.products(1)[0]
    assert ((first == second) | np.isnan(second)).all()


def test_a_whole_copy_in_the_memory_of_a_damaged_one(ask: Ask) -> None:
    tensor = codebook_tensor(SHAPE, 0, 3)
    name, shape, blob = encoded(tensor)
    damaged = blob.copy()
    damaged[struct.unpack_from("<Q", blob.data, 24)[0] - 70] ^= 1  # in no row that is asked for first
    answer = ask([(name, shape, damaged, 0), (name, shape, blob, 0)], arena=1 << 16)
    assert answer.is_nan(0)
    answer.assert_of(1, tensor)


GONE = """
import ctypes, importlib.util, sys
import numpy as np
driver, plugin, blobs, how, *libraries = sys.argv[1:]
spec = importlib.util.spec_from_file_location("ggml_driver", driver)
ggml = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ggml)
with np.load(blobs) as file:
    first, second, number, row, stride = (file[name] for name in ("first", "second", "number", "row", "stride"))
host, libc = ggml.Host(libraries), ctypes.CDLL(None)
assert ctypes.CDLL(plugin).anyquant_ggml_register() == 1
libc.mmap.restype = ctypes.c_void_p
size = ctypes.c_size_t(-(-first.size // 4096) * 4096)
at = libc.mmap(None, size, 3, 0x22, -1, ctypes.c_long(0))
ctypes.memmove(at, first.ctypes.data, first.size)
ggml.compute(host, {"rows": 512, "columns": 256, "number": int(number)}, at)
if how == "unmapped":
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(4096))
else:
    libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(4096), 0)
at += int(row * stride)
ctypes.memmove(at, second.ctypes.data, second.size)
found = ggml.compute(host, {"rows": 64, "columns": 256, "number": int(number)}, at)
np.save(blobs.replace("blobs.npz", "values.npy"), found["values"][:, :256])
np.save(blobs.replace("blobs.npz", "single.npy"), found["single"][:, 0])
"""


@pytest.mark.parametrize("how", ["unmapped", "protected"])
def test_another_tensor_where_the_beginning_of_one_is_gone(how: str, ggml_libraries: list[str], tmp_path: Path) -> None:
    """Rows of the same length, at places of rows that were; what lay before them cannot be read any more."""
    tensors = [codebook_tensor((rows, 256), 0, 3, seed=rows) for rows in (512, 64)]
    name, _, first = encoded(tensors[0])
    assert isinstance(tensors[1].spec, custom.Held)
    number, stride = custom.TYPES[name][0], 256 // 32 * custom.TYPES[name][1]
    row = next(row for row in range(4096 // stride + 1, 512) if row * stride % 32 == 0)
    np.savez(
        tmp_path / "blobs.npz", first=first, second=custom.encode("w", tensors[1], name), number=number, row=row,
        stride=stride,
    )  # fmt: skip
    driver = Path(__file__).with_name("ggml_driver.py")
    arguments = [str(driver), str(ggml_plugin.path()), str(tmp_path / "blobs.npz"), how, *ggml_libraries]
    done = subprocess.run([sys.executable, "-c", GONE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    weight = ir.dequantize(tensors[1])
    assert ir.digest(np.load(tmp_path / "values.npy")) == ir.digest(weight)
    x = np.random.default_rng(256).standard_normal((2, 256)).astype(np.float32)[0]
    np.testing.assert_allclose(np.load(tmp_path / "single.npy"), weight @ x, rtol=0, atol=1e-4)
