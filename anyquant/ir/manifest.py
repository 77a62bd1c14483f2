"""``anyquant.json``: what an IR folder says of itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from anyquant.errors import AnyquantError, CorruptFileError, InputError
from anyquant.ir.json_io import quoted
from anyquant.ir.spec import Spec, spec_from_json, spec_to_json

if TYPE_CHECKING:
    from anyquant.ir.container import Model

FORMAT_VERSION = "1.0"
MANIFEST = "anyquant.json"
_PLACEHOLDER_DIGEST = "0" * 64
_MAX_NAME = 512


@dataclass(frozen=True)
class Entry:
    """One tensor of the model.

    Attributes:
        spec: kind, shape and parameters.
        sha256: digest of the dequantized FP32 values ("" in a plan).
        error: relative squared error against the source, sum (w - q)**2 / sum w**2; None where nothing was lost.
        output_error: the same of the matrix' outputs, over the inputs of the calibration; None if unknown.
        quantized: whether a method chose its form (such tensors are what ``--bits`` counts).
        source_transposed: whether the checkpoint stores it [in, out].
    """

    spec: Spec
    sha256: str = ""
    error: float | None = None
    output_error: float | None = None
    quantized: bool = False
    source_transposed: bool = False


@dataclass(frozen=True)
class Manifest:
    """The parsed file."""

    anyquant_version: str
    method: str
    settings: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    aliases: dict[str, str]
    entries: dict[str, Entry]


def _error_json(name: str, error: float | None) -> str:
    """Twelve characters whatever the error, or that it is unknown: the size of the file is known before the values."""
    if error is None:
        return "null".ljust(12)
    error = float(error)
    if not 0 <= error < 9e99:
        raise AnyquantError(f"{name}: error {error!r} is not a number in 0..9e99")
    return f"{0.0 if error < 1e-99 else error:.6e}"  # a third digit of the exponent would be a thirteenth character


@lru_cache(1 << 12)  # layers repeat, and a search for a size asks for hundreds of manifests
def _fixed_json(spec: Spec, quantized: bool, source_transposed: bool) -> str:
    fixed = {
        **spec_to_json(spec),
        "quantized": quantized,
        "source_transposed": source_transposed,
        "bits_per_weight": round(spec.bits_per_weight, 6),
    }
    return json.dumps(fixed)[:-1]


def _line(name: str, entry: Entry, calibrated: bool) -> str:
    fixed = _fixed_json(entry.spec, entry.quantized, entry.source_transposed)
    lost = f'"error": {_error_json(name, entry.error or 0.0) if entry.quantized else "null"}'
    if calibrated and entry.quantized:
        lost += f', "output_error": {_error_json(name, entry.output_error)}'
    return f'  {quoted(name)}: {fixed}, "sha256": "{entry.sha256 or _PLACEHOLDER_DIGEST}", {lost}}}'


def manifest_json(model: Model, *, planned: bool = False) -> str:
    """The text of the file for a model, in ASCII.

    Args:
        model: the model.
        planned: whether digests and errors are not known yet; the text is as long as the final one.

    Raises:
        AnyquantError: settings, source or calibration hold something that is not JSON, or an error is negative or NaN.
    """
    head = {
        "format_version": FORMAT_VERSION,
        "anyquant_version": model.anyquant_version,
        "method": model.method,
        "settings": model.settings,
        "source": model.source,
        "calibration": model.calibration,
        "aliases": model.aliases,
    }
    calibrated = model.calibration is not None
    entries = model.entries.items()
    if planned:
        entries = {name: replace(entry, sha256="", error=0.0, output_error=0.0) for name, entry in entries}.items()
    lines = ",\n".join(_line(name, entry, calibrated) for name, entry in entries)
    try:
        text = json.dumps(head, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AnyquantError(f"the model's description cannot be written as JSON: {error}") from error
    return text[:-2] + ',\n "tensors": {\n' + lines + "\n }\n}\n"


def same_plan(one: Model, other: Model) -> bool:
    """Whether two models say the same of themselves, but for digests and errors."""
    return manifest_json(one, planned=True) == manifest_json(other, planned=True)


def manifest_size(model: Model) -> int:
    """Bytes of the file, known before digests and errors are."""
    return len(manifest_json(model, planned=True))


def _take(value: dict[str, Any], key: str, kind: type, where: str) -> Any:
    found = value.get(key)
    if not isinstance(found, kind):
        raise CorruptFileError(f"{MANIFEST}: {where}{key!r} is {found!r:.80}, must be a {kind.__name__}")
    return found


def check_name(name: object) -> None:
    """Check that a tensor's name can stand in a file, a table and a message.

    Raises:
        CorruptFileError: it is empty, very long, or holds control characters or half a surrogate pair.
    """
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= _MAX_NAME):
        raise CorruptFileError(f"{name!a:.80} is no name for a tensor: 1 to {_MAX_NAME} printable characters are")


def _parse_error(name: str, value: dict[str, Any], key: str) -> float | None:
    error = value.get(key)
    # The upper bound also keeps integers out that no float can hold.
    if error is not None and not (type(error) in (int, float) and 0 <= error <= 1e100):
        raise CorruptFileError(f"{MANIFEST}: {name}: {key} is {error!r:.80}, must be null or a number >= 0")
    return None if error is None else float(error)


def _parse_entry(name: str, value: Any) -> Entry:
    check_name(name)
    if not isinstance(value, dict):
        raise CorruptFileError(f"{MANIFEST}: the description of {name} is not a JSON object")
    where = f"{name}: "
    sha256 = _take(value, "sha256", str, where)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise CorruptFileError(f"{MANIFEST}: {name}: sha256 is {sha256!r:.80}, must be 64 hexadecimal digits")
    return Entry(
        spec_from_json(name, value),
        sha256,
        _parse_error(name, value, "error"),
        _parse_error(name, value, "output_error"),
        _take(value, "quantized", bool, where),
        _take(value, "source_transposed", bool, where),
    )


def parse_manifest(value: dict[str, Any]) -> Manifest:
    """Check and read the file's JSON object; unknown fields are ignored.

    Raises:
        InputError: a newer major version.
        CorruptFileError: a field is missing or malformed; names it.
    """
    version = _take(value, "format_version", str, "")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*", version):
        raise CorruptFileError(f"{MANIFEST}: format version {version!r:.40} is not of the form 1.0")
    if int(version.split(".")[0]) != int(FORMAT_VERSION.split(".")[0]):
        raise InputError(
            f"{MANIFEST}: format version {version!r:.40} is not readable by this anyquant, which reads version "
            f"{FORMAT_VERSION.split('.')[0]}. Upgrade anyquant, or quantize again."
        )
    tensors = _take(value, "tensors", dict, "")
    if not tensors:
        raise CorruptFileError(f"{MANIFEST}: lists no tensors")
    entries = {name: _parse_entry(name, entry) for name, entry in tensors.items()}
    aliases = _take(value, "aliases", dict, "")
    for alias, target in aliases.items():
        check_name(alias)
        if not isinstance(target, str) or target not in entries or alias in entries:
            raise CorruptFileError(f"{MANIFEST}: alias {alias!r:.80} does not name a stored tensor: {target!r:.80}")
    method = _take(value, "method", str, "")
    if not method or not method.isprintable():
        raise CorruptFileError(f"{MANIFEST}: 'method' is {method!a:.80}, must be a name")
    source = _take(value, "source", dict, "")
    for key in ("kind", "name", "fingerprint"):
        if key in source:
            _take(source, key, str, "source: ")
    return Manifest(
        _take(value, "anyquant_version", str, "") if "anyquant_version" in value else "",
        method,
        _take(value, "settings", dict, ""),
        source,
        None if value.get("calibration") is None else _take(value, "calibration", dict, ""),
        aliases,
        entries,
    )
