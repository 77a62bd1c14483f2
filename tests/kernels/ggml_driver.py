"""A process with a ggml that the plug-in is put into: its tables before and after, and what its functions make of rows.

python ggml_driver.py FOLDER PLUGIN LIBRARY...

FOLDER holds request.json and blobs.bin, and gets answer.json and answer.npz. Registering changes the tables of the
process, hence one of its own. request.json:

    occupied    a number of a type whose entry is taken before the plug-in comes
    threads     so many threads do all steps at once, each in another order
    arena       bytes of the memory that some steps share
    split       whether the first page of memory gets other settings, so that the kernel lists it apart
    steps       [{number, rows, columns, bytes, at}]: a tensor of the next so many bytes of blobs.bin, in memory of its
                own, which ends just before a page that nobody may touch, or, when its turn comes, in the arena at "at"
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

TYPES = 43
SENTINEL = 12345.0  # where nothing may be written
PAD = 8  # floats after a row of results or of activations
_LONG, _SIZE, _POINTER, _INT = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_ROW = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _LONG)
_DOT = ctypes.CFUNCTYPE(None, _INT, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _INT)


class TypeTraits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", _LONG),
        ("interleaved", _LONG),
        ("bytes", _SIZE),
        ("quantized", ctypes.c_bool),
        ("to_float", _POINTER),
        ("from_float", _POINTER),
    )


class CpuTraits(ctypes.Structure):
    _fields_ = (("from_float", _POINTER), ("vec_dot", _POINTER), ("activations", _INT), ("rows", _LONG))


class Host:
    """The two tables of the ggml in this process."""

    def __init__(self, libraries: list[str]) -> None:
        self._kept = [ctypes.CDLL(path) for path in libraries]
        self.traits = self._function("ggml_get_type_traits", TypeTraits)
        self.cpu = self._function("ggml_get_type_traits_cpu", CpuTraits)

    def _function(self, name: str, kind: type[ctypes.Structure]) -> Any:
        function = next(getattr(library, name) for library in self._kept if hasattr(library, name))
        function.restype, function.argtypes = ctypes.POINTER(kind), [_INT]
        return function

    def tables(self) -> list[dict[str, Any]]:
        found = []
        for number in range(TYPES):
            traits, cpu = self.traits(number).contents, self.cpu(number).contents
            entry = {field: getattr(traits, field) for field, _ in TypeTraits._fields_}
            entry |= {f"cpu_{field}": getattr(cpu, field) for field, _ in CpuTraits._fields_}
            entry["name"] = (entry["name"] or b"").decode()
            found.append(entry)
        return found

    def rights(self) -> list[str]:
        """Of the memory that the tables are in."""
        places = [ctypes.addressof(table(number).contents) for table in (self.traits, self.cpu) for number in (0, 38)]
        found = {}
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.update({place: line.split()[1] for place in places if begin <= place < end})
        return [found[place] for place in places]


_mapped: list[Any] = []  # kept, so that no address comes twice
_libc = ctypes.CDLL(None)


def _guarded(size: int, split: bool = False) -> int:
    """Address of new memory that ends at a page without rights, but for what aligns its beginning to 32 bytes."""
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    if split:
        memory.madvise(mmap.MADV_DONTDUMP, 0, mmap.PAGESIZE)
    _mapped.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(_POINTER(begin + length), _SIZE(mmap.PAGESIZE), 0) == 0
    return begin + (length - size) // 32 * 32


def activations(columns: int) -> np.ndarray:
    """Two rows, with what nobody may read after them."""
    x = np.full((2, columns + PAD), np.nan, np.float32)
    x[:, :columns] = np.random.default_rng(columns).standard_normal((2, columns))
    return x


def compute(host: Host, step: dict[str, Any], begin: int) -> dict[str, np.ndarray]:
    """Every row: its values, its products with one row of activations, and of pairs of rows with two."""
    rows, columns, number = step["rows"], step["columns"], step["number"]
    stride = columns // 32 * host.traits(number).contents.bytes
    to_float, vec_dot = _ROW(host.traits(number).contents.to_float), _DOT(host.cpu(number).contents.vec_dot)
    x = activations(columns)
    values = np.full((rows, columns + PAD), SENTINEL, np.float32)
    single = np.full((rows, 4), SENTINEL, np.float32)
    apart = min(3, rows - 1)
    pairs = np.full((rows - apart, 2, 16), SENTINEL, np.float32)
    for row in range(rows):
        at = begin + row * stride
        vec_dot(columns, single[row].ctypes.data, 0, at, 0, x.ctypes.data, 0, 1)
        to_float(at, values[row].ctypes.data, columns)
        if row < len(pairs):
            vec_dot(columns, pairs[row].ctypes.data, 16, at, apart * stride, x.ctypes.data, x.strides[0], 2)
    return {"values": values, "single": single, "pairs": pairs}


def do_steps(host: Host, request: dict[str, Any], blobs: bytes) -> dict[str, np.ndarray]:
    """Results by "thread/step/what"."""
    steps, arena, offset, places = request["steps"], _guarded(request.get("arena", 1)), 0, []
    for step in steps:
        step["blob"] = blobs[offset : offset + step["bytes"]]
        offset += step["bytes"]
        places.append(
            _guarded(step["bytes"], request.get("split", False)) if step.get("at") is None else arena + step["at"]
        )
        if step.get("at") is None:
            ctypes.memmove(places[-1], step["blob"], step["bytes"])
    threads, answer = request.get("threads", 1), {}
    together = threading.Barrier(threads)

    def work(thread: int) -> None:
        together.wait()
        for i in range(len(steps)):
            i = (i + thread) % len(steps)
            if steps[i].get("at") is not None:
                ctypes.memmove(places[i], steps[i]["blob"], steps[i]["bytes"])
            for name, array in compute(host, steps[i], places[i]).items():
                answer[f"{thread}/{i}/{name}"] = array

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return answer


def main(folder: Path, plugin_path: str, libraries: list[str]) -> None:
    request = json.loads((folder / "request.json").read_text())
    host, plugin = Host(libraries), ctypes.CDLL(plugin_path)
    plugin.anyquant_ggml_message.restype = ctypes.c_char_p
    plugin.ggml_backend_init.restype = _POINTER
    if "occupied" in request:
        entry = host.cpu(request["occupied"])
        page = ctypes.addressof(entry.contents) // mmap.PAGESIZE * mmap.PAGESIZE
        assert _libc.mprotect(_POINTER(page), _SIZE(2 * mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
        entry.contents.vec_dot = host.cpu(0).contents.vec_dot
    answer: dict[str, Any] = {"before": host.tables(), "rights before": host.rights()}
    answer["registered"] = [plugin.anyquant_ggml_register(), plugin.anyquant_ggml_register()]
    answer["backend"] = plugin.ggml_backend_init()
    answer |= {"after": host.tables(), "rights after": host.rights()}
    answer["message"] = plugin.anyquant_ggml_message().decode()
    results = do_steps(host, request, (folder / "blobs.bin").read_bytes())
    np.savez(folder / "answer.npz", **results)  # type: ignore[arg-type]  # its other argument is a switch
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
