"""From an IR and a float graph to the exact bytes of model.onnx and the list of what model.onnx.data holds.

``check`` runs this on a graph without values, ``export`` on one with them; they differ in nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import onnx
import onnx_ir as oir

import anyquant
from anyquant import ir
from anyquant.exporters.onnx import layout
from anyquant.exporters.onnx.binding import Binding, Part, bind
from anyquant.exporters.onnx.graph_source import GraphSource, checkpoint_bytes
from anyquant.exporters.onnx.rewrite import DATA_FILE, Item, Rewriter, place, serialize, tensor_shape, uses_of
from anyquant.exporters.protocol import ExportOptions, ExportPlan, Refusal

MODEL_FILE = "model.onnx"
MAP_KEY = "anyquant.tensors"
_BUILDER_MEMORY = 900 << 20  # the builder process without a model: torch, transformers, the graph

Place = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """Everything that is to be written.

    Attributes:
        proto: the bytes of model.onnx.
        items: the initializers in the order of the data file.
        offsets: where each lies.
        bindings: what must be proven by value.
        integers: initializers that are stored as integers, which are proven while they are written.
        source_places: initializer of the float graph -> (offset, bytes) in its data file.
        plan: the plan.
    """

    proto: bytes
    items: list[Item]
    offsets: list[int]
    bindings: dict[str, Binding]
    integers: dict[str, Binding]
    source_places: dict[str, Place]
    plan: ExportPlan


def prepare(model: ir.Model, options: ExportOptions, source: GraphSource, refusals: Sequence[Refusal] = ()) -> Job:
    """Bind, decide, rewrite and serialize; ``refusals`` are passed on to the plan."""
    proto = onnx.load_model_from_string(source.proto)
    places = _places(proto)
    graph = oir.from_proto(proto)
    _settle_cache_shapes(graph, _head_size(model))
    bindings = _bindings(model, graph, source)
    stored: dict[str, layout.Stored] = {}
    rewriter = Rewriter(graph, options.accuracy_level)
    held: list[tuple[tuple[Part, ...], str, bool]] = []
    for name, binding in bindings.items():
        value = graph.graph.initializers[name]
        if value.shape is None or len(value.shape) < 2 or len(model.entries[binding.parts[0].tensor].spec.shape) != 2:
            held.append((binding.parts, name, binding.transposed))
            continue
        uses = uses_of(value, transposed=binding.transposed)
        if uses is None:
            stored[name] = layout.plain(model, binding)
        else:
            stored[name] = layout.arrange(model, binding, options, mixed=not uses.gathers)
        if uses is None or stored[name].is_plain:
            held.append((binding.parts, name, binding.transposed))
        else:
            rewriter.replace(stored[name], uses)
    held += [(group.parts, value, transposed) for group, value, transposed in rewriter.held]
    items = rewriter.items()
    offsets, data_bytes = place(items)
    graph.producer_name, graph.producer_version = "anyquant", anyquant.__version__
    tensor_map = _map(model, held)
    written = serialize(graph, items, _metadata(model, options, tensor_map))
    plan = ExportPlan(
        layout=options.layout,
        files={MODEL_FILE: len(written), DATA_FILE: data_bytes},
        types=_types(model, stored, tensor_map),
        refusals=tuple(refusals),
        notes=tuple(_notes(model, stored, options, tensor_map)),
        temporary_disk=checkpoint_bytes(model) + sum(length for _, length in places.values()),
        peak_memory=2 * checkpoint_bytes(model) + _BUILDER_MEMORY,
    )
    integers = {name: b for name, b in bindings.items() if name in stored and any(g.form for g in stored[name].groups)}
    return Job(written, items, offsets, bindings, integers, places, plan)


def _places(proto: onnx.ModelProto) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for tensor in proto.graph.initializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        places[tensor.name] = (int(fields.get("offset", 0)), int(fields.get("length", 0)))
    return places


def _head_size(model: ir.Model) -> int:
    """Columns of an attention head, 0 if the config does not tell."""
    hidden, heads = model.config.get("hidden_size"), model.config.get("num_attention_heads")
    known = model.config.get("head_dim") or (hidden // heads if hidden and heads else 0)
    return int(known)


def _settle_cache_shapes(graph: oir.Model, head: int) -> None:
    """Give the last axis of past and present keys and values its number: clients take a symbol there for 0."""
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        cache = (value.name or "").startswith(("past_key_values.", "present."))
        if cache and head and value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int):
            value.shape = oir.Shape([*value.shape[:3], head])


def _bindings(model: ir.Model, graph: oir.Model, source: GraphSource) -> dict[str, Binding]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in graph.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == oir.DataType.FLOAT:
            shapes[name] = tensor_shape(value.const_value)
    tensors = {name: entry.spec.shape for name, entry in model.entries.items()}
    bindings = bind(shapes, tensors, model.aliases)
    if source.norm_offset:
        # The graph holds 1 + w, from which w cannot be had back exactly.
        bindings = {name: b for name, b in bindings.items() if not (len(shapes[name]) == 1 and "norm" in name)}
    return bindings


TensorMap = dict[str, list[tuple[str, int, int, bool]]]


def _map(model: ir.Model, held: list[tuple[tuple[Part, ...], str, bool]]) -> TensorMap:
    """IR name -> where its rows are: (value name, first row there, number of rows, transposed), in row order."""
    found: dict[str, dict[int, tuple[str, int, int, bool]]] = {}
    for parts, value, transposed in held:
        row = 0
        for part in parts:
            found.setdefault(part.tensor, {}).setdefault(part.start, (value, row, part.rows, transposed))
            row += part.rows
    complete: TensorMap = {}
    for name, entry in model.entries.items():
        places = [place for _, place in sorted(found.get(name, {}).items())]
        if places and sum(rows for _, _, rows, _ in places) == (entry.spec.shape[0] if entry.spec.shape else 1):
            complete[name] = places
    return complete


def _metadata(model: ir.Model, options: ExportOptions, tensor_map: TensorMap) -> dict[str, str]:
    values = {
        "anyquant.version": anyquant.__version__,
        "anyquant.method": model.method,
        "anyquant.layout": options.layout,
        "anyquant.source": str(model.source.get("fingerprint", "")),
        "anyquant.graph_source": f"onnxruntime-genai {metadata.version('onnxruntime-genai')}",
        MAP_KEY: json.dumps(tensor_map, separators=(",", ":")),
    }
    if options.layout == "f16" and options.allow_rounding:
        values["anyquant.rounding_allowed"] = "true"
    return values


def _types(model: ir.Model, stored: dict[str, layout.Stored], tensor_map: TensorMap) -> dict[str, str]:
    types = {name: "F32" if name in tensor_map else "F32, inside the graph" for name in model.entries}
    for matrix in stored.values():
        for group in matrix.groups:
            for part in group.parts:
                types[part.tensor] = group.label
    return types


def _notes(
    model: ir.Model, stored: dict[str, layout.Stored], options: ExportOptions, tensor_map: TensorMap
) -> list[str]:
    notes = layout.notes_on(model, stored, options)
    missing = [name for name in model.entries if name not in tensor_map]
    if missing:
        notes.append(
            f"{len(missing)} tensors, {missing[0]} the first, are in the graph in a changed form, as floats, and "
            "cannot be read back from it."
        )
    head = _head_size(model)
    if head % 16:
        notes.append(
            f"Heads have {head} columns; the attention operator of ONNX Runtime's CPU provider takes multiples of 16 "
            "only, so this model may not run."
        )
    notes.append(
        "Made for ONNX Runtime 1.31 (opset 22, com.microsoft operators); older ones are untested. Tokenizer files and "
        "genai_config.json, written beside the model, are not counted."
    )
    return notes
