"""Reading IR tensors back out of an ONNX folder: by what the graph computes, not by what the writer meant.

Written against the ONNX format, the definitions of MatMulNBits and GatherBlockQuantized in ONNX Runtime and those in
docs/onnx-operators.md; it shares no code with the writer. Operators on constants are evaluated with NumPy; a product
with the activations stands for its matrix [out, in], a sum of two such products for the sum of their matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.errors import AnyquantError, CorruptFileError, InputError, MissingDependency
from anyquant.exporters.onnx.codebook_reader import Stored, weights

# TensorProto.DataType; 16 is bfloat16.
_TYPES = {1: "<f4", 2: "u1", 4: "<u2", 6: "<i4", 7: "<i8", 10: "<f2", 12: "<u4", 16: "<u2"}
_MAX_PROTO = 1 << 30
_MAX_DEPTH = 16
_MAX_ZEROS = 1 << 34


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (IR tensor name, float32 values); see ``ONNXExporter.read``."""
    graph = _Graph(folder)
    for name, places in graph.tensor_map.items():
        if isinstance(places, tuple):
            yield name, np.zeros(places, np.float32)
            continue
        try:
            yield name, graph.tensor(places)
        except AnyquantError as error:
            raise CorruptFileError(f"{folder.name}/model.onnx: {name}: {error}") from None
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
            raise CorruptFileError(
                f"{folder.name}/model.onnx: {name}: its operators contradict their data: {error}"
            ) from None


class _Graph:
    """The parsed file: producers by value name, initializers as views of the data file."""

    def __init__(self, folder: Path) -> None:
        proto = _parse(folder)
        data_path = folder / "model.onnx.data"
        self._data: np.ndarray = np.empty(0, np.uint8)
        try:
            if data_path.stat().st_size:
                self._data = np.memmap(data_path, np.uint8, "r")
        except FileNotFoundError:
            raise InputError(f"{data_path.name} is missing in {folder}") from None
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._producers = {output: node for node in proto.graph.node for output in node.output if output}
        self.tensor_map = _tensor_map(proto)
        self._last: tuple[str, np.ndarray] | None = None

    def tensor(self, places: list[tuple[str, int, int, bool]]) -> np.ndarray:
        """Rows of one tensor, from the values that hold them."""
        pieces = []
        for value, start, rows, transposed in places:
            matrix = self._matrix(value)
            matrix = matrix.T if transposed else matrix
            if start + rows > (matrix.shape[0] if matrix.ndim else 1):
                raise CorruptFileError(f"rows {start} to {start + rows} of {value}, which has {matrix.shape}")
            pieces.append(matrix[start : start + rows] if matrix.ndim else matrix)
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return np.ascontiguousarray(whole, np.float32)

    def _matrix(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._evaluate(name, 0))
        return self._last[1]

    def _evaluate(self, name: str, depth: int) -> np.ndarray:
        if name in self._initializers:
            return self._stored(name)
        node = self._producers.get(name)
        if node is None or depth > _MAX_DEPTH:
            raise CorruptFileError(f"{name} is not computed from stored values")
        operator = _OPERATORS.get(node.op_type)
        if operator is None:
            raise CorruptFileError(f"{name}: operator {node.op_type!r} is not one that weights pass through")
        attributes = {a.name: a for a in node.attribute}
        inputs = list(node.input)
        return operator(lambda i: self._evaluate(inputs[i], depth + 1), inputs, attributes)

    def _stored(self, name: str) -> np.ndarray:
        tensor = self._initializers[name]
        fields = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.dtype(_TYPES[tensor.data_type])
        shape = tuple(int(n) for n in tensor.dims)
        if tensor.raw_data or 0 in shape:
            return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
        nbytes = dtype.itemsize * math.prod(shape)
        offset, length = int(fields.get("offset", "0")), int(fields.get("length", "-1"))
        if fields.get("location") != "model.onnx.data" or min(shape, default=0) < 0 or length != nbytes:
            raise CorruptFileError(f"{name}: {length} bytes at {fields.get('location')!r} for shape {list(shape)}")
        if offset < 0 or offset + nbytes > len(self._data):
            raise CorruptFileError(f"{name}: ends at byte {offset + nbytes:,}, the data file has {len(self._data):,}")
        array: np.ndarray = self._data[offset : offset + nbytes].view(dtype).reshape(shape)
        if tensor.data_type == 16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array


Get = Callable[[int], np.ndarray]


def _cast(get: Get, _: list[str], attributes: dict[str, Any]) -> np.ndarray:
    return get(0).astype(np.dtype(_TYPES[attributes["to"].i]))


def _multiply(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    product: np.ndarray = get(0) * get(1)
    return product


def _add(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    left, right = get(0), get(1)
    if left.shape != right.shape:
        raise CorruptFileError(f"a sum of matrices {left.shape} and {right.shape}")
    total: np.ndarray = left + right
    return total


def _gather(get: Get, inputs: list[str], attributes: dict[str, Any]) -> np.ndarray:
    """A table look-up by stored indices; or an embedding, whose matrix is the table itself."""
    table = get(0)
    if table.ndim == 2:
        return table
    return table[get(1)]


def _constant_of_shape(get: Get, _: list[str], attributes: dict[str, Any]) -> np.ndarray:
    value = attributes["value"].t
    if value.data_type != 2 or bytes(value.raw_data) != b"\0":
        raise CorruptFileError("ConstantOfShape of another value than the byte 0")
    shape = tuple(int(n) for n in get(0))
    if math.prod(shape) > _MAX_ZEROS:
        raise CorruptFileError(f"a constant of shape {shape}")
    return np.zeros(shape, np.uint8)


def _reshape(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    return get(0).reshape([int(n) for n in get(1)])


def _transpose(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    return get(0).T


def _slice(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    start, stop, axis = (int(get(i)[0]) for i in (1, 2, 3))
    if axis != -1:
        raise CorruptFileError(f"a slice along axis {axis}")
    return get(0)[:, start:stop]


def _matmul(get: Get, _: list[str], __: dict[str, Any]) -> np.ndarray:
    return get(1).T


def _matmul_nbits(get: Get, inputs: list[str], attributes: dict[str, Any]) -> np.ndarray:
    columns, rows = attributes["K"].i, attributes["N"].i
    zero = get(3) if len(inputs) > 3 and inputs[3] else None
    matrix = _blocks(get(1), get(2), zero, rows, attributes)
    if matrix.shape[1] < columns:
        raise CorruptFileError(f"K is {columns}, the blocks hold {matrix.shape[1]}")
    return matrix[:, :columns]


def _gather_blocks(get: Get, inputs: list[str], attributes: dict[str, Any]) -> np.ndarray:
    zero = get(3) if len(inputs) > 3 and inputs[3] else None
    data = get(0)
    return _blocks(data, get(2), zero, data.shape[0], attributes)


def _blocks(
    data: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, rows: int, attributes: dict[str, Any]
) -> np.ndarray:
    """(q - zero) * scale, q unsigned of 4 or 8 bits, low bits first; zero 2**(bits - 1) unless given."""
    bits, block = attributes["bits"].i, attributes["block_size"].i
    if bits not in (4, 8) or block not in (16, 32, 64, 128, 256) or data.dtype != np.uint8:
        raise CorruptFileError(f"blocks of {block} with {bits} bits in {data.dtype}")
    q = _unpack(data.reshape(rows, -1), bits).reshape(rows, -1, block)
    scale = scale.reshape(rows, q.shape[1]).astype(np.float32)
    points: np.ndarray = np.full((1, 1), 1 << (bits - 1), np.uint8)
    if zero is not None:
        points = _unpack(zero.reshape(rows, -1), bits)[:, : q.shape[1]]
    values: np.ndarray = (q.astype(np.float32) - points[:, :, None].astype(np.float32)) * scale[:, :, None]
    return values.reshape(rows, -1)


def _codebook_matmul(get: Get, _: list[str], attributes: dict[str, Any]) -> np.ndarray:
    by_output = attributes["transB"].i
    if by_output not in (0, 1):
        raise CorruptFileError(f"transB is {by_output}")
    outputs, inputs, bias = attributes["N"].i, attributes["K"].i, get(8)
    if bias.dtype != np.float32 or bias.shape != (1,) or bias[0] != 0:
        raise CorruptFileError("its bias is not the zero that 'anyquant export onnx' writes")
    return weights(Stored(*(get(i) for i in range(1, 8))), outputs, inputs, by_output=bool(by_output))


def _codebook_gather(get: Get, _: list[str], attributes: dict[str, Any]) -> np.ndarray:
    stored = Stored(*(get(i) for i in range(1, 8)))
    return weights(stored, len(stored.bits), attributes["K"].i, by_output=True)


def _unpack(data: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


_OPERATORS: dict[str, Callable[[Get, list[str], dict[str, Any]], np.ndarray]] = {
    "Add": _add,
    "Cast": _cast,
    "CodebookGather": _codebook_gather,
    "CodebookMatMul": _codebook_matmul,
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherBlockQuantized": _gather_blocks,
    "MatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "Mul": _multiply,
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": _transpose,
}


def _parse(folder: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise MissingDependency("onnx", "onnx", "Reading ONNX files") from None
    path = folder / "model.onnx"
    if not path.is_file():
        raise InputError(f"{path} is missing: not a folder that 'anyquant export onnx' wrote")
    if path.stat().st_size > _MAX_PROTO:
        raise CorruptFileError(f"{path} has {path.stat().st_size:,} bytes, more than any graph of ours")
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise CorruptFileError(f"{path} is not an ONNX model: {error}") from None


def _tensor_map(proto: Any) -> dict[str, list[tuple[str, int, int, bool]] | tuple[int, ...]]:
    """Name -> places in the graph; or a shape, for zeros that the graph goes without."""
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if "anyquant.tensors" not in properties:
        raise InputError("model.onnx has no anyquant.tensors: not a file that 'anyquant export onnx' wrote")
    try:
        value = json.loads(properties["anyquant.tensors"])
        return {
            str(name): _zeros(places) if isinstance(places, dict) else [_place(place) for place in places]
            for name, places in value.items()
            if places or _empty(name)
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"model.onnx: anyquant.tensors is malformed: {error}") from None


def _empty(name: str) -> bool:
    raise ValueError(f"{name} is nowhere")


def _zeros(entry: dict[str, Any]) -> tuple[int, ...]:
    shape = entry.get("zeros")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) > _MAX_ZEROS:
        raise ValueError(f"{entry!r:.80} is not the shape of zeros")
    return tuple(shape)


def _place(place: Any) -> tuple[str, int, int, bool]:
    value, start, rows, transposed = place
    ok = isinstance(value, str) and type(start) is int and type(rows) is int and isinstance(transposed, bool)
    if not ok or start < 0 or rows < 0:
        raise ValueError(f"{place!r:.80} is not [value, first row, rows, transposed]")
    return value, start, rows, transposed
