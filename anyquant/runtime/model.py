"""Dequantized weights as a transformers model: of an IR folder, or of a checkpoint that transformers cannot read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyquant import ir
from anyquant.errors import CorruptFileError, MachineError, UnknownArchitecture, UsageError
from anyquant.runtime import native

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from anyquant.checkpoint import Checkpoint


def checkpoint_tensors(model: ir.Model, left_out: Container[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (checkpoint name, FP32 values) as the source checkpoint stores them; see :func:`as_stored`."""
    turned = {name for name, entry in model.entries.items() if entry.source_transposed}
    return as_stored([name for name in model.entries if name not in left_out], model.dequantize, turned)


def as_stored(
    names: Iterable[str], read: Callable[[str], np.ndarray], transposed: Container[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (checkpoint name, values) as a checkpoint stores them, one tensor at a time.

    Conv1D weights are turned back to [in, out]; experts "name#0", "name#1", ... are stacked again, by number.

    Args:
        names: of all tensors, experts one by one.
        read: gives the values of a name, matrices as [out, in].
        transposed: the names to turn.

    Raises:
        CorruptFileError: the experts of a tensor are not numbered 0 to n - 1.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        stored, mark, _ = name.rpartition("#")
        groups.setdefault(stored if mark else name, []).append(name)

    def values(name: str) -> np.ndarray:
        return np.ascontiguousarray(read(name).T) if name in transposed else read(name)

    for stored, members in groups.items():
        if members == [stored]:
            yield stored, values(stored)
            continue
        experts = [f"{stored}#{number}" for number in range(len(members))]
        wrong = sorted(set(members) - set(experts))
        if wrong:
            raise CorruptFileError(
                f"{wrong[0]}: {stored} has {len(members)} experts, so they are numbered 0 to {len(members) - 1}. "
                "Some are missing or were renamed: make the folder again."
            )
        yield stored, np.stack([values(expert) for expert in experts])


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load an IR folder as a transformers model that generates.

    Linear layers multiply with their packed matrices, in about the memory that the folder takes on disk, on the CPU or
    on an NVIDIA GPU. Other layers hold dequantized weights: on the CPU also those of the kind ggml, and all where the
    compiled library is missing.

    Args:
        path: the folder that ``anyquant quantize`` wrote.
        dtype: of the parameters; FP32, which holds every dequantized value exactly, unless given.
        dequantize: dequantize all weights: four bytes for each, and linear layers that run on any device.
        device: where the model is to be: "cpu", or "cuda", "cuda:1", ...
        trust_remote_code: passed on to transformers for architectures with code of their own.

    Raises:
        InputError: not an IR folder.
        CorruptFileError: the folder is damaged, or its tensors are not those of the architecture.
        UnknownArchitecture: transformers has no such causal language model.
        UsageError: another device.
        MissingDependency: the extra for GPUs is not installed.
        MachineError: there is no GPU that the kernels run on, or it has too little memory.
    """
    import torch
    from transformers import GenerationConfig

    from anyquant.runtime import native_matmul
    from anyquant.runtime.cuda import reference

    home = _device(device)
    on_gpu = home.type == "cuda"
    if on_gpu:  # refused before anything is read
        from anyquant.runtime.cuda.launcher import launcher, require_gpu

        require_gpu(home) if dequantize else launcher(home)
    native.install()
    folder = Path(path)
    model = ir.open_ir(folder)
    code = folder if trust_remote_code else None
    kinds: tuple[type[ir.Spec], ...] = reference.KINDS if on_gpu else native_matmul.KINDS
    packed = {} if dequantize or not (on_gpu or native.available()) else _packable(model, str(path), code, kinds)
    loaded = model_from_state(
        model.config, checkpoint_tensors(model, packed), model.aliases, str(path),
        dtype=dtype, code_folder=code, replaced=packed,
    )  # fmt: skip
    if packed:
        from anyquant.runtime.linear import packed_linear, replace_linears

        make = packed_linear
        if on_gpu:
            from anyquant.runtime.cuda.linear import quantized_linear

            make = quantized_linear
        replace_linears(loaded, packed, model.tensor, make)
    if on_gpu:
        try:
            torch.nn.Module.to(loaded, home)
        except torch.OutOfMemoryError as error:
            raise MachineError(f"{path} does not fit into the memory of {home}: {error}") from error
    if (folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _device(name: str | torch.device) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {str(name)!r}; models are loaded onto 'cpu' or 'cuda'")
    return device


def _packable(
    model: ir.Model, where: str, code_folder: Path | None, kinds: tuple[type[ir.Spec], ...]
) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of the matrices of some kinds that linear layers can multiply with as they are."""
    import torch

    from anyquant.runtime.linear import replaceable

    settings, architecture = causal_lm_class(model.config, where, code_folder)
    with torch.device("meta"):
        skeleton = architecture(settings)
    found = {name: entry for name, entry in model.entries.items() if isinstance(entry.spec, kinds)}
    tied = set(model.aliases.values())
    names = [name for name, entry in found.items() if not entry.source_transposed and name not in tied]
    shapes = {name: (found[name].spec.shape[0], found[name].spec.shape[1]) for name in names}
    return {name: shapes[name] for name in replaceable(skeleton, shapes)}


def model_of(
    checkpoint: Checkpoint,
    read: Callable[[str], np.ndarray] | None = None,
    *,
    where: str | None = None,
) -> PreTrainedModel:
    """A checkpoint as a causal language model in FP32, in evaluation mode.

    Args:
        checkpoint: gives architecture and names.
        read: gives the values of a name, matrices as [out, in]; the checkpoint's own unless given.
        where: what messages call it; its name unless given.

    Raises:
        CorruptFileError: its tensors are not those of the architecture.
        UnknownArchitecture: transformers has no such causal language model.
    """
    tensors = as_stored(checkpoint.tensors, read or checkpoint.read, checkpoint.transposed)
    name = checkpoint.name if where is None else where
    return model_from_state(checkpoint.config, tensors, checkpoint.aliases, name, code_folder=checkpoint.code_folder())


def model_from_state(
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    aliases: Mapping[str, str],
    where: str,
    *,
    dtype: torch.dtype | None = None,
    code_folder: Path | None = None,
    replaced: Mapping[str, tuple[int, ...]] | None = None,
) -> PreTrainedModel:
    """A causal language model of transformers with these weights and no others, in evaluation mode.

    Args:
        config: the content of config.json.
        tensors: (checkpoint name, FP32 values) as the checkpoint stores them.
        aliases: name -> the tensor it shares.
        where: the weights come from, for messages.
        dtype: of the parameters; FP32 unless given.
        code_folder: holds what code the model ships, to be trusted; None takes transformers' classes.
        replaced: name -> shape of weights that are not among the tensors, since the caller will put something else in
            their place; until then they are zeros that take no memory.

    Raises:
        UnknownArchitecture: transformers has no such causal language model.
        CorruptFileError: tensors are missing, too many, or of another shape.
    """
    import torch

    settings, architecture = causal_lm_class(config, where, code_folder)
    dtype = dtype or torch.float32
    state = {name: torch.from_numpy(values).to(dtype) for name, values in tensors}
    for name, shape in (replaced or {}).items():
        state[name] = torch.zeros((), dtype=dtype).expand(shape)
    for alias, name in aliases.items():
        state.setdefault(alias, state[name])
    loaded, report = architecture.from_pretrained(
        None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True
    )
    _require_complete(report, where)
    result: PreTrainedModel = loaded.eval()
    return result


def causal_lm_class(config: dict[str, Any], where: str, code_folder: Path | None) -> tuple[Any, Any]:
    """The configuration, and the class of causal language models that goes with it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if code_folder is not None and "AutoModelForCausalLM" in config.get("auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        settings = AutoConfig.from_pretrained(code_folder, trust_remote_code=True)
        return settings, get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], code_folder)
    try:
        settings = AutoConfig.for_model(**config)
        return settings, MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    except (KeyError, ValueError, TypeError) as error:
        raise UnknownArchitecture(
            f"{where}: transformers has no causal language model for model_type {config.get('model_type')!r} "
            f"({error}). A newer transformers may; for code shipped with the model pass --trust-remote-code, or "
            "trust_remote_code=True."
        ) from error


def _require_complete(report: dict[str, Any], where: str) -> None:
    """A missing weight would be random: refuse rather than answer nonsense.

    Raises:
        CorruptFileError: names the first tensors that are missing or unexpected.
    """
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(what, ()))
        if names:
            raise CorruptFileError(
                f"{where}: {len(names)} {what.replace('_keys', '')} weights for this architecture, the first "
                f"{names[0]}. The configuration does not belong to these tensors."
            )
