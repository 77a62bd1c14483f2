"""Block tensors made from plain integers, and IR folders of tiny and of real models."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from anyquant import ir
from anyquant.checkpoint.gguf_names import is_conv1d
from anyquant.exporters.gguf import container
from anyquant.gguf_container import parse
from anyquant.ir.packing import pack


def _from_integers(k: np.ndarray, exponents: np.ndarray, width: int, block: int) -> ir.Tensor:
    """BFP tensor of integers k [out, in] and exponents [out, blocks]; zero blocks get their mark."""
    out, columns = k.shape
    blocks = -(-columns // block)
    padded = np.zeros((out, blocks * block), np.int64)
    padded[:, :columns] = k
    empty = ~padded.reshape(out, blocks, block).any(axis=2)
    codes = np.where(padded < 0, -padded | (1 << (width - 1)), padded).astype(np.uint8)
    arrays = {".codes": pack(codes, width), ".exponents": np.where(empty, -128, exponents).astype(np.int8)}
    tensor = ir.Tensor(ir.BlockSpec((out, columns), "bfp", width, block), arrays)
    tensor.check("made here")
    return tensor


def _quantized(values: np.ndarray, width: int = 4, block: int = 32) -> ir.Tensor:
    """BFP of float values by rounding; columns must be whole blocks."""
    out, columns = values.shape
    parts = values.astype(np.float64).reshape(out, -1, block)
    top = np.abs(parts).max(axis=2)
    exponents = np.where(top > 0, np.ceil(np.log2(np.where(top > 0, top, 1))), 0).astype(np.int64)
    largest = 2 ** (width - 1) - 1
    k = np.clip(np.rint(np.ldexp(parts, (width - 1 - exponents)[..., None])), -largest, largest)
    return _from_integers(k.reshape(out, columns).astype(np.int64), exponents, width, block)


@pytest.fixture(scope="session")
def bfp() -> Callable[[np.ndarray, np.ndarray, int, int], ir.Tensor]:
    """bfp(integers, exponents, width, block) -> tensor."""
    return _from_integers


@pytest.fixture(scope="session")
def quantized() -> Callable[..., ir.Tensor]:
    """quantized(values, width=4, block=32) -> BFP tensor."""
    return _quantized


@pytest.fixture(scope="session")
def raw_value() -> Callable[[object], bytes]:
    """raw_value(text, int, float, bool or list of texts) -> key-value bytes."""

    def encode(value: object) -> bytes:
        if isinstance(value, str):
            return container.string_value(value)
        if isinstance(value, bool):
            return container.bool_value(value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, list):
            texts = [str(text).encode() for text in value]
            head = struct.pack("<IIQ", 9, 8, len(texts))
            return head + b"".join(struct.pack("<Q", len(text)) + text for text in texts)
        assert isinstance(value, int)
        return container.uint32_value(value)

    return encode


@pytest.fixture(scope="session")
def save_ir() -> Callable[..., ir.Model]:
    """save_ir(folder, tensors, config, *, aliases, kind, files, settings) -> the opened IR folder."""

    def save(
        folder: Path,
        tensors: dict[str, ir.Tensor],
        config: dict[str, Any],
        *,
        aliases: dict[str, str] | None = None,
        kind: str = "huggingface",
        files: dict[str, bytes] | None = None,
    ) -> ir.Model:
        entries = {
            name: ir.Entry(tensor.spec, quantized=tensor.spec.kind != "dense") for name, tensor in tensors.items()
        }
        source = {"kind": kind, "name": "tests/tiny", "fingerprint": "f" * 64}
        plan = ir.Model(None, config, "block", {"width": 4}, source, entries, aliases or {}, anyquant_version="0.1.0")

        def side_files(target: Path) -> None:
            for name, content in (files or {}).items():
                (target / name).write_bytes(content)

        return ir.write_ir(folder, plan, lambda name: (tensors[name], ir.Loss(0.0)), side_files)

    return save


@pytest.fixture(scope="session")
def ir_of_folder(save_ir: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    """ir_of_folder(checkpoint, folder, width=4) -> IR of a tiny Hugging Face folder, its linear layers in BFP.

    Reads safetensors directly, so that names and orientation don't come from the code under test.
    """

    def make(checkpoint: Path, folder: Path, width: int = 4) -> ir.Model:
        config = json.loads((checkpoint / "config.json").read_text())
        tensors = {}
        for name, values in load_file(checkpoint / "model.safetensors").items():
            if is_conv1d(config["model_type"], name):
                values = np.ascontiguousarray(values.T)
            if values.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                tensors[name] = _quantized(values, width)
            else:
                tensors[name] = ir.Tensor(ir.DenseSpec(values.shape, "F32"), {".dense": values})
        skip = ("config.json", "model.safetensors")
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name not in skip}
        return save_ir(folder, tensors, config, files=files)

    return make


@pytest.fixture(scope="session")
def with_smol_tokenizer(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """with_smol_tokenizer(checkpoint) -> a copy with SmolLM2's byte-level BPE, whose hash the converter knows."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    header = parse(real_gguf.read_bytes(), real_gguf.name)
    tokens = header.get("tokenizer.ggml.tokens")
    kinds = header.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in header.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    saved = tmp_path_factory.mktemp("smol-tokenizer") / "tokenizer.json"
    tokenizer.save(str(saved))

    def copy(checkpoint: Path) -> Path:
        folder = tmp_path_factory.mktemp("smol") / checkpoint.name
        shutil.copytree(checkpoint, folder)
        shutil.copy(saved, folder / "tokenizer.json")
        fixed = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        description = {"tokenizer_class": "PreTrainedTokenizerFast", **fixed}
        (folder / "tokenizer_config.json").write_text(json.dumps(description))
        return folder

    return copy


def _dense(values: np.ndarray, dtype: str = "F32") -> ir.Tensor:
    return ir.Tensor(ir.DenseSpec(values.shape, dtype), {".dense": values})


@pytest.fixture
def tensors(quantized: Callable[..., ir.Tensor]) -> dict[str, ir.Tensor]:
    """Tensors of a tiny llama in BFP of 4, 5 and 8 bits, F16, BF16 and F32."""
    layer = "model.layers.0"
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "model.embed_tokens.weight": _dense(normal(50, 64).astype(np.float16), "F16"),
        f"{layer}.input_layernorm.weight": _dense(normal(64).astype(np.float16), "F16"),
        f"{layer}.self_attn.q_proj.weight": quantized(normal(64, 64)),
        f"{layer}.self_attn.k_proj.weight": quantized(normal(32, 64), 5),
        f"{layer}.self_attn.k_proj.bias": _dense(normal(32).view(np.uint32).__rshift__(16).astype(np.uint16), "BF16"),
        f"{layer}.mlp.up_proj.weight": quantized(normal(96, 64), 8),
        "model.norm.weight": _dense(normal(64)),
    }


@pytest.fixture
def source(raw_value: Callable[[object], bytes]) -> dict[str, bytes]:
    """Key-values of the GGUF file that the model came from."""
    return {
        "general.architecture": raw_value("llama"),
        "general.name": raw_value("Tiny"),
        "general.file_type": raw_value(3),
        "llama.attention.head_count": raw_value(4),
        "llama.attention.head_count_kv": raw_value(2),
        "llama.embedding_length": raw_value(64),
        "split.count": raw_value(2),
        "tokenizer.ggml.tokens": raw_value(["a", "b"]),
        "tokenizer.ggml.merges": raw_value([]),
    }


@pytest.fixture
def save_tiny(source: dict[str, bytes], save_ir: Callable[..., ir.Model], tmp_path: Path) -> Callable[..., ir.Model]:
    """save_tiny(tensors, **options of save_ir) -> the IR folder of a tiny llama that came from a GGUF file."""
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}

    def save(tensors: dict[str, ir.Tensor], **options: Any) -> ir.Model:
        files = {"source.gguf": container.header_bytes(source, [])}
        return save_ir(tmp_path / "ir", tensors, config, **{"kind": "gguf", "files": files, **options})

    return save


@pytest.fixture
def model(tensors: dict[str, ir.Tensor], save_tiny: Callable[..., ir.Model]) -> ir.Model:
    """The tiny llama, its head tied."""
    return save_tiny(tensors, aliases={"lm_head.weight": "model.embed_tokens.weight"})
