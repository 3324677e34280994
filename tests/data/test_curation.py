"""Splits and draws against their definitions, near-duplicates against all pairs."""

import datasets
import numpy as np
import pytest

from emssl_hf.data.curation import (
    assert_disjoint,
    ensure_splits,
    few_labels,
    near_duplicate_groups,
    overlap,
    perceptual_hashes,
    split_by_group,
)
from emssl_hf.data.opening import Opened
from emssl_hf.errors import EmsslError


def specimens(n: int = 600, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Labels and specimens of 1 to 6 images each, one class per specimen."""
    rng = np.random.default_rng(seed)
    of_image = np.repeat(np.arange(n), rng.integers(1, 7, n))[:n]
    return rng.integers(0, classes, n)[of_image], [f"s{i}" for i in of_image]


def opened(labels: list[int | None], groups: list[str], names: list[str], **others: list[int]) -> Opened:
    def made(labels: list[int | None], groups: list[str], prefix: str) -> datasets.Dataset:
        ids = [f"{prefix}{i}" for i in range(len(labels))]
        features = datasets.Features(
            id=datasets.Value("string"),
            group=datasets.Value("string"),
            label=datasets.ClassLabel(names=names),
        )
        return datasets.Dataset.from_dict({"id": ids, "group": groups, "label": labels}, features=features)

    splits = {"train": made(labels, groups, "t")}
    splits |= {k: made(v, [f"{k}{i}" for i in range(len(v))], k) for k, v in others.items()}
    return Opened("set", datasets.DatasetDict(splits), names, "x")


def test_split_is_stratified_disjoint_and_repeatable() -> None:
    labels, groups = specimens()
    split = split_by_group(labels, groups, seed=3)
    assert sorted(np.concatenate(list(split.values()))) == list(range(len(labels)))
    homes = [{groups[i] for i in indices} for indices in split.values()]
    assert not (homes[0] & homes[1] or homes[0] & homes[2] or homes[1] & homes[2])
    for name, fraction in zip(("train", "validation", "test"), (0.7, 0.15, 0.15), strict=True):
        for label in range(4):
            share = np.mean(labels[split[name]] == label) * len(split[name]) / np.sum(labels == label)
            assert abs(share - fraction) < 0.04
    again, other = split_by_group(labels, groups, seed=3), split_by_group(labels, groups, seed=4)
    assert all(np.array_equal(split[k], again[k]) for k in split)
    assert not np.array_equal(split["test"], other["test"])


def test_three_groups_reach_all_three_splits_and_groups_may_mix_classes() -> None:
    split = split_by_group([0, 0, 0], ["a", "b", "c"])
    assert [len(indices) for indices in split.values()] == [1, 1, 1]
    labels = np.arange(300) % 3
    split = split_by_group(labels, [f"g{i // 3}" for i in range(300)])
    assert [len(split[k]) for k in ("train", "validation", "test")] == [210, 45, 45]


def test_missing_splits_are_made_and_given_ones_kept() -> None:
    labels, groups = specimens(200, 2)
    splits = ensure_splits(opened(labels.tolist(), groups, ["a", "b"]))
    assert_disjoint(splits)
    assert list(splits) == ["train", "validation", "test"] and sum(map(len, splits.values())) == 200
    given = ensure_splits(opened(labels.tolist(), groups, ["a", "b"], test=[0, 1, 0]))
    assert given["test"]["id"][:] == ["test0", "test1", "test2"]
    assert len(given["validation"]) == pytest.approx(200 * 0.15 / 0.85, abs=6)
    assert len(given["train"]) + len(given["validation"]) == 200


def test_rare_classes_are_named_or_left_out() -> None:
    labels = [0] * 10 + [1] + [2] * 10 + [None]
    data = opened(labels, [str(i) for i in range(22)], ["a", "rare", "c"])
    with pytest.raises(EmsslError, match=r"class 'rare' has 1 image\(s\).*--data.min_per_class 2"):
        ensure_splits(data)
    splits = ensure_splits(data, min_per_class=2)
    assert splits["train"].features["label"].names == ["a", "c"]
    every = [label for split in splits.values() for label in split["label"]]
    assert sorted(x for x in every if x is not None) == [0] * 10 + [1] * 10 and every.count(None) == 1


def test_unlabelled_images_are_split_too() -> None:
    data = opened([None] * 20, [str(i) for i in range(20)], ["a"])
    unlabelled = datasets.DatasetDict({"train": data.splits["train"].remove_columns("label")})
    splits = ensure_splits(Opened("set", unlabelled, None, "x"))
    assert [len(split) for split in splits.values()] == [14, 3, 3]


def test_few_labels_are_stratified_nested_and_spread_over_groups() -> None:
    labels, groups = specimens(300, 3)
    labels[:20] = -1
    few, more = few_labels(labels, 5, seed=1), few_labels(labels, 20, seed=1)
    assert np.bincount(labels[few]).tolist() == [5, 5, 5] and labels[few].min() == 0
    assert set(few) < set(more) and np.array_equal(few, few_labels(labels, 5, seed=1))
    assert not np.array_equal(few, few_labels(labels, 5, seed=2))
    spread = few_labels(labels, 10, seed=1, groups=groups)
    assert len({groups[i] for i in spread}) == len(spread) == 30
    assert len(few_labels([0, 0, 1], 5)) == 3


def test_overlap_counts_images_and_groups() -> None:
    a = datasets.Dataset.from_dict({"id": ["1", "2"], "group": ["g", "h"]})
    b = datasets.Dataset.from_dict({"id": ["1", "3", "4"], "group": ["x", "h", "y"]})
    assert overlap(a, b) == 2 and overlap(b, a) == 2 and overlap(a, b.select([2])) == 0
    with pytest.raises(EmsslError, match="2 images of test"):
        assert_disjoint(datasets.DatasetDict(train=a, test=b))


def test_near_duplicate_groups_equal_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    hashes = np.concatenate([base, base, base])
    for i in range(60, 180):
        for bit in rng.choice(64, rng.integers(0, 8), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 4
    reach = near.copy()
    for _ in range(8):  # transitive closure by squaring
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    groups = near_duplicate_groups(hashes)
    assert np.array_equal(groups[:, None] == groups[None], reach)
    assert 60 < len(set(groups.tolist())) < 180


def test_hashes_see_the_same_specimen_again() -> None:
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.integers(30, 220, (8, 8)), np.ones((12, 12))) for _ in range(5)]
    again = [np.clip(scene * 0.9 + rng.normal(0, 4, scene.shape), 0, 255) for scene in scenes]
    groups = near_duplicate_groups(perceptual_hashes(x.astype(np.uint8) for x in scenes + again))
    assert groups[:5].tolist() == groups[5:].tolist() and len(set(groups.tolist())) == 5
