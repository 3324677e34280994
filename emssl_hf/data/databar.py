"""The data bar that microscopes print under a micrograph, found by its pixels."""

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels, bottom and right exclusive."""

SEARCH_FROM = 0.6
"""A bar begins below this share of the height (NFFA: 0.79 to 0.88)."""
HEIGHT_RANGE = (0.02, 0.3)
"""Smallest and largest height of a bar as a share of the image's."""
ROW_SHARE = 0.5
"""A row belongs to the bar when this share of its pixels has the bar's ground colour."""
TEXT_SHARE = 0.003
"""A bar carries print: at least this share of its pixels has the opposite colour."""


def find_databar(array: NDArray[np.generic]) -> Box | None:
    """Box of the white or black data bar of an (H, W) image, or None.

    A bar is a full-width band of one flat colour with print on it and a sharp upper edge. A Zeiss bar is
    white with a thin black frame and the image often goes on below it; a black bar reaches the lower edge.
    """
    height, width = array.shape
    start = int(SEARCH_FROM * height)
    low, high = float(array.min()), float(array.max())
    if height < 32 or width < 32 or not high > low:
        return None
    level = (array[start:].astype(np.float32) - low) / (high - low)
    for ground, reaches_edge in ((level >= 0.9, False), (level <= 0.05, True)):
        ink = level < 0.5 if not reaches_edge else level > 0.5
        band = _band(ground, ink, height, reaches_edge)
        if band is not None:
            return start + band[0], 0, start + band[1], width
    return None


def crop_databar(array: NDArray[np.generic], box: Box | None) -> NDArray[np.generic]:
    """Everything above the bar; what is below it is a strip too narrow to use. No box, no change."""
    return array if box is None else array[: box[0]]


def _band(ground: NDArray[np.bool_], ink: NDArray[np.bool_], height: int, reaches_edge: bool) -> tuple[int, int] | None:
    """First and last + 1 row of the longest run of ground rows, if that run is a bar."""
    rows = ground.mean(axis=1) >= ROW_SHARE
    first, last = _longest_run(rows)
    if not HEIGHT_RANGE[0] * height <= last - first <= HEIGHT_RANGE[1] * height:
        return None
    if reaches_edge and len(rows) - last > 0.01 * height + 1:
        return None
    has_print = ink[first:last].mean() >= TEXT_SHARE
    above = ground[max(0, first - 4) : first]
    # The ground colour stops at the edge: a bright or a saturated specimen fades out instead.
    sharp = 0 < first < last - 1 and ground[first + 1].mean() > 0.9 and float(above.mean(axis=1).min()) < 0.4
    if not (has_print and sharp and _sides_are_ground(ground[first:last])):
        return None
    return _with_frame(ground, ink, first, last, reaches_edge)


def _longest_run(rows: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and end of the longest run of True in a vector; (0, 0) where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rows, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest])


def _sides_are_ground(band: NDArray[np.bool_]) -> bool:
    """Whether the band reaches both sides of the image: near either side a column is free of print."""
    margin = max(3, band.shape[1] // 64)
    columns = band.mean(axis=0)
    return bool(columns[:margin].max() > 0.7 and columns[-margin:].max() > 0.7)


def _with_frame(
    ground: NDArray[np.bool_], ink: NDArray[np.bool_], first: int, last: int, reaches_edge: bool
) -> tuple[int, int]:
    """Widens a band by its frame, a line of one row in the opposite colour above and below."""
    if first > 0 and ink[first - 1].mean() > 0.9:
        first -= 1
    if not reaches_edge and last < len(ink) and ink[last].mean() > 0.9:
        last += 1
    return first, (len(ground) if reaches_edge else last)
