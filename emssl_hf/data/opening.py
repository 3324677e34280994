"""Any data set by one string: the procedural set, a folder, a saved data set, parquet files, or a Hub id."""

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from emssl_hf.data.folder import content_id, open_folder, split_name
from emssl_hf.errors import EmsslError

CONTENT_ID = re.compile(r"[0-9a-f]{32}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Opened:
    """A data set with the columns of this package (`image`, `label`, `id`, `group`, ...), split by split.

    `label_names` is None where no image has a label, `skipped` holds (path, reason) of files left out, and
    `fingerprint` is a digest of ids, labels and groups: equal data, equal fingerprint, wherever it lies.
    """

    name: str
    splits: datasets.DatasetDict
    label_names: list[str] | None
    fingerprint: str
    skipped: list[tuple[str, str]] = field(default_factory=list)


def open_dataset(path: str | Path, *, options: Mapping[str, Any] | None = None) -> Opened:
    """Opens "synthsem", a folder of micrographs, a `save_to_disk` folder, parquet files or a Hub id.

    `options` go to the procedural set (images, size, seed, ...) or to `open_folder` (labels). Raises
    EmsslError where there is no such data set, it cannot be reached, or an option is unknown.
    """
    options = dict(options or {})
    local = Path(path).expanduser()
    if str(path) == "synthsem":
        from emssl_hf.data.synthsem import synthsem  # lazy: brings scipy's image filters along

        return _opened("synthsem", synthsem(**_known(synthsem, options, "synthsem")))
    if local.is_dir() and not _is_saved(local) and not _parquet_files(local):
        found = open_folder(local, **_known(open_folder, options, str(path), "path"))
        return _opened(local.resolve().name, found.splits, found.skipped)
    _known(lambda: None, options, str(path))
    if local.exists():
        return _opened(local.resolve().name, _load_local(local))
    if HUB_ID.fullmatch(str(path)):
        return _opened(str(path), _load_hub(str(path)))
    raise EmsslError(f"{path}: there is no such folder, and it is no Hub id (org/name) either; check the path")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def _load_local(path: Path) -> datasets.DatasetDict:
    """A saved data set or parquet files, by split."""
    if path.is_file() and path.suffix != ".parquet":
        raise EmsslError(f"{path}: this is a file; give the folder it lies in")
    try:
        if path.is_dir() and _is_saved(path):
            return _as_splits(datasets.load_from_disk(str(path)))
        return _load_parquet([path] if path.is_file() else _parquet_files(path))
    except EmsslError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds on damaged files
        raise EmsslError(f"{path}: the data set cannot be opened ({_first_line(error)}); make it again") from error


def _load_parquet(files: list[Path]) -> datasets.DatasetDict:
    """Parquet files by split, which the name (train-00000-of-00002.parquet) or else the folder tells."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = split_name(re.split(r"[-_.]", file.name)[0]) or split_name(file.parent.name) or "train"
        by_split.setdefault(split, []).append(str(file))
    loaded = datasets.load_dataset("parquet", data_files=by_split)
    return _as_splits(loaded)


def _load_hub(name: str) -> datasets.DatasetDict:
    try:
        return _as_splits(datasets.load_dataset(name))
    except Exception as error:  # network, missing, gated and malformed repositories all end here
        raise EmsslError(
            f"{name}: there is no such folder, and the Hub's data set of this name cannot be loaded "
            f"({_first_line(error)}); check the name, the network and your access"
        ) from error


def _as_splits(loaded: Any) -> datasets.DatasetDict:
    """Splits under our names: train, validation, test; other names stay."""
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    return datasets.DatasetDict({split_name(str(k)) or str(k): v for k, v in loaded.items()})


def _opened(name: str, splits: datasets.DatasetDict, skipped: list[tuple[str, str]] | None = None) -> Opened:
    splits = datasets.DatasetDict({k: _with_columns(v, f"{name}[{k}]") for k, v in splits.items()})
    names = _label_names(splits, name)
    return Opened(name, splits, names, _fingerprint(splits), skipped or [])


def _with_columns(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """The columns of this package on a data set from elsewhere: `image`, `label`, `id`, `group`."""
    dataset = _with_image(dataset, name)
    if "label" not in dataset.column_names and "labels" in dataset.column_names:
        dataset = dataset.rename_column("labels", "label")
    if "label" in dataset.column_names and not isinstance(dataset.features["label"], datasets.ClassLabel):
        dataset = dataset.class_encode_column("label", include_nulls=False)
    if "id" not in dataset.column_names or not all(CONTENT_ID.fullmatch(str(i)) for i in dataset["id"][:]):
        # Somebody else's ids may be row numbers, which other images have too: ours say what the image is.
        kept = dataset.remove_columns([column for column in ("id",) if column in dataset.column_names])
        dataset = kept.add_column("id", _content_ids(kept))
    if "group" not in dataset.column_names:
        dataset = dataset.add_column("group", list(dataset["id"]))
    return dataset


def _with_image(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """One image column, called `image`."""
    images = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if "image" in images:
        return dataset
    if len(images) != 1:
        raise EmsslError(f"{name}: of the columns {dataset.column_names} none is `image`; rename the image column")
    return dataset.rename_column(images[0], "image")


def _content_ids(dataset: datasets.Dataset) -> list[str]:
    """Ids by content of images that carry none."""
    raw = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return [content_id(row["image"]["bytes"] or Path(row["image"]["path"])) for row in raw]


def _label_names(splits: datasets.DatasetDict, name: str) -> list[str] | None:
    """The class names, which all labelled splits must share."""
    named = {k: list(v.features["label"].names) for k, v in splits.items() if "label" in v.column_names}
    if any(names != next(iter(named.values())) for names in named.values()):
        raise EmsslError(f"{name}: the splits {sorted(named)} name different classes; give all of them the same")
    return next(iter(named.values()), None)


def _fingerprint(splits: datasets.DatasetDict) -> str:
    """Digest of what the splits hold, 128 bits in hex."""
    digest = hashlib.blake2b(digest_size=16)
    for split, dataset in splits.items():
        for key in ("id", "label", "group"):
            values = dataset[key][:] if key in dataset.column_names else []
            digest.update(f"|{split}|{key}|{values}".encode())
    return digest.hexdigest()


def _known(function: Any, options: dict[str, Any], name: str, *taken: str) -> dict[str, Any]:
    """The options, once each is known to be a parameter of the function. Raises EmsslError."""
    allowed = [key for key in inspect.signature(function).parameters if key not in taken]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise EmsslError(f"{name}: unknown option {unknown[0]!r}; known are: {', '.join(allowed) or 'none'}")
    return options


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
