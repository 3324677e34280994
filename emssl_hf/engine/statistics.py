"""Means with intervals, and how soon a curve reaches a mark."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of Student's 95 % interval over the values (null for a single one), and the values."""
    array = np.asarray(values, dtype=float)
    half = None
    if len(array) > 1:
        half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return {"mean": float(array.mean()), "ci95": half, "values": array.tolist()}


def first_epoch(curve: Sequence[tuple[int, float]], mark: float) -> int | None:
    """The first epoch of (epoch, accuracy) pairs at which the mark is reached, or None."""
    return next((epoch for epoch, value in curve if value >= mark), None)
