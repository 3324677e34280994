"""Fine-tuning: the label draw, the one look at the test split, stock classifiers, resume, refusals."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from emssl_hf.data.nffa import CLASS_NAMES
from emssl_hf.engine import finetune as module
from emssl_hf.engine.config import FinetuneConfig, parse
from emssl_hf.engine.finetune import Finetuning, build_classifier, finetune, labelled_stores
from emssl_hf.engine.loop import make_accelerator
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.engine.sources import open_source
from emssl_hf.errors import EmsslError
from tests.conftest import write_micrographs
from tests.engine.conftest import Finished
from tests.engine.tiny import Killed, finetune_config, kill_at


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def stores(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    config = finetune_config(tmp_path, **changes)
    return labelled_stores(open_source(config.data, make_accelerator(config.train, tmp_path)), config)


def built(tmp_path: Path, **changes: Any) -> Any:
    config = finetune_config(tmp_path, **changes)
    return build_classifier(config, list("abc"), make_accelerator(config.train, tmp_path))


def test_the_run_leaves_its_products_and_its_record(finetuned: Path) -> None:
    config = parse(FinetuneConfig, yaml.safe_load((finetuned / "run.yaml").read_text()))
    assert config.output_dir == finetuned
    assert {"classifier", "classifier_last", "predictions.csv", "metrics.jsonl"} <= {
        p.name for p in finetuned.iterdir()
    }
    assert not (finetuned / "best.safetensors").exists()
    summary = read_summary(finetuned)
    assert summary["classes"] == list(CLASS_NAMES) and summary["images"] == 75
    curve = [(m["validation_accuracy"], -m["epoch"]) for m in read_metrics(finetuned) if m["kind"] == "eval"]
    assert (summary["validation_accuracy"], -summary["best_epoch"]) == max(curve) and len(curve) == 3


def test_predictions_and_figures_agree_row_by_row(finetuned: Path, tmp_path: Path) -> None:
    rows, test = predictions(finetuned), stores(tmp_path)["test"]
    assert [row["id"] for row in rows] == test.ids.tolist() and len(rows) == 12
    assert [row["label"] for row in rows] == [CLASS_NAMES[label] for label in test.labels]
    scores = np.array([[float(row[f"score_{name}"]) for name in CLASS_NAMES] for row in rows])
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    assert [row["predicted"] for row in rows] == [CLASS_NAMES[place] for place in scores.argmax(1)]
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert read_summary(finetuned)["test"]["accuracy"] == pytest.approx(right)
    assert np.trace(read_summary(finetuned)["test"]["confusion"]) == round(12 * right)


def test_the_classifier_is_stock_and_gives_the_predictions(
    finetuned: Path, stock: dict[str, dict[str, Any]], test_images: NDArray[np.uint8]
) -> None:
    found, rows = stock["classifier"], predictions(finetuned)
    assert found["kind"] == "ViTForImageClassification" and found["pixel_values"].shape == (12, 3, 32, 32)
    assert found["names"].tolist() == list(CLASS_NAMES)
    scores = [[float(row[f"score_{name}"]) for name in CLASS_NAMES] for row in rows]
    np.testing.assert_allclose(found["scores"], scores, atol=2e-6)


def test_the_test_split_is_scored_once_and_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = Finetuning.predict

    def predict(self: Finetuning, split: str) -> Any:
        asked.append(split)
        return original(self, split)

    monkeypatch.setattr(Finetuning, "predict", predict)
    finetune(finetune_config(tmp_path / "run"))
    assert asked == ["validation"] * 3 + ["test"]


@pytest.mark.parametrize("per_class", [1, 3])
def test_labels_are_drawn_per_class_and_nested(per_class: int, tmp_path: Path) -> None:
    drawn = stores(tmp_path, labels_per_class=per_class)["train"]
    assert Counter(drawn.labels.tolist()) == dict.fromkeys(range(10), per_class)
    assert set(drawn.ids) <= set(stores(tmp_path, labels_per_class=per_class + 1)["train"].ids)
    assert set(drawn.ids) != set(stores(tmp_path, labels_per_class=per_class, seed=1)["train"].ids)
    held_out = stores(tmp_path, labels_per_class=per_class)
    assert not set(drawn.ids) & ({*held_out["test"].ids} | {*held_out["validation"].ids})


def test_a_run_on_few_labels_sees_those_alone(tmp_path: Path) -> None:
    run = finetune(finetune_config(tmp_path / "run", labels_per_class=2, train={"batch_size": 10}))
    assert read_summary(run)["images"] == 20
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert len(predictions(run)) == 12


def test_images_without_label_are_neither_trained_on_nor_scored(tmp_path: Path) -> None:
    folder = write_micrographs(tmp_path / "set", per_class=10)
    rows = [path.relative_to(folder) for path in sorted(folder.rglob("*.png")) if path.stem not in ("0", "1")]
    (folder / "labels.csv").write_text("\n".join(["path,label", *(f"{p},{p.parent}" for p in rows)]) + "\n")
    run = finetune(finetune_config(tmp_path / "run", data={"path": str(folder)}))
    assert sum(map(sum, read_summary(run)["test"]["confusion"])) == len(predictions(run)) > 0
    made = stores(tmp_path, data={"path": str(folder)})
    assert sum(map(len, made.values())) == 24 and min(store.labels.min() for store in made.values()) == 0


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    folder = write_micrographs(tmp_path / "set", per_class=14)
    plain = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
    train = {"epochs": 12, "batch_size": 15}
    run = finetune(
        finetune_config(tmp_path / "run", data={"path": str(folder)}, augment=plain, train=train, select="best")
    )
    assert read_summary(run)["test"]["accuracy"] == 1.0 and read_summary(run)["test"]["macro_f1"] == 1.0


def test_best_publishes_the_best_epoch_and_last_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation accuracy is made to peak after the first epoch."""
    made: dict[str, Path] = {}
    for select in ("best", "last"):
        peaks, original = iter([0.9, 0.2, 0.4]), module.classification_figures

        def figures(*args: Any, peaks: Any = peaks, original: Any = original) -> dict[str, Any]:
            return {**original(*args), "accuracy": next(peaks, 0.5)}

        with monkeypatch.context() as patch:
            patch.setattr(module, "classification_figures", figures)
            made[select] = finetune(finetune_config(tmp_path / select, select=select, train={"keep": 3}))
    best, last = weights(made["best"] / "classifier"), weights(made["last"] / "classifier")
    first_epoch = weights_of_checkpoint(made["best"], 1)
    assert torch.equal(best["classifier.weight"], first_epoch["classifier.weight"])
    assert torch.equal(last["classifier.weight"], weights_of_checkpoint(made["last"], 3)["classifier.weight"])
    assert same(last, weights(made["best"] / "classifier_last")) and not same(best, last)
    assert read_summary(made["best"])["best_epoch"] == 1


def weights_of_checkpoint(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"epoch-{epoch:05d}" / "model.safetensors")


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    finetuned: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(tmp_path / "run", model={"init": str(finished("mae") / "pretraining")})
    with monkeypatch.context() as patch:
        kill_at(14, patch, Finetuning)
        with pytest.raises(Killed):
            finetune(config)
    finetune(config)
    for folder in ("classifier", "classifier_last"):
        assert same(weights(tmp_path / "run" / folder), weights(finetuned / folder))
    assert (tmp_path / "run/predictions.csv").read_text() == (finetuned / "predictions.csv").read_text()
    values = [[m["loss"] for m in read_metrics(run) if m["kind"] == "train"] for run in (tmp_path / "run", finetuned)]
    assert values[0] == values[1] and len(values[0]) == 27


def test_two_micro_steps_equal_one_step_without_mixing_and_drop_path(tmp_path: Path) -> None:
    plain = {"augment": {"mixup": 0.0, "cutmix": 0.0}, "select": "last"}
    for accumulation in (1, 2):
        train = {"accumulation": accumulation, "drop_path": 0.0, "epochs": 2}
        finetune(finetune_config(tmp_path / str(accumulation), train=train, **plain))
    one, two = ([m["loss"] for m in read_metrics(tmp_path / n) if m["kind"] == "train"] for n in ("1", "2"))
    np.testing.assert_allclose(one, two, rtol=2e-5)


# Where the weights come from


def test_pretraining_and_backbone_start_with_the_same_features(finished: Finished, tmp_path: Path) -> None:
    run, pixels = finished("mff"), torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, published, scratch = (
            built(tmp_path, model={"init": init}).eval().vit(pixels).last_hidden_state
            for init in (str(run / "pretraining"), str(run / "backbone"), None)
        )
    torch.testing.assert_close(ours, published, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours, scratch, atol=0.1)


def test_scratch_and_pretrained_start_with_one_head_near_zero(finished: Finished, tmp_path: Path) -> None:
    model = built(tmp_path, model={"init": str(finished("mae") / "backbone")})
    assert model.classifier.weight.abs().max() < 1e-4 and (model.classifier.bias == 0).all()
    assert model.config.num_channels == 1 and model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert built(tmp_path).vit.embeddings.position_embeddings.abs().max() > 0.5


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    for name, model in (("bert", bert), ("resnet", resnet)):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(EmsslError, match=f"{tmp_path / name} is a '{name}' model; a backbone must be a plain ViT"):
            finetune(finetune_config(tmp_path / "run", model={"init": str(tmp_path / name)}, overwrite=True))


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match="neither a folder with a model nor a model on the Hub"):
        built(tmp_path, model={"init": str(tmp_path / "nothing")})


def test_a_class_of_one_image_is_named(tmp_path: Path) -> None:
    folder = write_micrographs(tmp_path / "set", per_class=6)
    (folder / "rare").mkdir()
    (folder / "dark/0.png").rename(folder / "rare/0.png")
    with pytest.raises(EmsslError, match=r"the class 'rare' has 1 image\(s\).*--data.min_per_class 2"):
        finetune(finetune_config(tmp_path / "run", data={"path": str(folder)}))


def test_images_without_labels_are_refused_with_the_way_to_label_them(tmp_path: Path, micrograph_folder: Path) -> None:
    with pytest.raises(EmsslError, match="has no labels: put the images into one folder per class"):
        finetune(finetune_config(tmp_path / "run", data={"path": str(micrograph_folder / "dark")}))


def test_a_misspelt_setting_of_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmsslError, match="hiden_size"):
        built(tmp_path, model={"options": {"hiden_size": 32}})
