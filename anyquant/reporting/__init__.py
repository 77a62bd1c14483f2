"""What all reports share: estimates, numbers in words, JSON, how pages and figures look, how files are written.

It knows nothing of the reports themselves: :mod:`anyquant.report`, :mod:`anyquant.sweep` and
:mod:`anyquant.validation` stand on it.
"""
