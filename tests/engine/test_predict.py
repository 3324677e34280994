"""Any model over any folder: the same scores as transformers' own pipeline, resumable, nothing left out silently."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from emssl_hf.engine import predict as module
from emssl_hf.engine.predict import embed, predict, squares
from emssl_hf.errors import EmsslError
from tests.engine.conftest import Finished


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock three-channel classifier with weights that differ by channel and opinions that differ by image."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "fibres", 1: "tips", 2: "powder, fine"}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, label2id={n: i for i, n in names.items()})
    classifier = ViTForImageClassification(config)
    torch.nn.init.normal_(classifier.classifier.weight)
    torch.nn.init.normal_(classifier.vit.embeddings.patch_embeddings.projection.weight, std=0.1)
    folder = tmp_path_factory.mktemp("stock") / "classifier"
    classifier.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25], do_convert_rgb=True
    ).save_pretrained(folder)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def scores(row: dict[str, str]) -> list[float]:
    return [float(value) for name, value in row.items() if name.startswith("score_")]


def test_scores_are_those_of_the_pipeline(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    found = rows(predict(model, micrograph_folder, tmp_path / "out" / "scores.csv", batch_size=7))
    columns = ["path", "label", "score_fibres", "score_tips", "score_powder, fine", "pixel_size"]
    assert list(found[0]) == columns and len(found) == 24
    classify = pipeline("image-classification", model=str(model), top_k=3)
    for row in found:
        expected = {entry["label"]: entry["score"] for entry in classify(str(micrograph_folder / row["path"]))}
        assert row["label"] == max(expected, key=expected.get)
        for name, value in expected.items():
            assert float(row[f"score_{name}"]) == pytest.approx(value, abs=2e-6)
    assert len({row["label"] for row in found}) > 1


def test_a_call_that_was_killed_is_taken_up(
    model: Path, micrograph_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predict(model, micrograph_folder, tmp_path / "whole.csv", batch_size=5)
    cut = predict(model, micrograph_folder, tmp_path / "cut.csv", batch_size=5)
    lines = cut.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:11]) + lines[11][:25])
    read: list[str] = []
    original = module.Reader.__call__

    def reader(self: Any, row: dict[str, Any]) -> Any:
        read.append(row["path"])
        return original(self, row)

    monkeypatch.setattr(module.Reader, "__call__", reader)
    predict(model, micrograph_folder, tmp_path / "cut.csv", batch_size=5)
    assert len(read) == 14
    assert cut.read_text() == whole.read_text()
    assert predict(model, micrograph_folder, tmp_path / "cut.csv") == cut and len(read) == 14


def test_a_kill_in_the_first_line_costs_nothing(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    whole = predict(model, micrograph_folder, tmp_path / "whole.csv").read_text()
    (tmp_path / "cut.csv").write_text("path,lab")
    assert predict(model, micrograph_folder, tmp_path / "cut.csv").read_text() == whole


def test_a_foreign_table_is_not_touched(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("sample,operator\n1,me\n")
    with pytest.raises(EmsslError, match="other columns"):
        predict(model, micrograph_folder, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "sample,operator\n1,me\n"


def test_rows_of_other_settings_are_refused(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    predict(model, micrograph_folder, tmp_path / "out.csv")
    with pytest.raises(EmsslError, match=r"other settings \(tiles\)"):
        predict(model, micrograph_folder, tmp_path / "out.csv", tiles=True)


def test_what_is_no_image_is_listed_with_its_reason(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    good = (micrograph_folder / "dark/0.png").read_bytes()
    (micrograph_folder / "dark/cut.png").write_bytes(good[: len(good) // 2])
    (micrograph_folder / "dark/notes.png").write_text("no image")
    (micrograph_folder / "dark/Thumbs.db").write_bytes(b"x")
    out = predict(model, micrograph_folder, tmp_path / "out.csv")
    skipped = {row["path"]: row["reason"] for row in rows(tmp_path / "out.csv.skipped.csv")}
    assert len(rows(out)) == 24 and set(skipped) == {"dark/cut.png", "dark/notes.png"}
    assert all(skipped.values())


def test_tiles_are_the_fewest_squares_and_scores_their_mean(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 100), dtype=np.uint8)
    cuts = squares(array)
    assert len(cuts) == 3 and all(cut.shape == (40, 40) for cut in cuts)
    for cut, left in zip(cuts, (0, 30, 60), strict=True):
        np.testing.assert_array_equal(cut, array[:, left : left + 40])
    assert [cut.shape for cut in squares(array.T)] == [(40, 40)] * 3 and len(squares(array[:, :40])) == 1
    (tmp_path / "long").mkdir()
    (tmp_path / "parts").mkdir()
    Image.fromarray(array).save(tmp_path / "long/a.png")
    Image.fromarray(array[:, :80]).save(tmp_path / "long/b.png")
    for number, cut in enumerate(cuts):
        Image.fromarray(cut).save(tmp_path / f"parts/{number}.png")
    tiled = rows(predict(model, tmp_path / "long", tmp_path / "tiled.csv", tiles=True))
    parts = rows(predict(model, tmp_path / "parts", tmp_path / "parts.csv"))
    np.testing.assert_allclose(scores(tiled[0]), np.mean([scores(row) for row in parts], axis=0), atol=2e-6)


def test_16_bit_micrographs_are_stretched_and_not_clipped(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (48, 48)).astype(np.float64)
    deep = np.rint(33069 + grey * (36863 - 33069) / 255).astype(np.uint16)
    (tmp_path / "set").mkdir()
    tifffile.imwrite(tmp_path / "set/deep.tif", deep)
    low, high = np.percentile(deep, (0.1, 99.9))
    stretched = np.rint(np.clip((deep - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(stretched).save(tmp_path / "set/shallow.png")
    found = {row["path"]: scores(row) for row in rows(predict(model, tmp_path / "set", tmp_path / "out.csv"))}
    np.testing.assert_allclose(found["deep.tif"], found["shallow.png"], atol=5e-4)


def test_features_go_to_parquet_and_are_taken_up(
    finished: Finished, micrograph_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = finished("mae") / "backbone"
    whole = pq.read_table(embed(backbone, micrograph_folder, tmp_path / "whole.parquet", batch_size=5)).to_pydict()
    assert list(whole) == ["path", "pixel_size", "features"] and len(whole["path"]) == 24
    extract = pipeline("image-feature-extraction", model=str(backbone))
    for row in (0, 23):
        expected = np.array(extract(str(micrograph_folder / whole["path"][row])))[0]
        np.testing.assert_allclose(whole["features"][row], expected[0], atol=2e-5)
    means = pq.read_table(embed(backbone, micrograph_folder, tmp_path / "mean.parquet", pool="mean")).to_pydict()
    np.testing.assert_allclose(means["features"][23], expected[1:].mean(0), atol=2e-5)

    calls, original = 0, module.Loaded.__call__

    def dies(self: Any, images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(module.Loaded, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            embed(backbone, micrograph_folder, tmp_path / "cut.parquet", batch_size=5)
    assert not (tmp_path / "cut.parquet").exists()
    again = pq.read_table(embed(backbone, micrograph_folder, tmp_path / "cut.parquet", batch_size=5)).to_pydict()
    assert again["path"] == whole["path"] and not (tmp_path / "cut.parquet.parts").exists()
    np.testing.assert_allclose(again["features"], whole["features"], atol=1e-6)


def test_features_of_a_folder_that_grew_are_added(finished: Finished, micrograph_folder: Path, tmp_path: Path) -> None:
    backbone, out = finished("mae") / "backbone", tmp_path / "out.parquet"
    embed(backbone, micrograph_folder, out)
    Image.new("L", (40, 40), 90).save(micrograph_folder / "dark/new.png")
    embed(backbone, micrograph_folder, out)
    paths = pq.read_table(out)["path"].to_pylist()
    assert len(paths) == len(set(paths)) == 25


def test_a_backbone_cannot_classify_and_says_so(finished: Finished, micrograph_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match=r"no weights for classifier.*needs a classifier"):
        predict(finished("mae") / "backbone", micrograph_folder, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_place_that_holds_no_model_is_named(micrograph_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match="nothing cannot be loaded"):
        predict(tmp_path / "nothing", micrograph_folder, tmp_path / "out.csv")
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(EmsslError, match="bert cannot be loaded"):
        embed(tmp_path / "bert", micrograph_folder, tmp_path / "out.parquet")


def test_a_place_that_cannot_be_written_is_named(model: Path, micrograph_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmsslError, match="cannot be written"):
        predict(model, micrograph_folder, tmp_path / "file/out.csv")
