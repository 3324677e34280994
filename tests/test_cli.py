"""The command line as a person meets it: help, wrong words, exit codes, and one real run of every command."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from emssl_hf.cli import main
from emssl_hf.recipes import load_recipe, recipe_folder
from tests.conftest import write_micrographs

TINY = [
    "--model.size", "tiny", "--model.image_size", "32", "--model.patch_size", "8",
    "--train.batch_size", "8", "--train.epochs", "1",
]  # fmt: skip
NARROW = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
DECODER = (
    "decoder_hidden_size: 16, decoder_num_hidden_layers: 1, decoder_num_attention_heads: 2, "
    "decoder_intermediate_size: 32"
)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "study", "predict", "embed", "convert", "stores"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "Example: emssl" in said and command in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--train.epoks", "3"], "Did you mean --train.epochs?"),
        (["pretrain", "--train.epochs", "many"], "train.epochs"),
        (["pretrain", "--data.split", "half"], "data.split"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["predict", "model"], "required"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--config", "mff_vit_giant"], "mff_vit_small"),
        (["pretrain", "--data.path", "no/such/folder", "--output_dir", "OUT"], "no/such/folder"),
        (["pretrain", "--method", "maee", "--output_dir", "OUT"], "maee"),
        (["predict", "no/such/model", ".", "--output", "OUT/x.csv"], "no/such/model"),
    ],
)
def test_a_job_that_cannot_work_gives_one_sentence_and_code_1(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("OUT", str(tmp_path / "out")) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_misspelt_key_in_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {bas_lr: 1.0e-3}\n")
    assert main(["pretrain", "--config", str(recipe), "--output_dir", str(tmp_path / "out")]) == 2
    assert "optim.bas_lr" in capsys.readouterr().err


def test_another_run_in_the_output_folder_is_named_with_both_ways_out(
    micrograph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["pretrain", "--data.path", str(micrograph_folder), "--output_dir", str(tmp_path / "run"), *TINY]
    options = ["--model.options", "{" + NARROW + ", " + DECODER + "}"]
    assert main([*common, *options]) == 0
    capsys.readouterr()
    assert main([*common, *options, "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert "seed (0 there, 1 here)" in error and "--output_dir" in error and "--overwrite true" in error


def test_the_way_of_a_scientist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretrain on a folder, fine-tune on labels, classify and describe new images."""
    folder, run, classes = write_micrographs(tmp_path / "images", per_class=20), tmp_path / "mff", tmp_path / "classes"
    store = ["--data.store", str(tmp_path / "stores")]
    options = ["--model.options", "{" + NARROW + ", " + DECODER + "}"]
    assert (
        main(
            [
                "pretrain",
                "--method",
                "mff",
                "--data.path",
                str(folder),
                "--output_dir",
                str(run),
                *TINY,
                *options,
                *store,
            ]
        )
        == 0
    )
    tune = ["--model.init", str(run / "backbone"), "--data.path", str(folder), "--output_dir", str(classes)]
    assert main(["finetune", *tune, *TINY, *store]) == 0
    assert main(["predict", str(classes / "classifier"), str(folder), "--output", str(tmp_path / "p.csv")]) == 0
    assert main(["embed", str(run / "backbone"), str(folder), "--output", str(tmp_path / "f.parquet")]) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 60 and {row["label"] for row in rows} <= {"bright", "dark", "striped"}
    assert pq.read_table(tmp_path / "f.parquet")["features"].to_pylist()[0].__len__() == 32
    assert "model card" not in capsys.readouterr().err
    for folder_ in (run, classes):
        assert (folder_ / "README.md").read_text().startswith("---\n")
    assert (run / "reconstructions.png").stat().st_size > 5000
    assert main(["stores", "--root", str(tmp_path / "stores")]) == 0
    assert "stores" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "emssl_hf.cli", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "pretrain" in done.stdout


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import emssl_hf, sys; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import emssl_hf; from transformers import AutoConfig",
        "import emssl_hf; from transformers import AutoImageProcessor, AutoConfig",
        "from transformers import AutoConfig; import emssl_hf",
        "import emssl_hf.models; from transformers import AutoConfig",
    ],
)
def test_auto_classes_know_the_methods_in_any_order_of_imports(code: str) -> None:
    code += "; print([AutoConfig.for_model(name).model_type for name in ('emssl_mae', 'emssl_mff', 'emssl_mocov3')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("['emssl_mae', 'emssl_mff', 'emssl_mocov3']"), done.stderr


@pytest.mark.parametrize("recipe", sorted(recipe_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_accepted_by_its_command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "finetune" if "finetune" in recipe.stem else "pretrain" if "_vit_" in recipe.stem else "study"
    command = "study" if recipe.stem.startswith("study") else command
    with pytest.raises(SystemExit) as exit_:
        main([command, "--config", recipe.stem, "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert json.dumps(printed["output_dir"]) == json.dumps(load_recipe(recipe.stem)["output_dir"])
