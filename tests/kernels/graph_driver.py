"""A process that multiplies in ggml's own graphs with tensors of the plug-in's types.

python graph_driver.py FOLDER PLUGIN BASE_LIBRARY CPU_LIBRARY

FOLDER holds request.npz, blob (uint8), shape (experts, rows, columns), number (of the type), x (float32 [n, columns]),
chosen (int32 [n, used], which experts each row of x goes to) and threads; it gets answer.npz: plain, products of all
rows of all experts [n, experts * rows], and of_experts, of the chosen ones [n, used, rows].
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
    x, chosen, threads = request["x"], request["chosen"], int(request["threads"])
    number, (n, used) = int(request["number"]), chosen.shape
    ggml = Ggml(base, cpu)
    assert ctypes.CDLL(plugin).anyquant_ggml_register() > 0
    flat = ggml.tensor(number, (columns, experts * rows), request["blob"])
    deep = ggml.tensor(number, (columns, rows, experts), request["blob"])
    inputs = ggml.tensor(F32, (columns, n), x)
    each = ggml.tensor(F32, (columns, 1, n), x)
    which = ggml.tensor(I32, (used, n), chosen)
    plain = ggml.product("ggml_mul_mat", threads, flat, inputs)
    of_experts = ggml.product("ggml_mul_mat_id", threads, deep, each, which)
    np.savez(
        folder / "answer.npz",
        plain=ggml.read(plain, (n, experts * rows)),
        of_experts=ggml.read(of_experts, (n, used, rows)),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
