"""The C interface of the llama.cpp inside the ``xllamacpp`` wheel, for ctypes.

The wheel's Python interface gives log-probabilities of sampled tokens only, but its library exports llama.cpp's
functions. Their parameter structs are passed by value and change between builds, so nothing is assumed: the library's
own defaults are read into an oversized buffer and must match, field for field, the layout known here; only then is a
field written. On x86-64 (System V) such structs are returned and passed in memory, where a longer buffer is harmless.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections import deque
from typing import Any, NamedTuple

from anyquant.errors import MachineError, MissingDependency

KNOWN_VERSION = "2026.10.11549"
_ERROR_LEVELS = (3, 4, 5)


class Field(NamedTuple):
    """A field of a parameter struct: where it is, its struct code, and what the library's default must be."""

    offset: int
    code: str
    default: float


MODEL_FIELDS = {
    "devices": Field(0, "<Q", 0),
    "tensor_buft_overrides": Field(8, "<Q", 0),
    "n_gpu_layers": Field(16, "<i", -1),
    "split_mode": Field(20, "<i", 1),
    "load_mode": Field(24, "<i", -1),
    "lazy_mode": Field(28, "<i", 1),
    "main_gpu": Field(32, "<i", 0),
    "tensor_split": Field(40, "<Q", 0),
    "progress_callback": Field(48, "<Q", 0),
    "progress_callback_user_data": Field(56, "<Q", 0),
    "kv_overrides": Field(64, "<Q", 0),
    "vocab_only": Field(72, "<B", 0),
    "check_tensors": Field(73, "<B", 0),
    "use_extra_bufts": Field(74, "<B", 1),
    "no_host": Field(75, "<B", 0),
    "no_alloc": Field(76, "<B", 0),
    "load_mtp": Field(77, "<B", 0),
}
CONTEXT_FIELDS = {
    "n_ctx": Field(0, "<I", 512),
    "n_batch": Field(4, "<I", 2048),
    "n_ubatch": Field(8, "<I", 512),
    "n_seq_max": Field(12, "<I", 1),
    "n_rs_seq": Field(16, "<I", 0),
    "n_outputs_max": Field(20, "<I", 0),
    "n_outputs_max_per_seq": Field(24, "<I", 1),
    "n_threads": Field(28, "<i", 4),
    "n_threads_batch": Field(32, "<i", 4),
    "ctx_type": Field(36, "<i", 0),
    "rope_scaling_type": Field(40, "<i", -1),
    "pooling_type": Field(44, "<i", -1),
    "attention_type": Field(48, "<i", -1),
    "flash_attn_type": Field(52, "<i", -1),
    "rope_freq_base": Field(56, "<f", 0),
    "rope_freq_scale": Field(60, "<f", 0),
    "yarn_ext_factor": Field(64, "<f", -1),
    "yarn_attn_factor": Field(68, "<f", -1),
    "yarn_beta_fast": Field(72, "<f", -1),
    "yarn_beta_slow": Field(76, "<f", -1),
    "yarn_orig_ctx": Field(80, "<I", 0),
    "defrag_thold": Field(84, "<f", -1),
    "cb_eval": Field(88, "<Q", 0),
    "cb_eval_user_data": Field(96, "<Q", 0),
    "type_k": Field(104, "<i", 1),
    "type_v": Field(108, "<i", 1),
    # Three pointers whose order does not matter here: all are left at null.
    "pointer_0": Field(112, "<Q", 0),
    "pointer_1": Field(120, "<Q", 0),
    "pointer_2": Field(128, "<Q", 0),
    "embeddings": Field(136, "<B", 0),
    "offload_kqv": Field(137, "<B", 1),
    "no_perf": Field(138, "<B", 1),
    "op_offload": Field(139, "<B", 1),
    "swa_full": Field(140, "<B", 1),
    "kv_unified": Field(141, "<B", 0),
    "samplers": Field(144, "<Q", 0),
    "n_samplers": Field(152, "<Q", 0),
    "ctx_other": Field(160, "<Q", 0),
}


class Oversized(ctypes.Structure):
    """Room for any parameter struct."""

    _fields_ = (("data", ctypes.c_uint8 * 1024),)


class Batch(ctypes.Structure):
    """llama_batch; positions and sequences stay null, so tokens follow those already in the cache."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT, _UINT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Oversized, []),
    "llama_context_default_params": (Oversized, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, Oversized]),
    "llama_model_free": (None, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, Oversized]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (_UINT, [_POINTER]),
    "llama_n_batch": (_UINT, [_POINTER]),
    "llama_n_ubatch": (_UINT, [_POINTER]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_tokenize": (_INT, [_POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_get_logits": (_POINTER, [_POINTER]),
}


def set_fields(params: Oversized, fields: dict[str, Field], **values: float) -> None:
    """Write fields of a parameter struct by name."""
    for name, value in values.items():
        struct.pack_into(fields[name].code, params.data, fields[name].offset, value)


def mismatches(params: Oversized, fields: dict[str, Field]) -> list[str]:
    """Fields whose default is not the known one: the struct then has another layout."""
    data = bytes(params.data)
    found = []
    for name, (offset, code, default) in fields.items():
        (value,) = struct.unpack_from(code, data, offset)
        if value != default:
            found.append(f"{name} reads {value}, not {default}")
    return found


_log: deque[str] = deque(maxlen=20)


def _collect(level: int, text: bytes | None, _user: object) -> None:
    if level in _ERROR_LEVELS and text:
        _log.append(text.decode("utf-8", "replace").strip())


# llama.cpp keeps the pointer for as long as the process lives, so the callback must live as long.
_callback = _LOG(_collect)


class LlamaLibrary:
    """The library, loaded and checked.

    Attributes:
        version: of the wheel.
        log: the last warnings and errors llama.cpp printed.
    """

    def __init__(self) -> None:
        """Load the library once per process; see :func:`library`.

        Raises:
            MissingDependency: xllamacpp is not installed.
            MachineError: its build is not one whose structs are known.
        """
        try:
            import xllamacpp
        except ImportError:
            raise MissingDependency("xllamacpp", "llamacpp", "running a GGUF file") from None
        self.version = str(getattr(xllamacpp, "__version__", "unknown"))
        if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
            raise self._refusal(f"it is for Linux x86-64, this is {platform.system()} {platform.machine()}")
        self.c = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.c, name, None)
            if function is None:
                raise self._refusal(f"its library exports no {name}")
            function.restype, function.argtypes = result, arguments
        self.log = _log
        self.c.llama_log_set(_callback, None)
        wrong = mismatches(self.c.llama_model_default_params(), MODEL_FIELDS)
        wrong += mismatches(self.c.llama_context_default_params(), CONTEXT_FIELDS)
        if wrong:
            raise self._refusal(f"its parameter structs have another layout: {'; '.join(wrong[:3])}")
        self.c.llama_backend_init()

    def _refusal(self, reason: str) -> MachineError:
        return MachineError(
            f"the llama.cpp inside xllamacpp {self.version} cannot be driven: {reason}. "
            f"Known to work: pip install 'xllamacpp=={KNOWN_VERSION}'"
        )

    def complaint(self) -> str:
        """What llama.cpp said last, for an error message."""
        words = "; ".join(line for line in self.log if line)
        return words or "it gave no reason"


_library: LlamaLibrary | None = None


def library() -> LlamaLibrary:
    """The library; loaded at the first call."""
    global _library
    if _library is None:
        _library = LlamaLibrary()
    return _library
