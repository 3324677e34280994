"""The white data bar of a Zeiss column: scale bar, then small print; the image goes on below it."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

#: Size in which a bar is drawn before it is reduced to the micrograph's width: NFFA's own.
BAR_WIDTH, BAR_HEIGHT = 1024, 58
#: Share of images with a bar by class in the NFFA set; elsewhere 0.6.
BAR_RATES = {
    "Tips": 0.81,
    "Fibres": 0.81,
    "MEMS_devices_and_electrodes": 0.46,
    "Porous_Sponge": 0.36,
    "Films_Coated_Surface": 0.20,
}
DEFAULT_RATE = 0.6


def scale_length(field: float) -> float:
    """The round length (1, 2 or 5 times a power of ten, metres) drawn for a field of `field` metres."""
    wanted = 0.12 * field
    power = 10.0 ** np.floor(np.log10(wanted))
    return float(max(power * step for step in (1.0, 2.0, 5.0) if power * step <= wanted * 1.0001))


def length_text(length: float) -> str:
    """2e-6 -> "2 µm"."""
    for unit, size in (("mm", 1e-3), ("µm", 1e-6), ("nm", 1e-9)):
        if length >= 0.999 * size:
            return f"{round(length / size):d} {unit}"
    return f"{length / 1e-9:.1f} nm"


def draw_bar(rng: np.random.Generator, width: int, height: int, pixel_size: float) -> npt.NDArray[np.uint8]:
    """A bar (height, width); its scale bar is right for `pixel_size` metres."""
    bar = Image.new("L", (BAR_WIDTH, BAR_HEIGHT), 255)
    pen = ImageDraw.Draw(bar)
    field = pixel_size * width
    length = scale_length(field)
    end = 12 + BAR_WIDTH * length / field
    pen.line([12, 37, end, 37], fill=60, width=3)
    for x in (12, end):
        pen.line([x, 26, x, 48], fill=60, width=3)
    _text(bar, 12, 2, length_text(length), 20)
    _small_print(rng, bar, field)
    logo = 940 + int(rng.integers(0, 20))
    pen.rectangle([logo, 12, logo + 42, 54], fill=20)
    bar.paste(ImageOps.invert(_printed("SEM", 15)), (logo + 4, 22))
    pen.rectangle([0, 0, BAR_WIDTH - 1, BAR_HEIGHT - 1], outline=40)
    return np.asarray(bar.resize((width, height), Image.Resampling.BOX))


def _small_print(rng: np.random.Generator, bar: Image.Image, field: float) -> None:
    """Two rows of settings; the magnification is that of a print 114 mm wide."""
    volts, distance, stage = rng.choice([1, 2, 3, 5, 10, 20]), rng.uniform(2, 9), rng.uniform(40, 50)
    left = 225 + int(rng.integers(0, 40))
    magnification = float(f"{0.114 / field:.1e}")
    size = f"{magnification / 1000:g} K X" if magnification >= 1000 else f"{magnification:g} X"
    upper = (
        f"EHT = {volts:.2f} kV",
        f"WD = {distance:.1f} mm",
        f"Signal A = {rng.choice(['SE2', 'InLens'])}",
    )
    lower = (f"Mag = {size}", f"Brightness = {rng.uniform(30, 60):.0f} %", "Aperture Size = 30.00 µm")
    for column, (above, below) in enumerate(zip(upper, lower, strict=True)):
        _text(bar, left + 165 * column, 9, above, 15)
        _text(bar, left + 165 * column, 32, below, 13)
    _text(bar, left + 500, 9, f"Stage at Z = {stage:.1f} mm", 15)


def _text(bar: Image.Image, x: int, y: int, text: str, size: int) -> None:
    bar.paste(_printed(text, size), (x, y))


@lru_cache(maxsize=2048)
def _printed(text: str, size: int) -> Image.Image:
    """Dark text on white; the built-in font has no micro sign, so a u is given a tail."""
    font = ImageFont.load_default(size)
    image = Image.new("L", (int(font.getlength(text)) + 3, round(1.3 * size)), 255)
    pen = ImageDraw.Draw(image)
    before, sign, _ = text.partition("µ")
    pen.text((1, 0), text.replace("µ", "u"), fill=20, font=font)
    if sign:
        tail = 1 + font.getlength(before) + 0.11 * size
        pen.line([tail, 0.5 * size, tail, 1.15 * size], fill=20, width=max(size // 10, 1))
    return image


def bar_rows(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """First row of the bar and the row after its last; on NFFA it starts at rows 629-677 of 768."""
    thickness = max(round(BAR_HEIGHT * width / BAR_WIDTH), 4)
    top = round(height * rng.uniform(0.82, 0.882))
    return min(top, height - thickness), min(top + thickness, height)
