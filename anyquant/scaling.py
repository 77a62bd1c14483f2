"""The scaling vector of a codebook tensor: one factor for each column, so that columns of unlike size share codebooks.

Source: Bai et al., "SKIM" (arXiv 2412.04180): with q_ij = a_j c_i[l_ij], k-means under the scale gives codes and
centroids, and with the codes fixed the scale minimises the error of the outputs, sum_i d_i^T H d_i. The paper takes
gradient steps; given codes and centroids the loss is quadratic in the scale, so that one linear system gives its least
value: A a = r with A = H * (C^T C) and r_j = sum_i C_ij (W H)_ij, where C_ij = c_i[l_ij] and * is by elements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_RANGE = 16.0  # a factor may lie this far from the middle, up and down
_RIDGE = 1e-2  # of A's own diagonal, towards what the scale was


def best_scale(weight: Floats, centroids: Floats, moment: Floats, scale: Floats, rows: Floats | None = None) -> Floats:
    """The scale with the least error of the outputs, given what each weight's code stands for.

    Args:
        weight: float32 [out, in]; 0 where a weight is kept apart.
        centroids: float32 [out, in], unscaled; 0 where a weight is kept apart.
        moment: float32 [in, in], the mean of x x^T.
        scale: float32 [in], the scale as it was: where the inputs tell nothing it stays.
        rows: float32 [out], what a row's error counts; 1 each where not given.

    Returns:
        float32 [in], positive, each an FP16 number.
    """
    weighted = centroids if rows is None else centroids * rows[:, None]
    system = (centroids.T @ weighted).astype(np.float64) * moment
    right = np.einsum("ij,ij->j", weighted, weight @ moment, dtype=np.float64)
    diagonal = np.diag(system).copy()
    ridge = _RIDGE * diagonal + 1e-12 * max(float(diagonal.max(initial=0.0)), 1e-300)
    system[np.diag_indices_from(system)] += ridge
    found = np.linalg.solve(system, right + ridge * scale)
    return stored_scale(np.where(found > 0, found, scale))


def gradient_scale(
    weight: Floats, centroids: Floats, moment: Floats, scale: Floats, rows: Floats | None = None, steps: int = 400
) -> Floats:
    """The same by gradient steps, as the paper says: Adam on the logarithm of the scale, which keeps it positive.

    The paper gives neither its rate nor its steps; here the rate falls from .05 to 0 along a half cosine, far enough to
    arrive.
    """
    weighted = centroids if rows is None else centroids * rows[:, None]
    system = (centroids.T @ weighted).astype(np.float64) * moment
    right = np.einsum("ij,ij->j", weighted, weight @ moment, dtype=np.float64)
    unit = max(float(np.abs(right).max(initial=0.0)), 1e-300)
    logarithm, first, second = np.log(scale.astype(np.float64)), np.zeros(len(scale)), np.zeros(len(scale))
    for step in range(1, steps + 1):
        a = np.exp(logarithm)
        gradient = 2 * (system @ a - right) * a / unit
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 0.025 * (1 + np.cos(np.pi * step / steps))
        logarithm -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
    return stored_scale(np.exp(logarithm))


def stored_scale(scale: NDArray[np.floating]) -> Floats:
    """The scale as it is stored: FP16, positive, about 1 in the middle.

    A factor common to all columns is the codebooks'; what lies far from the middle is cut.
    """
    middle = np.exp(np.mean(np.log(scale.astype(np.float64))))
    stored: Floats = np.clip(scale / middle, 1 / _RANGE, _RANGE).astype(np.float16).astype(np.float32)
    return stored
