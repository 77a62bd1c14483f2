"""The operator's kernel for GPUs in a process of its own; its CUDA and NVRTC are fakes, its ONNX Runtime is this.

python ort_driver.py LIBRARY FAKE_CUDA FOLDER [SCENARIO]

With the fakes' folder on LD_LIBRARY_PATH, and ANYQUANT_ONNXRUNTIME_CUDA=1. Runs every case of CASES, or the one that
SCENARIO names, and writes what it found to FOLDER/answer.json.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.exporters.onnx.codebook import NEUTRAL, STORED, stored_arrays
from anyquant.runtime.cuda.layout import pack_codebook
from anyquant.testing import codebook_tensor

SLOTS = 300
STREAM = 0x57
TYPES = {"float32": 1, "uint8": 2, "uint16": 4, "float16": 10, "uint32": 12}
POINTER, SIZE, LONG, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
MIXED = [4, 0, 2, 3, 1, 8, 5, 7, 6]
CASES: dict[str, tuple[ir.Tensor, bool, list[tuple[int, ...]]]] = {
    "rows": (codebook_tensor((70, 300), 0, [2, 3, 4], scaled=True, outliers=90), True, [(1,), (3, 4), (17,)]),
    "columns": (codebook_tensor((70, 300), 1, [2, 3, 4], scaled=True, outliers=90), True, [(1,), (3, 4), (17,)]),
    "all widths of rows": (codebook_tensor((75, 129), 0, MIXED), False, [(1,), (2,)]),
    "all widths of columns": (codebook_tensor((75, 129), 1, MIXED), False, [(1,), (2,)]),
    "one weight": (codebook_tensor((1, 1), 0, [4]), False, [(1,)]),
    "outliers alone": (codebook_tensor((20, 70), 1, [0], outliers=1400), False, [(1,)]),
    "wide indices": (codebook_tensor((3, 65600), 0, [2, 4], outliers=70), False, [(1,)]),
    "nothing": (codebook_tensor((8, 40), 0, [3]), True, [(0,)]),
}

LARGE = "groups that share a task"
"""So large that it is packed, and not run in the emulator."""


class Api:
    """As much of ONNX Runtime as the library calls. Values and kernels' infos are numbers of objects."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._objects: dict[int, Any] = {}
        self.ops: list[int] = []
        self.table = (POINTER * SLOTS)()
        for slot, result, arguments, function in [
            (0, POINTER, (INT, ctypes.c_char_p), self.create_status),
            (26, POINTER, (ctypes.c_char_p, POINTER), self.create_domain),
            (27, POINTER, (POINTER, POINTER), self.add_op),
            (28, POINTER, (POINTER, POINTER), lambda options, domain: None),
            (51, POINTER, (POINTER, POINTER), self.data),
            (60, POINTER, (POINTER, POINTER), self.element_type),
            (61, POINTER, (POINTER, POINTER), self.rank),
            (62, POINTER, (POINTER, POINTER, SIZE), self.sides),
            (65, POINTER, (POINTER, POINTER), lambda value, out: self.put(out, value)),
            (86, POINTER, (POINTER, ctypes.c_char_p, POINTER), self.attribute),
            (90, POINTER, (POINTER, SIZE, POINTER), self.input),
            (91, POINTER, (POINTER, SIZE, POINTER, SIZE, POINTER), self.output),
            (99, None, (POINTER,), lambda info: None),
            (193, POINTER, (POINTER, POINTER), lambda context, out: self.put(out, STREAM)),
            (244, POINTER, (POINTER, POINTER, POINTER), self.node_name),
            (249, POINTER, (POINTER, SIZE, POINTER, POINTER), self.constant),
        ]:
            self.table[slot] = ctypes.cast(self.keep(ctypes.CFUNCTYPE(result, *arguments)(function)), POINTER)

    def keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing

    def number(self, thing: Any) -> int:
        """By which the library refers to it."""
        number = len(self._objects) + 1
        self._objects[number] = thing
        return number

    def put(self, out: int, value: int) -> None:
        ctypes.c_void_p.from_address(out).value = value

    def create_status(self, code: int, message: bytes) -> int:
        return self.number((code, message.decode()))

    def status(self, number: int | None) -> tuple[int, str] | None:
        found: tuple[int, str] | None = self._objects[number] if number else None
        return found

    def create_domain(self, name: bytes, out: int) -> None:
        assert name == b"anyquant"
        self.put(out, 0xD0)

    def add_op(self, domain: int, op: int) -> None:
        self.ops.append(op)

    def data(self, value: int, out: int) -> None:
        self.put(out, self._objects[value].address)

    def element_type(self, value: int, out: int) -> None:
        INT.from_address(out).value = TYPES[self._objects[value].dtype]

    def rank(self, value: int, out: int) -> None:
        SIZE.from_address(out).value = len(self._objects[value].shape)

    def sides(self, value: int, out: int, count: int) -> None:
        (LONG * count).from_address(out)[:] = self._objects[value].shape

    def attribute(self, info: int, name: bytes, out: int) -> None:
        LONG.from_address(out).value = self._objects[info]["attributes"][name.decode()]

    def constant(self, info: int, index: int, is_constant: int, out: int) -> None:
        INT.from_address(is_constant).value = 1
        self.put(out, self._objects[info]["constants"][index])

    def node_name(self, info: int, out: int, size: int) -> None:
        SIZE.from_address(size).value = 3
        if out:
            ctypes.memmove(out, b"/7\0", 3)

    def input(self, context: int, index: int, out: int) -> None:
        assert index == 0
        self.put(out, self._objects[context]["x"])

    def output(self, context: int, index: int, sides: int, rank: int, out: int) -> None:
        run = self._objects[context]
        assert tuple((LONG * rank).from_address(sides)) == run["shape"]
        self.put(out, run["y"])


class Value:
    """A tensor, in memory of the host or of the device."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.address, self.shape, self.dtype = address, shape, dtype


def slot(op: int, position: int, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of an OrtCustomOp, after its version."""
    address = ctypes.c_void_p.from_address(op + 8 * position).value
    assert address
    return ctypes.CFUNCTYPE(result, *arguments)(address)


class Operator:
    """The kernel for the device, of a library registered here."""

    def __init__(self, library: str, cuda: str) -> None:
        self.api, self.cuda = Api(), ctypes.CDLL(cuda)
        for name in ("fake_allocate", "fake_largest"):
            getattr(self.cuda, name).restype = ctypes.c_uint64
        table = ctypes.addressof(self.api.table)
        get = self.api.keep(
            ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)(lambda version: table if version == 17 else None)
        )
        base = (POINTER * 2)(ctypes.cast(get, POINTER), None)
        register = ctypes.CDLL(library).RegisterCustomOps
        register.restype = POINTER
        register.argtypes = (POINTER, POINTER)
        assert register(0x0B, ctypes.addressof(base)) is None
        named = [slot(op, 3, ctypes.c_char_p, POINTER)(op) for op in self.api.ops]
        self.providers = [name.decode() for name in named]
        self.op = self.api.ops[-1]
        self.memory = [slot(self.op, 12, INT, POINTER, SIZE)(self.op, index) for index in range(9)]

    def on_device(self, array: np.ndarray) -> int:
        address = int(self.cuda.fake_allocate(ctypes.c_size_t(max(1, array.nbytes))))
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def case(self, tensor: ir.Tensor, has_bias: bool, batches: list[tuple[int, ...]]) -> dict[str, Any]:
        spec, api, rng = tensor.spec, self.api, np.random.default_rng(0)
        assert isinstance(spec, ir.CodebookSpec)
        arrays = {**NEUTRAL, **stored_arrays(tensor)}
        bias = rng.standard_normal(spec.shape[0] if has_bias else 1).astype(np.float32) * has_bias
        constants = [np.zeros(0, np.float32), *(np.ascontiguousarray(arrays[name]) for name in STORED), bias]
        info = api.number(
            {
                "attributes": {"K": spec.shape[1], "N": spec.shape[0], "transB": 1 - spec.axis},
                "constants": [api.number(Value(a.ctypes.data, a.shape, a.dtype.name)) for a in constants],
            }
        )
        kernel = POINTER()
        create = slot(self.op, 17, POINTER, POINTER, POINTER, POINTER, POINTER)
        status = api.status(
            create(self.op, ctypes.addressof(api.table), ctypes.c_void_p(info), ctypes.addressof(kernel))
        )
        if status:
            return {"created": status}
        weight, found = ir.dequantize(tensor).astype(np.float64), {"errors": [], "statuses": [], "same": []}
        for leading in batches:
            x = rng.standard_normal((*leading, spec.shape[1])).astype(np.float32)
            shape = (*leading, spec.shape[0])
            y = np.full(shape, np.nan, np.float32)
            runs = []
            for _ in range(2):
                at_x, at_y = self.on_device(x), self.on_device(y)
                context = api.number(
                    {
                        "x": api.number(Value(at_x, x.shape, "float32")),
                        "y": api.number(Value(at_y, shape, "float32")),
                        "shape": shape,
                    }
                )
                status = api.status(slot(self.op, 18, POINTER, POINTER, POINTER)(kernel.value, context))
                result = y.copy()
                ctypes.memmove(result.ctypes.data, at_y, result.nbytes)
                packed = self.packed(at_x, at_y)
                self.cuda.fake_free(ctypes.c_uint64(at_x))
                self.cuda.fake_free(ctypes.c_uint64(at_y))
                runs.append(result)
                found["statuses"].append(status)
                if len(packed):
                    expected = pack_codebook(tensor)[1]
                    found["packed"] = bool((packed[: len(expected)] == expected).all())
            exact = x.astype(np.float64) @ weight.T + bias
            size = np.abs(x).astype(np.float64) @ np.abs(weight).T + np.abs(bias)
            if not any(found["statuses"]):
                found["errors"].append(float((np.abs(runs[0] - exact) / np.maximum(size, 1e-30)).max(initial=0)))
                found["same"].append(bool((runs[0] == runs[1]).all()))
        slot(self.op, 9, None, POINTER)(kernel.value)
        return found

    def packed(self, *but: int) -> np.ndarray:
        """What the kernel put onto the device."""
        size = SIZE()
        at = self.cuda.fake_largest(*map(ctypes.c_uint64, but), ctypes.byref(size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(at)).copy() if at else np.zeros(0, "u1")


def main() -> None:
    """Run the cases."""
    library, cuda, folder, *scenario = sys.argv[1:]
    operator = Operator(library, cuda)
    cases = CASES
    if scenario == [LARGE]:
        cases = {LARGE: (codebook_tensor((16400, 2100), 1, [1, 2]), False, [(1,)])}
    elif scenario:
        cases = {name: CASES[name] for name in scenario}
    answer = {
        "providers": operator.providers,
        "memory": operator.memory,
        "cases": {name: operator.case(*case) for name, case in cases.items()},
        "live": operator.cuda.fake_live(),
        "depth": operator.cuda.fake_depth(),
        "loaded": operator.cuda.fake_loaded(),
    }
    (Path(folder) / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
