"""Any folder of micrographs as a data set: nested or flat, labelled or not, whatever else lies in it."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm import tqdm

from emssl_hf.data.nffa import CLASS_NAMES
from emssl_hf.data.reading import UnreadableMicrograph, read_header
from emssl_hf.errors import EmsslError
from emssl_hf.machine import cores

LABELS_FILE = "labels.csv"
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "dev": "validation",
    "validation": "validation", "test": "test", "testing": "test",
}  # fmt: skip
SILENT_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}
SIDECARS = {".txt", ".xml", ".json", ".yaml", ".yml", ".csv", ".tsv", ".hdr", ".ini", ".md", ".log"}
MASK_FOLDERS = {"mask", "masks", "annotation", "annotations"}


class Entry(NamedTuple):
    """An image file: its path below the root, what its header says, and the digest of its bytes."""

    relative: Path
    id: str
    width: int
    height: int
    pixel_size: float | None


class CsvLabel(NamedTuple):
    """What a labels file says of one image."""

    label: str | None
    group: str | None


@dataclass(frozen=True)
class FolderDataset:
    """Images by split ("train" alone where the folder has none), and (path, reason) of what is left out."""

    splits: datasets.DatasetDict
    skipped: list[tuple[str, str]]


def open_folder(path: str | Path, labels: str | Path | None = "auto", progress: bool = True) -> FolderDataset:
    """The micrographs below a folder, checked by their headers; they stay where they are.

    Labels: "auto" takes a `labels.csv` (columns path, label and perhaps group; images it does not name stay
    unlabelled), else the top-level sub-folders if there are two or more and no image lies outside of them;
    None leaves the images unlabelled; a path names another CSV file. Top-level folders train, validation (or
    val) and test are the user's split. Raises EmsslError for no folder, no image, a bad labels file.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise EmsslError(f"{path}: " + ("this is a file; give its folder" if root.exists() else "no such folder"))
    skipped: list[tuple[str, str]] = []
    entries = _read_entries(root, sorted(_walk(root, skipped)), skipped, progress)
    if not entries:
        detail = f"; {len(skipped)} files are no images, the first: {': '.join(skipped[0])}" if skipped else ""
        raise EmsslError(f"{path}: no micrograph in this folder{detail}")
    splits = _by_split(entries)
    described = _describe(root, splits, labels)
    names = label_order({d.label for d in described.values() if d.label is not None})
    made = {split: _dataset(root, rows, described, names) for split, rows in splits.items()}
    return FolderDataset(datasets.DatasetDict(made), skipped)


def content_id(content: bytes | Path) -> str:
    """Digest of an image's bytes: 128 bits of BLAKE2b in hex."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def label_order(names: Iterable[str]) -> list[str]:
    """Class names in NFFA's order if they are NFFA's, else sorted."""
    found = set(names)
    return list(CLASS_NAMES) if found == set(CLASS_NAMES) else sorted(found)


def split_name(name: str) -> str | None:
    """Our name of a split folder or file, None if it names no split."""
    return SPLIT_NAMES.get(name.lower())


def _walk(root: Path, skipped: list[tuple[str, str]]) -> Iterator[Path]:
    """Files that may be images; links to folders are followed once, folders of masks beside images named."""
    seen: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        masks = [f for f in folders if f.lower() in MASK_FOLDERS and {"images", "image"} & {*map(str.lower, folders)}]
        skipped += [(str((Path(place) / f).relative_to(root)), "masks beside images are no micrographs") for f in masks]
        folders[:] = sorted(f for f in folders if f not in masks and not _is_silent(f))
        yield from (Path(place) / name for name in files if not _is_silent(name) and not _is_sidecar(name))


def _is_silent(name: str) -> bool:
    return name.startswith(".") or name.lower() in SILENT_NAMES


def _is_sidecar(name: str) -> bool:
    return Path(name).suffix.lower() in SIDECARS


def _read_entries(root: Path, files: list[Path], skipped: list[tuple[str, str]], progress: bool) -> list[Entry]:
    """Header and digest of every file, in threads, in order."""

    def look(file: Path) -> Entry | tuple[str, str]:
        relative = file.relative_to(root)
        try:
            header = read_header(file)
            return Entry(relative, content_id(file), header.width, header.height, header.pixel_size)
        except UnreadableMicrograph as error:
            return str(relative), str(error).removeprefix(f"{file}: ")
        except OSError as error:
            return str(relative), f"it cannot be read ({error.strerror})"

    entries: list[Entry] = []
    with ThreadPoolExecutor(2 * cores()) as pool:
        found = pool.map(look, files)
        for item in tqdm(
            found, "looking at files", len(files), unit="file", disable=not progress, leave=False, delay=2
        ):
            if isinstance(item, Entry):
                entries.append(item)
            else:
                skipped.append(item)
    return entries


def _by_split(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by the user's split, where the top-level folders are one; "train" for all otherwise."""
    tops = {entry.relative.parts[0] if len(entry.relative.parts) > 1 else "" for entry in entries}
    given = {top: split_name(top) for top in tops}
    if None in given.values() or "train" not in given.values():
        return {"train": entries}
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        splits.setdefault(str(given[entry.relative.parts[0]]), []).append(entry)
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _describe(root: Path, splits: dict[str, list[Entry]], labels: str | Path | None) -> dict[Path, CsvLabel]:
    """Label and group of each image that has them."""
    entries = [entry for rows in splits.values() for entry in rows]
    if labels is None:
        return {}
    if labels != "auto" or (root / LABELS_FILE).is_file():
        return _read_csv(root / LABELS_FILE if labels == "auto" else Path(labels), root, entries)
    depth = 0 if list(splits) == ["train"] and split_name(entries[0].relative.parts[0]) != "train" else 1
    classes = {entry.relative: entry.relative.parts[depth:-1][:1] for entry in entries}
    if () in classes.values() or len(set(classes.values())) < 2:
        return {}
    return {relative: CsvLabel(top[0], None) for relative, top in classes.items()}


def _read_csv(file: Path, root: Path, entries: list[Entry]) -> dict[Path, CsvLabel]:
    """A labels file by relative path. Raises EmsslError for missing columns, files and double labels."""
    if not file.is_file():
        raise EmsslError(f"{file}: there is no such labels file; give a CSV with the columns path,label")
    with file.open(newline="", encoding="utf-8-sig") as stream:
        header = stream.readline()
        stream.seek(0)
        reader = csv.DictReader(stream, delimiter=";" if ";" in header and "," not in header else ",")
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise EmsslError(f"{file}: the first line must name the columns path and label, and perhaps group")
        rows = list(reader)
    known = {entry.relative for entry in entries}
    described: dict[Path, CsvLabel] = {}
    for line, row in enumerate(rows, start=2):
        relative = Path((row["path"] or "").replace("\\", "/"))
        relative = relative.relative_to(root) if relative.is_relative_to(root) else relative
        label = CsvLabel(row["label"] or None, row.get("group") or None)
        if relative not in known:
            raise EmsslError(f"{file}, line {line}: {row['path']!r} is no readable image below {root}; mend the path")
        if described.setdefault(relative, label) != label:
            raise EmsslError(f"{file}, line {line}: {row['path']!r} stands there twice with different labels")
    return described


def _dataset(root: Path, entries: list[Entry], described: dict[Path, CsvLabel], names: list[str]) -> datasets.Dataset:
    """The data set of one split; without names there is no label column."""
    told = [described.get(entry.relative, CsvLabel(None, None)) for entry in entries]
    columns: dict[str, list[Any]] = {
        "image": [str(root / entry.relative) for entry in entries],
        "id": [entry.id for entry in entries],
        "group": [tell.group or entry.id for tell, entry in zip(told, entries, strict=True)],
        "path": [str(entry.relative) for entry in entries],
        "pixel_size": [entry.pixel_size for entry in entries],
        "width": [entry.width for entry in entries],
        "height": [entry.height for entry in entries],
    }
    kinds = {"pixel_size": "float32", "width": "int32", "height": "int32"}
    features = {key: datasets.Value(kinds.get(key, "string")) for key in columns}
    features["image"] = datasets.Image()
    if names:
        columns["label"] = [tell.label for tell in told]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
