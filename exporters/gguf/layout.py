"""How each tensor of a model is stored in the file: decided once, for the plan and for the export."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anyquant import ir
from anyquant.checkpoint.gguf_names import (
    gguf_to_hf_name,
    hf_to_gguf_name,
    norm_offset,
    row_permutation,
    rows_by_heads,
)
from anyquant.exporters.gguf import container, custom, stock
from anyquant.exporters.gguf.metadata import Metadata
from anyquant.exporters.protocol import ExportOptions, Refusal

_FLOAT = "use --layout f32, which holds every value"
_HALF = "use --layout f16, which holds every value of a codebook"
_ROUND = "use --layout f32, or accept rounding with --allow-rounding"
# llama.cpp looks rows up in these, which it cannot in types of ours.
_LOOKED_UP = ("token_embd.weight", "position_embd.weight", "token_types.weight")
# It computes with these in FP32 only.
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "token_types.weight", "ffn_gate_inp.weight")


@dataclass(frozen=True)
class Piece:
    """One tensor of the file.

    Attributes:
        name: of the IR's tensor.
        gguf: its name in the file.
        type: ggml type, as in ``container.TYPE_IDS``.
        shape: in NumPy's order.
        order: rows of the file in terms of the IR's (llama's q and k), or None.
        offset: what the file adds to the values (Gemma's norms).
    """

    name: str
    gguf: str
    type: str
    shape: tuple[int, ...]
    order: np.ndarray | None = None
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of data, padding not counted."""
        return container.nbytes(self.type, self.shape)


@dataclass(frozen=True)
class Layout:
    """All tensors of a file, in order, and those that do not fit.

    Attributes:
        pieces: what will be written.
        refusals: what cannot be.
        names: GGUF name -> IR name where the reader could not derive it (checkpoints without the usual prefix).
        assumed: how many tensors' types were judged without their values.
    """

    pieces: tuple[Piece, ...]
    refusals: tuple[Refusal, ...]
    names: dict[str, str]
    assumed: int


def arrange(model: ir.Model, base: Metadata, options: ExportOptions, examine: bool) -> Layout:
    """Decide name, type and order of every tensor; reads values only where the decision depends on them.

    Args:
        model: the model.
        base: what comes beside its tensors.
        options: of the export.
        examine: False takes matrices to fit the type made for their width, as nearly all do; writing one that does
            not raises ``stock.NotExact``.

    Raises:
        CorruptFileError: the heads in config.json are missing or odd.
    """
    pieces: list[Piece] = []
    refusals: list[Refusal] = []
    assumed = 0
    taken = {name: "the model's metadata" for name, *_ in base.tensors}
    for name, entry in model.entries.items():
        try:
            piece = _piece(model, name, base.architecture, options, examine and model.has_values)
        except _Misfit as error:
            refusals.append(Refusal(name, str(error), error.remedy))
            continue
        except stock.NotExact as error:
            refusals.append(Refusal(name, str(error), _remedy(entry.spec, options)))
            continue
        if piece.gguf in taken:
            reason = f"{piece.gguf} would be written twice, also for {taken[piece.gguf]}"
            refusals.append(Refusal(name, reason, "check the source checkpoint for a tensor under two names"))
            continue
        taken[piece.gguf] = name
        assumed += not model.has_values and _depends_on_values(entry.spec, options)
        pieces.append(piece)
    names = {p.gguf: p.name for p in pieces if gguf_to_hf_name(base.architecture, p.gguf) != p.name}
    return Layout(tuple(pieces), tuple(refusals), names, assumed)


class _Misfit(Exception):
    """A tensor that has no place in the file, whatever its values."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def _piece(model: ir.Model, name: str, architecture: str, options: ExportOptions, examine: bool) -> Piece:
    spec = model.entries[name].spec
    gguf = hf_to_gguf_name(architecture, name)
    if gguf is None:
        raise _Misfit(
            f"no GGUF name is known for it in architecture {architecture}",
            "export to ONNX, which takes any architecture",
        )
    rows = rows_by_heads(architecture, name, model.config)
    if rows is not None and spec.shape[:1] != (rows,):
        raise _Misfit(
            f"has shape {list(spec.shape)}, but the heads in config.json make {rows} rows",
            "check num_attention_heads, num_key_value_heads and head_dim in config.json",
        )
    offset = norm_offset(architecture, name)
    order = row_permutation(architecture, name, model.config)
    return Piece(name, gguf, _type(model, name, gguf, offset, options, examine), spec.shape, order, offset)


def _remedy(spec: ir.Spec, options: ExportOptions) -> str:
    if isinstance(spec, ir.DenseSpec) or options.layout == "f16":
        return _ROUND
    if isinstance(spec, ir.CodebookSpec) or (isinstance(spec, ir.BlockSpec) and spec.format != "bfp"):
        fitting = _HALF if _is_half(spec) else _FLOAT
        return f"{fitting}, or quantize with --method block and its format bfp, which stock types hold exactly"
    if isinstance(spec, ir.BlockSpec) and spec.block == 16:
        return f"{_FLOAT}, or quantize with --block 32, the length that shares a scale in stock types"
    if isinstance(spec, ir.AffineSpec) and spec.shape[1] % 32 == 0:
        return f"{_FLOAT}, or quantize with --set blocks=32 (or more) --set symmetric=yes, which stock types hold"
    return _FLOAT


def _depends_on_values(spec: ir.Spec, options: ExportOptions) -> bool:
    if isinstance(spec, ir.DenseSpec):
        return spec.dtype == "F64"
    return not isinstance(spec, ir.GGMLSpec) and options.layout != "f32" and not _is_half(spec)


def _is_half(spec: ir.Spec) -> bool:
    """Whether every value is an FP16, whatever it is: entries of codebooks and outliers are."""
    return isinstance(spec, ir.CodebookSpec) and not spec.input_scale


def _type(model: ir.Model, name: str, gguf: str, offset: float, options: ExportOptions, examine: bool) -> str:
    """The ggml type of one tensor.

    Raises:
        NotExact: the layout cannot hold it.
    """
    spec = model.entries[name].spec
    if isinstance(spec, ir.DenseSpec):
        return _dense_type(model, name, gguf, offset, options)
    if isinstance(spec, ir.GGMLSpec):
        return spec.type
    if options.layout == "f32":
        return "F32"
    if options.layout == "f16":
        if examine:
            _require_f16(model.tensor(name), options)
        return "F16"
    if isinstance(spec, ir.CodebookSpec):
        return _own_type(spec, gguf, "no stock type has a codebook per row or column")
    try:
        if model.has_values and (examine or not stock.expects_first(spec)):
            return stock.choose(model.tensor(name))
        return stock.expected_type(spec, symmetric=model.settings.get("symmetric") is True)
    except stock.NotExact as error:
        return _own_type(spec, gguf, str(error))


def _own_type(spec: custom.Held, gguf: str, why: str) -> str:
    """The type of ours that holds a tensor; FP16 or FP32 where llama.cpp looks rows up, as it cannot in ours.

    Raises:
        NotExact: none does.
    """
    if gguf in _LOOKED_UP:
        return "F16" if _is_half(spec) else "F32"
    found = custom.type_for(spec)
    if found is None:
        columns = spec.shape[1]
        if columns % custom.BLOCK:
            problem = f"rows of {columns} are not whole blocks of {custom.BLOCK}, as all types of ggml have them"
        else:
            problem = f"its {spec.nbytes:,} bytes and a header are more than the largest type of ours has for it"
        raise stock.NotExact(f"{why}, and {problem}")
    return found


def _dense_type(model: ir.Model, name: str, gguf: str, offset: float, options: ExportOptions) -> str:
    spec = model.entries[name].spec
    assert isinstance(spec, ir.DenseSpec)
    if spec.dtype == "F64" and model.has_values:
        stored = model.tensor(name).arrays[".dense"]
        lost = int((stored.astype(np.float32) != stored).sum())
        if lost and not options.allow_rounding:
            raise stock.NotExact(f"{lost} of its F64 values are not exactly an F32")
    if offset and model.has_values:
        values = model.dequantize(name)
        lost = int((values + np.float32(offset) - np.float32(offset) != values).sum())
        if lost and not options.allow_rounding:
            raise stock.NotExact(f"llama.cpp stores it plus {offset:g}, where {lost} of its values would be rounded")
    if spec.dtype == "F64" or offset or len(spec.shape) < 2 or gguf.endswith(_ALWAYS_F32):
        return "F32"
    return spec.dtype


def _require_f16(tensor: ir.Tensor, options: ExportOptions) -> None:
    """Check that every value is an FP16, or at least within its range where rounding is allowed."""
    lost = over = 0
    for rows in chunks(tensor.spec):
        values = ir.dequantize(tensor, rows)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16).astype(np.float32)
        over += int(np.isinf(half).sum())
        lost += int((half != values).sum())
    if over:
        raise stock.NotExact(f"{over} of its values are beyond 65504, the largest FP16")
    if lost and not options.allow_rounding:
        raise stock.NotExact(f"{lost} of its {tensor.spec.numel} values are not exactly an FP16")


def chunks(spec: ir.Spec) -> list[slice]:
    """Row slices to process one after another; one for column codebooks, which any slice decodes in full."""
    if isinstance(spec, ir.CodebookSpec) and spec.axis == 1:
        return [slice(None)]
    return list(ir.row_chunks(spec.shape))
