"""From the depth of the detector to the 8 or 16 bits of a store, once per image and on the record."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emssl_hf.errors import EmsslError

DEFAULT_STRETCH = (0.1, 99.9)
"""Percentiles of an image that become black and white."""
MAX_CLIPPED = 0.01
MIN_LEVELS = 64
SAMPLE = 1 << 20
"""Percentiles of larger images are taken from an even sample of about this many pixels."""


class Stretch(NamedTuple):
    """The source values that became the lowest and the highest value of the result."""

    low: float
    high: float


class DepthError(EmsslError):
    """A conversion that would ruin an image: too many pixels clipped or too few grey levels left."""


def to_uint8(
    array: NDArray[np.generic], stretch: tuple[float, float] = DEFAULT_STRETCH
) -> tuple[NDArray[np.uint8], Stretch]:
    """8-bit copy of an (H, W) image; 8-bit images stay untouched, deeper ones are stretched by percentiles.

    Raises `DepthError` where more than 1 % of the pixels would be clipped, or fewer than 64 grey levels
    left of an image that has more.
    """
    if array.dtype == np.uint8:
        return array.view(np.uint8), Stretch(0.0, 255.0)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255), Stretch(0.0, 1.0)
    values, result_stretch = _stretched(array, stretch, 255)
    result = values.astype(np.uint8)
    _guard_levels(array, result)
    return result, result_stretch


def to_uint16(
    array: NDArray[np.generic], stretch: tuple[float, float] = DEFAULT_STRETCH
) -> tuple[NDArray[np.uint16], Stretch]:
    """16-bit copy: 8-bit images times 257, deeper ones stretched by the same percentiles as `to_uint8`."""
    if array.dtype in (np.uint8, np.bool_):
        narrow, narrow_stretch = to_uint8(array)
        return narrow.astype(np.uint16) * np.uint16(257), narrow_stretch
    values, result_stretch = _stretched(array, stretch, 65535)
    return values.astype(np.uint16), result_stretch


def _stretched(
    array: NDArray[np.generic], stretch: tuple[float, float], top: int
) -> tuple[NDArray[np.float32], Stretch]:
    """The image with its low percentile at 0 and its high one at `top`, rounded, float32."""
    values: NDArray[np.floating] = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    low, high = _limits(values, stretch)
    if low == high:
        return np.zeros(array.shape, np.float32), Stretch(low, high)
    clipped = float(np.mean((values < low) | (values > high)))
    if clipped > MAX_CLIPPED:
        raise DepthError(
            f"stretching {low:g}..{high:g} to {top.bit_length()} bits clips {clipped:.1%} of the pixels; "
            f"widen the percentiles, e.g. stretch={DEFAULT_STRETCH} instead of {stretch}"
        )
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (top / (high - low))
    return np.rint(np.clip(scaled, 0, top)).astype(np.float32), Stretch(low, high)


def _limits(values: NDArray[np.floating], stretch: tuple[float, float]) -> tuple[float, float]:
    """Source values of the two percentiles; the extremes where both percentiles fall on one value."""
    sample = values.ravel()[:: max(1, values.size // SAMPLE)]
    if values.dtype.kind == "f" and not np.isfinite(sample).all():
        sample = sample[np.isfinite(sample)]
    if not sample.size:
        raise DepthError("no pixel of the image has a finite value; look at the file in its own viewer")
    low, high = np.percentile(sample, stretch)
    if low == high:
        finite = values[np.isfinite(values)]
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _guard_levels(source: NDArray[np.generic], result: NDArray[np.uint8]) -> None:
    """Refuses a result of few grey levels made from a source of many."""
    kept = int(np.count_nonzero(np.bincount(result.ravel(), minlength=256)))
    if kept >= MIN_LEVELS:
        return
    had = len(np.unique(source.ravel()[:: max(1, source.size // SAMPLE)]))
    if had >= MIN_LEVELS and kept < had:
        raise DepthError(
            f"8 bits would keep {kept} of {had} grey levels: outliers take up the range; "
            "keep 16 bits (dtype='uint16') or narrow the percentiles, e.g. stretch=(0.4, 99.6)"
        )
