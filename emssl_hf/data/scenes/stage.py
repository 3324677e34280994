"""The specimen stage: where the camera looks, random textures fixed to the specimen, and what a scene is.

World coordinates are in field widths of the specimen's base view, x to the right and y down, with (0, 0) in
the middle; heights are in pixels, so that slopes are true slopes.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

#: Views move by at most this part of the field and widen it by at most this factor, so that scenes need to
#: hold objects only for world coordinates within +-REACH.
MAX_SHIFT = 0.2
MAX_ZOOM = 1.25
REACH = 0.5 * MAX_ZOOM + MAX_SHIFT + 0.1

TEXTURE_TILE = 512
#: Texels per wavelength of each stored texture.
TEXTURE_PERIOD = {"bands": 10.0, "cloud": 128.0}


@dataclass(frozen=True)
class Scene:
    """A specimen as the beam meets it: relief (H, W) in pixels, relative yield, instance numbers (0 none)."""

    relief: FloatArray
    material: FloatArray
    depth: float  # typical relief in pixels; the shadowing of pits is measured against it
    instances: IntArray | None = None


@dataclass(frozen=True)
class View:
    """Camera over a specimen: stage shift (field widths), zoom, rotation (radians), shortening by tilt."""

    height: int
    width: int
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    angle: float = 0.0
    tilt: float = 1.0

    @property
    def pixels(self) -> int:
        """The longer edge."""
        return max(self.height, self.width)

    @property
    def scale(self) -> float:
        """Pixels per world unit."""
        return self.zoom * self.pixels

    @property
    def richness(self) -> float:
        """Features across relative to 64 pixels: small images show small fields, not blurred ones."""
        return min(max((self.pixels / 64.0) ** 0.55, 0.85), 4.0)

    @cached_property
    def matrix(self) -> npt.NDArray[np.float64]:
        """(2, 2) from world to pixels: rotation, then foreshortening of y."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return np.array([[c, -s], [self.tilt * s, self.tilt * c]]) * self.scale

    def points(self, world: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """World points (N, 2) to pixels (N, 2) as x, y."""
        centre = np.array([self.width / 2, self.height / 2])
        return (np.asarray(world, dtype=np.float64) - self.shift) @ self.matrix.T + centre

    def sampling(self, matrix: npt.ArrayLike, offset: npt.ArrayLike) -> tuple[float, ...]:
        """Affine coefficients (a, b, c, d, e, f) from pixels to `matrix @ world + offset`."""
        inverse = np.linalg.inv(self.matrix)
        linear = np.asarray(matrix) @ inverse
        centre = np.array([self.width / 2, self.height / 2])
        start = np.asarray(matrix) @ (np.asarray(self.shift) - inverse @ centre) + np.asarray(offset)
        return (*linear[0].tolist(), float(start[0]), *linear[1].tolist(), float(start[1]))

    def grid(self, turn: float = 0.0) -> tuple[FloatArray, FloatArray]:
        """World coordinates of every pixel, (H, W) each, along axes turned by `turn` radians."""
        rotation = [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        a, b, c, d, e, f = self.sampling(rotation, (0.0, 0.0))
        x = np.arange(self.width, dtype=np.float32)[None, :] + np.float32(0.5)
        y = np.arange(self.height, dtype=np.float32)[:, None] + np.float32(0.5)
        u = np.float32(a) * x + (np.float32(b) * y + np.float32(c))
        v = np.float32(d) * x + (np.float32(e) * y + np.float32(f))
        return u, v

    def texture(
        self,
        name: str,
        wavelength: float,
        place: npt.ArrayLike,
        *,
        stretch: float = 1.0,
        turn: float = 0.0,
    ) -> FloatArray:
        """A random field (H, W) of mean 0 and spread 1, fixed to the specimen.

        `wavelength` is in world units ("bands": that of its waves; "cloud": its outer scale), `place` in
        [0, 1)^2 chooses the piece, and `stretch` lengthens it along the direction `turn`.
        """
        texels = TEXTURE_PERIOD[name] / max(wavelength, 0.03 * TEXTURE_PERIOD[name] / 10.0)
        c, s = np.cos(turn), np.sin(turn)
        matrix = np.array([[c, s], [-s, c]]) * [[texels / stretch], [texels]]
        offset = TEXTURE_TILE * (1.0 + np.asarray(place, dtype=np.float64))
        coefficients = np.array(self.sampling(matrix, offset))
        level = int(np.clip(np.floor(np.log2(max(texels / self.scale, 1e-6)) + 0.4), 0, 3))
        return _sample(texture_image(name, level), coefficients / 2**level, self.width, self.height)


def _sample(image: Image.Image, coefficients: FloatArray, width: int, height: int) -> FloatArray:
    """`image` under an affine map; slowly varying fields are sampled coarsely and enlarged."""
    step = float(np.hypot(coefficients[0], coefficients[3]))
    coarse = 4 if step < 0.12 and min(width, height) >= 128 else 1
    size = (-(-width // coarse), -(-height // coarse))
    a, b, c, d, e, f = coefficients
    ratio_x, ratio_y = width / size[0], height / size[1]
    data = (a * ratio_x, b * ratio_y, c, d * ratio_x, e * ratio_y, f)
    sampled = image.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    if coarse > 1:  # smoothing by less than a texel hides the texels' grid, which slopes would show
        smooth = gaussian_filter(np.asarray(sampled), 0.45 / (step * coarse), truncate=3.0)
        sampled = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(sampled, dtype=np.float32)


@lru_cache(maxsize=16)
def texture_image(name: str, level: int) -> Image.Image:
    """A stored texture, three tiles across, averaged over 2**level texels."""
    if level > 0:
        return texture_image(name, level - 1).reduce(2)
    tile = np.tile(_texture_tile(name), (3, 3))
    return Image.fromarray(tile)


def _texture_tile(name: str) -> FloatArray:
    """Periodic Gaussian random field with the spectrum of `name`."""
    rng = np.random.default_rng([0x5E3, len(name)])
    frequency = np.hypot(np.fft.fftfreq(TEXTURE_TILE)[:, None], np.fft.rfftfreq(TEXTURE_TILE)[None, :])
    if name == "bands":
        amplitude = np.exp(-0.5 * ((frequency * TEXTURE_PERIOD[name] - 1.0) / 0.32) ** 2)
    else:
        amplitude = (frequency**2 + TEXTURE_PERIOD[name] ** -2) ** -0.8
    amplitude[0, 0] = 0.0
    spectrum = np.fft.rfft2(rng.standard_normal((TEXTURE_TILE, TEXTURE_TILE))) * amplitude
    field = np.fft.irfft2(spectrum, s=(TEXTURE_TILE, TEXTURE_TILE))
    return (field / field.std()).astype(np.float32)


def scatter(rng: np.random.Generator, per_field: float) -> npt.NDArray[np.float64]:
    """Points (N, 2) strewn over the whole reach of the stage, `per_field` to the base field on average."""
    count = max(round(per_field * (2 * REACH) ** 2), 1)
    return rng.uniform(-REACH, REACH, (count, 2))


def jittered_lattice(rng: np.random.Generator, spacing: float, jitter: float) -> npt.NDArray[np.float64]:
    """Points (N, 2) of a hexagonal lattice over the stage, each moved by up to `jitter` spacings."""
    across = int(np.ceil(2 * REACH / spacing)) + 1
    column, row = np.meshgrid(np.arange(across), np.arange(int(across * 1.16) + 1))
    x = (column + 0.5 * (row % 2)) * spacing - REACH
    y = row * spacing * 0.866 - REACH
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing


def smoothstep(value: FloatArray, low: float, high: float) -> FloatArray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)
