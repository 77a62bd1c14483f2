"""A process that multiplies in ggml's own graphs with tensors of the plug-in's types.

python graph_driver.py FOLDER PLUGIN BASE_LIBRARY CPU_LIBRARY

FOLDER holds request.npz, blob (uint8), shape (experts, rows, columns), number (of the type), x (float32 [n, columns]),
chosen (int32 [n, used], which experts each row of x goes to), skipped (rows) and threads, and perhaps another blob of
the same size, then. It gets answer.npz: plain, products of all rows of all experts [n, experts * rows]; apart, the
same of rows of x that are a matrix each, and strided, of rows that lie apart; first_rows, so many as are skipped, and
of_rows, the others; of_experts, of the chosen ones [n, used, rows]; taken, which of the first five are done at once;
then, plain with the other blob in the same memory; whole, of how many ggmls whole products are done; and added, how
many buffer types ggml has more than before.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

F32, I32 = 0, 26
_LONG, _SIZE, _POINTER, _INT = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int


class InitParams(ctypes.Structure):
    _fields_ = (("size", _SIZE), ("memory", _POINTER), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The few functions that a graph takes, and a context of some megabytes."""

    def __init__(self, base: str, cpu: str) -> None:
        # The one needs the other, whose names it must see.
        self._base, self._cpu = ctypes.CDLL(base, ctypes.RTLD_GLOBAL), ctypes.CDLL(cpu)
        self.context = self._call(self._base, "ggml_init", InitParams(64 << 20, None, False))

    def _call(self, library: Any, name: str, *arguments: Any, result: Any = _POINTER) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    def tensor(self, number: int, sides: tuple[int, ...], data: np.ndarray | None) -> Any:
        sizes = (_LONG * len(sides))(*sides)
        made = self._call(self._base, "ggml_new_tensor", _POINTER(self.context), _INT(number), _INT(len(sides)), sizes)
        if data is not None:
            assert self._call(self._base, "ggml_nbytes", _POINTER(made), result=_SIZE) == data.nbytes
            ctypes.memmove(self.data(made), data.ctypes.data, data.nbytes)
        return made

    def view(self, tensor: int, sides: tuple[int, int], stride: int, offset: int) -> int:
        arguments = _POINTER(self.context), _POINTER(tensor), *map(_LONG, sides), _SIZE(stride), _SIZE(offset)
        made: int = self._call(self._base, "ggml_view_2d", *arguments)
        return made

    def buffer_types(self) -> int:
        """So many can do operations in ggml's place."""
        name = "_Z39ggml_backend_cpu_get_extra_buffer_typesv"
        begin, end = self._call(self._cpu, name, result=ctypes.POINTER(_SIZE * 2)).contents
        return int(end - begin) // ctypes.sizeof(_POINTER)

    def is_taken(self, product: int, threads: int) -> bool:
        """Whether somebody does it in ggml's place."""
        arguments = _INT(threads), _POINTER(product), ctypes.byref(_SIZE())
        return bool(self._call(self._cpu, "ggml_cpu_extra_work_size", *arguments, result=ctypes.c_bool))

    def data(self, tensor: int) -> int:
        found: int = self._call(self._base, "ggml_get_data", _POINTER(tensor))
        return found

    def product(self, name: str, threads: int, *tensors: int) -> int:
        made: int = self._call(self._base, name, _POINTER(self.context), *map(_POINTER, tensors))
        graph = self._call(self._base, "ggml_new_graph", _POINTER(self.context))
        self._call(self._base, "ggml_build_forward_expand", _POINTER(graph), _POINTER(made), result=None)
        compute = "ggml_graph_compute_with_ctx"
        arguments = _POINTER(self.context), _POINTER(graph), _INT(threads)
        assert self._call(self._cpu, compute, *arguments, result=_INT) == 0
        return made

    def read(self, tensor: int, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, np.float32)
        ctypes.memmove(out.ctypes.data, self.data(tensor), out.nbytes)
        return out


def main(folder: Path, plugin: str, base: str, cpu: str) -> None:
    with np.load(folder / "request.npz") as file:
        request = dict(file)
    experts, rows, columns = (int(side) for side in request["shape"])
    x, chosen, threads, skipped = request["x"], request["chosen"], int(request["threads"]), int(request["skipped"])
    number, (n, used) = int(request["number"]), chosen.shape
    ggml, library = Ggml(base, cpu), ctypes.CDLL(plugin)
    before = ggml.buffer_types()
    assert library.anyquant_ggml_register() == library.anyquant_ggml_register() == 1
    flat = ggml.tensor(number, (columns, experts * rows), request["blob"])
    deep = ggml.tensor(number, (columns, rows, experts), request["blob"])
    inputs = ggml.tensor(F32, (columns, n), x)
    each = ggml.tensor(F32, (columns, 1, n), x)
    which = ggml.tensor(I32, (used, n), chosen)
    stride = request["blob"].nbytes // (experts * rows)
    left = experts * rows - skipped
    first = ggml.view(flat, (columns, skipped), stride, 0)
    some = ggml.view(flat, (columns, left), stride, skipped * stride)
    wide = ggml.tensor(F32, (columns + 32, n), np.pad(x, ((0, 0), (0, 32)), constant_values=np.nan))
    loose = ggml.view(wide, (columns, n), 4 * (columns + 32), 0)

    taken = []

    def product(name: str, shape: tuple[int, ...], *tensors: int) -> np.ndarray:
        made = ggml.product(name, threads, *tensors)
        taken.append(ggml.is_taken(made, threads))
        return ggml.read(made, shape)

    answer = {
        "plain": product("ggml_mul_mat", (n, experts * rows), flat, inputs),
        "apart": product("ggml_mul_mat", (n, experts * rows), flat, each),
        "strided": product("ggml_mul_mat", (n, experts * rows), flat, loose),
        "first_rows": product("ggml_mul_mat", (n, skipped), first, inputs),
        "of_rows": product("ggml_mul_mat", (n, left), some, inputs),
        "of_experts": product("ggml_mul_mat_id", (n, used, rows), deep, each, which),
        "taken": np.array(taken[:5]),
        "whole": np.array(library.anyquant_ggml_whole()),
        "added": np.array(ggml.buffer_types() - before),
    }
    if "then" in request:
        ctypes.memmove(ggml.data(flat), request["then"].ctypes.data, request["then"].nbytes)
        answer["then"] = product("ggml_mul_mat", (n, experts * rows), flat, inputs)
    np.savez(folder / "answer.npz", **answer)  # type: ignore[arg-type]  # its other argument is a switch


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
