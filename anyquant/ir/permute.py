"""The same matrix with its rows in another order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyquant.ir.packing import code_offsets, entry_offsets, pack, unpack
from anyquant.ir.spec import CodebookSpec
from anyquant.ir.tensor import Tensor


def with_rows(tensor: Tensor, order: NDArray[np.int64]) -> Tensor:
    """The tensor whose row i is row ``order[i]`` of this one, in the same kind and as many bytes.

    Args:
        tensor: of any kind of matrix.
        order: int64 [out], each row once.
    """
    spec, arrays = tensor.spec, tensor.arrays
    if not isinstance(spec, CodebookSpec):
        # All arrays of the other kinds begin with the rows.
        return Tensor(spec, {name: np.ascontiguousarray(array[order]) for name, array in arrays.items()})
    changed = dict(arrays)
    if spec.axis == 0:
        changed[".bits"] = arrays[".bits"][order]
        for name, offsets in (
            (".codes", code_offsets(arrays[".bits"], spec.shape[1])),
            (".codebook", entry_offsets(arrays[".bits"])),
        ):
            changed[name] = np.concatenate([arrays[name][offsets[row] : offsets[row + 1]] for row in order])
    else:
        streams, offsets = [], code_offsets(arrays[".bits"], spec.shape[0])
        for column, bits in enumerate(arrays[".bits"].tolist()):
            stream = arrays[".codes"][None, offsets[column] : offsets[column + 1]]
            streams.append(pack(np.ascontiguousarray(unpack(stream, spec.shape[0], bits)[:, order]), bits)[0])
        changed[".codes"] = np.concatenate(streams)
    if spec.outliers:
        starts = arrays[".outlier_indptr"].astype(np.int64)
        counts = np.diff(starts)[order]
        changed[".outlier_indptr"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
        taken = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in order])
        for name in (".outlier_index", ".outlier_value"):
            changed[name] = arrays[name][taken]
    return Tensor(spec, changed)
