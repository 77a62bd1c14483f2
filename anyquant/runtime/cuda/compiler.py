"""The kernels' sources compiled by NVRTC, through cuda-core, and kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import anyquant
from anyquant.errors import AnyquantError, MachineError, MissingDependency

_DIGEST = 32  # bytes of the SHA-256 that a kept file begins with
_STANDARD = "c++17"


def source_folder() -> Path:
    """Where the sources are: in the installed package, or in the tree that it is imported from.

    Raises:
        AnyquantError: nowhere, so that the installation is not whole.
    """
    folders = [Path(folder) for folder in anyquant.__path__]
    candidates = [
        *(folder / "_kernels" / "cuda" for folder in folders),
        *(folder.parent / "kernels" / "cuda" for folder in folders),
    ]
    found = next((folder for folder in candidates if (folder / "platform.cuh").is_file()), None)
    if found is None:
        raise AnyquantError(
            f"the CUDA sources are in none of {', '.join(map(str, candidates))}: install anyquant again"
        )
    return found


def cache_folder() -> Path:
    """Where compiled kernels are kept: under $ANYQUANT_CACHE, $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ANYQUANT_CACHE"):
        return Path(own) / "cubins"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyquant" / "cubins"


def compiled(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """A file of kernels as a cubin, from the disk or by the compiler.

    Args:
        source: name of the file in :func:`source_folder`.
        macros: that it is compiled with.
        architecture: such as "sm_90".

    Raises:
        MissingDependency: cuda-core or NVRTC is not installed.
        MachineError: the compiler does not know the architecture.
        AnyquantError: it refuses the source; says what it says.
    """
    folder = source_folder()
    digest = hashlib.sha256(f"{source} {sorted(macros.items())} {architecture} {_compiler()}".encode())
    for file in sorted([*folder.glob("*.cuh"), folder / source]):
        digest.update(file.read_bytes())
    kept = cache_folder() / f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:32]}.cubin"
    cubin = _read(kept)
    if cubin is None:
        cubin = _compile(folder, source, macros, architecture)
        _keep(kept, cubin)
    return cubin


def _compiler() -> str:
    """What compiles: another version is another cubin."""
    try:
        return f"nvrtc {version('nvidia-cuda-nvrtc')} {_STANDARD}"
    except PackageNotFoundError:
        return f"nvrtc of the system {_STANDARD}"


def _compile(folder: Path, source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError:
        raise MissingDependency("cuda-core", "cuda", "running kernels on a GPU") from None
    options = ProgramOptions(
        name=source, arch=architecture, std=_STANDARD, include_path=str(folder),
        define_macro=[(name, str(value)) for name, value in sorted(macros.items())] or None,
    )  # fmt: skip
    try:
        code = Program((folder / source).read_text(encoding="utf-8"), "c++", options).compile("cubin").code
    except Exception as error:  # of the compiler, of its library, or that there is none
        message = str(error)
        if "libnvrtc" in message or type(error).__name__ == "DynamicLibNotFoundError":
            raise MissingDependency("nvidia-cuda-nvrtc", "cuda", "compiling kernels for a GPU") from None
        if "gpu-architecture" in message or "INVALID_OPTION" in message:
            raise MachineError(f"{_compiler()} does not compile for {architecture}: {message.strip()}") from None
        raise AnyquantError(f"{source} with {dict(macros)} does not compile for {architecture}: {message}") from None
    assert isinstance(code, bytes)
    return code


def _read(kept: Path) -> bytes | None:
    """A kept cubin; None where there is none, or a damaged one."""
    try:
        content = kept.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _keep(kept: Path, cubin: bytes) -> None:
    """Write under another name first: others may do the same. Where nothing can be written nothing is kept."""
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept.parent, prefix=".cubin-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, kept)
        except OSError:
            os.unlink(name)
            raise
