"""Opening an exported model in ONNX Runtime, with our kernels for the operators that ONNX Runtime does not have.

``libanyquant_onnxruntime`` (kernels/onnxruntime) is one file for ONNX Runtime 1.17 and later. Without it the functions
in the model compute the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anyquant.errors import CorruptFileError, InputError, MachineError, MissingDependency
from anyquant.runtime import native

if TYPE_CHECKING:
    import onnxruntime

LIBRARY = "libanyquant_onnxruntime.so"
CPU = "CPUExecutionProvider"
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
    path = native.path_of(LIBRARY)
    if path is None:
        raise MachineError(f"the operators for ONNX Runtime are not available: {native.missing(LIBRARY)}")
    return path


def operators_beside(file: Path) -> Path | None:
    """The library that was exported with a model, or None.

    It is run only if it is the installed one, byte for byte: a folder may come from anywhere.

    Raises:
        InputError: it is another one.
        MachineError: there is none to compare it with.
    """
    beside = file.with_name(LIBRARY)
    if not beside.exists():
        return None
    if beside.read_bytes() != operators().read_bytes():
        raise InputError(
            f"{beside} is not the library of this anyquant, and is not run. Export the model again, or remove the "
            "file: the functions in the model compute the same."
        )
    return beside


def onnx_session(
    folder: str | Path,
    options: onnxruntime.SessionOptions | None = None,
    *,
    providers: Sequence[str] = (CPU,),
) -> onnxruntime.InferenceSession:
    """Open a folder that ``anyquant export onnx`` wrote, or a file in one, in ONNX Runtime.

    Codebook matrices are multiplied with by the installed library of operators where the CPU is the first provider;
    elsewhere, or with a RuntimeWarning if there is no such library, by the functions in the model.

    Args:
        folder: the folder, or a file that ends in .onnx.
        options: of the session; the library is registered in them.
        providers: of the session.

    Raises:
        MissingDependency: onnxruntime is not installed.
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
    file = path if path.suffix == ".onnx" else model_file(path)
    options = options or ort.SessionOptions()
    if providers[0] == CPU and _OPERATOR in file.read_bytes():
        try:
            options.register_custom_ops_library(str(operators()))
        except MachineError as error:
            warnings.warn(f"{file} runs without our kernels: {error}", RuntimeWarning, stacklevel=2)
    return open_session(file, options, providers)


def open_session(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[str] = (CPU,)
) -> onnxruntime.InferenceSession:
    """A session with these options and no others.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:
        raise InputError(f"ONNX Runtime {ort.__version__} cannot load {file}: {error}") from None
