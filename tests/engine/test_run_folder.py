"""The rules of the run folder: what may change when a run is resumed, and what is refused in which words."""

import json
from pathlib import Path

import pytest
import yaml

from emssl_hf.engine.config import PretrainConfig, StudyConfig, parse, result_settings, to_yaml
from emssl_hf.engine.run_folder import MetricsWriter, RunFolder, read_metrics
from emssl_hf.errors import EmsslError
from tests.conftest import TINY_SET
from tests.engine.tiny import pretrain_config


def prepare(config: PretrainConfig) -> RunFolder:
    folder = RunFolder(config, "pretrain")
    folder.prepare()
    return folder


def begin(run: Path) -> None:
    """Leave what a first step leaves."""
    MetricsWriter(run, 0).write({"kind": "train", "step": 1})


def test_the_recipe_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    config = pretrain_config("mff", tmp_path / "run", augment={"scale": [0.3, 0.9]}, data={"workers": 2})
    prepare(config)
    text = (tmp_path / "run/run.yaml").read_text()
    assert parse(PretrainConfig, yaml.safe_load(text)) == config
    assert text.startswith("# emssl pretrain") and yaml.safe_load(text) == yaml.safe_load(to_yaml(config))


def test_the_recipe_of_a_run_that_overwrote_does_not_delete_it_again(tmp_path: Path) -> None:
    config = pretrain_config("mae", tmp_path / "run")
    prepare(config).finish({"loss": 1.0})
    assert RunFolder(config, "pretrain").finished
    again = prepare(pretrain_config("mae", tmp_path / "run", overwrite=True))
    assert not again.finished
    again.finish({})
    reread = parse(PretrainConfig, yaml.safe_load((tmp_path / "run/run.yaml").read_text()))
    assert reread == config and prepare(reread).finished


def test_other_settings_are_refused_by_name_with_both_ways_out(tmp_path: Path) -> None:
    prepare(pretrain_config("mae", tmp_path / "run"))
    begin(tmp_path / "run")
    changed = pretrain_config(
        "mae", tmp_path / "run", seed=3, train={"epochs": 7}, model={"options": {"mask_ratio": 0.5}}
    )
    with pytest.raises(EmsslError) as caught:
        prepare(changed)
    message = str(caught.value)
    for part in ("seed (0 there, 3 here)", "train.epochs (3 there, 7 here)", "model.options", "--output_dir"):
        assert part in message
    assert "--overwrite true" in message and "optim" not in message


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path) -> None:
    prepare(pretrain_config("mae", tmp_path / "run", model={"options": {"mask_ration": 0.5}}))
    MetricsWriter(tmp_path / "run", 0)
    config = pretrain_config("mae", tmp_path / "run", model={"options": {"mask_ratio": 0.5}})
    prepare(config)
    assert parse(PretrainConfig, yaml.safe_load((tmp_path / "run/run.yaml").read_text())) == config


def test_where_and_how_a_run_works_may_change(tmp_path: Path) -> None:
    prepare(pretrain_config("mae", tmp_path / "run"))
    begin(tmp_path / "run")
    free = {"log_every": 7, "threads": 2, "save_every": 2, "keep": 5, "eval_every": 3, "gradient_checkpointing": True}
    data = {**TINY_SET, "path": "elsewhere", "workers": 3, "store": str(tmp_path / "stores")}
    prepare(pretrain_config("mae", tmp_path / "run", train=free, data=data))
    assert "log_every: 7" in (tmp_path / "run/run.yaml").read_text()


def test_every_setting_is_either_free_or_compared() -> None:
    settings = result_settings(PretrainConfig())
    assert {"seed", "method", "train.batch_size", "optim.betas", "augment.scale", "model.init"} <= set(settings)
    assert {"output_dir", "overwrite", "data.path", "data.store", "train.log_every"}.isdisjoint(settings)


def test_the_methods_of_a_study_are_compared_too(tmp_path: Path) -> None:
    def study(**changes: object) -> None:
        RunFolder(parse(StudyConfig, {"output_dir": str(tmp_path / "study"), **changes}), "study").prepare()

    study(methods={"mae": {}})
    begin(tmp_path / "study")
    study(methods={"mae": {}})
    with pytest.raises(EmsslError, match="methods"):
        study(methods={"mae": {"optim": {"base_lr": 0.1}}})
    with pytest.raises(EmsslError, match="finetune"):
        study(methods={"mae": {}}, finetune={"train": {"epochs": 3}})


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(EmsslError, match="not empty and holds no run"):
            prepare(pretrain_config("mae", tmp_path, overwrite=overwrite))
    assert (tmp_path / "thesis.tex").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmsslError, match=r"file/run cannot be written .*--output_dir"):
        prepare(pretrain_config("mae", tmp_path / "file" / "run"))


def test_a_command_of_several_lines_does_not_spoil_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["emssl", "--model.options", "{mask_ratio: 0.5,\n  hidden_size: 32}\nbad"])
    config = pretrain_config("mae", tmp_path / "run")
    prepare(config)
    assert parse(PretrainConfig, yaml.safe_load((tmp_path / "run/run.yaml").read_text())) == config


def test_metrics_beyond_the_step_of_the_resume_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 7):
        writer.write({"kind": "train", "step": step})
    MetricsWriter(tmp_path, 4).write({"kind": "train", "step": 5, "again": True})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["again"]
    MetricsWriter(tmp_path, 0)
    assert read_metrics(tmp_path) == []


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, 0).write({"kind": "train", "step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]
    MetricsWriter(tmp_path, 1).write({"kind": "train", "step": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
