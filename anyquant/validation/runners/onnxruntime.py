"""ONNX Runtime on the CPU: an exported folder with its key-value cache as inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError, MissingDependency
from anyquant.runtime.onnx_session import model_file, open_session, operators_beside, register
from anyquant.validation.runners.protocol import check_ids

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_FATAL = 4


class OnnxRuntimeRunner:
    """An ONNX model with inputs input_ids, attention_mask, position_ids (those it has) and past keys and values."""

    def __init__(self, name: str, path: Path, *, threads: int) -> None:
        """Open a session.

        Args:
            name: of the row in the report.
            path: the exported folder.
            threads: of the session.

        Raises:
            MissingDependency: onnxruntime is not installed.
            InputError: no such file, ONNX Runtime refuses it, or a library lies beside it that is not ours.
            MachineError: a library lies beside it, and this installation has none, or one that cannot be loaded.
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingDependency("onnxruntime", "onnxruntime", "running an ONNX file") from None
        if not path.exists():
            raise InputError(f"there is no {path}")
        self.name, self.runtime = name, f"ONNX Runtime {ort.__version__}"
        self._file = model_file(path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        # Other runners take turns with this one: its threads must not spin meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # What was exported is what is run: with our kernels if they are part of it.
        library = operators_beside(self._file)
        if library:
            register(options, library)
            self.runtime += " with our kernels"
        self._session = open_session(self._file, options)
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._vocabulary: int | None = None
        self._cache = self._pair_cache()
        self._check_inputs()

    def _pair_cache(self) -> dict[str, str]:
        """Past input -> present output."""
        return {
            name: name.replace("past_key_values.", "present.", 1)
            for name in self._inputs
            if name.startswith("past_key_values.")
        }

    def _check_inputs(self) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *self._cache}
        unknown = [name for name in self._inputs if name not in known]
        if unknown or "input_ids" not in self._inputs:
            raise InputError(
                f"{self._file} has the inputs {', '.join(self._inputs)}; this runner does not know "
                f"{', '.join(unknown) if unknown else 'any for token ids'}"
            )
        missing = [name for name in ("logits", *self._cache.values()) if name not in self._outputs]
        if missing:
            raise InputError(f"{self._file} has no output {missing[0]} (it has {', '.join(self._outputs[:4])}, ...)")

    def _empty_cache(self) -> dict[str, np.ndarray]:
        cache = {}
        for name in self._cache:
            node = self._inputs[name]
            # Batch 1; the other unknown dimension is the length of what was read so far.
            shape = [d if isinstance(d, int) else int(axis == 0) for axis, d in enumerate(node.shape)]
            cache[name] = np.zeros(shape, dtype=self._dtype(name))
        return cache

    def _dtype(self, name: str) -> Any:
        kind = self._inputs[name].type
        if kind not in _TYPES:
            raise InputError(f"{self._file}: input {name} is a {kind}, which this runner cannot make")
        return _TYPES[kind]

    def _run(
        self, ids: NDArray[np.int64], past: int, cache: dict[str, np.ndarray], keep_cache: bool
    ) -> tuple[NDArray[np.float32], dict[str, np.ndarray]]:
        total = past + len(ids)
        values = {
            "input_ids": ids,
            "attention_mask": np.ones(total, dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64),
        }
        feed = {n: v[None].astype(self._dtype(n), copy=False) for n, v in values.items() if n in self._inputs}
        wanted = ["logits", *(self._cache.values() if keep_cache else ())]
        try:
            logits, *present = self._session.run(wanted, feed | cache)
        except Exception as error:
            raise InputError(f"ONNX Runtime failed on {self._file} with {len(ids)} tokens: {error}") from None
        self._vocabulary = int(logits.shape[-1])
        return logits[0].astype(np.float32, copy=False), dict(zip(self._cache, present, strict=keep_cache))

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        if self._vocabulary is not None:
            check_ids(token_ids, self._vocabulary, self.name)
        return self._run(np.asarray(token_ids, dtype=np.int64), 0, self._empty_cache(), keep_cache=False)[0]

    def generate(self, prompt_ids: list[int], n: int) -> list[int]:
        """See Runner."""
        step, past, cache = np.asarray(prompt_ids, dtype=np.int64), 0, self._empty_cache()
        answer: list[int] = []
        for _ in range(n):
            logits, cache = self._run(step, past, cache, keep_cache=True)
            answer.append(int(logits[-1].argmax()))
            if self._cache:
                past += len(step)
                step = np.array([answer[-1]], dtype=np.int64)
            else:
                step = np.append(step, answer[-1])
        return answer

    def close(self) -> None:
        """See Runner."""
        self._session = None
