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
from anyquant.checkpoint.gguf_names import gguf_to_hf_name, inverse_permutation, is_conv1d, row_permutation
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

        return ir.write_ir(folder, plan, lambda name: (tensors[name], 0.0), side_files)

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


@pytest.fixture(scope="session")
def real_ir(real_gguf: Path, save_ir: Callable[..., ir.Model], tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """SmolLM2 with all linear layers in BFP4 of 32, embedding and norms as they are in its GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    header = parse(real_gguf.read_bytes(), real_gguf.name)
    config = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    tensors = {}
    for found in GGUFReader(real_gguf).tensors:
        name = gguf_to_hf_name("llama", found.name)
        assert name is not None
        if found.tensor_type.name == "F32":
            stored = np.array(found.data)
            tensors[name] = ir.Tensor(ir.DenseSpec(stored.shape, "F32"), {".dense": stored})
        elif found.tensor_type.name == "Q8_0":
            shape = tuple(int(n) for n in reversed(found.shape))
            assert len(shape) == 2
            tensors[name] = ir.Tensor(ir.GGMLSpec(shape, "Q8_0"), {".blocks": np.array(found.data)})
        else:
            values = dequantize(found.data, found.tensor_type)
            order = row_permutation("llama", name, config)
            tensors[name] = _quantized(values if order is None else values[inverse_permutation(order)])
    return save_ir(
        tmp_path_factory.mktemp("real") / "ir",
        tensors,
        config,
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        kind="gguf",
        files={"source.gguf": container.header_bytes(header.values, [])},
    )
