"""Opening an exported model in ONNX Runtime, with our kernels for the operators that ONNX Runtime does not have.

``libanyquant_onnxruntime`` (kernels/onnxruntime) is one file for ONNX Runtime 1.20 and later. Without it the functions
in the model compute the same. Its kernel for NVIDIA GPUs has run on none yet: with ANYQUANT_ONNXRUNTIME_CUDA=1 in the
environment it is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyquant.errors import CorruptFileError, InputError, MachineError, MissingDependency, UsageError
from anyquant.runtime import native

if TYPE_CHECKING:
    import onnxruntime

LIBRARY = "libanyquant_onnxruntime.so"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Provider = str | tuple[str, dict[str, Any]]
_OPERATOR = b"CodebookMatMul"


def model_file(path: Path) -> Path:
    """The graph in an exported folder.

    Raises:
        CorruptFileError: there is none.
    """
    if not (path / "model.onnx").is_file():
        raise CorruptFileError(f"{path} holds no ONNX model: give the folder that 'anyquant export onnx' wrote")
    return path / "model.onnx"


def operators() -> Path:
    """The library of operators that is installed with anyquant.

    Raises:
        MachineError: there is none.
    """
    return native.required(LIBRARY, "the operators for ONNX Runtime are")


def operators_beside(file: Path) -> Path | None:
    """The installed library, where a model was exported with it, or None.

    What lies beside a model is compared with it byte for byte, and not run: a folder may come from anywhere.

    Raises:
        InputError: it is another one.
        MachineError: there is none to compare it with.
    """
    beside = file.with_name(LIBRARY)
    if not beside.exists():
        return None
    installed = operators()
    same = beside.is_file() and beside.stat().st_size == installed.stat().st_size
    if not same or beside.read_bytes() != installed.read_bytes():
        raise InputError(
            f"{beside} is not the library of this anyquant, and is not run. Export the model again, or remove the "
            "file, and custom_ops_library from genai_config.json: the functions in the model compute the same."
        )
    return installed


def register(options: onnxruntime.SessionOptions, library: Path) -> None:
    """Let sessions with these options have the operators.

    Raises:
        MachineError: ONNX Runtime cannot load the library.
    """
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise MachineError(f"ONNX Runtime cannot load {library}: {error}") from None


def onnx_session(
    folder: str | Path,
    options: onnxruntime.SessionOptions | None = None,
    *,
    providers: Sequence[Provider] = (CPU,),
) -> onnxruntime.InferenceSession:
    """Open a folder that ``anyquant export onnx`` wrote, or a file in one, in ONNX Runtime.

    Codebook matrices are multiplied with by the installed library of operators where the CPU is the first provider, or
    where CUDA is and ANYQUANT_ONNXRUNTIME_CUDA=1 is in the environment; elsewhere, or with a RuntimeWarning if there is
    no such library, by the functions in the model.

    Args:
        folder: the folder, or a file that ends in .onnx.
        options: of this session and no other, as the library is registered in them.
        providers: of the session; names, or pairs of a name and options.

    Raises:
        MissingDependency: onnxruntime is not installed.
        UsageError: another session has these options, or no provider is named.
        MachineError: ONNX Runtime cannot load the library.
        InputError: there is no such folder, or ONNX Runtime refuses it.
        CorruptFileError: it holds no model.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingDependency("onnxruntime", "onnxruntime", "running an ONNX file") from None
    path = Path(folder)
    if not path.exists():
        raise InputError(f"there is no {path}")
    file = path if path.is_file() else model_file(path)
    options = options or ort.SessionOptions()
    if not providers:
        raise UsageError(f"no execution provider is named for {file}; the CPU's is {CPU}")
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    ours = first == CPU or (first == CUDA and os.environ.get("ANYQUANT_ONNXRUNTIME_CUDA") == "1")
    if ours and _OPERATOR in file.read_bytes():
        if native.path_of(LIBRARY) is None:
            reason = native.missing(LIBRARY)
            warnings.warn(f"{file} runs without our kernels: {reason}", RuntimeWarning, stacklevel=2)
        else:
            register(options, operators())
    return open_session(file, options, providers)


def open_session(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[Provider] = (CPU,)
) -> onnxruntime.InferenceSession:
    """A session with these options, as they are.

    Raises:
        InputError: ONNX Runtime refuses the file.
        UsageError: operators are registered twice in the options.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:
        if "already set in registry" in str(error):
            raise UsageError(f"these options have been used for a session before {file}: make new ones") from None
        raise InputError(f"ONNX Runtime {ort.__version__} cannot load {file}: {error}") from None
