"""One synthetic micrograph by its number: which class and specimen it shows, and its pixels."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from emssl_hf.data.nffa import CLASS_COUNTS, CLASS_NAMES
from emssl_hf.data.scenes import SCENES
from emssl_hf.data.scenes.databar import BAR_RATES, DEFAULT_RATE, bar_rows, draw_bar
from emssl_hf.data.scenes.optics import Column, Exposure, emission, expose
from emssl_hf.data.scenes.stage import MAX_SHIFT, MAX_ZOOM, Scene, View

Imbalance = Literal["balanced", "nffa"]
#: Series lengths are drawn from these; a class's images are numbered through in blocks of SERIES_BLOCK.
SERIES_LENGTHS = (1, 1, 2, 3, 4, 5, 6, 8)
SERIES_BLOCK = 32
#: Field widths of the base view in metres, smallest and largest, by class.
FIELDS = {
    "Porous_Sponge": (2e-6, 1.5e-3),
    "Patterned_surface": (1e-6, 2e-4),
    "Particles": (2e-7, 5e-5),
    "Films_Coated_Surface": (5e-7, 2e-4),
    "Powder": (5e-7, 2e-4),
    "Tips": (5e-7, 2e-4),
    "Nanowires": (8e-7, 5e-5),
    "Biological": (3e-6, 1e-4),
    "MEMS_devices_and_electrodes": (5e-6, 1e-3),
    "Fibres": (1e-5, 1e-3),
}


@dataclass(frozen=True)
class Place:
    """Where an image stands in the set: class number, specimen number within the class."""

    label: int
    specimen: int


@dataclass(frozen=True)
class SynthMicrograph:
    """One image (H, W), its class, specimen, data-bar box, metres per pixel, and instances if asked for."""

    array: npt.NDArray[np.uint8]
    label: int
    specimen: str
    databar: tuple[int, int, int, int] | None
    pixel_size: float
    mask: npt.NDArray[np.uint16] | None


@lru_cache(maxsize=2)
def _nffa_order() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Class and number within it of 21,169 images, mixed so that every prefix has NFFA's proportions."""
    labels = np.repeat(np.arange(len(CLASS_NAMES)), list(CLASS_COUNTS.values()))
    numbers = np.concatenate([np.arange(count) for count in CLASS_COUNTS.values()])
    order = np.lexsort((labels, (numbers + 0.5) / np.array(list(CLASS_COUNTS.values()))[labels]))
    return labels[order], numbers[order]


@lru_cache(maxsize=4096)
def _series(seed: int, label: int, block: int) -> tuple[int, ...]:
    """The specimen, numbered within the block, of each of the block's images."""
    rng = np.random.default_rng([seed, 1, label, block])
    lengths: list[int] = []
    while sum(lengths) < SERIES_BLOCK:
        lengths.append(min(int(rng.choice(SERIES_LENGTHS)), SERIES_BLOCK - sum(lengths)))
    return tuple(np.repeat(np.arange(len(lengths)), lengths).tolist())


def place(index: int, *, seed: int = 0, imbalance: Imbalance = "balanced") -> Place:
    """Class and specimen of image `index`; sets of different lengths share their first images."""
    if imbalance == "balanced":
        number, label = divmod(index, len(CLASS_NAMES))
    else:
        labels, numbers = _nffa_order()
        rounds, at = divmod(index, len(labels))
        label = int(labels[at])
        number = int(numbers[at]) + rounds * list(CLASS_COUNTS.values())[label]
    block, within = divmod(number, SERIES_BLOCK)
    return Place(label, block * SERIES_BLOCK + _series(seed, label, block)[within])


def render(
    index: int,
    *,
    seed: int = 0,
    size: int | tuple[int, int] = 64,
    imbalance: Imbalance = "balanced",
    databar: bool = True,
    masks: bool = False,
) -> SynthMicrograph:
    """Image `index` of the set; `size` is the edge or (height, width), in pixels.

    `databar=False` leaves out every bar; `masks=True` adds the instances of Particles and Powder (0
    elsewhere), where one grain bears one number in all views of its specimen.
    """
    height, width = (size, size) if isinstance(size, int) else size
    spot = place(index, seed=seed, imbalance=imbalance)
    name = CLASS_NAMES[spot.label]
    specimen_seed = [seed, 2, spot.label, spot.specimen]
    setting = np.random.default_rng([*specimen_seed, 0])
    column, field = Column.draw(setting), _log_uniform(setting, *FIELDS[name])
    tilt = setting.uniform(0.6, 0.95) if setting.random() < 0.35 else 1.0
    shot = np.random.default_rng([seed, 3, index])
    view = View(
        height,
        width,
        shift=(shot.uniform(-MAX_SHIFT, MAX_SHIFT), shot.uniform(-MAX_SHIFT, MAX_SHIFT)),
        zoom=_log_uniform(shot, 1 / MAX_ZOOM, MAX_ZOOM),
        angle=shot.normal(0, 0.06),
        tilt=tilt,
    )
    scene = SCENES[name](np.random.default_rng([*specimen_seed, 1]), view)
    pixels = expose(emission(scene, column), Exposure.draw(shot, view), shot).astype(np.uint8)
    pixel_size = float(np.float32(field / view.scale))
    box = _add_bar(pixels, name, pixel_size, np.random.default_rng([seed, 4, index])) if databar else None
    mask = _instances(scene, box) if masks else None
    return SynthMicrograph(pixels, spot.label, f"{name}-{seed}-{spot.specimen}", box, pixel_size, mask)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.random())


def _add_bar(
    pixels: npt.NDArray[np.uint8], name: str, pixel_size: float, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Draw a data bar into `pixels`, at the class's rate; its box as top, left, bottom, right."""
    if rng.random() >= BAR_RATES.get(name, DEFAULT_RATE):
        return None
    height, width = pixels.shape
    top, bottom = bar_rows(rng, height, width)
    pixels[top:bottom] = draw_bar(rng, width, bottom - top, pixel_size)
    return top, 0, bottom, width


def _instances(scene: Scene, box: tuple[int, int, int, int] | None) -> npt.NDArray[np.uint16]:
    """Instance numbers (H, W), 0 on ground and under the data bar."""
    if scene.instances is None:
        return np.zeros(scene.relief.shape, np.uint16)
    mask = scene.instances.astype(np.uint16)
    if box is not None:
        mask[box[0] : box[2]] = 0
    return mask
