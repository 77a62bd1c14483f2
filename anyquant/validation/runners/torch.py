"""PyTorch: the source, or the weights of an IR folder, dequantized or multiplied with by our kernels for GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError
from anyquant.validation.runners.protocol import RunnerSpec, check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchRunner:
    """A transformers causal language model in float32, on the device that it is on."""

    def __init__(self, name: str, model: Any, threads: int | None = None, activations: str | None = None) -> None:
        """Wrap a model that is loaded already.

        Args:
            name: of the row in the report.
            model: a transformers ``PreTrainedModel``.
            threads: torch.set_num_threads, for the whole process; None leaves it.
            activations: format to quantize them to, such as "bfp6"; None leaves them in float32.
        """
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.name, self.runtime = name, f"PyTorch {torch.__version__}"
        self._model, self._activations = model.eval(), activations
        embeddings = model.get_input_embeddings().weight
        self._vocabulary, self._device = int(embeddings.shape[0]), embeddings.device
        if self._device.type == "cuda":
            self.runtime += f", anyquant's kernels on {torch.cuda.get_device_name(self._device)}"

    def _arithmetic(self) -> AbstractContextManager[object]:
        """In which the model is to be run."""
        if self._activations is None:
            return nullcontext()
        from anyquant.validation.activations import quantized_activations

        return quantized_activations(self._model, self._activations)

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        import torch

        check_ids(token_ids, self._vocabulary, self.name)
        with torch.inference_mode(), self._arithmetic():
            ids = torch.from_numpy(np.array(token_ids[None], dtype=np.int64)).to(self._device)
            output = self._model(ids, use_cache=False)
        result: NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        return result

    def generate(self, prompt_ids: list[int], n: int) -> list[int]:
        """See Runner."""
        import torch

        check_ids(np.asarray(prompt_ids, dtype=np.int64), self._vocabulary, self.name)
        step, cache, answer = torch.tensor([prompt_ids], dtype=torch.int64, device=self._device), None, []
        with torch.inference_mode(), self._arithmetic():
            for _ in range(n):
                output = self._model(step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                answer.append(int(output.logits[0, -1].float().cpu().numpy().argmax()))
                step = torch.tensor([[answer[-1]]], dtype=torch.int64, device=self._device)
        return answer

    def close(self) -> None:
        """See Runner."""
        self._model = None


def open_ir_runner(spec: RunnerSpec) -> TorchRunner:
    """An IR folder, its weights dequantized to float32, or on a GPU as they are; its activations as the spec says.

    Raises:
        MissingDependency: the extra for GPUs is not installed.
        MachineError: there is no GPU that the kernels run on.
    """
    from anyquant.runtime import load

    quiet()
    on_cpu = spec.device == "cpu"
    model = load(Path(spec.path), dequantize=on_cpu, device=spec.device, trust_remote_code=spec.trust_remote_code)
    return TorchRunner(spec.name, model, threads=spec.thread_count, activations=spec.activations)


def open_checkpoint_runner(spec: RunnerSpec) -> TorchRunner:
    """The source: what transformers loads from a folder or hub id, or the values of a GGUF file.

    Raises:
        InputError: it cannot be loaded.
    """
    quiet()
    if Path(spec.path).is_file():  # a folder or a hub id is none; what no GGUF is, the reader refuses
        return TorchRunner(spec.name, _load_gguf(spec.path), threads=spec.thread_count)
    import torch
    from transformers import AutoModelForCausalLM

    from anyquant.checkpoint.hub import split_revision

    path, revision = (
        (spec.path, spec.revision) if Path(spec.path).is_dir() else split_revision(spec.path, spec.revision)
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load the source {spec.path}: {error}") from error
    return TorchRunner(spec.name, model, threads=spec.thread_count)


def _load_gguf(path: str) -> PreTrainedModel:
    """A model with the values of a GGUF file, dequantized to float32."""
    from anyquant.checkpoint import open_checkpoint
    from anyquant.runtime.model import model_of

    return model_of(open_checkpoint(path), where=path)


def quiet() -> None:
    """No progress bars: the caller shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
