"""Reading a GGUF file back into IR names, order and FP32 values.

gguf-py's reader finds the tensors, and its reference functions dequantize those of stock types, so none of that
encoding is ours; types of our own, of which it knows nothing, are decoded by :mod:`anyquant.exporters.gguf.custom`.
Names and the order of rows follow from the file's metadata by the same table that the writer uses, which the tests
compare with llama.cpp's own converter. Our parser only checks beforehand that no count or offset leads outside the
file, and that the tensors fill it, which gguf-py takes on trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.checkpoint.gguf_names import (
    ROPE_TENSORS,
    gguf_to_hf_name,
    head_dim,
    inverse_permutation,
    norm_offset,
    row_permutation,
    rows_by_heads,
)
from anyquant.errors import CorruptFileError, MissingDependency, UnknownArchitecture
from anyquant.exporters.gguf import container, custom
from anyquant.exporters.gguf.metadata import NAMES_KEY
from anyquant.gguf_container import Header, StoredTensor, map_file, padded, parse


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (IR name, float32 values [out, in]) of every tensor of the checkpoint, in the file's order.

    Raises:
        InputError: missing, not GGUF, or with types that are not supported.
        CorruptFileError: truncated or damaged.
        UnknownArchitecture: names of this family are not known.
        MissingDependency: gguf is not installed.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise MissingDependency("gguf", "gguf", "reading a GGUF file") from None
    header = parse(map_file(path), path.name)
    _require_no_gaps(header, header.stored(container.TYPES))
    architecture = header.get("general.architecture", str, "")
    config = _heads(header, architecture)
    names = _names(header, path)
    custom.register()
    try:
        tensors = GGUFReader(path).tensors
    except Exception as error:  # it raises whatever NumPy does on odd bytes
        raise CorruptFileError(f"{path.name}: gguf-py cannot read it: {type(error).__name__}: {error}") from error
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in ROPE_TENSORS:
            continue
        name = names.get(tensor.name) or gguf_to_hf_name(architecture, tensor.name)
        if name is None:
            raise UnknownArchitecture(
                f"{path.name}: tensor {tensor.name!r:.80} of architecture {architecture!r:.40} has no known name in "
                "Hugging Face's checkpoints"
            )
        if name in seen:
            raise CorruptFileError(f"{path.name}: {tensor.name!r:.80} and {seen[name]!r:.80} are both {name!r:.80}")
        seen[name] = tensor.name
        if int(tensor.tensor_type) in custom.NUMBERS:
            shape = tuple(int(side) for side in reversed(tensor.shape))
            values = ir.dequantize(custom.decode(tensor.name, shape, tensor.data.reshape(-1)))
        else:
            with np.errstate(all="ignore"):  # scales may be anything
                values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        yield name, _in_ir_order(values, name, architecture, config, path)


def _require_no_gaps(header: Header, stored: Mapping[str, StoredTensor]) -> None:
    """Check that tensors lie one after the other, to the end, as in llama.cpp: most false shapes and types leave gaps.

    Raises:
        CorruptFileError: bytes belong to none.
    """
    end = header.data_start
    for name, tensor in stored.items():
        if tensor.offset != end:
            raise CorruptFileError(
                f"{header.name}: {name!r:.80} begins at byte {tensor.offset}, the tensors before end at {end}"
            )
        end = padded(tensor.offset + tensor.nbytes, header.alignment)
    if header.size > end:
        raise CorruptFileError(f"{header.name}: the tensors end at byte {end}, the file at {header.size}")


def _in_ir_order(values: np.ndarray, name: str, architecture: str, config: Mapping[str, Any], path: Path) -> np.ndarray:
    try:
        rows = rows_by_heads(architecture, name, config)
    except CorruptFileError as error:
        raise CorruptFileError(f"{path.name}: head counts are missing or odd in the metadata: {error}") from None
    if rows is not None and rows != len(values):
        raise CorruptFileError(f"{path.name}: {name} has {len(values)} rows, but the heads in the metadata make {rows}")
    # llama.cpp insists on this, too; else other heads of as many rows would go unnoticed.
    if rows is not None and config.get("rotary_dim", head_dim(config)) != head_dim(config):
        raise CorruptFileError(
            f"{path.name}: a head has {head_dim(config)} rows by the metadata, and rotates {config['rotary_dim']!r:.40}"
        )
    order = row_permutation(architecture, name, config)
    if order is not None:
        values = values[inverse_permutation(order)]
    offset = norm_offset(architecture, name)
    if offset:
        values = values - np.float32(offset)
    return np.ascontiguousarray(values)


def _heads(header: Header, architecture: str) -> dict[str, Any]:
    """The sizes that the order of q and k rows depends on, under the names of config.json."""
    keys = {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "hidden_size": "embedding_length",
        "rotary_dim": "rope.dimension_count",
    }
    found = {name: header.get(f"{architecture}.{key}") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _names(header: Header, path: Path) -> dict[str, str]:
    text = header.get(NAMES_KEY)
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise CorruptFileError(f"{path.name}: {NAMES_KEY} is not a JSON object of names")
    return names
