"""An IR folder as a transformers model, its weights dequantized by the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import ir
from anyquant.errors import CorruptFileError, UnknownArchitecture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def checkpoint_tensors(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (checkpoint name, FP32 values) as the source checkpoint stores them, one tensor at a time.

    Conv1D weights are turned back to [in, out] and experts "name#e" are stacked again; aliases are left out.
    """
    experts: dict[str, list[str]] = {}
    for name in model.entries:
        if "#" in name:
            experts.setdefault(name.rpartition("#")[0], []).append(name)
    for name, entry in model.entries.items():
        stored, _, number = name.rpartition("#")
        if not stored:
            values = model.dequantize(name)
            yield name, np.ascontiguousarray(values.T) if entry.source_transposed else values
        elif number == "0":
            parts = [model.dequantize(part) for part in experts[stored]]
            yield stored, np.stack([part.T for part in parts] if entry.source_transposed else parts)


def load(path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load an IR folder as a transformers model that generates.

    Args:
        path: the folder that ``anyquant quantize`` wrote.
        dtype: of the parameters; FP32, which holds every dequantized value exactly, unless given.
        trust_remote_code: passed on to transformers for architectures with code of their own.

    Raises:
        InputError: not an IR folder.
        CorruptFileError: the folder is damaged, or its tensors are not those of the architecture.
        UnknownArchitecture: transformers has no such causal language model.
    """
    import torch
    from transformers import GenerationConfig

    folder = Path(path)
    model = ir.open_ir(folder)
    config, architecture = _architecture(model, folder, trust_remote_code)
    dtype = dtype or torch.float32
    state = {name: torch.from_numpy(values).to(dtype) for name, values in checkpoint_tensors(model)}
    for alias, name in model.aliases.items():
        state.setdefault(alias, state[name])
    loaded, report = architecture.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    _require_complete(report, path)
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    result: PreTrainedModel = loaded.eval()
    return result


def _architecture(model: ir.Model, folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration, and the class of causal language models that goes with it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if trust_remote_code and "AutoModelForCausalLM" in model.config.get("auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return config, get_class_from_dynamic_module(model.config["auto_map"]["AutoModelForCausalLM"], folder)
    model_type = model.config.get("model_type")
    try:
        config = AutoConfig.for_model(**model.config)
        return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (KeyError, ValueError, TypeError) as error:
        raise UnknownArchitecture(
            f"transformers has no causal language model for model_type {model_type!r} ({error}). "
            "A newer transformers may; for code shipped with the model pass trust_remote_code=True."
        ) from error


def _require_complete(report: dict[str, Any], path: str | Path) -> None:
    """A missing weight would be random: refuse rather than answer nonsense.

    Raises:
        CorruptFileError: names the first tensors that are missing or unexpected.
    """
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(what, ()))
        if names:
            raise CorruptFileError(
                f"{path}: {len(names)} {what.replace('_keys', '')} weights for this architecture, the first "
                f"{names[0]}. The config.json does not belong to these tensors."
            )
