"""llama.cpp with full logits: FP32 key-value cache, no flash attention, one window per call."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyquant.errors import InputError, MachineError
from anyquant.exporters.gguf import custom
from anyquant.gguf_container import map_file, parse
from anyquant.runtime import ggml_plugin
from anyquant.validation.runners.llama_abi import CONTEXT_FIELDS, MODEL_FIELDS, Batch, library, set_fields
from anyquant.validation.runners.protocol import check_ids

_F32 = 0
_FLASH_ATTENTION_OFF = 0


class LlamaCppRunner:
    """A GGUF file in llama.cpp, on the CPU.

    Everything that llama.cpp would round on its own account is switched off, so that what remains is the arithmetic
    of the file's tensor types.
    """

    def __init__(self, name: str, path: Path, *, context: int, threads: int) -> None:
        """Load a file.

        Args:
            name: of the row in the report.
            path: the GGUF file.
            context: tokens a window may have; logits of all of them fit into one batch.
            threads: to compute with.

        Raises:
            InputError: missing, damaged, or refused by llama.cpp.
            MissingDependency: xllamacpp is not installed.
            MachineError: its build is unknown, does not take our tensor types, or memory is short.
        """
        self._model = self._context = None
        self._library = library()
        self._c = self._library.c
        self.name, self.runtime = name, f"llama.cpp (xllamacpp {self._library.version})"
        header = parse(map_file(path), str(path))
        if any(tensor.type_id in custom.NUMBERS for tensor in header.tensors.values()):
            ggml_plugin.register()
        self._library.log.clear()
        params = self._c.llama_model_default_params()
        set_fields(params, MODEL_FIELDS, n_gpu_layers=0)
        self._model = self._c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise InputError(f"llama.cpp cannot load {path}: {self._library.complaint()}")
        params = self._c.llama_context_default_params()
        set_fields(
            params,
            CONTEXT_FIELDS,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_outputs_max=context,
            n_outputs_max_per_seq=context,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=_FLASH_ATTENTION_OFF,
            type_k=_F32,
            type_v=_F32,
        )
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise MachineError(
                f"llama.cpp cannot make a context of {context} tokens for {path}: {self._library.complaint()}"
            )
        self._vocabulary = self._c.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._c.llama_vocab_n_tokens(self._vocabulary))
        self._check_context(context, threads)

    def _check_context(self, context: int, threads: int) -> None:
        """What was set must have arrived: the last guard against a struct of another layout."""
        c, made = self._c, self._context
        found = (int(c.llama_n_ctx(made)), int(c.llama_n_batch(made)), int(c.llama_n_ubatch(made)))
        if min(found) < context or int(c.llama_n_threads(made)) != threads:
            self.close()
            raise MachineError(
                f"xllamacpp {self._library.version} made a context of n_ctx, n_batch, n_ubatch {found} where {context} "
                "was asked for: its parameter structs are not those known here"
            )
        self._limit = context

    def _decode(self, ids: NDArray[np.int64], every: bool) -> NDArray[np.float32]:
        """Append tokens to the cache; logits of all of them, or of the last."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        wanted = np.full(len(tokens), every, dtype=np.int8)
        wanted[-1] = 1
        self._library.log.clear()
        code = self._c.llama_decode(
            self._context, Batch(len(tokens), tokens.ctypes.data, None, None, None, None, wanted.ctypes.data)
        )
        address = self._c.llama_get_logits(self._context) if code == 0 else None
        if not address:
            raise MachineError(
                f"{self.name}: llama.cpp could not compute {len(tokens)} tokens (llama_decode returned {code}): "
                f"{self._library.complaint()}"
            )
        rows = int(np.count_nonzero(wanted))
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        return np.array(np.ctypeslib.as_array(pointer, (rows, self.vocabulary)), dtype=np.float32)

    def _start(self, ids: NDArray[np.int64], more: int) -> None:
        if not self._context:
            raise MachineError(f"{self.name}: the runner is closed")
        if not 0 < len(ids) <= self._limit - more:
            raise InputError(f"{self.name}: {len(ids)} tokens, and {more} to come, in a context of {self._limit}")
        check_ids(ids, self.vocabulary, self.name)
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        self._start(token_ids, 0)
        return self._decode(token_ids, every=True)

    def generate(self, prompt_ids: list[int], n: int) -> list[int]:
        """See Runner."""
        step = np.asarray(prompt_ids, dtype=np.int64)
        self._start(step, n)
        answer: list[int] = []
        for _ in range(n):
            answer.append(int(self._decode(step, every=False)[-1].argmax()))
            step = np.array(answer[-1:], dtype=np.int64)
        return answer

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """See TextRunner."""
        if not self._model:
            raise MachineError(f"{self.name}: the runner is closed")
        data = text.encode()
        room = len(data) + 16  # a byte makes one token at most; besides there are those of every text
        ids = np.empty(room, dtype=np.int32)
        count = self._c.llama_tokenize(self._vocabulary, data, len(data), ids.ctypes.data, room, not special, special)
        if count < 0:
            raise MachineError(f"{self.name}: llama.cpp could not tokenize {len(data)} bytes ({count})")
        return [int(i) for i in ids[:count]]

    def close(self) -> None:
        """See Runner."""
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._model = self._context = None
