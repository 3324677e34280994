"""Decodes the rows of a data set on all cores and writes a store's folder, in order and in flat memory."""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from emssl_hf.data.decoding import Decoded, PixelSpec, decode_row, row_name
from emssl_hf.data.pixels import DATA, FORMAT_VERSION, INDEX, META, Ints, Skipped
from emssl_hf.errors import EmsslError

UNFINISHED = ".building-"
USUAL_ASPECT = 1.4
"""Assumed for the estimate of disk space where the data set does not tell sizes."""


@dataclass
class _Index:
    """What is known of each image written so far."""

    rows: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    stretches: list[tuple[float, float]] = field(default_factory=list)
    moments: list[tuple[float, float]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    cut: int = 0


def store_key(dataset: datasets.Dataset, spec: PixelSpec) -> str:
    """Folder name of a store: what decides its pixels, so not the labels, and not where the files lie."""
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps([FORMAT_VERSION, asdict(spec)]).encode())
    for name in ("id", "databar"):
        if name in dataset.column_names:
            digest.update(f"|{name}|{dataset[name][:]}".encode())
    edge = str(spec.size) if isinstance(spec.size, int) else "x".join(map(str, spec.size))
    return f"{edge}-{spec.dtype}-{digest.hexdigest()}"


def write_store(dataset: datasets.Dataset, spec: PixelSpec, folder: Path, workers: int, progress: bool) -> None:
    """Builds a store beside its place and moves it there when it is whole. The caller holds the lock."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a build that was killed
    unfinished.mkdir(parents=True)
    try:
        with (unfinished / DATA).open("wb") as file:
            index = _write_pixels(_decoded_rows(dataset, spec, workers, progress), file)
        _write_index(unfinished, dataset, spec, index)
        shutil.rmtree(folder, ignore_errors=True)  # there only if it was damaged
        unfinished.replace(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EmsslError(f"{folder.parent}: the disk is full; free some space or set EMSSL_STORE") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def expected_bytes(dataset: datasets.Dataset, spec: PixelSpec) -> int:
    """An estimate of the size of the file of pixels."""
    if isinstance(spec.size, int):
        pixels = len(dataset) * spec.size**2 * USUAL_ASPECT
    else:
        pixels = len(dataset) * float(np.prod(spec.size))
    return int(pixels * np.dtype(spec.dtype).itemsize)


def column(dataset: datasets.Dataset, name: str, rows: Ints | list[int]) -> list[Any]:
    """A column at some rows."""
    values = dataset[name][:]
    return [values[row] for row in rows]


Row = tuple[int, dict[str, Any]]
Result = tuple[int, Decoded, tuple[float, float]] | Skipped


def _decoded_rows(dataset: datasets.Dataset, spec: PixelSpec, workers: int, progress: bool) -> Iterator[Result]:
    """Results in the order of the rows; a few per worker are under way at a time."""
    wanted = [name for name in ("image", "id", "databar") if name in dataset.column_names]
    rows = dataset.with_format(None).select_columns(wanted).cast_column("image", datasets.Image(decode=False))
    bar = tqdm(
        total=len(dataset), desc="decoding micrographs", unit="img", disable=None if progress else True, leave=False
    )
    with bar, ThreadPoolExecutor(workers) as pool:
        for result in _in_order(pool, lambda row: _decode(row, spec), enumerate(rows), 4 * workers):
            bar.update()
            yield result


def _in_order(
    pool: ThreadPoolExecutor, job: Callable[[Row], Result], rows: Iterator[Row], window: int
) -> Iterator[Result]:
    """`map` over a pool that keeps at most `window` results in memory."""
    waiting: deque[Future[Result]] = deque()
    try:
        for row in rows:
            waiting.append(pool.submit(job, row))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _decode(row: Row, spec: PixelSpec) -> Result:
    """Decodes one row; an unreadable image is a result too, a file that has gone stops the build."""
    number, content = row
    try:
        decoded = decode_row(content, spec)
    except FileNotFoundError as error:
        raise EmsslError(f"{error}: the file has gone since the data set was opened; open it again") from error
    except EmsslError as error:
        name = row_name(content)
        return Skipped(number, name, str(error).removeprefix(f"{name}: "))
    return number, decoded, _moments(decoded.pixels)


def _moments(pixels: NDArray[Any]) -> tuple[float, float]:
    """Sum of the pixels and of their squares in units of the full range."""
    counts = np.bincount(pixels.ravel())
    values = np.arange(len(counts)) / np.iinfo(pixels.dtype).max
    return float(counts @ values), float(counts @ values**2)


def _write_pixels(results: Iterator[Result], file: BinaryIO) -> _Index:
    index = _Index()
    for result in results:
        if isinstance(result, Skipped):
            index.skipped.append(result)
            continue
        row, decoded, moments = result
        file.write(np.ascontiguousarray(decoded.pixels).data)
        index.rows.append(row)
        index.shapes.append((decoded.pixels.shape[0], decoded.pixels.shape[1]))
        index.stretches.append(decoded.stretch)
        index.moments.append(moments)
        index.cut += decoded.cut
    file.flush()
    os.fsync(file.fileno())
    return index


def _write_index(folder: Path, dataset: datasets.Dataset, spec: PixelSpec, index: _Index) -> None:
    """Writes the index and, last, the description. Raises EmsslError where no image could be read."""
    if not index.rows:
        reason = f"; the first: {index.skipped[0].path}: {index.skipped[0].reason}" if index.skipped else ""
        raise EmsslError(f"none of the {len(dataset)} images could be read{reason}")
    np.savez(
        folder / INDEX,
        ids=np.array(column(dataset, "id", index.rows), dtype=np.str_),
        rows=np.array(index.rows, dtype=np.int64),
        shapes=np.array(index.shapes, dtype=np.int64),
        stretches=np.array(index.stretches, dtype=np.float64),
        moments=np.array(index.moments, dtype=np.float64),
    )
    meta = {
        "format_version": FORMAT_VERSION,
        **asdict(spec),
        "images": len(index.rows),
        "cut_to_2_to_1": index.cut,
        "skipped": [asdict(entry) for entry in index.skipped],
    }
    (folder / META).write_text(json.dumps(meta, indent=1))
