"""A folder, a saved data set and parquet files open to the same data; the rest is refused in words."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from emssl_hf.data import opening
from emssl_hf.data.opening import open_dataset
from emssl_hf.errors import EmsslError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images in two classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(6):
        place = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 8), dtype=np.uint8)).save(place)
    return tmp_path / "set"


def test_saved_and_parquet_are_the_folder_again(folder: Path, tmp_path: Path) -> None:
    opened = open_dataset(str(folder))
    assert opened.label_names == ["a", "b"] and opened.name == "set"
    opened.splits.save_to_disk(str(tmp_path / "saved"))
    train = opened.splits["train"]
    table = datasets.table.embed_table_storage(train.data.table)
    (tmp_path / "parquet").mkdir()
    datasets.Dataset(datasets.table.InMemoryTable(table), info=train.info).to_parquet(
        tmp_path / "parquet" / "train-00000-of-00001.parquet"
    )
    for other in ("saved", "parquet"):
        again = open_dataset(tmp_path / other)
        assert again.fingerprint == opened.fingerprint and again.label_names == ["a", "b"]
        assert np.array_equal(np.asarray(again.splits["train"][3]["image"]), np.asarray(train[3]["image"]))


def test_fingerprint_sees_labels_and_pixels_not_places(folder: Path, tmp_path: Path) -> None:
    before = open_dataset(folder).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_dataset(moved).fingerprint == before
    assert open_dataset(moved, options={"labels": None}).fingerprint != before
    (moved / "a" / "0.png").unlink()
    assert open_dataset(moved).fingerprint != before


def test_columns_of_a_data_set_from_elsewhere(tmp_path: Path) -> None:
    pictures = [Image.new("L", (4, 4), i) for i in (1, 2, 1)]
    features = datasets.Features({"picture": datasets.Image(), "labels": datasets.Value("string")})
    plain = datasets.Dataset.from_dict({"picture": pictures, "labels": ["x", "y", "x"]}, features=features)
    datasets.DatasetDict({"train": plain, "val": plain}).save_to_disk(str(tmp_path / "plain"))
    opened = open_dataset(tmp_path / "plain")
    train = opened.splits["train"]
    assert sorted(opened.splits) == ["train", "validation"] and opened.label_names == ["x", "y"]
    assert train["label"][:] == [0, 1, 0]
    assert train[0]["id"] == train[2]["id"] != train[1]["id"] and train["group"][:] == train["id"][:]


def test_what_cannot_be_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmsslError, match="no such folder"):
        open_dataset("no/such/place/at/all")
    with pytest.raises(EmsslError, match="unknown option 'lables'; known are: labels, progress"):
        open_dataset(folder, options={"lables": None})
    with pytest.raises(EmsslError, match="this is a file"):
        open_dataset(folder / "a" / "0.png")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(EmsslError, match="cannot be opened") as caught:
        open_dataset(tmp_path / "bad.parquet")
    assert "\n" not in str(caught.value)

    def unreachable(name: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(opening.datasets, "load_dataset", unreachable)
    with pytest.raises(EmsslError, match=r"org/name: .* \(no route\)"):
        open_dataset("org/name")
