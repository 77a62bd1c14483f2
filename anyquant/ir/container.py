"""An IR folder, format version 1: opened lazily, every claim checked before it is used.

The folder looks like a Hugging Face checkpoint, but its weights are in ``anyquant*.safetensors`` and no key
ends in a bare ``.weight``: a loader that does not know anyquant stops instead of reading noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.errors import AnyquantError, CorruptFileError, InputError
from anyquant.ir.dequantize import dequantize
from anyquant.ir.json_io import read_json
from anyquant.ir.manifest import FORMAT_VERSION, MANIFEST, Entry, manifest_size, parse_manifest
from anyquant.ir.safetensors_io import Entry as ArrayEntry
from anyquant.ir.safetensors_io import SafetensorsReader, file_size
from anyquant.ir.tensor import Tensor

WEIGHTS = "anyquant.safetensors"
INDEX = "anyquant.safetensors.index.json"
SHARD_BYTES = 4 << 30


@dataclass
class Model:
    """A quantized model: its description, and its tensors on demand.

    Built by :func:`open_ir` from a folder, or by the pipeline without values, to plan.

    Attributes:
        path: the folder; None for a plan.
        config: the source's config.json.
        method: name of the method that quantized it.
        settings: the method's settings.
        source: {"kind": "gguf" | "huggingface", "name": ..., "fingerprint": ...}.
        entries: name -> description, in the checkpoint's order.
        aliases: tied name -> stored name.
        files: name -> path of every side file (tokenizer, generation settings, source.gguf, ...).
        anyquant_version: the version that wrote it.
        calibration: fingerprint and settings of the calibration; None where the method needs none.
    """

    path: Path | None
    config: dict[str, Any]
    method: str
    settings: dict[str, Any]
    source: dict[str, Any]
    entries: dict[str, Entry]
    aliases: dict[str, str]
    files: dict[str, Path] = field(default_factory=dict)
    anyquant_version: str = ""
    calibration: dict[str, Any] | None = None
    _readers: dict[str, SafetensorsReader] = field(default_factory=dict, repr=False)

    @property
    def has_values(self) -> bool:
        """Whether tensors can be read, or only described."""
        return bool(self._readers)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors, headers not counted."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all tensors."""
        return 8 * self.nbytes / max(1, sum(e.spec.numel for e in self.entries.values()))

    @property
    def quantized_bits(self) -> float:
        """Stored bits per weight over the quantized matrices: what ``--bits`` counts."""
        chosen = [entry.spec for entry in self.entries.values() if entry.quantized]
        return 8 * sum(s.nbytes for s in chosen) / max(1, sum(s.numel for s in chosen))

    def tensor(self, name: str) -> Tensor:
        """Read and check one tensor.

        Raises:
            CorruptFileError: an array is out of range.
        """
        if not self._readers:
            raise AnyquantError(f"{name}: this model is a plan and holds no values")
        spec = self.entries[name].spec
        arrays = {suffix: self._readers[name + suffix].read(name + suffix) for suffix in spec.arrays()}
        tensor = Tensor(spec, arrays)
        tensor.check(name)
        return tensor

    def array(self, name: str, suffix: str) -> np.ndarray:
        """Read one array of a tensor, such as the ``.bits`` of a codebook; its values are not checked."""
        if not self._readers:
            raise AnyquantError(f"{name}: this model is a plan and holds no values")
        return self._readers[name + suffix].read(name + suffix)

    def dequantize(self, name: str) -> np.ndarray:
        """FP32 values of one tensor, in the IR's orientation.

        Raises:
            CorruptFileError: an array is out of range.
        """
        return dequantize(self.tensor(name))


def array_entries(entries: dict[str, Entry]) -> list[ArrayEntry]:
    """(key, dtype, shape) of every stored array, in order."""
    return [
        (name + suffix, dtype, shape)
        for name, entry in entries.items()
        for suffix, (dtype, shape) in entry.spec.arrays().items()
    ]


def shards(entries: dict[str, Entry], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names. Tensors are never split; a shard holds at least one."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.spec.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entry.spec.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"anyquant-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _weight_map(entries: dict[str, Entry], files: dict[str, list[str]]) -> dict[str, str]:
    return {
        name + suffix: file for file, names in files.items() for name in names for suffix in entries[name].spec.arrays()
    }


def index_json(entries: dict[str, Entry], files: dict[str, list[str]]) -> str:
    """The text of the shard index, in the layout of Hugging Face's."""
    weight_map = _weight_map(entries, files)
    total = sum(entry.spec.nbytes for entry in entries.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def config_json(model: Model) -> str:
    """The text of config.json: the source's, with the quantization named."""
    config = dict(model.config)
    config["quantization_config"] = {"quant_method": "anyquant", "format_version": FORMAT_VERSION}
    return json.dumps(config, indent=2) + "\n"


def file_sizes(model: Model, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Exact bytes of every file of the folder that anyquant itself makes; side files come on top."""
    files = shards(model.entries, shard_bytes)
    sizes = {
        file: file_size(array_entries({name: model.entries[name] for name in names}), {"format": "anyquant"})
        for file, names in files.items()
    }
    if len(files) > 1:
        sizes[INDEX] = len(index_json(model.entries, files).encode())
    sizes[MANIFEST] = manifest_size(model)
    sizes["config.json"] = len(config_json(model).encode())
    return sizes


def _weight_map_of(path: Path) -> dict[str, str] | None:
    """Key -> file name, as the index says; None where there is no index."""
    if not (path / INDEX).exists():
        return None
    if (path / WEIGHTS).exists():
        raise CorruptFileError(f"{path} holds both {WEIGHTS} and {INDEX}: two models are mixed in it")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError(f"{INDEX}: weight_map does not map keys to file names")
    for file in weight_map.values():
        if Path(file).name != file or not file.isprintable() or not file.endswith(".safetensors"):
            raise CorruptFileError(f"{INDEX}: {file!a:.80} is not the name of a safetensors file in this folder")
    return weight_map


def _open_weights(path: Path, entries: dict[str, Entry]) -> tuple[dict[str, SafetensorsReader], set[str]]:
    """Key -> reader, and the names of the files. Manifest, index and headers must agree on every key."""
    weight_map = _weight_map_of(path)
    names = [WEIGHTS] if weight_map is None else list(dict.fromkeys(weight_map.values()))
    readers: dict[str, SafetensorsReader] = {}
    for file in names:
        reader = SafetensorsReader(path / file)
        for key in reader.entries:
            if key in readers:
                raise CorruptFileError(f"{key!a:.80} is both in {readers[key].path.name} and in {file}")
            if weight_map is not None and weight_map.get(key) != file:
                raise CorruptFileError(f"{INDEX} says that {key!a:.80} is in {weight_map.get(key)}, it is in {file}")
            readers[key] = reader
    expected = array_entries(entries)
    for key, dtype, shape in expected:
        if key not in readers:
            raise CorruptFileError(f"{key}: {MANIFEST} lists it, but the safetensors files do not hold it")
        readers[key].expect(key, dtype, shape)
    extra = (set(readers) | set(weight_map or ())) - {key for key, _, _ in expected}
    if extra:
        raise CorruptFileError(f"{MANIFEST} does not list {min(extra)!a:.80}, which the safetensors files or index do")
    return readers, set(names)


def open_ir(path: str | Path) -> Model:
    """Open an IR folder. Reads headers alone; schema, keys, dtypes, shapes and sizes are checked.

    Raises:
        InputError: not a folder of anyquant's, or a file of it is missing.
        CorruptFileError: a file is truncated, edited or contradicts another.
    """
    try:
        return _open(Path(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: Path) -> Model:
    if not path.is_dir():
        model, folder = (path, f"{path.stem}-quantized") if path.is_file() else ("MODEL", path)
        raise InputError(f"{path} is not a folder. 'anyquant quantize {model} -o {folder}' writes an IR folder.")
    if not (path / MANIFEST).exists():
        raise InputError(
            f"{MANIFEST} is missing in {path}: not a folder of anyquant's. 'anyquant quantize MODEL -o DIR' writes one."
        )
    manifest = parse_manifest(read_json(path / MANIFEST, finite=True))
    config = read_json(path / "config.json")  # some families' hold Infinity
    config.pop("quantization_config", None)
    readers, weights = _open_weights(path, manifest.entries)
    own = {MANIFEST, "config.json", INDEX} | weights
    return Model(
        path=path,
        config=config,
        method=manifest.method,
        settings=manifest.settings,
        source=manifest.source,
        entries=manifest.entries,
        aliases=manifest.aliases,
        files={p.name: p for p in sorted(path.iterdir()) if p.is_file() and p.name not in own},
        anyquant_version=manifest.anyquant_version,
        calibration=manifest.calibration,
        _readers=readers,
    )
