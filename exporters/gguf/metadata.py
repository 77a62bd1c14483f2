"""Key-values of the file to write: the source's own, or those of llama.cpp's converter, and anyquant's."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anyquant import __version__, ir
from anyquant.checkpoint.gguf_names import (
    MODEL_CLASSES,
    ROPE_TENSORS,
    SUPPORTED_ARCHITECTURES,
    checked_size,
    gguf_architecture,
    head_dim,
)
from anyquant.checkpoint.gguf_rope import llama3_factors
from anyquant.errors import CorruptFileError, MissingDependency, UnknownArchitecture
from anyquant.exporters.gguf import container, converter, tokenizer
from anyquant.exporters.protocol import ExportOptions
from anyquant.gguf_container import ALIGNMENT, Data, map_file, parse

SOURCE = "source.gguf"
NAMES_KEY = "anyquant.names"
QUANTIZATION_VERSION = 2
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# ggml's general.file_type for a file whose matrices are mostly of a type
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ2_S": 28,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
}


ExtraTensor = tuple[str, str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class Metadata:
    """What the file holds beside the model's tensors.

    Attributes:
        architecture: general.architecture.
        values: key-values as stored bytes, in order.
        alignment: of tensor data, in bytes.
        tensors: (name, type, shape, bytes) of tensors that no checkpoint has (rotary factors).
        complete: False where a plan has neither source.gguf nor tokenizer files to take key-values from.
    """

    architecture: str
    values: dict[str, bytes] = field(default_factory=dict)
    alignment: int = ALIGNMENT
    tensors: tuple[ExtraTensor, ...] = ()
    complete: bool = True


def load(model: ir.Model) -> Metadata:
    """Collect the key-values of a model's GGUF file.

    Raises:
        UnknownArchitecture: tensors of this family have no known GGUF names.
        ExportRefused: the converter refuses the tokenizer, or tokens or a chat template would be lost.
        CorruptFileError: source.gguf is damaged, or missing in a finished IR folder.
    """
    if SOURCE in model.files:
        # While planning this may be the whole file of the source, of whose tensors only these are metadata.
        found = _parse(map_file(model.files[SOURCE]), SOURCE, ROPE_TENSORS)
        return found if found.tensors else replace(found, tensors=_rotary_factors(model.config))
    model_type = str(model.config.get("model_type", ""))
    architecture = _known(model_type, "the config's model_type")
    if model.source.get("kind") == "gguf":
        if model.has_values:
            raise CorruptFileError(
                f"{SOURCE} is missing in {model.path}: the model came from a GGUF file, quantize again"
            )
        return Metadata(architecture, complete=False)
    if not model.files and not model.has_values:
        return Metadata(architecture, complete=False)
    _require_known_class(model.config)
    converted = converter.convert(model)
    made = _parse(converted, "the converter's output")
    if made.architecture != architecture:
        raise UnknownArchitecture(
            f"llama.cpp's converter makes architecture {made.architecture!r} of model_type {model_type!r}, but the "
            f"names known here are those of {architecture!r}. Export to ONNX instead."
        )
    vocabulary = checked_size(model.config, "vocab_size") if model.config.get("vocab_size") is not None else None
    made = replace(made, values=made.values | tokenizer.settled(converted, model.files, vocabulary))
    return _completed(made, model)


def _known(architecture: str, where: str) -> str:
    family = gguf_architecture(architecture)
    if family is None:
        raise UnknownArchitecture(
            f"{where} is {architecture!r}, whose tensors have no known GGUF names (known: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)} and their relatives). Export to ONNX instead."
        )
    return family


def _require_known_class(config: dict[str, Any]) -> None:
    """Refuse any class but those of the known families: it selects the code that the converter runs."""
    found = config.get("architectures")
    if found is not None and not (
        isinstance(found, list) and found and all(str(name) in MODEL_CLASSES for name in found)
    ):
        raise UnknownArchitecture(
            f"architectures in config.json is {found!r:.80}, not one of those whose GGUF names are known "
            f"({', '.join(sorted(MODEL_CLASSES))}). Export to ONNX instead."
        )


def _positive(config: Mapping[str, Any], key: str) -> float:
    value: Any = config.get(key)
    if type(value) not in (int, float) or not 1e-6 <= value <= 1e12:
        raise CorruptFileError(
            f"{key} of the rotary scaling in config.json is {value!r:.40}, must be a number in 1e-6..1e12. "
            "Compare with the config.json of the original model."
        )
    return float(value)


def _factors(scaling: dict[str, Any], key: str) -> list[float]:
    values = scaling.get(key)
    if not isinstance(values, list) or not values:
        raise CorruptFileError(f"{key} of rope_scaling in config.json is {values!r:.40}, must be a list of numbers")
    return [_positive({key: value}, key) for value in values]


def _rotary_factors(config: dict[str, Any]) -> tuple[ExtraTensor, ...]:
    """The tensors that llama.cpp wants where the config scales rotary frequencies: Llama 3's rule, or Phi-3's lists.

    Without them it would compute something else without a word.

    Raises:
        CorruptFileError: a number that they follow from is missing or odd; names its key.
    """
    scaling = {} if config.get("rope_scaling") is None else config["rope_scaling"]
    if not isinstance(scaling, dict):
        raise CorruptFileError(f"rope_scaling in config.json is {scaling!r:.40}, must be a JSON object")
    kind = scaling.get("rope_type")
    made: dict[str, Any] = {}
    if kind == "llama3":
        checked = {key: _positive(scaling, key) for key in _LLAMA3_KEYS}
        if checked["low_freq_factor"] >= checked["high_freq_factor"]:
            raise CorruptFileError("low_freq_factor of rope_scaling in config.json is not below high_freq_factor")
        made["rope_freqs.weight"] = llama3_factors(_positive(config, "rope_theta"), head_dim(config), checked)
    elif kind == "longrope":
        made = {f"rope_factors_{side}.weight": _factors(scaling, f"{side}_factor") for side in ("long", "short")}
    arrays = {name: np.asarray(values, "<f4") for name, values in made.items()}
    return tuple((name, "F32", array.shape, array.tobytes()) for name, array in arrays.items())


def _parse(data: Data, name: str, only: Collection[str] | None = None) -> Metadata:
    header = parse(data, name)
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str):
        raise CorruptFileError(f"{name}: general.architecture is missing or not a string")
    # A sharded source becomes one file.
    values = {key: value for key, value in header.values.items() if not key.startswith("split.")}
    tensors = tuple(
        (key, found.type, found.shape, bytes(data[found.offset : found.offset + found.nbytes]))
        for key, found in header.stored(container.TYPES, only).items()
    )
    return Metadata(_known(architecture, "general.architecture"), values, header.alignment, tensors)


def _completed(made: Metadata, model: ir.Model) -> Metadata:
    """Add what the converter derives from tensors, of which it saw none, or gets wrong."""
    try:
        from gguf.utility import size_label
    except ImportError:
        raise MissingDependency("gguf", "gguf", "exporting to GGUF") from None
    total = sum(entry.spec.numel for entry in model.entries.values())
    values = {**made.values, "general.size_label": container.string_value(size_label(total, total, 0, 0))}
    if made.architecture == "gpt2" and model.config.get("n_inner") is not None:
        # It takes the MLP for 4 times the width, whatever the config says.
        values["gpt2.feed_forward_length"] = container.uint32_value(checked_size(model.config, "n_inner"))
    return replace(made, values=values)


def finish(
    base: Metadata,
    model: ir.Model,
    options: ExportOptions,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    names: dict[str, str],
) -> dict[str, bytes]:
    """Return the key-values to write.

    Args:
        base: what came with the source.
        model: the model.
        options: of the export.
        tensors: (type, shape) of every tensor written.
        names: GGUF name -> IR name of the tensors whose IR name does not follow from the architecture.
    """
    weights: dict[str, int] = {}
    for type_name, shape in tensors:
        if len(shape) > 1:
            size = 1
            for n in shape:
                size *= n
            weights[type_name] = weights.get(type_name, 0) + size
    values = dict(base.values)
    if weights:
        most = max(weights, key=lambda name: weights[name])
        if most in FILE_TYPES:
            values["general.file_type"] = container.uint32_value(FILE_TYPES[most])
        else:
            # There is no number for a file of our types: loaders then name the most frequent type themselves.
            values.pop("general.file_type", None)
    if any(name in ir.GGML_TYPES for name in weights):
        values["general.quantization_version"] = container.uint32_value(QUANTIZATION_VERSION)
    own = {
        "anyquant.version": __version__,
        "anyquant.method": model.method,
        "anyquant.settings": json.dumps(model.settings, sort_keys=True),
        "anyquant.layout": options.layout,
        "anyquant.source_name": str(model.source.get("name", "")),
        "anyquant.source_fingerprint": str(model.source.get("fingerprint", "")),
    }
    if names:
        own[NAMES_KEY] = json.dumps(names)
    values |= {key: container.string_value(text) for key, text in own.items()}
    if options.allow_rounding:  # also norms of Gemma and F64 tensors may be rounded then, in any layout
        values["anyquant.allow_rounding"] = container.bool_value(True)
    return values
