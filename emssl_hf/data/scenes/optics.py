"""From relief to grey levels: secondary-electron yield, detector, probe, and the faults of a scan.

Yield follows Goldstein et al., Scanning Electron Microscopy and X-Ray Microanalysis (4th ed., 2018): it grows
with the slope of the surface, falls in pits, and the detector sees what faces it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.signal import lfilter

from emssl_hf.data.scenes.stage import FloatArray, Scene, View


@dataclass(frozen=True)
class Column:
    """What a session at the microscope keeps for one specimen: detector and its gains."""

    detector: float  # direction towards it, radians in the image plane
    edge: float  # gain of 1 - cos(slope)
    facing: float  # gain of the part facing the detector
    shadow: float  # darkening of pits

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Column":
        """Detector mostly at the top of the image; in-lens columns see edges and little direction."""
        inlens = rng.random() < 0.4
        facing = rng.uniform(0.0, 0.15) if inlens else rng.uniform(0.2, 0.65)
        edge = rng.uniform(0.9, 2.2) if inlens else rng.uniform(0.4, 1.6)
        return cls(rng.normal(-np.pi / 2, 0.6), edge, facing, rng.uniform(0.15, 0.7))


@dataclass(frozen=True)
class Exposure:
    """What changes from image to image: focus, dose, video levels, and faults."""

    defocus: tuple[float, float]  # probe blur in pixels along y and x; unequal is astigmatism
    noise: float  # shot noise at mid-grey, in grey levels
    level: float  # mean grey level
    contrast: float  # standard deviation in grey levels
    gamma: float
    inverted: bool
    slope: tuple[float, float]  # uneven collection: grey levels across the field in x and y
    jitter: float  # scan-line displacement in pixels
    charging: float  # strength of streaks; 0 mostly

    @classmethod
    def draw(cls, rng: np.random.Generator, view: View) -> "Exposure":
        """Video levels and noise know nothing of what is in sight."""
        blur = 0.42 * np.exp(rng.normal(0, 0.28)) * max((view.pixels / 64) ** 0.45, 0.8)
        astigmatism = np.exp(rng.normal(0, 0.22))
        contrast = np.exp(rng.uniform(np.log(17), np.log(60)))
        return cls(
            defocus=(blur * astigmatism, blur / astigmatism),
            noise=float(min(np.exp(rng.uniform(np.log(1.2), np.log(9.0))), 0.3 * contrast)),
            level=rng.uniform(48, 185),
            contrast=float(contrast),
            gamma=float(np.exp(rng.normal(0, 0.28))),
            inverted=bool(rng.random() < 0.06),
            slope=(rng.normal(0, 14), rng.normal(0, 14)),
            jitter=rng.uniform(0.15, 0.6) if rng.random() < 0.12 else 0.0,
            charging=rng.uniform(0.3, 1.0) if rng.random() < 0.07 else 0.0,
        )


def emission(scene: Scene, column: Column) -> FloatArray:
    """Electrons that reach the detector from each point (H, W), in units of the yield of flat ground."""
    relief, material = _antialiased(scene.relief), _antialiased(scene.material)
    dx, dy = np.empty_like(relief), np.empty_like(relief)
    dx[:, 1:-1], dx[:, 0], dx[:, -1] = 0.5 * (relief[:, 2:] - relief[:, :-2]), 0, 0
    dy[1:-1], dy[0], dy[-1] = 0.5 * (relief[2:] - relief[:-2]), 0, 0
    dx[:, 0], dx[:, -1], dy[0], dy[-1] = dx[:, 1], dx[:, -2], dy[1], dy[-2]
    cosine = 1 / np.sqrt(1 + dx * dx + dy * dy)
    facing = (np.float32(np.cos(column.detector)) * dx + np.float32(np.sin(column.detector)) * dy) * cosine
    gain = 1 + np.float32(column.edge) * (1 - cosine) - np.float32(column.facing) * facing
    return np.asarray(material * gain * _openness(scene, column.shadow), dtype=np.float32)


def _antialiased(field: FloatArray) -> FloatArray:
    """Binomial smoothing over 3 x 3 pixels: outlines are drawn to whole pixels, and slopes would show the steps."""
    rows = field.copy()
    rows[1:-1] += np.float32(0.25) * (field[2:] - 2 * field[1:-1] + field[:-2])
    smooth = rows.copy()
    smooth[:, 1:-1] += np.float32(0.25) * (rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2])
    return smooth


def _openness(scene: Scene, shadow: float) -> FloatArray:
    """Share of electrons that escape: points below their surroundings lose some."""
    height, width = scene.relief.shape
    factor = 4 if min(height, width) >= 192 else 2
    small = Image.fromarray(scene.relief).reduce(factor)
    radius = float(np.clip(1.5 * scene.depth, 0.02 * width, 0.15 * width)) / factor
    around = gaussian_filter(np.asarray(small, dtype=np.float32), radius, truncate=2.0)
    surroundings = np.asarray(Image.fromarray(around).resize((width, height), Image.Resampling.BILINEAR))
    below = (scene.relief - surroundings) / np.float32(scene.depth + 1e-3)
    return 1 + np.float32(shadow) * below / (1 + np.abs(below))


def expose(signal: FloatArray, exposure: Exposure, rng: np.random.Generator) -> FloatArray:
    """Grey levels (H, W), float, within [0, 255]: probe, video levels, faults, then shot noise."""
    signal = gaussian_filter1d(signal, exposure.defocus[0], axis=0, truncate=3.0)
    signal = gaussian_filter1d(signal, exposure.defocus[1], axis=1, truncate=3.0)
    grey = video(signal, exposure)
    if exposure.charging > 0:
        grey = _charged(grey, exposure.charging, rng)
    if exposure.jitter > 0:
        grey = _jittered(grey, exposure.jitter, rng)
    grey = np.clip(grey, 2, 255)
    shot = rng.standard_normal(grey.shape, dtype=np.float32) * np.float32(exposure.noise)
    return np.clip(grey + shot * np.sqrt(grey * np.float32(1 / 128)), 0, 255)


def video(signal: FloatArray, exposure: Exposure) -> FloatArray:
    """Set the mean and spread of the signal; highlights and shadows bend softly into the limits."""
    spread = float(signal.std()) + 0.02
    tone = (signal - signal.mean()) / np.float32(spread)
    tone /= np.sqrt(1 + (tone / np.float32(3.5)) ** 2)
    if exposure.inverted:
        tone = -tone
    height, width = signal.shape
    ramp_x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * np.float32(exposure.slope[0])
    ramp_y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(exposure.slope[1])
    grey = np.float32(exposure.level) + np.float32(exposure.contrast) * tone + ramp_x + ramp_y
    share = np.clip(0.5 + (grey - 127.5) / 300.0, 0.02, 0.98)
    bent = np.power(share, np.float32(exposure.gamma))
    return np.asarray(127.5 + 135.0 * np.tanh((bent - 0.5) * np.float32(2.3)), dtype=np.float32)


def _charged(grey: FloatArray, strength: float, rng: np.random.Generator) -> FloatArray:
    """Charge from bright spots trails along the fast scan direction, and single lines flash."""
    bright = np.maximum(grey - grey.mean() - 1.2 * grey.std(), 0)
    decay = 1 - 6.0 / grey.shape[1]
    trail = lfilter([np.float32(strength * 0.16)], [np.float32(1), np.float32(-decay)], bright, axis=1)
    lines = (grey.shape[0], 1)
    flashes = (rng.random(lines) < 0.04) * rng.normal(0, 22 * strength, lines)
    return np.asarray(grey - np.minimum(trail, 45 * strength) + flashes, dtype=np.float32)


def _jittered(grey: FloatArray, jitter: float, rng: np.random.Generator) -> FloatArray:
    """Displace each scan line by up to one pixel."""
    part = np.clip(0.5 + jitter * rng.standard_normal(grey.shape[0]), 0, 1).astype(np.float32)[:, None]
    return grey * (1 - part) + np.roll(grey, 1, axis=1) * part
