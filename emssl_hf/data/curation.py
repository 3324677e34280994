"""Splits without leaks, few-label draws, and what is (nearly) the same image twice."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import datasets
import imagehash
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from emssl_hf.data.opening import Opened
from emssl_hf.errors import EmsslError

Ints = NDArray[np.int64]

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.7, 0.15, 0.15)


def split_by_group(
    labels: ArrayLike, groups: Sequence[str], fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> dict[str, Ints]:
    """Indices of train, validation and test: stratified by class, and no group in two of them.

    Groups go one by one, large ones first and otherwise in an order drawn from `seed`, to the split that is
    furthest below its share of their classes. A fraction of 0 leaves its split empty.
    """
    classes = np.unique(np.asarray(labels, dtype=np.int64), return_inverse=True)[1]
    names, member = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    counts = np.zeros((len(names), int(classes.max(initial=-1)) + 1))
    np.add.at(counts, (member, classes), 1)
    target = np.outer(fractions, counts.sum(axis=0)) / sum(fractions)
    filled = np.zeros_like(target)
    home = np.zeros(len(names), dtype=np.int64)
    for group in _large_first(counts.sum(axis=1), seed):
        need = np.where(target > 0, (target - filled) / np.maximum(target, 1e-9), -np.inf)
        present = counts[group] > 0
        home[group] = np.argmax(need[:, present] @ counts[group, present])
        filled[home[group]] += counts[group]
    return {split: np.flatnonzero(home[member] == i) for i, split in enumerate(SPLITS[: len(fractions)])}


def ensure_splits(opened: Opened, seed: int = 0, min_per_class: int = 1) -> datasets.DatasetDict:
    """Train, validation and test of a data set: given ones stay, missing ones are made from train by group.

    Classes of fewer than `min_per_class` images are left out. Raises EmsslError for a class of which some
    split would have no image, and where no split is called train.
    """
    splits = dict(opened.splits)
    if "train" not in splits:
        raise EmsslError(f"{opened.name}: the splits {sorted(splits)} have no train; rename one of them to train")
    splits = _without_rare(splits, min_per_class)
    missing = [name for name in SPLITS if name not in splits]
    if missing:
        parts = [name for name in SPLITS if name == "train" or name in missing]
        made = _split_train(splits["train"], parts, seed, opened.name)
        splits.update(made)
    return datasets.DatasetDict({name: splits[name] for name in SPLITS})


def few_labels(labels: ArrayLike, per_class: int, seed: int = 0, groups: Sequence[str] | None = None) -> Ints:
    """Sorted indices of `per_class` images of each class, all of a class that has fewer, none without label.

    With groups, an image of a new group comes before a second one of a group drawn already. Draws are nested:
    those for a smaller `per_class` and the same seed are part of those for a larger.
    """
    known = np.asarray(labels, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(known))
    turn = _turn_in_group(order, groups)
    order = order[np.argsort(turn[order], kind="stable")]
    chosen = [order[known[order] == label][:per_class] for label in np.unique(known[known >= 0])]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def overlap(a: datasets.Dataset, b: datasets.Dataset) -> int:
    """Rows of b of which the image (`id`) or the specimen (`group`) occurs in a."""
    ids, groups = set(a["id"][:]), set(a["group"][:])
    return sum(i in ids or g in groups for i, g in zip(b["id"][:], b["group"][:], strict=True))


def assert_disjoint(splits: datasets.DatasetDict) -> None:
    """Raises EmsslError where two splits share an image or a group."""
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = overlap(splits[first], splits[second])
            if shared:
                raise EmsslError(f"{shared} images of {second} share a group with {first}; split the data anew")


def perceptual_hashes(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    """64-bit DCT hash of each grey image: near-duplicates differ in few bits."""
    bits = [imagehash.phash(Image.fromarray(image)).hash.ravel() for image in images]
    packed = np.packbits(np.array(bits, dtype=np.uint8).reshape(-1, 64), axis=1)
    return packed.view(">u8").ravel().astype(np.uint64)


def near_duplicate_groups(hashes: NDArray[np.uint64], max_distance: int = 4) -> Ints:
    """Group number of each hash; hashes at most `max_distance` bits apart share one, chains too.

    The bits are cut into `max_distance` + 1 bands: two such hashes agree in one band at least, so only hashes
    of one bucket are compared, never all with all.
    """
    unique, inverse = np.unique(hashes, return_inverse=True)
    parent = np.arange(len(unique))
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in pairwise(edges):
        band = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            _join_bucket(unique, bucket, max_distance, parent)
    roots = np.array([_root(parent, i) for i in range(len(unique))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1][inverse].astype(np.int64)


def _large_first(sizes: NDArray[np.float64], seed: int) -> Ints:
    """Groups by falling size, equal ones shuffled."""
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    return shuffled[np.argsort(-sizes[shuffled], kind="stable")]


def _without_rare(splits: dict[str, datasets.Dataset], min_per_class: int) -> dict[str, datasets.Dataset]:
    """The splits without the classes of fewer than `min_per_class` images in all; unlabelled images stay."""
    if "label" not in splits["train"].column_names or min_per_class <= 1:
        return splits
    names = splits["train"].features["label"].names
    every = np.concatenate([_labels(split) for split in splits.values()])
    keep = [i for i in range(len(names)) if np.count_nonzero(every == i) >= min_per_class]
    if len(keep) == len(names):
        return splits
    renumber = {-1: None} | {old: new for new, old in enumerate(keep)}
    return {name: _relabelled(split, renumber, [names[i] for i in keep]) for name, split in splits.items()}


def _relabelled(split: datasets.Dataset, renumber: dict[int, int | None], names: list[str]) -> datasets.Dataset:
    """Rows whose label is kept, under new numbers."""
    labels = _labels(split)
    rows = [i for i, label in enumerate(labels.tolist()) if label in renumber]
    kept = split.select(rows).remove_columns("label")
    values = [renumber[int(labels[i])] for i in rows]
    return kept.add_column("label", values, feature=datasets.ClassLabel(names=names))


def _labels(split: datasets.Dataset) -> Ints:
    """Labels as integers, -1 for none."""
    if "label" not in split.column_names:
        return np.full(len(split), -1)
    return np.array([-1 if label is None else label for label in split["label"][:]], dtype=np.int64)


def _split_train(train: datasets.Dataset, parts: list[str], seed: int, name: str) -> dict[str, datasets.Dataset]:
    """Train cut into these parts, in their usual proportions, each with every class."""
    labels, groups = _labels(train), list(train["group"][:])
    fractions = [FRACTIONS[SPLITS.index(part)] if part in parts else 0.0 for part in SPLITS]
    indices = split_by_group(labels, groups, fractions, seed)
    labelled = np.unique(labels[labels >= 0]) if (labels >= 0).any() else np.array([-1])
    for label in labelled:
        for part in parts:
            if not (labels[indices[part]] == label).any():
                raise EmsslError(_too_few(train, int(label), labels, groups, part, name))
    return {part: train.select(indices[part]) for part in parts}


def _too_few(train: datasets.Dataset, label: int, labels: Ints, groups: list[str], part: str, name: str) -> str:
    """Why a class cannot be split, and what to do."""
    count = int(np.count_nonzero(labels == label))
    specimens = len({groups[i] for i in np.flatnonzero(labels == label)})
    called = "the unlabelled images" if label < 0 else f"the class {train.features['label'].names[label]!r}"
    return (
        f"{name}: {called} has {count} image(s) of {specimens} specimen(s) and leaves none for {part}; add "
        f"images, give the splits as folders, or leave rare classes out (--data.min_per_class {count + 1})"
    )


def _turn_in_group(order: Ints, groups: Sequence[str] | None) -> Ints:
    """How many images of an image's group come before it in `order`."""
    turn = np.zeros(len(order), dtype=np.int64)
    drawn: dict[str, int] = defaultdict(int)
    if groups is not None:
        for index in order:
            turn[index] = drawn[groups[index]]
            drawn[groups[index]] += 1
    return turn


def _join_bucket(hashes: NDArray[np.uint64], bucket: Ints, max_distance: int, parent: Ints) -> None:
    """Joins the near pairs among the hashes of one bucket, one row of comparisons at a time."""
    for place, first in enumerate(bucket[:-1]):
        others = bucket[place + 1 :]
        near = np.bitwise_count(hashes[others] ^ hashes[first]) <= max_distance
        for second in others[near]:
            parent[_root(parent, int(second))] = _root(parent, int(first))


def _root(parent: Ints, index: int) -> int:
    """The representative of a set, with its path halved on the way."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index
