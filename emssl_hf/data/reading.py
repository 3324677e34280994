"""One file of any electron microscopy format -> grey array, pixel size, data-bar box."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emssl_hf.data.databar import Box, crop_databar, find_databar
from emssl_hf.data.depth import DepthError, Stretch, to_uint8, to_uint16
from emssl_hf.data.formats import Header, Raw, RefusedError, Source, check_size, detect, pil_array
from emssl_hf.errors import EmsslError

__all__ = [
    "Box",
    "DepthError",
    "Header",
    "Micrograph",
    "Stretch",
    "UnreadableMicrograph",
    "crop_databar",
    "find_databar",
    "read_header",
    "read_micrograph",
    "to_uint8",
    "to_uint16",
]

MAX_PIXELS = 500_000_000
T = TypeVar("T")


class UnreadableMicrograph(EmsslError):  # noqa: N818 - the name is public
    """A file that is no micrograph, is damaged, or is too large; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Micrograph:
    """A grey image at its own depth.

    `array` is (H, W), `pixel_size` in metres, `databar` a (top, left, bottom, right) box, `bits` the depth
    of one pixel; `other_pages` names the pages, frames or sections of the file that were not read.
    """

    array: NDArray[np.generic]
    pixel_size: float | None
    databar: Box | None
    bits: int
    other_pages: tuple[str, ...] = ()


def read_micrograph(
    source: str | Path | bytes | Image.Image, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Micrograph:
    """Reads JPEG, PNG, BMP, GIF, TIFF, MRC and, with the `em` extra, DM3, DM4, EMD and SER.

    Colour becomes luminance, the first of several pages is read, and the depth stays as it is. `name`
    stands in messages for a source without a path. Raises `UnreadableMicrograph`.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    raw = _guarded(_decode, source, name, max_pixels)
    array = np.ascontiguousarray(_grey(raw.array, name))
    return Micrograph(array, raw.header.pixel_size, find_databar(array), 8 * array.dtype.itemsize, raw.other_pages)


def read_header(source: str | Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Header:
    """Width, height and pixel size as the file declares them, undecoded. Raises `UnreadableMicrograph`."""
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    return _guarded(_probe, source, name, max_pixels)


def _decode(source: Source | Image.Image, name: str, max_pixels: int) -> Raw:
    if isinstance(source, Image.Image):
        check_size(*source.size, max_pixels)
        return Raw(pil_array(source), Header(*source.size))
    return detect(source, name).read(source, max_pixels)


def _probe(source: Source | Image.Image, name: str, max_pixels: int) -> Header:
    assert not isinstance(source, Image.Image)
    return detect(source, name).probe(source, max_pixels)


def _guarded(
    job: Callable[[Source | Image.Image, str, int], T],
    source: str | Path | bytes | Image.Image,
    name: str,
    max_pixels: int,
) -> T:
    """Runs a reader; whatever goes wrong in it becomes one sentence with the file's name."""
    source = Path(source) if isinstance(source, str) else source
    try:
        return job(source, name, max_pixels)
    except FileNotFoundError as error:
        raise UnreadableMicrograph(f"{name}: there is no such file; check the path") from error
    except RefusedError as error:
        raise UnreadableMicrograph(f"{name}: {error}") from error
    except MemoryError as error:
        raise UnreadableMicrograph(
            f"{name}: it does not fit into memory; lower max_pixels to skip such files"
        ) from error
    except Exception as error:  # decoders raise what they like on a damaged file
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UnreadableMicrograph(f"{name}: the file is damaged or cut short ({detail}); copy it again") from error


def _grey(array: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """(H, W) of a decoded page: luminance of colour (Rec. 601 weights in integers), alpha left out."""
    if array.ndim == 3 and array.shape[2] in (1, 2):
        array = array[..., 0]
    if array.ndim == 2 and array.size and array.dtype.kind in "buif":
        return array
    if array.ndim != 3 or array.shape[2] not in (3, 4) or array.dtype.kind not in "uif":
        raise UnreadableMicrograph(f"{name}: an array of shape {array.shape}, {array.dtype} is no grey or RGB image")
    red, green, blue = (array[..., c] for c in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    if array.dtype.kind == "f":
        weights = np.array([0.299, 0.587, 0.114], dtype=array.dtype)
        return np.asarray(array[..., :3] @ weights)
    wide = 19595 * red.astype(np.int64) + 38470 * green.astype(np.int64) + 7471 * blue.astype(np.int64)
    return ((wide + 32768) >> 16).astype(array.dtype)
