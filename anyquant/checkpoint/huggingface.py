"""Reader of Hugging Face folders: config.json with safetensors, one file or shards."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from anyquant import ir
from anyquant.checkpoint import names
from anyquant.checkpoint.base import BaseCheckpoint, Rows
from anyquant.checkpoint.finite import to_float32
from anyquant.checkpoint.gguf_names import is_conv1d
from anyquant.checkpoint.protocol import TensorInfo
from anyquant.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from anyquant.checkpoint.tying import ties_by_default
from anyquant.errors import CorruptFileError, InputError

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "*.jinja", "*.model", "tekken.json",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates"
# Model types whose stacked expert tensors are [experts, in, out]; all others are [experts, out, in].
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text"})


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: file, name there, which expert, and whether the last two axes are to be swapped."""

    file: SafetensorsFile
    stored: str
    expert: int | None
    swap: bool

    def view(self) -> np.ndarray:
        """Return the values as stored, in IR orientation, as a view."""
        array = self.file.view(self.stored)
        if self.expert is not None:
            array = array[self.expert]
        return array.T if self.swap else array


class HuggingFaceCheckpoint(BaseCheckpoint):
    """A folder with config.json and safetensors; see the Checkpoint protocol."""

    kind = "huggingface"

    def __init__(self, folder: Path, name: str, *, trust_remote_code: bool = False) -> None:
        """Read config and headers; no weight is read, but tied embeddings that are stored twice are compared.

        Args:
            folder: the model's folder.
            name: what to call it in messages.
            trust_remote_code: keep the model's Python files among the side files.

        Raises:
            InputError: no config or weights, only pickled weights, an already quantized model, an unusable dtype.
            CorruptFileError: a damaged file.
        """
        self.folder, self.name = folder, name
        self._patterns = (*_SIDE_FILES, "*.py") if trust_remote_code else _SIDE_FILES
        self.config = _read_config(folder, name)
        self._shards = _open_shards(folder, name)
        self._places: dict[str, _Place] = {}
        self.tensors = {}
        self.aliases = {}
        for info, place in sorted(self._entries(), key=lambda entry: names.order_key(entry[0].name)):
            self.tensors[info.name], self._places[info.name] = info, place
        if not self.tensors:
            raise InputError(f"{name}: its safetensors files hold no weights.")
        self.transposed = frozenset(name for name, place in self._places.items() if place.swap)
        self._tie()

    def _entries(self) -> list[tuple[TensorInfo, _Place]]:
        """List every weight in the shards, stacked experts split."""
        model_type = str(self._text_config.get("model_type", self.config.get("model_type", "")))
        entries = []
        for file in self._shards:
            for name, stored in file.tensors.items():
                if names.is_buffer(name, stored.shape):
                    log.debug("%s: %s is a constant of the model code, left out", self.name, name)
                    continue
                _check_dtype(file.path.name, name, stored)
                shape, nbytes = stored.shape, stored.nbytes
                if 0 in shape:
                    raise InputError(f"{file.path.name}: {name} has the shape {list(shape)}: there is nothing in it.")
                if names.is_stacked_experts(name, shape):
                    swap = model_type in _EXPERTS_IN_OUT
                    matrix = shape[:0:-1] if swap else shape[1:]
                    entries += [
                        (
                            TensorInfo(f"{name}#{e}", matrix, stored.dtype, nbytes // shape[0]),
                            _Place(file, name, e, swap),
                        )
                        for e in range(shape[0])
                    ]
                    continue
                swap = len(shape) == 2 and is_conv1d(model_type, name)
                info = TensorInfo(name, shape[::-1] if swap else shape, stored.dtype, nbytes)
                entries.append((info, _Place(file, name, None, swap)))
        return entries

    @property
    def _text_config(self) -> dict[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def _tie(self) -> None:
        """Find the tied output head: missing from the file, or stored twice with the same bytes."""
        embedding = next((n for n in self.tensors if names.is_token_embedding(n)), None)
        head = next((n for n in self.tensors if names.is_head(n)), None)
        if embedding is None:
            return
        flag = self.config.get("tie_word_embeddings", self._text_config.get("tie_word_embeddings"))
        if head is None:
            model_type = str(self._text_config.get("model_type", ""))
            if flag if flag is not None else ties_by_default(model_type):
                self.aliases["embed_out.weight" if "embed_in" in embedding else "lm_head.weight"] = embedding
            else:
                log.warning("%s: has no output head and says that embeddings are not tied", self.name)
            return
        if self._same_bytes(embedding, head):
            del self.tensors[head]
            self.aliases[head] = embedding
        elif flag if flag is not None else ties_by_default(str(self._text_config.get("model_type", ""))):
            log.warning(
                "%s: its config ties the embeddings, but %s differs from %s in the file; the file's values are kept",
                self.name,
                head,
                embedding,
            )
            # Loaders would otherwise tie and drop the head that the file holds.
            self.config = {**self.config, "tie_word_embeddings": False}

    def _same_bytes(self, a: str, b: str) -> bool:
        first, second = self.tensors[a], self.tensors[b]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        x, y = self._places[a].view(), self._places[b].view()
        return all(x[rows].tobytes() == y[rows].tobytes() for rows in ir.row_chunks(first.shape))

    def _values(self, name: str, rows: Rows) -> np.ndarray:
        view = self._places[name].view()
        return to_float32(view if rows is None or not view.shape else view[rows], self.tensors[name].dtype)

    def _stored(self, name: str) -> ir.Tensor:
        # A copy: aligned, and independent of the file.
        return ir.Tensor(self.spec(name), {".dense": self._places[name].view().copy(order="C")})

    def spec(self, name: str) -> ir.Spec:
        """Return the form of ``raw(name)``: dense, in the stored dtype."""
        info = self.tensors[name]
        return ir.DenseSpec(info.shape, info.dtype)

    def _where(self, name: str) -> str:
        return f"{self.name}/{self._places[name].file.path.name}"

    def _files(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def write_side_files(self, folder: Path) -> None:
        """Copy config, tokenizer, chat template and generation settings verbatim."""
        folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / _MORE_TEMPLATES).is_dir():
            log.warning(
                "%s: the chat templates in its folder %s are left behind, that in chat_template.jinja is kept. To keep "
                "all, save the tokenizer with save_jinja_files=False to an empty folder, and take its files instead.",
                self.name,
                _MORE_TEMPLATES,
            )
        for name, path in self.side_files().items():
            shutil.copyfile(path, folder / name)

    def side_files(self) -> dict[str, Path]:
        """Return config, tokenizer, chat template and generation settings, where they lie."""
        found = (p for p in sorted(self.folder.iterdir()) if p.is_file())
        return {p.name: p for p in found if any(fnmatch(p.name, pattern) for pattern in self._patterns)}


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"Give the GGUF file itself: {folder / ggufs[0]}" if ggufs else "Give a model's folder."
        raise InputError(f"{name}: there is no config.json in this folder. {hint}")
    config = ir.read_json(path)
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            raise InputError(
                f"{name}: is already quantized (quantization_config in config.json, method {method!r}). Quantizing "
                "twice adds up both errors: start from the original model."
            )
    return config


def _open_shards(folder: Path, name: str) -> list[SafetensorsFile]:
    index = folder / INDEX
    if index.is_file():
        return _open_index(folder, index)
    single = folder / SINGLE
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise InputError(
                f"{name}: has only pickled weights ({pickled[0]}), which can run code when they are read. "
                "Convert them: load the model with transformers and save_pretrained(folder), which writes safetensors."
            )
        raise InputError(f"{name}: there is no .safetensors file in this folder. Give a model's folder.")
    if len(paths) > 1:
        raise InputError(
            f"{name}: holds {len(paths)} .safetensors files but no {INDEX} that says how they belong together. "
            "Download the index too."
        )
    return [SafetensorsFile(paths[0])]


def read_index(index: Path) -> dict[str, str]:
    """Read which shard holds which tensor: tensor name -> plain file name.

    Raises:
        CorruptFileError: it does not say so.
    """
    weight_map = ir.read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        raise CorruptFileError(f"{index.name}: has no weight_map from tensor names to file names.")
    for file in weight_map.values():
        if Path(file).name != file:
            raise CorruptFileError(f"{index.name}: names the shard {file!r}, which is not a plain file name.")
    return weight_map


def _open_index(folder: Path, index: Path) -> list[SafetensorsFile]:
    """Open the shards that an index lists and check that each holds just what the index says."""
    weight_map = read_index(index)
    shards = []
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise InputError(f"{index.name}: the shard {file} is missing. Download the model again.")
        shard = SafetensorsFile(folder / file)
        listed = {tensor for tensor, where in weight_map.items() if where == file}
        for tensors, what in ((listed - set(shard.tensors), "lacks"), (set(shard.tensors) - listed, "also holds")):
            if tensors:
                raise CorruptFileError(
                    f"{file}: {what} {len(tensors)} tensor{'s' * (len(tensors) != 1)} against {index.name}, "
                    f"the first {min(tensors)}. Index and shards are not of one model: download it again."
                )
        shards.append(shard)
    return shards


def _check_dtype(file: str, name: str, stored: StoredTensor) -> None:
    if stored.dtype in ir.DENSE_DTYPES:
        return
    kind = "an 8-bit or smaller float" if stored.dtype.startswith(("F8", "F6", "F4")) else "not a floating type"
    raise InputError(
        f"{file}: {name} is {stored.dtype}, {kind}: this checkpoint is quantized already or holds something "
        "other than weights. Start from an F32, F16 or BF16 original."
    )
