"""The store on disk: one flat file of pixels, an index, and the view of it that training reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emssl_hf.errors import EmsslError

FORMAT_VERSION = 1
DATA, INDEX, META = "data.bin", "index.npz", "meta.json"
"""Pixels, one image after the other; one row per image; what holds for all of them."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Skipped:
    """A row of the data set that has no pixels, and why."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Store:
    """Decoded micrographs in a memory-mapped file, or a subset of them sharing the same pixels.

    All per-image fields have one entry per image: `ids` and `groups` strings, `labels` int64 (-1: none),
    `shapes` (N, 2) height and width, `rows` the row of the data set that each image came from,
    `stretches` (N, 2) the source values that became black and white, `moments` (N, 2) the sums of the
    pixels and of their squares in units of the full range. Pickles to its path and indices, never to pixels.
    """

    path: Path
    dtype: str
    ids: NDArray[np.str_]
    labels: Ints
    groups: NDArray[np.str_]
    shapes: Ints
    rows: Ints
    stretches: NDArray[np.float64]
    moments: NDArray[np.float64]
    offsets: Ints
    label_names: list[str] | None
    skipped: list[Skipped]
    pixels: NDArray[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mean(self) -> float:
        """Mean of all pixels of these images, 0 to 1 of the full range."""
        return float(self.moments[:, 0].sum() / self._pixel_count())

    @property
    def std(self) -> float:
        """Standard deviation of all pixels of these images, in units of the full range."""
        variance = float(self.moments[:, 1].sum() / self._pixel_count()) - self.mean**2
        return float(np.sqrt(max(variance, 0.0)))

    @property
    def max_shape(self) -> tuple[int, int]:
        """Largest height and largest width of these images."""
        height, width = self.shapes.max(axis=0)
        return int(height), int(width)

    def image(self, index: int) -> NDArray[Any]:
        """Image `index` (h, w), a view of the file in the store's dtype."""
        height, width = self.shapes[index]
        start = self.offsets[index]
        return self.pixels[start : start + height * width].reshape(height, width)

    def gather(self, indices: Sequence[int] | Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Images as one (B, Hmax, Wmax) tensor, smaller ones zero-padded below and right, and (B, 2) extents.

        uint8 stores give uint8; uint16 stores give int32, which every device can compute with.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        extents = self.shapes[chosen]
        height, width = extents.max(axis=0) if len(chosen) else self.max_shape
        if len(chosen) and (extents == extents[0]).all():
            block = self._equal_block(chosen, int(height), int(width))
        else:
            block = np.zeros((len(chosen), height, width), self.dtype)
            for slot, index, (h, w) in zip(block, chosen, extents, strict=True):
                slot[:h, :w] = self.image(int(index))
        if self.dtype == "uint16":
            block = block.astype(np.int32)
        return torch.from_numpy(block), torch.from_numpy(extents.copy())

    def subset(self, indices: Sequence[int] | Ints) -> "Store":
        """The images at these positions, in this order, on the same pixels."""
        at = np.asarray(indices, dtype=np.int64)
        names = ("ids", "labels", "groups", "shapes", "rows", "stretches", "moments", "offsets")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    def with_labels(self, labels: Ints, groups: NDArray[np.str_], label_names: list[str] | None) -> "Store":
        """The same images under other labels and groups, one per image."""
        assert len(labels) == len(groups) == len(self)
        return replace(self, labels=labels, groups=groups, label_names=label_names)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, pixels=map_pixels(state["path"], state["dtype"]))

    def _pixel_count(self) -> int:
        return int(self.shapes.prod(axis=1).sum())

    def _equal_block(self, chosen: Ints, height: int, width: int) -> NDArray[Any]:
        """Images of one shape: a single fancy index where the whole file is a regular array."""
        step = height * width
        starts = self.offsets[chosen]
        if (starts % step == 0).all() and len(self.pixels) % step == 0:
            return np.asarray(self.pixels.reshape(-1, height, width)[starts // step])
        return np.stack([self.pixels[s : s + step] for s in starts]).reshape(-1, height, width)


def open_store(path: str | Path) -> Store:
    """Opens a finished store by its folder: pixels and ids, no labels, each image a group of its own.

    Labels and groups belong to data sets: `build_store` adds them. Raises EmsslError.
    """
    folder = Path(path)
    if not (folder / META).is_file():
        raise EmsslError(f"{folder}: no finished store of micrographs is here; build it with build_store")
    meta = json.loads((folder / META).read_text())
    if meta["format_version"] != FORMAT_VERSION:
        raise EmsslError(
            f"{folder}: a store of format {meta['format_version']}, not {FORMAT_VERSION}; delete this folder"
        )
    with np.load(folder / INDEX, allow_pickle=False) as index:
        columns = {name: index[name] for name in index.files}
    sizes = columns["shapes"].prod(axis=1)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    pixels = map_pixels(folder, meta["dtype"])
    if len(pixels) != sizes.sum():
        raise EmsslError(f"{folder}: the file of pixels is cut short; delete this folder and build it again")
    skipped = [Skipped(**entry) for entry in meta["skipped"]]
    return Store(
        path=folder,
        dtype=meta["dtype"],
        labels=np.full(len(offsets), -1, dtype=np.int64),
        groups=columns["ids"],
        offsets=offsets,
        label_names=None,
        skipped=skipped,
        pixels=pixels,
        **columns,
    )


def map_pixels(folder: Path, dtype: str) -> NDArray[Any]:
    """The flat file of pixels, mapped read-only."""
    return np.memmap(folder / DATA, dtype=dtype, mode="r")
