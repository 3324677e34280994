"""Data set -> memory-mapped store, built once: the door to `Store`, `batches` and the stores on disk."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from emssl_hf.data.batches import Batch, batch_count, batches, epoch_order
from emssl_hf.data.building import UNFINISHED, column, expected_bytes, store_key, write_store
from emssl_hf.data.decoding import PixelSpec
from emssl_hf.data.depth import DEFAULT_STRETCH
from emssl_hf.data.pixels import META, Skipped, Store, open_store
from emssl_hf.errors import EmsslError
from emssl_hf.machine import cores

__all__ = [
    "Batch",
    "Skipped",
    "Store",
    "StoreInfo",
    "batch_count",
    "batches",
    "build_store",
    "default_root",
    "epoch_order",
    "list_stores",
    "open_store",
    "prune_stores",
]


@dataclass(frozen=True)
class StoreInfo:
    """A store on disk: its folder, its size in bytes, and when it was last used (seconds, Unix time)."""

    path: Path
    bytes: int
    last_used: float


def build_store(
    dataset: datasets.Dataset,
    *,
    size: int | tuple[int, int],
    root: Path | None = None,
    dtype: str = "uint8",
    databar: str = "crop",
    stretch: tuple[float, float] = DEFAULT_STRETCH,
    workers: int | None = None,
    progress: bool = True,
) -> Store:
    """The store of a data set's pixels, decoded now or found from an earlier run.

    `size` as an int is the short edge, every image scaled to it with its aspect kept (beyond 2:1 the centre);
    (H, W) squashes the whole micrograph to that shape. Images that cannot be read are left out and listed in
    `Store.skipped`; labels and groups are those of `dataset`. Raises EmsslError where nothing can be read,
    the disk is too full, or an image file has gone.
    """
    spec = PixelSpec(size, dtype, databar, stretch)
    if missing := {"image", "id"} - set(dataset.column_names):
        raise EmsslError(f"the data set has no column {sorted(missing)[0]!r}; open it with open_dataset")
    root = default_root() if root is None else root
    folder = root / store_key(dataset, spec)
    with _lock(root, folder.name, progress):
        store = _finished(folder)
        if store is None:
            needed = expected_bytes(dataset, spec)
            _say(progress, f"decoding {len(dataset):,} images at {size} px into {root}, about {needed / 1e9:.2f} GB")
            _check_disk(root, needed)
            write_store(dataset, spec, folder, workers or cores(), progress)
            store = open_store(folder)
            _say(progress, f"{len(store):,} images, {store.pixels.nbytes / 1e9:.2f} GB, in {folder}")
        os.utime(folder / META)
    if store.skipped:
        first = store.skipped[0]
        _say(progress, f"{len(store.skipped)} images left out, the first: {first.path}: {first.reason}")
    return _labelled(store, dataset)


def default_root() -> Path:
    """Where stores are kept: $EMSSL_STORE, or the user's cache folder."""
    if place := os.environ.get("EMSSL_STORE"):
        return Path(place)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "emssl_hf" / "stores"


def list_stores(root: Path | None = None) -> list[StoreInfo]:
    """The finished stores under a root, the last used first."""
    root = default_root() if root is None else root
    found = [
        StoreInfo(meta.parent, _bytes_of(meta.parent), meta.stat().st_mtime) for meta in root.glob(f"[!.]*/{META}")
    ]
    return sorted(found, key=lambda info: -info.last_used)


def prune_stores(root: Path | None = None, *, unused_days: float = 30.0) -> list[StoreInfo]:
    """Deletes stores not used for so many days, and what killed builds left; returns what was deleted."""
    root = default_root() if root is None else root
    for unfinished in root.glob(f"{UNFINISHED}*"):
        with _try_lock(root, unfinished.name.removeprefix(UNFINISHED)) as free:
            if free:
                shutil.rmtree(unfinished)
    pruned = []
    for info in list_stores(root):
        if time.time() - info.last_used > unused_days * 86400:
            with _try_lock(root, info.path.name) as free:
                if free:
                    shutil.rmtree(info.path)
                    pruned.append(info)
    return pruned


def _finished(folder: Path) -> Store | None:
    """The store in a folder, or None where there is none or only a damaged one."""
    if not (folder / META).is_file():
        return None
    try:
        return open_store(folder)
    except EmsslError:
        return None  # cut short by a full disk or another version: built again in its place


def _labelled(store: Store, dataset: datasets.Dataset) -> Store:
    """The store under the labels and groups of the data set that asked for it."""
    groups = column(dataset, "group" if "group" in dataset.column_names else "id", store.rows)
    if "label" not in dataset.column_names:
        return store.with_labels(np.full(len(store), -1), np.array(groups, dtype=np.str_), None)
    labels = [-1 if label is None else label for label in column(dataset, "label", store.rows)]
    names = list(dataset.features["label"].names)
    return store.with_labels(np.array(labels, dtype=np.int64), np.array(groups, dtype=np.str_), names)


def _check_disk(root: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise EmsslError(
            f"{root}: the store needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space, choose a smaller size, or set EMSSL_STORE to another disk"
        )


@contextmanager
def _lock(root: Path, name: str, progress: bool) -> Iterator[None]:
    """Holds the lock of one store; the system frees it when a process dies, however it dies."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(progress, f"waiting for another process that builds {root / name}")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise EmsslError(f"{root}: {error}; set EMSSL_STORE to a local folder to write in") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _try_lock(root: Path, name: str) -> Iterator[bool]:
    """Whether nobody else holds the lock of a store; held meanwhile."""
    lock = FileLock(root / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _say(progress: bool, message: str) -> None:
    if progress:
        tqdm.write(message, file=sys.stderr)
