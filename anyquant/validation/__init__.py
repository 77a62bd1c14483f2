"""Proof of equivalence and measurement of quality: tensors, logits and text of every file of one model.

:func:`validate` compares the dequantized tensors bit for bit, the logits of llama.cpp and ONNX Runtime with those
of PyTorch on the same weights, and all of them with the unquantized source. What it finds is a
:class:`ValidationReport`: JSON, HTML, and gates that pass or fail.
"""

from __future__ import annotations

from anyquant.validation.results import ValidationReport
from anyquant.validation.run import validate
from anyquant.validation.settings import ValidationSettings
from anyquant.validation.table import format_table

__all__ = ["ValidationReport", "ValidationSettings", "format_table", "validate"]
