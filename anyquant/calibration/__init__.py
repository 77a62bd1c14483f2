"""Calibration: what a model's matrices see on a text, as second moments of their inputs and as gradients.

:func:`calibrate` takes tokens (a text, a dataset, or text that the model itself samples), runs them through the
model one block at a time, and leaves a folder that serves any later target. Importing this package imports neither
torch nor transformers.
"""

from __future__ import annotations

from anyquant.calibration.run import calibrate
from anyquant.calibration.settings import CalibrationSettings
from anyquant.calibration.store import MatrixStatistics, Statistics, open_statistics

__all__ = ["CalibrationSettings", "MatrixStatistics", "Statistics", "calibrate", "open_statistics"]
