"""anyquant: quantize a transformers language model to any size, and write that one result as GGUF and as ONNX.

``import anyquant`` is light: neither torch nor transformers is imported before ``load`` is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyquant.runtime import load as load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import ``load``, and torch with it, when it is first asked for."""
    if name == "load":
        from anyquant.runtime import load

        return load
    raise AttributeError(f"module 'anyquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
