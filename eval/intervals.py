"""How sure a score is, given the test set: bootstrap intervals over test samples, and over paired differences.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", percentile intervals (section 13.3). Where samples have groups
whole groups are drawn, for the samples of a patient are no independent evidence (cluster bootstrap, Davison and Hinkley
1997, section 3.8). All scores of a test set see the same draws, so that differences of them are paired.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfsight import keyed

DRAWS = 2000
LOW, HIGH = 2.5, 97.5  # percentiles: 95 %
LEAST_UNITS = 10  # below, resampling a handful of patients or images says nothing of how sure a score is
_VALUES = 2**22  # in memory at once
Draws = NDArray[np.float64]


def draws_of(each: Tensor, groups: Tensor, draws: int = DRAWS, seed: int = 0) -> Draws:
    """The mean of resampled test sets (draws, R) for each of R scores.

    Args:
        each: (M, R) what every sample contributes.
        groups: (M,) group of each sample, -1 for one of its own.
        seed: of another set, so that draws of two sets are independent.
    """
    unit, count = units_of(groups)
    sizes = torch.bincount(unit, minlength=count).double().numpy()
    sums = torch.zeros(count, each.shape[1], dtype=torch.float64).index_add_(0, unit, each.double()).numpy()
    found = np.empty((draws, each.shape[1]))
    step = max(1, _VALUES // count)
    for first in range(0, draws, step):
        rows = range(first, min(first + step, draws))
        drawn = keyed.hashes(seed, "bootstrap", rows, count) % np.uint64(count)
        times = np.stack([np.bincount(row.astype(np.int64), minlength=count) for row in drawn]).astype(np.float64)
        found[rows.start : rows.stop] = (times @ sums) / (times @ sizes)[:, None]
    return found


def units_of(groups: Tensor) -> tuple[Tensor, int]:
    """Which unit each sample is drawn with (M,), a group or itself where it has none (-1); and how many units there are."""
    own = torch.where(groups < 0, groups.max().clamp(min=-1) + 1 + torch.arange(len(groups)), groups)
    found, unit = own.unique(return_inverse=True)
    return unit, len(found)


def interval(draws: Draws) -> list[float]:
    """The 95 % percentile interval of (draws,) values."""
    low, high = np.percentile(draws, (LOW, HIGH))
    return [float(low), float(high)]
