"""Folders as users have them: nested, labelled in three ways, split or not, with rubbish in between."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emssl_hf.data.folder import label_order, open_folder
from emssl_hf.data.nffa import CLASS_NAMES
from emssl_hf.errors import EmsslError


def image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """A small PNG of noise; equal seeds give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)).save(path)
    return path


def names_of(dataset) -> list[str]:
    return [dataset.features["label"].names[i] for i in dataset["label"]]


def test_class_folders_ids_and_columns(tmp_path: Path) -> None:
    first = image(tmp_path / "b" / "deep" / "x.png", 1)
    image(tmp_path / "a" / "y.PNG", 2)
    found = open_folder(tmp_path)
    train = found.splits["train"]
    assert list(found.splits) == ["train"] and found.skipped == []
    assert train["path"][:] == ["a/y.PNG", "b/deep/x.png"] and names_of(train) == ["a", "b"]
    assert train[1]["id"] == hashlib.blake2b(first.read_bytes(), digest_size=16).hexdigest()
    assert train["group"][:] == train["id"][:]
    assert (train[0]["width"], train[0]["height"]) == (12, 10)
    assert np.array_equal(np.asarray(train[1]["image"]), np.asarray(Image.open(first)))


def test_flat_single_and_forced_folders_have_no_labels(tmp_path: Path) -> None:
    image(tmp_path / "flat" / "x.png")
    image(tmp_path / "one" / "only" / "x.png")
    image(tmp_path / "mixed" / "a" / "x.png")
    image(tmp_path / "mixed" / "b" / "x.png")
    for name, labels in (("flat", "auto"), ("one", "auto"), ("mixed", None)):
        assert "label" not in open_folder(tmp_path / name, labels).splits["train"].column_names
    assert "label" in open_folder(tmp_path / "mixed").splits["train"].column_names
    image(tmp_path / "mixed" / "x.png")
    assert "label" not in open_folder(tmp_path / "mixed").splits["train"].column_names


def test_users_split_is_kept(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            for i in range(count):
                image(tmp_path / split / name / f"{i}.png", i)
    splits = open_folder(tmp_path).splits
    assert {k: len(v) for k, v in splits.items()} == {"train": 6, "validation": 4, "test": 2}
    assert names_of(splits["test"]) == ["a", "b"]


def test_rubbish_is_skipped_silently_or_listed(tmp_path: Path) -> None:
    image(tmp_path / "x.png")
    for silent in ("Thumbs.db", ".DS_Store", "x.txt", ".hidden/y.png"):
        (tmp_path / silent).parent.mkdir(exist_ok=True)
        (tmp_path / silent).write_bytes(b"abc")
    (tmp_path / "notes.docx").write_bytes(b"PK\3\4")
    (tmp_path / "broken.tif").write_bytes(b"II*\0" + b"\xff" * 8)
    found = open_folder(tmp_path)
    assert found.splits["train"]["path"][:] == ["x.png"]
    assert [path for path, _ in found.skipped] == ["broken.tif", "notes.docx"]
    assert all("\n" not in reason and str(tmp_path) not in reason for _, reason in found.skipped)


def test_masks_beside_images_are_no_class(tmp_path: Path) -> None:
    image(tmp_path / "images" / "x.png")
    image(tmp_path / "masks" / "x.png", 1)
    found = open_folder(tmp_path)
    assert found.splits["train"]["path"][:] == ["images/x.png"] and "label" not in found.splits["train"].column_names
    assert found.skipped[0][0] == "masks"


def test_link_to_a_parent_folder_ends(tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_folder(tmp_path).splits["train"]) == 1


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_labels_file(tmp_path: Path, delimiter: str) -> None:
    for i in range(4):
        image(tmp_path / "sub" / f"{i}.png", i)
    rows = ["path,label,group", "sub/2.png,wire,s1", "sub/0.png,tip,s1", "sub\\1.png,,s2"]
    (tmp_path / "labels.csv").write_text("\ufeff" + "\r\n".join(rows).replace(",", delimiter), encoding="utf-8")
    train = open_folder(tmp_path).splits["train"]
    assert train.features["label"].names == ["tip", "wire"]
    assert train["label"][:] == [0, None, 1, None]
    assert train["group"][:3] == ["s1", "s2", "s1"] and train[3]["group"] == train[3]["id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\nx.png,a\n", "columns path and label"),
        ("path,label\ny.png,a\n", "line 2: 'y.png'"),
        ("path,label\nx.png,a\nx.png,b\n", "line 3: 'x.png' stands there twice"),
    ],
)
def test_bad_labels_files(tmp_path: Path, text: str, message: str) -> None:
    image(tmp_path / "x.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(EmsslError, match=message):
        open_folder(tmp_path)
    with pytest.raises(EmsslError, match="no such labels file"):
        open_folder(tmp_path, labels=tmp_path / "other.csv")


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match="no micrograph"):
        open_folder(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(EmsslError, match=r"1 files are no images, the first: a\.docx"):
        open_folder(tmp_path)
    with pytest.raises(EmsslError, match="no such folder"):
        open_folder(tmp_path / "absent")
    with pytest.raises(EmsslError, match="this is a file"):
        open_folder(tmp_path / "a.docx")


def test_nffas_own_order() -> None:
    assert label_order(sorted(CLASS_NAMES)) == list(CLASS_NAMES)
    assert label_order(["Tips", "Powder"]) == ["Powder", "Tips"]
