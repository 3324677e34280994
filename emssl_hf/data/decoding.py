"""One row of a data set -> the pixels that a store keeps: read, crop the data bar, 8 or 16 bits, resize."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emssl_hf.data.databar import crop_databar
from emssl_hf.data.depth import DEFAULT_STRETCH, Stretch, to_uint8, to_uint16
from emssl_hf.data.reading import read_micrograph
from emssl_hf.errors import EmsslError

MAX_ASPECT = 2.0
"""Longer images keep their centre: a strip would pad every batch that it is in."""


@dataclass(frozen=True)
class PixelSpec:
    """What decides the pixels of a store.

    `size`: an int is the length of the short edge; (H, W) squashes the whole micrograph to that shape.
    `databar`: "crop" leaves out the bar and what is below it, "keep" leaves the image whole.
    """

    size: int | tuple[int, int]
    dtype: str = "uint8"
    databar: str = "crop"
    stretch: tuple[float, float] = DEFAULT_STRETCH

    def __post_init__(self) -> None:
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            raise EmsslError(f"size is {self.size}; give the short edge in pixels, or (height, width)")
        if self.dtype not in ("uint8", "uint16"):
            raise EmsslError(f"dtype is {self.dtype!r}; a store holds 'uint8' or 'uint16'")
        if self.databar not in ("crop", "keep"):
            raise EmsslError(f"databar is {self.databar!r}; give 'crop' or 'keep'")
        if not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            raise EmsslError(f"stretch is {self.stretch}; give two percentiles, low then high, such as (0.1, 99.9)")


class Decoded(NamedTuple):
    """The pixels of one image (h, w), where its grey levels came from, and whether its ends were cut off."""

    pixels: NDArray[Any]
    stretch: Stretch
    cut: bool


def decode_row(row: dict[str, Any], spec: PixelSpec) -> Decoded:
    """Decodes a row's undecoded `image` column; the row's `databar`, where there is one, is believed.

    Raises EmsslError for an unreadable image and FileNotFoundError for one that has gone.
    """
    image = row["image"]
    source: Path | bytes = Path(image["path"]) if image["bytes"] is None else image["bytes"]
    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(source)
    micrograph = read_micrograph(source, name=row_name(row))
    array = micrograph.array
    if spec.databar == "crop":
        array = crop_databar(array, row.get("databar", micrograph.databar))
        if not array.size:
            raise EmsslError(f"{row_name(row)}: its data bar {row['databar']} leaves no image above it")
    array, cut = (array, False) if not isinstance(spec.size, int) else keep_centre(array)
    narrow, stretch = to_uint8(array, spec.stretch) if spec.dtype == "uint8" else to_uint16(array, spec.stretch)
    return Decoded(resize(narrow, target_shape(narrow.shape, spec.size)), stretch, cut)


def row_name(row: dict[str, Any]) -> str:
    """What messages call a row: its path, or its id."""
    return str(row["image"].get("path") or row.get("id") or "image")


def keep_centre(array: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """The centre of an image beyond 2:1, and whether anything was cut off."""
    height, width = array.shape
    limit = int(MAX_ASPECT * min(height, width))
    top, left = max(0, (height - limit) // 2), max(0, (width - limit) // 2)
    kept = array[top : top + limit, left : left + limit]
    return kept, kept.shape != array.shape


def target_shape(shape: tuple[int, ...], size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in the store: the short edge becomes `size`, or the shape is `size` itself."""
    if not isinstance(size, int):
        return size
    height, width = shape
    if height <= width:
        return size, round(size * width / height)
    return round(size * height / width), size


def resize(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Pillow's bilinear resize with antialiasing, as in a stock ViTImageProcessor; float for 16 bits."""
    if array.shape == shape:
        return array
    height, width = shape
    if array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    image = Image.fromarray(array.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.rint(np.clip(np.asarray(image), 0, 65535)).astype(array.dtype)
