"""anyquant: quantize a transformers language model to any size, and write that one result as GGUF and as ONNX.

``import anyquant`` is light: neither torch nor transformers is imported before one of its names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyquant.calibration import CalibrationSettings as CalibrationSettings
    from anyquant.job import Job as Job
    from anyquant.job import Target as Target
    from anyquant.quantizing import quantize as quantize
    from anyquant.runtime import load as load
    from anyquant.runtime.onnx_session import onnx_session as onnx_session

__all__ = ["CalibrationSettings", "Job", "Target", "__version__", "load", "onnx_session", "quantize"]

__version__ = "0.1.0"

_HOMES = {
    "CalibrationSettings": "anyquant.calibration",
    "Job": "anyquant.job",
    "Target": "anyquant.job",
    "load": "anyquant.runtime",
    "onnx_session": "anyquant.runtime.onnx_session",
    "quantize": "anyquant.quantizing",
}


def __getattr__(name: str) -> object:
    """Import a name, and what it needs, when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'anyquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
