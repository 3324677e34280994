"""Pretraining from settings to products, for every method."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from emssl_hf.data.opening import open_dataset
from emssl_hf.data.store import build_store
from emssl_hf.engine.config import PretrainConfig, parse
from emssl_hf.engine.loop import make_accelerator
from emssl_hf.engine.pretrain import Pretraining, build_objective, pretrain, views_of
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.engine.sources import open_source
from emssl_hf.models import MicrographImageProcessor, load_objective
from tests.conftest import TINY_SET
from tests.engine.conftest import Finished
from tests.engine.tiny import METHODS, Killed, kill_at, pretrain_config


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pretraining" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_the_run_leaves_its_products_and_its_record(method: str, finished: Finished) -> None:
    run = finished(method)
    assert parse(PretrainConfig, yaml.safe_load((run / "run.yaml").read_text())) == pretrain_config(method, run)
    lines = read_metrics(run)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 28))
    assert [line["epoch"] for line in steps] == [1] * 9 + [2] * 9 + [3] * 9
    assert steps[0]["lr"] == 0 and max(line["lr"] for line in steps) == pytest.approx(0.1 * 8 / 256, rel=0.1)
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    assert {"feature_std", "effective_rank", "knn_cls", "knn_mean"} <= set(evaluations[0])
    assert ("accuracy" in steps[0]) == (method == "mocov3")
    summary = read_summary(run)
    assert summary["images"] == 75 and summary["method"] == load_objective(method).title
    assert summary["loss"] == losses(run)[-1] and summary["split"] == "given"
    assert (run / "reconstructions.png").exists() == (method != "mocov3")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch-00002", "epoch-00003"]
    json.loads((run / "finished.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("method", ["mae", "mff"])
def test_the_loss_falls(method: str, finished: Finished) -> None:
    values = losses(finished(method))
    assert np.mean(values[-6:]) < 0.97 * np.mean(values[:3])


def test_the_loss_of_mocov3_falls_and_its_accuracy_rises(tmp_path: Path) -> None:
    mild = {
        "scale": [0.7, 1.0],
        "brightness": 0.1,
        "contrast": 0.1,
        "blur_probability": 0.0,
        "solarize_probability": 0.0,
    }
    train = {"epochs": 14, "batch_size": 25, "eval_every": 0, "save_every": 0}
    run = pretrain(pretrain_config("mocov3", tmp_path / "run", augment=mild, train=train))
    lines = read_metrics(run)
    first, last = ([line[key] for line in lines] for key in ("loss", "accuracy"))
    assert np.mean(first[-6:]) < 0.9 * np.mean(first[:3])
    assert np.mean(last[-6:]) > 1.5 * np.mean(last[:3])
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_pretraining_folder_loads_and_is_the_last_checkpoint(method: str, finished: Finished) -> None:
    run = finished(method)
    model = AutoModelForPreTraining.from_pretrained(run / "pretraining")
    assert type(model) is load_objective(method)
    stored = load_file(run / "checkpoints" / "epoch-00003" / "model.safetensors")
    assert same({name: value.contiguous() for name, value in model.state_dict().items()}, stored)
    processor = MicrographImageProcessor.from_pretrained(run / "pretraining")
    summary = read_summary(run)
    assert list(processor.image_mean) == [summary["mean"]] and list(processor.image_std) == [summary["std"]]


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_is_stock_and_gives_the_features_of_training(
    method: str, finished: Finished, stock: dict[str, dict[str, Any]], test_images: NDArray[np.uint8]
) -> None:
    run, found = finished(method), stock[method]
    assert found["kind"] == "ViTModel" and found["pixel_values"].shape == (12, 3, 32, 32)
    model, summary = load_objective(method).from_pretrained(run / "pretraining"), read_summary(run)
    grey = (torch.from_numpy(test_images)[:, None] / 255.0 - summary["mean"]) / summary["std"]
    np.testing.assert_allclose(found["pixel_values"][:, :1], grey.numpy(), atol=1e-5)
    with torch.no_grad():
        tokens = model.backbone.eval()(grey).last_hidden_state.numpy()
    np.testing.assert_allclose(found["tokens"], tokens, atol=2e-5)
    np.testing.assert_allclose(found["pooled"], tokens[:, 0], atol=2e-5)
    files = {path.name for path in (run / "backbone").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert "auto_map" not in (run / "backbone/config.json").read_text()


def test_mean_and_deviation_are_those_of_the_training_pixels(finished: Finished) -> None:
    opened = open_dataset("synthsem", options=TINY_SET["options"])
    store = build_store(opened.splits["train"], size=36, progress=False)
    values = np.concatenate([store.image(i).ravel() for i in range(len(store))]) / 255
    summary = read_summary(finished("mae"))
    assert summary["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert summary["std"] == pytest.approx(values.std(), abs=1e-6)


def test_the_second_call_does_nothing(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished("mae")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.yaml"}
    assert pretrain(pretrain_config("mae", run)) == run
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "is finished; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    method: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain_config(method, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(14, patch, Pretraining)  # in the middle of the second epoch
        with pytest.raises(Killed):
            pretrain(config)
    assert len(losses(tmp_path / "run")) == 13 and not (tmp_path / "run/finished.json").exists()
    pretrain(config)
    assert same(tensors(tmp_path / "run"), tensors(finished(method)))
    assert losses(tmp_path / "run") == losses(finished(method))
    assert [line["epoch"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"] == [1, 2, 3]


def test_a_run_that_was_killed_after_its_last_checkpoint_still_ends(tmp_path: Path, finished: Finished) -> None:
    config = pretrain_config("mae", tmp_path / "run")
    pretrain(config)
    (tmp_path / "run/finished.json").unlink()
    (tmp_path / "run/pretraining/model.safetensors").unlink()
    pretrain(config)
    assert same(tensors(tmp_path / "run"), tensors(finished("mae")))
    assert read_summary(tmp_path / "run")["loss"] == losses(finished("mae"))[-1]


def test_a_run_repeats_and_another_seed_is_another_run(finished: Finished, tmp_path: Path) -> None:
    pretrain(pretrain_config("mae", tmp_path / "same"))
    pretrain(pretrain_config("mae", tmp_path / "other", seed=1))
    assert same(tensors(tmp_path / "same"), tensors(finished("mae")))
    assert not same(tensors(tmp_path / "other"), tensors(finished("mae")))


@pytest.mark.parametrize("method", ["mae", "mff"])
def test_two_micro_steps_equal_one_step(method: str, finished: Finished, tmp_path: Path) -> None:
    """MoCo v3 is left out: its negatives and its BatchNorm belong to the micro-batch."""
    pretrain(pretrain_config(method, tmp_path / "run", train={"accumulation": 2}))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished(method)), rtol=2e-5)
    np.testing.assert_allclose(losses(tmp_path / "run")[:5], losses(finished(method))[:5], rtol=1e-6)


def test_gradient_checkpointing_changes_nothing(finished: Finished, tmp_path: Path) -> None:
    pretrain(pretrain_config("mae", tmp_path / "run", train={"gradient_checkpointing": True, "epochs": 3}))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished("mae")), rtol=1e-6)


def test_a_short_run_reports_its_loss_though_no_line_was_due(tmp_path: Path) -> None:
    run = pretrain(pretrain_config("mae", tmp_path / "run", train={"epochs": 1, "log_every": 100}))
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"] == [9]
    assert 0 < read_summary(run)["loss"] < 10


def test_one_session_runs_jobs_of_different_precision(tmp_path: Path) -> None:
    pretrain(pretrain_config("mae", tmp_path / "bf16", train={"epochs": 1, "precision": "bf16"}))
    pretrain(pretrain_config("mae", tmp_path / "fp32", train={"epochs": 1, "precision": "no"}))
    first, second = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert first != second
    np.testing.assert_allclose(first, second, rtol=0.05)


def test_mff_of_one_fused_block_trains(tmp_path: Path) -> None:
    run = pretrain(
        pretrain_config("mff", tmp_path / "run", train={"epochs": 1}, model={"options": {"fused_layers": [1]}})
    )
    assert np.isfinite(losses(run)).all()


def test_weights_can_be_continued_from_both_products(finished: Finished, tmp_path: Path) -> None:
    run = finished("mae")
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    features, stored = [], AutoModelForPreTraining.from_pretrained(run / "pretraining").state_dict()
    for product, method in (("pretraining", "mae"), ("backbone", "mae"), ("pretraining", "mocov3")):
        config = pretrain_config(method, tmp_path, model={"init": str(run / product)})
        model = build_objective(config, make_accelerator(config.train, tmp_path)).eval()
        with torch.no_grad():
            features.append(model.backbone(grey).last_hidden_state)
        assert not model.backbone.embeddings.position_embeddings.requires_grad
        assert same(model.state_dict(), stored) == ((product, method) == ("pretraining", "mae"))
    # The momentum network of MoCo v3 starts as a copy, wherever the weights came from.
    assert same(model.momentum_backbone.state_dict(), model.backbone.state_dict())
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features[0], features[2], atol=1e-5, rtol=1e-5)


def test_the_recipe_changes_the_views_and_leaves_the_rest_to_the_method() -> None:
    config = pretrain_config("mocov3", Path("unused"), augment={"brightness": 0.1, "scale": [0.5, 0.9]})
    model = build_objective(config, make_accelerator(config.train, "unused"))
    own, made = model.views(model.config), views_of(model, config.augment)
    assert [view.brightness for view in made] == [0.1, 0.1] and made[0].scale == (0.5, 0.9)
    assert [dataclasses.replace(v, brightness=0.4, scale=(0.08, 1.0)) for v in made] == list(own)


def test_every_epoch_has_its_own_views_and_masks(tmp_path: Path) -> None:
    config = pretrain_config("mae", tmp_path)
    accelerator = make_accelerator(config.train, tmp_path)
    model = build_objective(config, accelerator)
    job = Pretraining(config, model, open_source(config.data, accelerator), accelerator)
    batch = next(job.batches(0, 0, 1))
    first, again, later = (job.loss(model, batch, epoch)[0].item() for epoch in (0, 0, 1))
    assert first == again != later
    assert not torch.equal(batch.indices, next(job.batches(1, 0, 1)).indices)


def test_all_takes_every_split_and_given_the_train_split(tmp_path: Path) -> None:
    for split, count in (("all", 120), ("train", 75)):
        run = pretrain(pretrain_config("mae", tmp_path / split, data={"split": split}, train={"epochs": 1}))
        assert read_summary(run)["images"] == count and read_summary(run)["split"] == split


def test_a_folder_of_unequal_16_bit_images_without_labels(tmp_path: Path) -> None:
    import tifffile

    rng = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for number in range(9):
        shape = (40 + 3 * number, 60 - 2 * number)
        tifffile.imwrite(tmp_path / f"flat/{number}.tif", rng.integers(20000, 30000, shape).astype(np.uint16))
    data = {"path": str(tmp_path / "flat"), "dtype": "uint16"}
    for method in METHODS:
        run = pretrain(pretrain_config(method, tmp_path / method, data=data, train={"epochs": 1}))
        assert np.isfinite(losses(run)).all()
        assert "knn_cls" not in read_metrics(run)[-1]


def test_images_without_label_are_left_out_of_the_online_knn(tmp_path: Path, micrograph_folder: Path) -> None:
    for path in sorted(micrograph_folder.rglob("*.png")):
        split = "val" if path.stem in ("6", "7") else "train"
        home = tmp_path / "split" / split
        home.mkdir(parents=True, exist_ok=True)
        path.rename(home / f"{path.parent.name}_{path.name}")
    rows = [p.relative_to(tmp_path / "split") for p in sorted((tmp_path / "split").rglob("*.png"))]
    told = [f"{p},{p.stem.split('_')[0]}" for p in rows if not p.stem.endswith("_1")]
    (tmp_path / "split/labels.csv").write_text("\n".join(["path,label", *told]) + "\n")
    data = {"path": str(tmp_path / "split")}
    run = pretrain(pretrain_config("mae", tmp_path / "run", data=data, train={"epochs": 1}))
    assert read_summary(run)["images"] == 18 and 0 <= read_metrics(run)[-1]["knn_cls"] <= 1
