"""Pixel size in metres from the records that files carry; never a guess from the magnification."""

from typing import Any

import tifffile

METRES = {
    "m": 1.0, "mm": 1e-3, "cm": 1e-2,
    "um": 1e-6, "µm": 1e-6, "\u03bcm": 1e-6, "micron": 1e-6, "microns": 1e-6, "micrometer": 1e-6,
    "nm": 1e-9, "pm": 1e-12, "a": 1e-10, "å": 1e-10, "angstrom": 1e-10,
}  # fmt: skip
PLAUSIBLE = (1e-13, 2e-5)
"""Pixel sizes outside of this, in metres, come from no electron microscope but from a printer's default."""


def tiff_pixel_size(tif: tifffile.TiffFile) -> float | None:
    """Pixel size of a TIFF file: Zeiss's own record, ImageJ's unit, or a resolution per centimetre."""
    for source in (_zeiss, _imagej, _per_centimetre):
        size = source(tif)
        if size is not None and PLAUSIBLE[0] < size < PLAUSIBLE[1]:
            return size
    return None


def mrc_pixel_size(mrc: Any) -> float | None:
    """Pixel size of an MRC file: its cell in angstrom over its number of pixels."""
    size = float(mrc.voxel_size.x) * 1e-10
    return size if PLAUSIBLE[0] < size < PLAUSIBLE[1] else None


def in_metres(value: float, unit: str) -> float | None:
    """A length in metres; None for a unit that is no length."""
    factor = METRES.get(unit.strip().replace("\\u00b5", "µ").replace("\\u00B5", "µ").lower())
    return None if factor is None else value * factor


def _zeiss(tif: tifffile.TiffFile) -> float | None:
    """AP_IMAGE_PIXEL_SIZE of tag 34118; AP_PIXEL_SIZE is the size on the monitor."""
    record = (tif.sem_metadata or {}).get("ap_image_pixel_size")
    if not isinstance(record, tuple) or len(record) < 3:
        return None
    return in_metres(float(record[1]), str(record[2]))


def _imagej(tif: tifffile.TiffFile) -> float | None:
    """ImageJ writes pixels per unit as the resolution, and the unit in its own tag."""
    unit = (tif.imagej_metadata or {}).get("unit")
    resolution = _resolution(tif)
    return None if unit is None or resolution is None else in_metres(1 / resolution, str(unit))


def _per_centimetre(tif: tifffile.TiffFile) -> float | None:
    """TIFF's own resolution, where its unit is the centimetre; inches are a printer's figure."""
    unit = tif.pages.first.tags.get("ResolutionUnit")
    resolution = _resolution(tif)
    is_centimetre = unit is not None and int(unit.value) == 3
    return 0.01 / resolution if is_centimetre and resolution is not None else None


def _resolution(tif: tifffile.TiffFile) -> float | None:
    """Pixels per unit along x; None where absent or not positive."""
    tag = tif.pages.first.tags.get("XResolution")
    if tag is None or not tag.value[0] or not tag.value[1]:
        return None
    return float(tag.value[0] / tag.value[1])
