"""Any model over any folder: classes to CSV, features to Parquet, going on where an earlier call stopped."""

import csv
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import logging

from emssl_hf.data.decoding import resize
from emssl_hf.data.folder import open_folder
from emssl_hf.data.reading import crop_databar, read_micrograph, to_uint8
from emssl_hf.engine.sinks import CsvSink, ParquetSink, Row, Sink
from emssl_hf.errors import EmsslError

Pool = Literal["cls", "mean"]
DataBar = Literal["crop", "keep"]


@dataclass(frozen=True)
class Loaded:
    """A model with the input that its processor describes."""

    model: Any
    size: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor

    @torch.no_grad()
    def __call__(self, images: list[NDArray[np.uint8]]) -> Any:
        """The model's output for grey 8-bit images (H, W) of its size."""
        pixels = torch.from_numpy(np.stack(images)).to(self.model.device).float() / 255
        pixels = pixels[:, None].expand(-1, self.model.config.num_channels, -1, -1)
        return self.model((pixels - self.mean) / self.std)


@dataclass(frozen=True)
class Item:
    """One file, cut into tiles (one, unless tiling was asked for), or the reason why it was left out."""

    path: str
    tiles: list[NDArray[np.uint8]]
    pixel_size: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Reader:
    """A file -> the 8-bit tiles of the model's size, read and stretched as in training."""

    size: tuple[int, int]
    tiles: bool
    databar: DataBar

    def __call__(self, row: dict[str, Any]) -> Item:
        try:
            micrograph = read_micrograph(row["image"]["path"])
            array = micrograph.array
            if self.databar == "crop":
                array = crop_databar(array, micrograph.databar)
            grey, _ = to_uint8(array)
        except EmsslError as error:
            return Item(row["path"], [], problem=str(error))
        cuts = squares(grey) if self.tiles else [grey]
        return Item(row["path"], [resize(cut, self.size) for cut in cuts], micrograph.pixel_size)


def squares(array: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The fewest squares of the short edge that cover the image, evenly spread."""
    edge, length = min(array.shape), max(array.shape)
    starts = np.linspace(0, length - edge, -(-length // edge)).astype(int)
    upright = array.shape[0] == length
    return [array[s : s + edge] if upright else array[:, s : s + edge] for s in starts]


def predict(
    model: str | Path,
    folder: str | Path,
    output: str | Path,
    *,
    batch_size: int = 32,
    tiles: bool = False,
    databar: DataBar = "crop",
) -> Path:
    """Classify every micrograph under `folder`; returns the CSV: path, label, score per class, pixel size in metres.

    Files that cannot be read stand with the reason in `<output>.skipped.csv`. Rows of an earlier call are kept and
    their files not scored again. With `tiles`, squares of the short edge are scored and their scores averaged.
    Raises EmsslError where the model is no classifier or the folder holds no micrograph.
    """
    loaded = load_model(model, AutoModelForImageClassification)
    names = [str(loaded.model.config.id2label[i]) for i in range(loaded.model.config.num_labels)]

    def rows(items: list[Item], output: Any) -> list[Row]:
        scores = per_item(items, output.logits.float().softmax(1).cpu().numpy())
        return [
            {
                "path": item.path,
                "label": names[int(score.argmax())],
                **{f"score_{name}": round(float(value), 6) for name, value in zip(names, score, strict=True)},
                "pixel_size": item.pixel_size,
            }
            for item, score in zip(items, scores, strict=True)
        ]

    output = Path(output)
    columns = ["path", "label", *(f"score_{name}" for name in names), "pixel_size"]
    sink = CsvSink(output, columns, origin(loaded, model, folder) | {"tiles": tiles, "databar": databar})
    stream(loaded, Path(folder), sink, rows, Reader(loaded.size, tiles, databar), batch_size, output)
    return output


def embed(
    model: str | Path,
    folder: str | Path,
    output: str | Path,
    *,
    batch_size: int = 32,
    pool: Pool = "cls",
    tiles: bool = False,
    databar: DataBar = "crop",
) -> Path:
    """Features of every micrograph under `folder`; returns the Parquet file: path, pixel_size, features (D floats).

    `pool` takes the CLS token after the final norm, or the mean over patches. Otherwise as `predict`.
    """
    loaded = load_model(model, AutoModel)

    def rows(items: list[Item], output: Any) -> list[Row]:
        tokens = output.last_hidden_state.float()
        features = per_item(items, (tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)).cpu().numpy())
        return [
            {"path": item.path, "pixel_size": item.pixel_size, "features": feature}
            for item, feature in zip(items, features, strict=True)
        ]

    output = Path(output)
    sink = ParquetSink(output, origin(loaded, model, folder) | {"tiles": tiles, "databar": databar, "pool": pool})
    stream(loaded, Path(folder), sink, rows, Reader(loaded.size, tiles, databar), batch_size, output)
    return output


def origin(loaded: Loaded, model: str | Path, folder: str | Path) -> dict[str, str]:
    """What the rows of an output have in common: folder, model, and a digest of its weights."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in loaded.model.state_dict().values():
        digest.update(np.ascontiguousarray(parameter.detach().cpu().numpy()).data)
    return {"folder": str(Path(folder).resolve()), "model": str(model), "weights": digest.hexdigest()}


def load_model(source: str | Path, kind: Any) -> Loaded:
    """A backbone or classifier with its processor, from a folder or the Hub, on the GPU where there is one.

    Raises EmsslError where there is none, or where the weights lack something that the task needs.
    """
    if Path(source).is_dir():  # bars are for downloads
        logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(str(source), output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise EmsslError(f"{source} cannot be loaded: {' '.join(str(error).split())}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise EmsslError(
            f"{source} has no weights for {', '.join(missing[:3])}: `emssl predict` needs a classifier (a "
            "`classifier/` folder, say), `emssl embed` any backbone."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1)[:, : model.config.num_channels]
        for values in (processor.image_mean, processor.image_std)
    )
    if not (processor.size.get("height") and processor.size.get("width")):
        raise EmsslError(
            f"{source}: its processor resizes by {dict(processor.size)}; one with height and width is needed."
        )
    size = (processor.size["height"], processor.size["width"])
    return Loaded(model.eval().to(device), size, mean, std)


def stream(
    loaded: Loaded,
    folder: Path,
    sink: Sink,
    rows: Callable[[list[Item], Any], list[Row]],
    reader: Reader,
    batch_size: int,
    output: Path,
) -> None:
    """Read in threads, score in batches, write batch by batch; list what was left out."""
    found = open_folder(folder, labels=None)
    files = datasets.concatenate_datasets(list(found.splits.values())).cast_column(
        "image", datasets.Image(decode=False)
    )
    left = [row for row in files.select_columns(["image", "path"]) if row["path"] not in sink.done]
    if sink.done:
        print(f"{len(files) - len(left)} of {len(files)} files are in {output} already")
    skipped = list(found.skipped)
    with tqdm(total=len(left), unit="img", disable=None) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(left), batch_size):
            items = list(pool.map(reader, left[start : start + batch_size]))
            skipped += [(item.path, item.problem) for item in items if item.problem]
            good = [item for item in items if not item.problem]
            if good:
                sink.write(rows(good, loaded([tile for item in good for tile in item.tiles])))
            bar.update(len(items))
    sink.finish()
    _report_skipped(skipped, output)
    print(f"{len(files) - (len(skipped) - len(found.skipped))} micrographs in {output}")


def per_item(items: list[Item], values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Means over each item's tiles of values (T, K), one (K,) per item."""
    edges = np.cumsum([len(item.tiles) for item in items])[:-1]
    return [part.mean(0) for part in np.split(values, edges)]


def _report_skipped(skipped: list[tuple[str, str]], output: Path) -> None:
    file = output.with_name(output.name + ".skipped.csv")
    file.unlink(missing_ok=True)
    if not skipped:
        return
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([("path", "reason"), *skipped])
    print(f"{len(skipped)} files left out, listed in {file}; the first: {': '.join(skipped[0])}")
