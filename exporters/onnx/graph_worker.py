"""The child process that runs onnxruntime-genai's model builder: it prints much, and needs gigabytes at once.

Called as ``python -P -m anyquant.exporters.onnx.graph_worker REQUEST``; REQUEST is a JSON file with "checkpoint" (a
Hugging Face folder), "output" (a folder to make), "result" (a JSON file to write) and "values". With "values" false
the weights are never made: matrices are torch meta tensors, and the graph is saved with initializers that have a
dtype, a shape and no data. Vectors keep their values, since the builder leaves out biases that are zero.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

# Names of files that make a folder one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class _NoTokenizer:
    """Stands in for the tokenizer of a checkpoint that has none: the builder only wants to copy it."""

    eos_token = None

    def get_vocab(self) -> dict[str, int]:
        """No tokens."""
        return {}

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


def _skeleton_weights(folder: Path) -> None:
    """Make transformers build models on the meta device, vectors excepted."""
    import torch
    import transformers
    from safetensors.torch import load_file

    def build(cls: Any, /, path: str, *_: Any, config: Any = None, **__: Any) -> Any:
        config = config or transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config)
        model.tie_weights()
        vectors = load_file(str(folder / "model.safetensors"))
        for module_name, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim < 2:
                    full = f"{module_name}.{name}" if module_name else name
                    value = vectors.get(full)
                    value = torch.ones(parameter.shape) if value is None else value
                    setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        return model.eval()

    transformers.PreTrainedModel.from_pretrained = classmethod(build)  # type: ignore[assignment]


def _save_skeleton(builder: Any, out_dir: str) -> None:
    """Replacement of the builder's save_model: the same graph, initializers without data."""
    import onnx_ir

    model = builder.model
    model.graph.sort()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        value.const_value = onnx_ir.ExternalTensor(
            "absent", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name
        )
    onnx_ir.save(model, str(Path(out_dir) / builder.filename))


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from onnxruntime_genai.models import builder
    from onnxruntime_genai.models.builders import base  # the package puts its own folder on sys.path

    checkpoint = Path(request["checkpoint"])
    found: dict[str, Any] = {}
    base_model = builder.Model
    original_save = base_model.save_model

    def save(self: Any, out_dir: str) -> None:
        # Some families' norms multiply by 1 + w, and the graph holds the sum.
        found["norm_offset"] = float(self.layernorm_attrs["add_offset"])
        if request["values"]:
            original_save(self, out_dir)
        else:
            _save_skeleton(self, out_dir)

    base_model.save_model = save
    if not any((checkpoint / name).exists() for name in TOKENIZER_FILES):
        for module in {sys.modules[base_model.__module__], builder, base}:
            module.AutoTokenizer = type("NoTokenizer", (), {"from_pretrained": lambda *_, **__: _NoTokenizer()})
    if not request["values"]:
        _skeleton_weights(checkpoint)
    output = Path(request["output"])
    arguments = ("", str(checkpoint), str(output), "fp32", "cpu", str(output / "cache"))
    # A windowed cache has to be allocated by onnxruntime-genai; without, plain ONNX Runtime can start from nothing.
    options = builder.parse_extra_options(*arguments, ["hf_token=false", "windowed_kv_cache=false"])
    builder.create_model(*arguments, **options)
    cache = output / "cache"
    if cache.is_dir() and not any(cache.iterdir()):
        cache.rmdir()
    return found


def _category(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "missing"
    if isinstance(error, NotImplementedError) and "not currently supported" in str(error):
        return "architecture"
    if isinstance(error, (ValueError, KeyError)) and "does not recognize this architecture" in str(error):
        return "architecture"
    if isinstance(error, (MemoryError, OSError)):
        return "machine"
    return "fault"


def main(request_path: str) -> int:
    """Run one request; the result file says how it went. Returns the exit code."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    result: dict[str, Any]
    try:
        result = _build(request)
    except Exception as error:
        traceback.print_exc()
        name = getattr(error, "name", None) if isinstance(error, ImportError) else None
        result = {"error": _category(error), "message": f"{type(error).__name__}: {error}", "module": name}
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
