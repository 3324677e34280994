"""From the data settings of a run to the stores that it trains and is judged on."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from accelerate import Accelerator

from emssl_hf.data.curation import ensure_splits
from emssl_hf.data.opening import Opened, open_dataset
from emssl_hf.data.store import Store, build_store
from emssl_hf.engine.config import DataConfig, ModelConfig
from emssl_hf.errors import EmsslError

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Source:
    """An opened data set and how its pixels are stored."""

    opened: Opened
    config: DataConfig
    quiet: bool = False

    @property
    def has_labels(self) -> bool:
        return self.opened.label_names is not None

    @property
    def has_splits(self) -> bool:
        """Whether the set brings a validation or test split along."""
        return len(self.opened.splits) > 1

    def pretraining_images(self) -> datasets.Dataset:
        """The images that pretraining sees, as `data.split` says."""
        splits = self.opened.splits
        if self.config.split == "all":
            return datasets.concatenate_datasets([_unlabelled(part) for part in splits.values()])
        if self.config.split == "train":
            return self.labelled_splits()["train"]
        if "train" not in splits:
            raise EmsslError(
                f"{self.opened.name} has no train split, only {', '.join(splits)}: give --data.split all to use those."
            )
        return splits["train"]

    def labelled_splits(self) -> datasets.DatasetDict:
        """train, validation and test; those that the set lacks are made without tearing a group apart."""
        if not self.has_labels:
            raise EmsslError(
                f"{self.opened.name} has no labels: put the images into one folder per class, or give "
                "--data.labels FILE.csv with the columns path and label."
            )
        return ensure_splits(self.opened, seed=self.config.split_seed, min_per_class=self.config.min_per_class)

    def store(self, images: datasets.Dataset, size: Size) -> Store:
        """The decoded pixels of `images`, built on first use."""
        return build_store(
            images,
            size=size,
            root=self.config.store,
            dtype=self.config.dtype,
            databar=self.config.databar,
            workers=self.config.workers,
            progress=not self.quiet,
        )


def open_source(config: DataConfig, accelerator: Accelerator) -> Source:
    """Open the data set that the settings name; where several processes do, file locks let one do the work."""
    options = dict(config.options) if config.path == "synthsem" else {}
    if config.labels != "auto":
        options["labels"] = None if config.labels == "none" else config.labels
    opened = open_dataset(config.path, options=options)
    if opened.skipped and accelerator.is_main_process:
        path, reason = opened.skipped[0]
        accelerator.print(f"{len(opened.skipped)} files left out, the first: {path}: {reason}")
    return Source(opened, config, quiet=not accelerator.is_main_process)


def write_skipped(run: Path, source: Source, stores: Sequence[Store]) -> None:
    """skipped.csv of a run: every file that was left out, with the reason; no file where there is none."""
    rows = [*source.opened.skipped, *((lost.path, lost.reason) for store in stores for lost in store.skipped)]
    if rows:
        with (run / "skipped.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("path", "reason"), *rows])


def share_of(count: int, accelerator: Accelerator) -> range:
    """The rows out of `count` that this process evaluates: consecutive, as evenly as it goes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return range(count * rank // world, count * (rank + 1) // world)


def input_size(model: ModelConfig) -> tuple[int, int]:
    """(height, width) of the model's input."""
    size = model.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def training_resolution(data: DataConfig, model: ModelConfig) -> int:
    """Short edge of the stored training images: 8/7 of the input (256 for 224), so that crops lose no detail."""
    return data.resolution or max(input_size(model)) * 8 // 7


def _unlabelled(images: datasets.Dataset) -> datasets.Dataset:
    """Splits may differ in their labels; pretraining needs none."""
    return images.remove_columns([name for name in ("label",) if name in images.column_names])
