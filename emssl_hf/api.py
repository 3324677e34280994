"""The jobs as functions, for notebooks and scripts: the same settings, run folders and messages as the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emssl_hf.engine import finetune as finetuning
from emssl_hf.engine import predict as prediction
from emssl_hf.engine import pretrain as pretraining
from emssl_hf.engine import study as comparison
from emssl_hf.engine.config import FinetuneConfig, PretrainConfig, StudyConfig, T, merge, parse
from emssl_hf.engine.loop import is_main_process
from emssl_hf.hub.cards import write_card
from emssl_hf.recipes import load_recipe

embed = prediction.embed
predict = prediction.predict


#: A folder of micrographs, a saved or Hub data set, `synthsem`; or all data settings: {"path": ..., "databar": "keep"}.
Data = str | Path | Mapping[str, Any]


def pretrain(
    data: Data,
    output_dir: str | Path,
    *,
    method: str | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Pretrain on a folder of micrographs, a data set or `synthsem`; by MAE if neither recipe nor method says else.

    Settings are those of `emssl pretrain`, nested: `train={"epochs": 50}`. They win over the recipe. Returns the run
    folder.
    """
    return run_pretrain(
        _config(PretrainConfig, recipe, settings, data, output_dir, {} if method is None else {"method": method})
    )


def finetune(
    data: Data,
    output_dir: str | Path,
    *,
    init: str | Path | None = None,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a classifier from the weights `init`, or from scratch without; returns the run folder."""
    own = {"model": {"init": str(init)}} if init is not None else {}
    return run_finetune(_config(FinetuneConfig, recipe, settings, data, output_dir, own))


def study(
    data: Data = "synthsem",
    output_dir: str | Path = "runs/study",
    *,
    recipe: str | Path | None = None,
    **settings: Any,
) -> Path:
    """Compare pretraining methods with training from scratch; returns the folder with report.md and report.json."""
    return run_study(_config(StudyConfig, recipe, settings, data, output_dir, {}))


def run_pretrain(config: PretrainConfig) -> Path:
    """Pretrain, write the model card, and say what comes next."""
    run = pretraining.pretrain(config)
    next_ = f"emssl finetune --config finetune_vit_{_recipe_size(config)} --model.init {run / 'backbone'}"
    return _close(run, f"{next_} --data.path LABELLED --output_dir {run}-classes")


def run_finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, write the model card, and say what comes next."""
    run = finetuning.finetune(config)
    return _close(run, f"emssl predict {run / 'classifier'} FOLDER --output predictions.csv")


def run_study(config: StudyConfig) -> Path:
    """Compare, then write the card of every run."""
    folder = comparison.study(config)
    for recipe in sorted(folder.glob("**/run.yaml")):
        if recipe.parent != folder:
            write_card(recipe.parent)
    return folder


def _close(run: Path, next_command: str) -> Path:
    if is_main_process():
        write_card(run)
        print(f"in {run}; next: {next_command}")
    return run


def _recipe_size(config: PretrainConfig) -> str:
    """The size of the fine-tuning recipe that goes with it; there is none for large."""
    return "base" if config.model.size == "large" else config.model.size


def _config(
    kind: type[T],
    recipe: str | Path | None,
    settings: dict[str, Any],
    data: Data,
    output_dir: str | Path,
    own: dict[str, Any],
) -> T:
    base = load_recipe(recipe) if recipe is not None else {}
    data_settings = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    return parse(kind, merge(base, own, settings, {"data": data_settings, "output_dir": str(output_dir)}))
