"""The file formats of microscopes, each a small probe of the header and a small reader.

A reader takes a path or bytes, checks the declared size before it decodes, and lets every error out;
`reading` puts the errors into words.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import mrcfile
import numpy as np
import tifffile
from mrcfile.mrcinterpreter import MrcInterpreter
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from emssl_hf.data.pixel_size import mrc_pixel_size, tiff_pixel_size

Source = Path | bytes

EM_EXTENSIONS = {
    ".dm3": "rsciio.digitalmicrograph",
    ".dm4": "rsciio.digitalmicrograph",
    ".emd": "rsciio.emd",
    ".ser": "rsciio.tia",
    ".emi": "rsciio.tia",
}
MRC_EXTENSIONS = (".mrc", ".mrcs", ".rec", ".ali")
PIL_PLUGINS: dict[bytes, Callable[..., Image.Image]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
}
PLAIN_TIFF = ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE")
"""Colour spaces decoded here at full depth; Pillow converts the others (CMYK, YCbCr, Lab) from 8 bits."""
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class RefusedError(Exception):
    """A reason, in words, why a file is not read."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself: size in pixels and pixel size in metres."""

    width: int
    height: int
    pixel_size: float | None = None


@dataclass(frozen=True)
class Raw:
    """A decoded first page: (H, W) or (H, W, C), channels R, G, B, and what else came along."""

    array: NDArray[np.generic]
    header: Header
    other_pages: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Format:
    """The two ways to look at one file format; `limit` is the largest number of pixels accepted."""

    probe: Callable[[Source, int], Header]
    read: Callable[[Source, int], Raw]


def detect(source: Source, name: str) -> Format:
    """The format of a file by its first bytes, by its extension where those do not tell."""
    head = _head(source, 212)
    extension = Path(name).suffix.lower()
    if extension in EM_EXTENSIONS:
        return Format(_probe_em, _read_em)
    if head.startswith(TIFF_MAGIC):
        return Format(_probe_tiff, _read_tiff)
    if head.startswith(tuple(PIL_PLUGINS)):
        return Format(_probe_pil, _read_pil)
    if head[208:212] == b"MAP " or extension in MRC_EXTENSIONS:
        return Format(_probe_mrc, _read_mrc)
    raise RefusedError("the file is empty" if not head else "this is no image format that is read here")


def check_size(width: int, height: int, limit: int) -> None:
    """Refuses a declared size of no pixels or of more than `limit`."""
    if width < 1 or height < 1:
        raise RefusedError(f"it declares {width} x {height} pixels")
    if width * height > limit:
        raise RefusedError(f"it declares {width} x {height} pixels, more than the limit of {limit:,}; raise max_pixels")


def pil_array(image: Image.Image) -> NDArray[np.generic]:
    """A Pillow image at its own depth; 8-bit colour becomes luminance, alpha is left out."""
    if image.mode in ("L", "F", "I") or image.mode.startswith("I;16"):
        array: NDArray[np.generic] = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if image.mode == "LA":
        return np.asarray(image.getchannel("L"))
    # Pillow's weights (19595 R + 38470 G + 7471 B) >> 16 sum to one: equal channels keep their value.
    return np.asarray((image.convert("RGB") if image.mode not in ("1", "RGB") else image).convert("L"))


def _head(source: Source, count: int) -> bytes:
    """The first bytes of a file."""
    if isinstance(source, bytes):
        return source[:count]
    with source.open("rb") as file:
        return file.read(count)


def _binary(source: Source) -> BinaryIO:
    """A readable, seekable stream."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _open_pil(stream: BinaryIO) -> Image.Image:
    """Opens by the plugin itself: the formats named above only, and our own limit instead of Pillow's."""
    head = stream.read(26)
    stream.seek(0)
    if head.startswith(b"\x89PNG") and head[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        raise RefusedError("a PNG with 16-bit colour would lose its lower 8 bits here; save it as 16-bit grey or TIFF")
    plugin = next(plugin for magic, plugin in PIL_PLUGINS.items() if head.startswith(magic))
    return plugin(stream)


def _probe_pil(source: Source, limit: int) -> Header:
    with _binary(source) as stream, _open_pil(stream) as image:
        check_size(*image.size, limit)
        return Header(*image.size)


def _read_pil(source: Source, limit: int) -> Raw:
    with _binary(source) as stream, _open_pil(stream) as image:
        check_size(*image.size, limit)
        return Raw(pil_array(image), Header(*image.size), _frames(image))


def _frames(image: Image.Image) -> tuple[str, ...]:
    """Names of the frames after the first."""
    return tuple(f"frame {i}" for i in range(1, getattr(image, "n_frames", 1)))


def _tiff_header(tif: tifffile.TiffFile, limit: int) -> Header:
    page: Any = tif.pages.first
    header = Header(page.imagewidth, page.imagelength, tiff_pixel_size(tif))
    check_size(header.width, header.height, limit)
    check_size(1, page.size, 4 * limit)  # channels and planes count too
    return header


def _probe_tiff(source: Source, limit: int) -> Header:
    with _binary(source) as stream, tifffile.TiffFile(stream) as tif:
        return _tiff_header(tif, limit)


def _read_tiff(source: Source, limit: int) -> Raw:
    with _binary(source) as stream, tifffile.TiffFile(stream) as tif:
        header = _tiff_header(tif, limit)
        page: Any = tif.pages.first
        others = tuple(f"page {i}" for i in range(1, len(tif.pages)))
        codec, space = page.compression.name, page.photometric.name
        if codec in ("NONE", "ADOBE_DEFLATE", "DEFLATE", "LZMA") and space in PLAIN_TIFF:
            return Raw(_tiff_plane(page), header, others)
        stream.seek(0)  # LZW, PackBits and JPEG go through Pillow's libtiff
        with TiffImagePlugin.TiffImageFile(stream) as image:
            if page.bitspersample > 8 and page.samplesperpixel > 1:
                raise RefusedError(f"{codec} {space} of {page.bitspersample} bits; save it as uncompressed grey")
            return Raw(pil_array(image), header, others)


def _tiff_plane(page: Any) -> NDArray[np.generic]:
    """One page as (H, W) or (H, W, RGB): palette looked up, planes last, white-is-zero turned round."""
    array: NDArray[np.generic] = page.asarray()
    if page.photometric.name == "PALETTE":
        return np.moveaxis(page.colormap[:, array], 0, -1)
    if page.axes.startswith("S"):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and page.photometric.name != "RGB":
        array = array[..., 0]  # further samples are alpha or another detector
    if page.photometric.name == "MINISWHITE" and array.dtype.kind in "ub":
        array = np.array((1 << page.bitspersample) - 1 - array.astype(np.int64)).astype(array.dtype)
    if page.bitspersample == 1:
        array = array.astype(np.bool_)
    return array


def _open_mrc(stream: BinaryIO, header_only: bool) -> Any:
    return MrcInterpreter(iostream=stream, permissive=True, header_only=header_only)


def _probe_mrc(source: Source, limit: int) -> Header:
    with _binary(source) as stream:
        mrc = _open_mrc(stream, header_only=True)
        header = mrc.header
        if header is None:
            raise RefusedError("its MRC header is cut short")
        check_size(int(header.nx), int(header.ny), limit)
        return Header(int(header.nx), int(header.ny), mrc_pixel_size(mrc))


def _read_mrc(source: Source, limit: int) -> Raw:
    """First section of an MRC stack; only that section is read into memory."""
    header = _probe_mrc(source, limit)
    with _binary(source) as stream:
        meta = _open_mrc(stream, header_only=True).header
        dtype = mrcfile.utils.data_dtype_from_header(meta)
        if dtype.kind == "c":
            raise RefusedError("it holds complex numbers (a transform), no image")
        stream.seek(1024 + int(meta.nsymbt))
        data = stream.read(dtype.itemsize * header.width * header.height)
    array = np.frombuffer(data, dtype).reshape(header.height, header.width)
    others = tuple(f"section {i}" for i in range(1, int(meta.nz)))
    return Raw(array.astype(dtype.newbyteorder("=")), header, others)


def _em_signals(source: Source) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The first image in a DM3, DM4, EMD or SER file, and the names of what else it holds."""
    if isinstance(source, bytes):
        raise RefusedError("DM3, DM4, EMD and SER files are read from disk only; give the path")
    try:
        reader = import_module(EM_EXTENSIONS[source.suffix.lower()])
    except ModuleNotFoundError as error:
        raise RefusedError("this format needs an extra: pip install 'emssl-hf[em]'") from error
    signals = reader.file_reader(str(source), lazy=True)
    images = [s for s in signals if len(s["axes"]) >= 2 and not np.issubdtype(s["data"].dtype, np.complexfloating)]
    if not images:
        raise RefusedError("it holds no image")
    title = [s["metadata"].get("General", {}).get("title", "image") for s in images]
    return images[0], tuple(str(t) for t in title[1:])


def _em_header(signal: dict[str, Any], limit: int) -> Header:
    vertical, horizontal = signal["axes"][-2:]
    metres = {"m": 1.0, "mm": 1e-3, "µm": 1e-6, "um": 1e-6, "nm": 1e-9, "pm": 1e-12, "Å": 1e-10}
    unit = metres.get(str(horizontal.get("units")))
    check_size(int(horizontal["size"]), int(vertical["size"]), limit)
    size = None if unit is None else float(horizontal["scale"]) * unit
    return Header(int(horizontal["size"]), int(vertical["size"]), size)


def _probe_em(source: Source, limit: int) -> Header:
    return _em_header(_em_signals(source)[0], limit)


def _read_em(source: Source, limit: int) -> Raw:
    signal, others = _em_signals(source)
    header = _em_header(signal, limit)
    data = signal["data"]
    while data.ndim > 2:
        data = data[0]
    return Raw(np.asarray(data), header, others)
