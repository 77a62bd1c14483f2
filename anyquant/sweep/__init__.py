"""Size against loss: the same model at many sizes, planned and measured with statistics that are taken once.

:func:`sweep` is what ``anyquant sweep`` and the benchmarks of allocations stand on.
"""

from __future__ import annotations

from anyquant.sweep.measure import TextSettings
from anyquant.sweep.results import Point, Sweep, load_sweep
from anyquant.sweep.run import sweep

__all__ = ["Point", "Sweep", "TextSettings", "load_sweep", "sweep"]
