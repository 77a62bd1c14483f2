"""Reports in HTML and JSON: what a quantization made of a model, and what sizes cost what loss.

:func:`anyquant.report.run.report` writes the report of an IR folder, :func:`anyquant.report.sweeps.write_sweep` that
of a sweep.
"""
