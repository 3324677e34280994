"""SynthSEM: procedural scanning electron micrographs in NFFA's ten classes, the embedded default data set.

Image i is a function of (seed, i), the size and the imbalance alone. Images come in series of one specimen
(column `group`), and the splits keep each specimen whole.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from emssl_hf.data.nffa import CLASS_NAMES
from emssl_hf.data.scenes.micrograph import Imbalance, Place, SynthMicrograph, place, render
from emssl_hf.errors import EmsslError
from emssl_hf.machine import cores

__all__ = ["SynthMicrograph", "SynthSEM", "SynthSEMConfig", "contact_sheet", "place", "render", "synthsem"]

#: Raise when the same (seed, index) gives other pixels, so that nobody reads an older cache.
CODE_VERSION = "1.0.0"
SPLITS = {"train": 0.70, "validation": 0.15, "test": 0.15}
SIZE_LIMITS = (32, 1024)


@dataclass
class SynthSEMConfig(datasets.BuilderConfig):
    """What to make. Raises `EmsslError` on values that cannot be made."""

    images: int = 6000
    size: int | tuple[int, int] = 64  # edge, or (height, width), in pixels
    imbalance: Imbalance = "balanced"
    seed: int = 0
    masks: bool = False  # adds the column `mask`: instances of Particles and Powder
    databar: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        edges = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(edges) != 2 or not all(SIZE_LIMITS[0] <= edge <= SIZE_LIMITS[1] for edge in edges):
            raise EmsslError(
                f"synthsem: size={self.size} is not possible; give an edge, or (height, width), of "
                f"{SIZE_LIMITS[0]} to {SIZE_LIMITS[1]} pixels."
            )
        if self.imbalance not in ("balanced", "nffa"):
            raise EmsslError(f"synthsem: imbalance={self.imbalance!r} is unknown; choose 'balanced' or 'nffa'.")
        if self.images < 1 or self.seed < 0:
            raise EmsslError(
                f"synthsem: images={self.images}, seed={self.seed} is not possible; "
                "give at least 1 image and a seed of at least 0."
            )
        self.size = edges[0] if edges[0] == edges[1] else (edges[0], edges[1])

    def digest(self) -> str:
        """Hash of everything that decides the rows, the code's version among it."""
        fields = {name: getattr(self, name) for name in ("images", "size", "imbalance", "seed", "masks", "databar")}
        text = json.dumps([CODE_VERSION, fields], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        """Names the cache folder: `datasets` would otherwise not notice a change of this code."""
        return f"{self.name}-{self.images}-{self.digest()}"


class SynthSEM(datasets.GeneratorBasedBuilder):
    """Builder: `SynthSEM(images=2000, size=64)`, then `download_and_prepare()` and `as_dataset()`."""

    BUILDER_CONFIG_CLASS = SynthSEMConfig
    VERSION = datasets.Version(CODE_VERSION)
    config: SynthSEMConfig

    def _info(self) -> datasets.DatasetInfo:
        columns: dict[str, Any] = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(CLASS_NAMES)),
            "id": datasets.Value("string"),
            "group": datasets.Value("string"),
            "databar": datasets.List(datasets.Value("int32")),
            "pixel_size": datasets.Value("float32"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
        }
        if self.config.masks:
            columns["mask"] = datasets.Image()
        return datasets.DatasetInfo(
            description="Procedural scanning electron micrographs in the ten classes of the NFFA-EUROPE set.",
            features=datasets.Features(columns),
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        config = self.config
        places = [place(i, seed=config.seed, imbalance=config.imbalance) for i in range(config.images)]
        parts = split_specimens(places, config.seed)
        empty = [name for name, indices in parts.items() if not indices]
        if empty:
            raise EmsslError(
                f"synthsem: {config.images} images leave no specimen for {' and '.join(empty)}; ask for at least 100."
            )
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"indices": _chunks(indices)})
            for name, indices in parts.items()
        ]

    def _generate_examples(self, indices: list[tuple[int, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.config
        for index in (i for chunk in indices for i in chunk):
            micrograph = render(
                index,
                seed=config.seed,
                size=config.size,
                imbalance=config.imbalance,
                databar=config.databar,
                masks=config.masks,
            )
            yield index, _row(micrograph)


def _chunks(indices: list[int]) -> list[tuple[int, ...]]:
    """Shards for `num_proc`: `datasets` divides a list between processes, in order."""
    step = max(min(64, len(indices) // 32), 1)
    return [tuple(indices[start : start + step]) for start in range(0, len(indices), step)]


def _row(micrograph: SynthMicrograph) -> dict[str, Any]:
    height, width = micrograph.array.shape
    row: dict[str, Any] = {
        "image": _png(micrograph.array),
        "label": micrograph.label,
        "id": content_id(micrograph.array),
        "group": micrograph.specimen,
        "databar": list(micrograph.databar) if micrograph.databar else None,
        "pixel_size": micrograph.pixel_size,
        "width": width,
        "height": height,
    }
    if micrograph.mask is not None:
        row["mask"] = _png(micrograph.mask)
    return row


def _png(array: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> dict[str, bytes | None]:
    """PNG at the lowest effort: noise hardly compresses, and a higher level costs more than rendering."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def content_id(array: npt.NDArray[np.uint8]) -> str:
    """128-bit hash of shape and grey levels, as 32 hexadecimal digits."""
    return hashlib.blake2b(array.tobytes(), digest_size=16, person=str(array.shape).encode()[:16]).hexdigest()


def split_specimens(places: list[Place], seed: int) -> dict[str, list[int]]:
    """Indices of `places` by split: 70/15/15 within each class, and every specimen in one split only."""
    series: dict[int, dict[int, list[int]]] = {}
    for index, spot in enumerate(places):
        series.setdefault(spot.label, {}).setdefault(spot.specimen, []).append(index)
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for label, specimens in sorted(series.items()):
        _deal(specimens, parts, np.random.default_rng([seed, 5, label]))
    return {name: sorted(indices) for name, indices in parts.items()}


def _deal(specimens: dict[int, list[int]], parts: dict[str, list[int]], rng: np.random.Generator) -> None:
    """Deal one class's specimens, each to the split that lacks most; three or more reach every split."""
    lacking = {name: share * sum(map(len, specimens.values())) for name, share in SPLITS.items()}
    untouched = list(SPLITS)
    order = rng.permutation(sorted(specimens)).tolist()
    if len(order) < 10:  # too few to even out: the longest series go to train
        order.sort(key=lambda specimen: -len(specimens[specimen]))
    for position, specimen in enumerate(order):
        candidates = untouched if len(order) - position <= len(untouched) else list(SPLITS)
        name = max(candidates, key=lambda split: lacking[split])
        parts[name] += specimens[specimen]
        lacking[name] -= len(specimens[specimen])
        if name in untouched:
            untouched.remove(name)


def synthsem(
    images: int = 6000,
    size: int | tuple[int, int] = 64,
    imbalance: Imbalance = "balanced",
    seed: int = 0,
    *,
    masks: bool = False,
    databar: bool = True,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """The set as train, validation and test; made on first use, by default on all cores, then cached.

    Raises `EmsslError` on values that cannot be made.
    """
    builder = SynthSEM(
        cache_dir=str(cache_dir) if cache_dir is not None else None,
        images=images,
        size=size,
        imbalance=imbalance,
        seed=seed,
        masks=masks,
        databar=databar,
    )
    if num_proc is None:
        edges = (size, size) if isinstance(size, int) else size
        worth_sharing = images * edges[0] * edges[1] > 2000 * 64 * 64
        num_proc = cores() if worth_sharing else 1
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


def contact_sheet(columns: int = 8, size: int = 128, *, seed: int = 0) -> Image.Image:
    """One row per class with its name at the left, `columns` specimens each.

    The README's picture: `contact_sheet(size=100, seed=3).save("docs/images/synthsem.png", optimize=True)`.
    """
    left, gap = 108, 3
    step = size + gap
    sheet = Image.new("L", (left + columns * step, len(CLASS_NAMES) * step), 255)
    pen = ImageDraw.Draw(sheet)
    for label, name in enumerate(CLASS_NAMES):
        text = name.replace("_and_", "\nand ").replace("_", "\n")
        pen.multiline_text((4, label * step + size // 2 - 20), text, fill=0, font=ImageFont.load_default(15))
        shown: set[str] = set()
        index = label
        while len(shown) < columns:
            micrograph = render(index, seed=seed, size=size)
            if micrograph.specimen not in shown:
                sheet.paste(Image.fromarray(micrograph.array), (left + len(shown) * step, label * step))
                shown.add(micrograph.specimen)
            index += len(CLASS_NAMES)
    return sheet
