"""A whole comparison in miniature: its stages, its report, its caches and its promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModel, AutoModelForImageClassification

from emssl_hf import api
from emssl_hf.engine.config import StudyConfig, parse
from emssl_hf.engine.run_folder import read_metrics, read_summary
from emssl_hf.engine.study import with_split
from emssl_hf.errors import EmsslError

DATA = {"path": "synthsem", "options": {"images": 300, "size": 32}, "split": "train", "resolution": 32}
SETTINGS: dict[str, Any] = {
    "model": {
        "size": "tiny",
        "image_size": 32,
        "patch_size": 8,
        "options": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "methods": {
        "mff": {
            "model": {
                "options": {
                    "decoder_hidden_size": 16,
                    "decoder_num_hidden_layers": 1,
                    "decoder_num_attention_heads": 2,
                    "decoder_intermediate_size": 32,
                }
            }
        },
        "mocov3": {"model": {"options": {"projector_hidden_size": 32, "projection_size": 16}}},
    },
    "pretrain": {"train": {"epochs": 2, "batch_size": 32, "log_every": 1}, "optim": {"warmup_epochs": 1}},
    "finetune": {"train": {"epochs": 2, "batch_size": 16, "save_every": 0}, "augment": {"interpolation": "bilinear"}},
    "scratch": [{}, {"optim": {"base_lr": 1.0e-3}}],
    "scratch_long": 3,
    "labels_per_class": 3,
    "seeds": [0, 1],
    "jobs": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study") / "study"
    return api.study(DATA, place, **SETTINGS)


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return loaded


def test_the_report_keeps_its_contract(report: dict[str, Any]) -> None:
    assert report["dataset"] == "synthsem" and report["labels_per_class"] == 3 and report["seeds"] == [0, 1]
    assert list(report["methods"]) == ["scratch", "mff", "mocov3"]
    for name, figures in report["methods"].items():
        for key in ("accuracy", "macro_f1"):
            assert set(figures[key]) == {"mean", "ci95", "values"} and len(figures[key]["values"]) == 2
        assert "epochs_to_scratch" in figures
        assert (figures["pretrain_images_per_s"] is None) == (name == "scratch")


def test_figures_are_those_of_the_runs(folder: Path, report: dict[str, Any]) -> None:
    for method, figures in report["methods"].items():
        runs = [read_summary(folder / "finetune" / f"{method}-{seed}")["test"] for seed in (0, 1)]
        values = [run["accuracy"] for run in runs]
        assert figures["accuracy"]["values"] == values
        assert figures["accuracy"]["mean"] == pytest.approx(np.mean(values))
        half = stats.t.interval(0.95, 1, loc=0, scale=stats.sem(values))[1] if values[0] != values[1] else 0.0
        assert figures["accuracy"]["ci95"] == pytest.approx(half)
        assert np.sum(figures["confusion"]) == np.sum([run["confusion"] for run in runs])
    scratch = report["methods"]["scratch"]["accuracy"]["values"]
    mff = report["methods"]["mff"]
    assert mff["gain"]["values"] == pytest.approx(np.subtract(mff["accuracy"]["values"], scratch))


def test_scratch_has_the_candidate_that_is_best_on_validation(folder: Path, report: dict[str, Any]) -> None:
    reached = [read_summary(folder / "sweep" / number)["validation_accuracy"] for number in ("0", "1")]
    assert report["scratch_recipe"]["validation_accuracy"] == reached
    assert report["scratch_recipe"]["chosen"] == int(np.argmax(reached))
    assert read_metrics(folder / "finetune" / "scratch-long")[-1]["epoch"] == 3


def test_pretraining_shares_nothing_with_the_held_out_images(report: dict[str, Any]) -> None:
    assert report["facts"]["overlap"] == 0 and not report["facts"]["transductive"]
    assert report["facts"]["images"] == report["facts"]["counts"]["train"]


def test_markdown_shows_every_picture_and_row(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "say nothing about your microscope" in text and "random weights" in text and "scratch, 3 epochs" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.partition("(")[2].rstrip(")")).stat().st_size > 2000
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows[:6]}) == 1


def test_products_stand_where_others_look_for_them(folder: Path) -> None:
    for method in ("scratch", "mff", "mocov3"):
        for kind, name in ((AutoModel, "backbone"), (AutoModelForImageClassification, "classifier")):
            model, info = kind.from_pretrained(folder / method / name, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert torch.isfinite(model(torch.zeros(1, 3, 32, 32))[0]).all()
    assert (folder / "mff" / "pretraining").is_dir() and (folder / "mff" / "README.md").is_file()


def test_a_second_run_repeats_nothing_and_a_lost_stage_is_made_again(folder: Path) -> None:
    def times() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in folder.glob("**/finished.json")}

    before = times()
    api.study(DATA, folder, **SETTINGS)
    assert times() == before
    figures = (folder / "report.json").read_text()
    (folder / "finished.json").unlink()
    (folder / "finetune" / "mff-1" / "finished.json").unlink()
    api.study(DATA, folder, **SETTINGS)
    after = times()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {str(folder / "finished.json"), str(folder / "finetune" / "mff-1" / "finished.json")}
    remade, was = json.loads((folder / "report.json").read_text()), json.loads(figures)
    assert remade["methods"]["mff"]["accuracy"] == was["methods"]["mff"]["accuracy"]


def test_transductive_studies_say_so(tmp_path: Path) -> None:
    from emssl_hf.engine.report import _warning

    said = _warning({"dataset": "mine", "transductive": True})
    assert "Transductive" in said and "microscope" not in said


def test_an_unlabelled_folder_is_refused(tmp_path: Path, micrograph_folder: Path) -> None:
    with pytest.raises(EmsslError, match="no labels"):
        api.study({"path": str(micrograph_folder), "labels": "none"}, tmp_path / "study", **SETTINGS)


def test_a_misspelt_setting_is_named(tmp_path: Path) -> None:
    tiny = {"path": "synthsem", "options": {"images": 120, "size": 32}}
    with pytest.raises(EmsslError, match="epoks"):
        api.study(tiny, tmp_path / "study", finetune={"train": {"epoks": 3}})


@pytest.mark.parametrize("where", ["pretrain", "finetune"])
def test_no_run_may_see_other_data_than_the_study(tmp_path: Path, where: str) -> None:
    with pytest.raises(EmsslError, match="same data"):
        api.study(DATA, tmp_path / "study", **{where: {"data": {"split": "all"}}})


def test_pretraining_on_all_images_is_allowed_and_said() -> None:
    config = with_split(parse(StudyConfig, {"pretrain": {"split": "all", "train": {"epochs": 1}}}))
    assert config.data.split == "all" and config.pretrain == {"train": {"epochs": 1}}


def test_settings_are_typed() -> None:
    with pytest.raises(EmsslError, match="seeds"):
        parse(StudyConfig, {"seeds": ["first"]})
