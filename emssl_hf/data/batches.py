"""Store -> batches whose order is a function of (seed, epoch), the same for any number of processes."""

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from emssl_hf.data.pixels import Store
from emssl_hf.errors import EmsslError


class Batch(NamedTuple):
    """One process's share of one global batch.

    `images` (B, Hmax, Wmax) uint8 or int32, `extents` (B, 2) true height and width, `indices` (B,) int64
    positions in the store, `labels` (B,) int64 (-1: none), `number` of the batch in its epoch from 0.
    """

    images: torch.Tensor
    extents: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor
    number: int


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(n) drawn from (seed, epoch) alone.

    Sorts raw Philox words: NumPy keeps bit generators stable over versions, not `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def batch_count(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Global batches in an epoch of n images."""
    return n // batch_size if drop_last else -(-n // batch_size)


def batches(
    store: Store,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    drop_last: bool = True,
    start: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Yields rank's contiguous share of each global batch of `batch_size` images, from batch `start` on.

    Without `drop_last` the last global batch is split as evenly as it goes, so a share may be empty: every
    process still sees the same number of batches. `prefetch` batches are read ahead in a thread; 0 reads
    in place. Raises EmsslError for a size that does not fit the store or the processes.
    """
    if batch_size < 1 or batch_size % world:
        raise EmsslError(f"batch size {batch_size} cannot be shared by {world} processes; make it a multiple")
    if not len(store) or (drop_last and len(store) < batch_size):
        raise EmsslError(
            f"{len(store)} images do not fill one batch of {batch_size}; lower the batch size or add images"
        )
    order = epoch_order(len(store), seed, epoch) if shuffle else np.arange(len(store))
    numbers = range(start, batch_count(len(store), batch_size, drop_last))
    shares = (_share(order[b * batch_size : (b + 1) * batch_size], rank, world) for b in numbers)
    made = (_batch(store, share, number) for number, share in zip(numbers, shares, strict=True))
    return _read_ahead(made, prefetch) if prefetch else made


def _share(order: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Rank's contiguous slice of a global batch."""
    return np.array_split(order, world)[rank]


def _batch(store: Store, indices: NDArray[np.int64], number: int) -> Batch:
    images, extents = store.gather(indices)
    labels = torch.from_numpy(store.labels[indices])
    return Batch(images, extents, torch.from_numpy(indices.copy()), labels, number)


def _read_ahead(made: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Runs an iterator in a thread, `depth` items ahead; its errors are raised here, and it ends with us."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in made:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # handed over to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name="emssl-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
