"""Reports in HTML and JSON: what a quantization made of a model, and what sizes cost what loss.

``style``, ``markup`` and ``figures`` are the look that all reports share, those of :mod:`anyquant.validation` too.
:func:`anyquant.report.run.report` writes the report of an IR folder.
"""
