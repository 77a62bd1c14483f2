"""Reader of GGUF files: Hugging Face names, order and values, block by block."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from anyquant import ir
from anyquant.checkpoint import names
from anyquant.checkpoint.base import BaseCheckpoint, Rows
from anyquant.checkpoint.finite import to_float32
from anyquant.checkpoint.gguf_config import architecture, synthesize_config
from anyquant.checkpoint.gguf_file import GGUFFile
from anyquant.checkpoint.gguf_names import (
    ROPE_TENSORS,
    gguf_to_hf_name,
    inverse_permutation,
    is_conv1d,
    layer_tensors,
    norm_offset,
    row_permutation,
    rows_by_heads,
)
from anyquant.checkpoint.gguf_tokenizer import write_tokenizer
from anyquant.checkpoint.protocol import TensorInfo
from anyquant.errors import CorruptFileError, InputError
from anyquant.gguf_container import StoredTensor

log = logging.getLogger(__name__)

SOURCE_HEADER = "source.gguf"
"""Name of the side file that keeps all key-values of the source."""


class GGUFCheckpoint(BaseCheckpoint):
    """A GGUF file; see the Checkpoint protocol."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Read the header; no weight is read.

        Raises:
            CorruptFileError: a damaged file, or tensors that contradict the metadata.
            UnknownArchitecture: an architecture whose names and layout are not known.
            InputError: unknown tensors, or a tensor type that cannot be dequantized.
            MissingDependency: the gguf package is not installed.
        """
        self.name = path.name
        self._file = GGUFFile(path)
        self._arch = architecture(self._file)
        self.config = synthesize_config(self._file)
        self._gguf_names = self._translate()
        self.tensors = {}
        for name in sorted(self._gguf_names, key=names.order_key):
            stored = self._file.tensors[self._gguf_names[name]]
            self._check(name, stored)
            self.tensors[name] = TensorInfo(name, stored.shape, stored.type, stored.nbytes)
        tied = self.config["tie_word_embeddings"]
        embedding = gguf_to_hf_name(self._arch, "token_embd.weight")
        self.aliases = {"lm_head.weight": str(embedding)} if tied else {}
        # GGUF stores [out, in]; transformers' model wants [in, out].
        self.transposed = frozenset(n for n in self.tensors if is_conv1d(self._arch, n))

    def _translate(self) -> dict[str, str]:
        """Map Hugging Face names to the file's names; refuse unknown and missing tensors."""
        found: dict[str, str] = {}
        unknown = []
        for gguf_name in self._file.tensors:
            hf_name = gguf_to_hf_name(self._arch, gguf_name)
            if hf_name is not None:
                found[hf_name] = gguf_name
            elif gguf_name not in ROPE_TENSORS:
                unknown.append(gguf_name)
        if unknown:
            raise InputError(
                f"{self.name}: {len(unknown)} tensors are not part of a {self._arch} model: {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}. A variant (experts, adapters) that is not read from GGUF: "
                "start from the model's Hugging Face folder."
            )
        layers = int(self.config.get("num_hidden_layers") or self.config["n_layer"])
        # A hostile count must not make the list below long.
        missing = (
            [f"blk.{len(self._file.tensors)}"]
            if layers > len(self._file.tensors)
            else [n for n in layer_tensors(self._arch, layers) if n not in self._file.tensors]
        )
        if missing:
            raise CorruptFileError(
                f"{self.name}: {layers} layers of {self._arch} need {len(missing)} tensors that the file lacks, the "
                f"first {missing[0]}. Download or convert the model again."
            )
        beyond = [g for g in found.values() if g.startswith("blk.") and int(g.split(".")[1]) >= layers]
        if beyond:
            raise CorruptFileError(f"{self.name}: {beyond[0]} lies beyond the {layers} layers of the model.")
        return found

    def _check(self, name: str, stored: StoredTensor) -> None:
        """Refuse types without a dequantizer and rows that contradict the heads."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = rows_by_heads(self._arch, name, self.config)
        if rows is not None and rows != stored.shape[0]:
            raise CorruptFileError(
                f"{self.name}: {name} has {stored.shape[0]} rows, the heads in the metadata make {rows}."
            )
        if stored.type in ir.DENSE_DTYPES:
            return
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, stored.block_bytes), np.uint8), GGMLQuantizationType[stored.type])
        except NotImplementedError as error:
            raise InputError(
                f"{self.name}: {name} is {stored.type}, which the gguf package cannot dequantize. Start from a file in "
                "another type, or from the original model."
            ) from error

    def _rows(self, name: str, rows: Rows) -> np.ndarray:
        """Return stored bytes [..., row bytes] of the rows in Hugging Face's order (a view where it is the same)."""
        blocks = self._file.blocks(self._gguf_names[name])
        order = row_permutation(self._arch, name, self.config)
        if blocks.ndim == 1:
            # A vector's elements are its rows; quantized vectors are read whole.
            stored = self._file.tensors[self._gguf_names[name]]
            if stored.type not in ir.DENSE_DTYPES:
                return blocks
            blocks = blocks.reshape(stored.shape[0], stored.block_bytes)
        if order is not None:
            inverse = inverse_permutation(order)
            picked: np.ndarray = blocks[inverse if rows is None else inverse[rows]]
            return picked
        return blocks if rows is None else blocks[rows]

    def _values(self, name: str, rows: Rows) -> np.ndarray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        stored = self._rows(name, rows)
        if info.dtype in ir.DENSE_DTYPES:
            values = to_float32(np.ascontiguousarray(stored).view(ir.DENSE_DTYPES[info.dtype]), info.dtype)
            values = values.reshape(-1) if len(info.shape) == 1 else values
        elif len(info.shape) == 1:
            with np.errstate(all="ignore"):
                values = dequantize(np.ascontiguousarray(stored), GGMLQuantizationType[info.dtype])
            values = np.array(values if rows is None else values[rows], np.float32)
        else:
            values = np.empty((*stored.shape[:-1], info.shape[-1]), np.float32)
            # By pieces: dequantize makes several temporaries of the size of its result.
            for part in ir.row_chunks(values.shape):
                with np.errstate(all="ignore"):
                    values[part] = dequantize(np.ascontiguousarray(stored[part]), GGMLQuantizationType[info.dtype])
        offset = norm_offset(self._arch, name)
        return values - np.float32(offset) if offset else values

    def spec(self, name: str) -> ir.Spec:
        """Return the form of ``raw(name)``: stock blocks as they are, what the IR has no form for in F32."""
        info = self.tensors[name]
        if info.dtype in ir.GGML_TYPES and len(info.shape) == 2:
            return ir.GGMLSpec((info.shape[0], info.shape[1]), info.dtype)
        kept = info.dtype in ir.DENSE_DTYPES and not norm_offset(self._arch, name)
        return ir.DenseSpec(info.shape, info.dtype if kept else "F32")

    def _stored(self, name: str) -> ir.Tensor:
        info, spec = self.tensors[name], self.spec(name)
        if isinstance(spec, ir.GGMLSpec):
            return ir.Tensor(spec, {".blocks": np.array(self._rows(name, None))})
        assert isinstance(spec, ir.DenseSpec)
        if spec.dtype == info.dtype and not norm_offset(self._arch, name):
            dense = np.array(self._rows(name, None)).view(ir.DENSE_DTYPES[info.dtype]).reshape(info.shape)
            return ir.Tensor(spec, {".dense": dense})
        if info.dtype not in ir.DENSE_DTYPES:
            log.warning("%s: %s is %s, kept as F32 in the intermediate representation", self.name, name, info.dtype)
        return ir.Tensor(spec, {".dense": self._values(name, None)})

    def side_files(self) -> dict[str, Path]:
        """Return the file itself: its key-values are what source.gguf will hold."""
        return {SOURCE_HEADER: self._file.path}

    def _where(self, name: str) -> str:
        return f"{self.name} (there {self._gguf_names[name]})"

    def _files(self) -> list[Path]:
        return [self._file.path]

    def write_side_files(self, folder: Path) -> None:
        """Write source.gguf (every key-value, no tensors), config.json, tokenizer files and generation_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SOURCE_HEADER).write_bytes(self._file.header_only())
        generation = {k: self.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # A chat's turn may end with another token than the text.
        turn = self._file.get("tokenizer.ggml.eot_token_id", int)
        if turn is not None and turn != generation["eos_token_id"]:
            generation["eos_token_id"] = [t for t in (generation["eos_token_id"], turn) if t is not None]
        generation = {key: value for key, value in generation.items() if value is not None}
        for file, content in (("config.json", self.config), ("generation_config.json", generation)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(folder, SOURCE_HEADER, self.name)
