"""From an IR and a float graph to the exact bytes of model.onnx and the list of what model.onnx.data holds.

``check`` runs this on a graph without values, ``export`` on one with them; they differ in nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

import onnx
import onnx_ir as oir

import anyquant
from anyquant import ir
from anyquant.exporters.onnx import layout
from anyquant.exporters.onnx.binding import Binding, Part, bind, left_out
from anyquant.exporters.onnx.editing import DATA_FILE, Item, place, serialize, tensor_shape
from anyquant.exporters.onnx.functions import MATMUL
from anyquant.exporters.onnx.graph_source import GraphSource, checkpoint_bytes, head_size, temporary_disk
from anyquant.exporters.onnx.matmul_nbits import Form
from anyquant.exporters.onnx.rewrite import Rewriter, uses_of
from anyquant.exporters.protocol import ExportOptions, ExportPlan, Refusal
from anyquant.runtime.onnx_session import LIBRARY, operators

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
        integers: parts that are stored as integers, which are proven while they are written.
        source_places: initializer of the float graph -> (offset, bytes) in its data file.
        plan: the plan.
    """

    proto: bytes
    items: list[Item]
    offsets: list[int]
    bindings: dict[str, Binding]
    integers: frozenset[Part]
    source_places: dict[str, Place]
    plan: ExportPlan


def prepare(model: ir.Model, options: ExportOptions, source: GraphSource, refusals: Sequence[Refusal] = ()) -> Job:
    """Bind, decide, rewrite and serialize; ``refusals`` are passed on to the plan."""
    proto = onnx.load_model_from_string(source.proto)
    places = _places(proto)
    graph = oir.from_proto(proto)
    _settle_cache_shapes(graph, head_size(model))
    bindings, unbound = _bindings(model, graph, source)
    stored: dict[str, layout.Stored] = {}
    rewriter = Rewriter(graph, options)
    held: list[tuple[tuple[Part, ...], str, bool]] = []
    for name, binding in bindings.items():
        value = graph.graph.initializers[name]
        if binding.addend:
            rewriter.separate(binding)
            continue
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
    held += rewriter.held
    items = rewriter.items()
    offsets, data_bytes = place(items)
    graph.producer_name, graph.producer_version = "anyquant", anyquant.__version__
    tensor_map = _map(model, held)
    zeros = _zeros(model, bindings, unbound)
    functions = rewriter.functions()
    called = {function.name for function in functions}
    written = serialize(graph, items, _metadata(model, options, tensor_map, zeros), functions)
    plan = ExportPlan(
        layout=options.layout,
        files={MODEL_FILE: len(written), DATA_FILE: data_bytes, **_runtime(options, called)},
        types=_types(model, stored, tensor_map, zeros),
        refusals=tuple(refusals),
        notes=tuple(_notes(model, stored, options, [*tensor_map, *zeros], called)),
        temporary_disk=temporary_disk(model),
        peak_memory=2 * checkpoint_bytes(model) + _BUILDER_MEMORY,
    )
    groups = [group for matrix in stored.values() for group in matrix.groups]
    integers = frozenset(part for group in groups if isinstance(group.form, Form) for part in group.parts)
    return Job(written, items, offsets, bindings, integers, places, plan)


def _places(proto: onnx.ModelProto) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for tensor in proto.graph.initializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        places[tensor.name] = (int(fields.get("offset", 0)), int(fields.get("length", 0)))
    return places


def _settle_cache_shapes(graph: oir.Model, head: int) -> None:
    """Give the last axis of past and present keys and values its number: clients take a symbol there for 0."""
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        cache = (value.name or "").startswith(("past_key_values.", "present."))
        if cache and head and value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int):
            value.shape = oir.Shape([*value.shape[:3], head])


def _bindings(model: ir.Model, graph: oir.Model, source: GraphSource) -> tuple[dict[str, Binding], list[str]]:
    """What the float initializers hold, and the names of those of which nothing is known."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in graph.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == oir.DataType.FLOAT:
            shapes[name] = tensor_shape(value.const_value)
    tensors = {name: entry.spec.shape for name, entry in model.entries.items()}
    bindings = bind(shapes, tensors, model.aliases)
    for name, binding in bindings.items():
        # Not biases, nor the gated norm of linear attention; a mistake here is found out by value before writing.
        weight = len(shapes[name]) == 1 and "norm" in name and name.endswith(".weight")
        if source.norm_offset and weight and ".linear_attn." not in name:
            bindings[name] = replace(binding, addend=source.norm_offset)
    return bindings, [name for name in shapes if name not in bindings]


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


def _zeros(model: ir.Model, bindings: dict[str, Binding], unbound: list[str]) -> list[str]:
    """Tensors that hold zeros alone and that the graph source left out, as it does with biases."""
    used = {part.tensor for binding in bindings.values() for part in binding.parts}
    return [
        name
        for name in model.entries
        if model.has_values and name not in used and left_out(name, unbound) and not model.dequantize(name).any()
    ]


def _genai_version() -> str:
    """Of the installed package; the one for CUDA has another name and the same module."""
    for name in ("onnxruntime-genai", "onnxruntime-genai-cuda"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _metadata(model: ir.Model, options: ExportOptions, tensor_map: TensorMap, zeros: list[str]) -> dict[str, str]:
    places = {
        name: {"zeros": model.entries[name].spec.shape} if name in zeros else tensor_map[name]
        for name in model.entries
        if name in zeros or name in tensor_map
    }
    values = {
        "anyquant.version": anyquant.__version__,
        "anyquant.method": model.method,
        "anyquant.layout": options.layout,
        "anyquant.source": str(model.source.get("fingerprint", "")),
        "anyquant.graph_source": f"onnxruntime-genai {_genai_version()}",
        MAP_KEY: json.dumps(places, separators=(",", ":")),
    }
    if options.layout == "f16" and options.allow_rounding:
        values["anyquant.allow_rounding"] = "true"
    return values


def _types(
    model: ir.Model, stored: dict[str, layout.Stored], tensor_map: TensorMap, zeros: list[str]
) -> dict[str, str]:
    types = {name: "F32" if name in tensor_map else "F32, inside the graph" for name in model.entries}
    types |= dict.fromkeys(zeros, "left out, all zeros")
    for matrix in stored.values():
        for group in matrix.groups:
            for part in group.parts:
                types[part.tensor] = group.label
    return types


def _runtime(options: ExportOptions, called: Container[str]) -> dict[str, int]:
    """The library of operators, where it is wanted and of use."""
    return {LIBRARY: operators().stat().st_size} if options.with_runtime and MATMUL in called else {}


def _notes(
    model: ir.Model,
    stored: dict[str, layout.Stored],
    options: ExportOptions,
    readable: list[str],
    called: Container[str],
) -> list[str]:
    notes = layout.notes_on(model, stored, options)
    if options.with_runtime and MATMUL in called:
        notes.append(
            "The library beside the model multiplies with codebook matrices as they are stored, on Linux with x86-64; "
            "elsewhere onnxruntime-genai opens the folder without custom_ops_library in genai_config.json."
        )
    elif options.with_runtime:
        notes.append("No product of this model needs the library, so that none is put beside it.")
    elif MATMUL in called:
        notes.append(
            "--with-runtime puts a library beside the model, for ONNX Runtime on the CPU, that multiplies with "
            "codebook matrices as they are stored."
        )
    missing = [name for name in model.entries if name not in readable]
    if missing:
        notes.append(
            f"{len(missing)} tensors, {missing[0]} the first, are in the graph in a changed form, as floats, and "
            "cannot be read back from it."
        )
    head = head_size(model)
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
