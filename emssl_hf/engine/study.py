"""The comparison of pretraining methods with training from scratch: which runs it takes, in which order, how read."""

import contextlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from emssl_hf.data.curation import few_labels, overlap
from emssl_hf.engine import probe
from emssl_hf.engine.config import (
    FinetuneConfig,
    PretrainConfig,
    StudyConfig,
    merge,
    parse,
    to_dict,
)
from emssl_hf.engine.finetune import finetune
from emssl_hf.engine.metrics import classification_figures
from emssl_hf.engine.pretrain import pretrain
from emssl_hf.engine.report import write_report
from emssl_hf.engine.run_folder import RunFolder, read_summary
from emssl_hf.engine.sources import Source, input_size, open_source, training_resolution
from emssl_hf.errors import EmsslError
from emssl_hf.models.backbone import load_backbone

#: Neighbours that kNN may use; the number is chosen on validation.
NEIGHBOURS = (1, 3, 5, 10, 20)


@dataclass(frozen=True)
class Stage:
    """One run of the study, by the name that people read."""

    name: str
    config: PretrainConfig | FinetuneConfig


def study(config: StudyConfig) -> Path:
    """Run the comparison, or what is left of it, and write report.md and report.json; returns the study's folder.

    Raises EmsslError where a stage fails, naming the stage; finished stages are kept.
    """
    folder = RunFolder(config, "study")
    folder.prepare()
    if folder.finished:
        print(f"{folder.path} is finished; nothing to do (--overwrite true starts anew)")
        return folder.path
    source = open_source(config.data, Accelerator(cpu=not torch.cuda.is_available()))
    facts = prepare_data(source, config)
    print(f"study in {folder.path}: {facts['images']:,} images for pretraining, {facts['overlap']} shared with test")
    workers = config.jobs or default_jobs()
    run_stages([*pretraining_stages(config), *sweep_stages(config)], workers)
    recipe = best_scratch(config)
    run_stages(finetuning_stages(config, recipe), workers)
    for method in ["scratch", *config.methods]:
        collect_products(config, method)
    probes = probe_backbones(source, config)
    write_report(config, facts, recipe, probes)
    folder.finish({"job": "study"})
    print((folder.path / "report.md").read_text().split("\n## ")[0])
    print(f"report: {folder.path / 'report.md'}")
    return folder.path


def default_jobs() -> int:
    """Small runs use cores better side by side than one after another; a GPU takes one run at a time."""
    return 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)))


def prepare_data(source: Source, config: StudyConfig) -> dict[str, Any]:
    """Build the stores once, before the runs need them, and check that pretraining sees no held-out specimen."""
    splits, images = source.labelled_splits(), source.pretraining_images()
    source.store(images, training_resolution(config.data, config.model))
    for split in ("train", "validation", "test"):
        source.store(splits[split], input_size(config.model))
    shared = overlap(images, splits["test"]) + overlap(images, splits["validation"])
    if shared and config.data.split != "all":
        raise EmsslError(
            f"{shared} validation or test images, or their specimens, are among the images for pretraining: mend the "
            "splits, or give --data.split all for a study that says it is transductive."
        )
    return {
        "dataset": source.opened.name,
        "images": len(images),
        "overlap": shared,
        "transductive": config.data.split == "all",
        "counts": {split: len(splits[split]) for split in splits},
        "classes": source.opened.label_names,
    }


def pretraining_stages(config: StudyConfig) -> list[Stage]:
    """One pretraining per method, the slowest kinds first so that no core idles at the end."""
    return [
        Stage(
            method,
            parse(
                PretrainConfig,
                merge(
                    _shared(config),
                    config.pretrain,
                    own,
                    {"method": method, "output_dir": str(config.output_dir / method)},
                ),
            ),
        )
        for method, own in config.methods.items()
    ]


def sweep_stages(config: StudyConfig) -> list[Stage]:
    """Scratch's candidates, each with the first seed."""
    if len(config.scratch) == 1:
        return []
    return [
        Stage(
            f"scratch-candidate-{number}",
            _finetuning(config, "sweep", str(number), config.seeds[0], candidate),
        )
        for number, candidate in enumerate(config.scratch)
    ]


def best_scratch(config: StudyConfig) -> dict[str, Any]:
    """The candidate with the highest validation accuracy; its settings and the candidates' figures."""
    figures = [read_summary(stage.config.output_dir)["validation_accuracy"] for stage in sweep_stages(config)] or [
        float("nan")
    ]
    chosen = int(np.nanargmax(figures)) if len(figures) > 1 else 0
    return {"settings": config.scratch[chosen], "chosen": chosen, "validation_accuracy": figures}


def finetuning_stages(config: StudyConfig, recipe: dict[str, Any]) -> list[Stage]:
    """Every method and scratch with every seed, and scratch's long run."""
    stages = []
    if config.scratch_long:
        longer = merge(recipe["settings"], {"train": {"epochs": config.scratch_long}})
        stages.append(Stage("scratch-long", _finetuning(config, "finetune", "scratch-long", config.seeds[0], longer)))
    for seed in config.seeds:
        for method in ["scratch", *config.methods]:
            own = (
                recipe["settings"]
                if method == "scratch"
                else {"model": {"init": str(config.output_dir / method / "pretraining")}}
            )
            stages.append(
                Stage(f"{method}, seed {seed}", _finetuning(config, "finetune", f"{method}-{seed}", seed, own))
            )
    return stages


def _finetuning(config: StudyConfig, kind: str, name: str, seed: int, own: dict[str, Any]) -> FinetuneConfig:
    fixed = {
        "seed": seed,
        "output_dir": str(config.output_dir / kind / name),
        "labels_per_class": config.labels_per_class,
    }
    return parse(FinetuneConfig, merge(_shared(config), config.finetune, own, fixed))


def _shared(config: StudyConfig) -> dict[str, Any]:
    model = to_dict(config.model)
    return {"data": to_dict(config.data), "model": {key: model[key] for key in model if key != "init"}}


def run_stages(stages: list[Stage], workers: int) -> None:
    """Run the stages in `workers` processes at a time; a progress bar counts their epochs."""
    left = [stage for stage in stages if not (stage.config.output_dir / "finished.json").exists()]
    epochs = sum(stage.config.train.epochs for stage in left)
    threads = max(1, (len(os.sched_getaffinity(0))) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=epochs, unit="epoch") as bar:
        running: dict[Future[None], Stage] = {pool.submit(run_stage, stage, threads): stage for stage in left}
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                stage = running.pop(future)
                _check(future, stage, pool)
                tqdm.write(f"  {stage.name}: {closing_line(stage)}")
            bar.n = sum(epochs_done(stage) for stage in left)
            bar.refresh()


def _check(future: "Future[None]", stage: Stage, pool: ProcessPoolExecutor) -> None:
    error = future.exception()
    if error is None:
        return
    pool.shutdown(wait=False, cancel_futures=True)
    raise EmsslError(
        f"The stage {stage.name} failed: {error} Its log is {stage.config.output_dir / 'log.txt'}; the same command "
        "goes on from what is finished."
    ) from error


def run_stage(stage: Stage, threads: int) -> None:
    """One stage in a process of its own; what it says goes to log.txt in its run folder."""
    torch.set_num_threads(threads)
    os.environ["EMSSL_QUIET"] = "1"
    stage.config.output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = stage.config.output_dir.with_name(f".{stage.config.output_dir.name}.log")
    with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        if isinstance(stage.config, PretrainConfig):
            pretrain(stage.config)
        else:
            finetune(stage.config)


def epochs_done(stage: Stage) -> int:
    """Epochs that the stage's metrics speak of."""
    file = stage.config.output_dir / "metrics.jsonl"
    if not file.exists():
        return 0
    last = file.read_text().rstrip().rpartition("\n")[2]
    return int(json.loads(last)["epoch"]) if last.endswith("}") else 0


def closing_line(stage: Stage) -> str:
    """What a finished stage came to, in a few words."""
    summary = read_summary(stage.config.output_dir)
    if summary["job"] == "pretrain":
        return f"pretrained in {summary['seconds']:.0f} s, loss {summary['loss']:.4f}"
    return f"validation accuracy {summary['validation_accuracy']:.3f} in {summary['seconds']:.0f} s"


def collect_products(config: StudyConfig, method: str) -> None:
    """`<study>/<method>/` gets the classifier that is best on validation; scratch gets its backbone too."""
    runs = [config.output_dir / "finetune" / f"{method}-{seed}" for seed in config.seeds]
    best = max(runs, key=lambda run: read_summary(run)["validation_accuracy"])
    home = config.output_dir / method
    shutil.copytree(best / "classifier", home / "classifier", dirs_exist_ok=True)
    if method == "scratch":
        from emssl_hf.models.backbone import publish_backbone

        publish_backbone(load_backbone(best / "classifier")[0]).save_pretrained(home / "backbone")
        shutil.copy(best / "classifier" / "preprocessor_config.json", home / "backbone")


def probe_backbones(source: Source, config: StudyConfig) -> dict[str, dict[str, Any]]:
    """kNN and linear probe on frozen features, with each seed's labels; `random` is the same on random weights."""
    splits = source.labelled_splits()
    stores = {split: source.store(splits[split], input_size(config.model)) for split in splits}
    results: dict[str, dict[str, Any]] = {}
    for method in ["random", *config.methods]:
        model, mean, std = _frozen(config, method, stores["train"])
        features = {split: probe.extract(model, store, mean=mean, std=std) for split, store in stores.items()}
        results[method] = _probe_seeds(features, stores, config)
    return results


def _frozen(config: StudyConfig, method: str, train: Any) -> tuple[Any, float, float]:
    if method != "random":
        summary = read_summary(config.output_dir / method)
        backbone, _ = load_backbone(config.output_dir / method / "pretraining")
        return backbone, summary["mean"], summary["std"]
    from emssl_hf.engine.finetune import build_classifier

    scratch = parse(FinetuneConfig, merge(_shared(config), config.finetune, {"seed": config.seeds[0]}))
    model = build_classifier(scratch, train.label_names, Accelerator(cpu=not torch.cuda.is_available()))
    return model.vit, train.mean, train.std


def _probe_seeds(features: dict[str, Any], stores: dict[str, Any], config: StudyConfig) -> dict[str, Any]:
    """Accuracy of kNN and of the linear probe on the test split, per seed; choices are made on validation."""
    truth = {split: store.labels for split, store in stores.items()}
    classes = len(stores["test"].label_names)
    found: dict[str, list[Any]] = {"linear": [], "knn": [], "linear_pool": [], "k": []}
    for seed in config.seeds:
        rows = np.arange(len(stores["train"]))
        if config.labels_per_class is not None:
            rows = few_labels(truth["train"], config.labels_per_class, seed, groups=list(stores["train"].groups))
        train = {pool: values[rows] for pool, values in features["train"].items()}
        fitted = probe.linear_probe(
            train, truth["train"][rows], features["validation"], truth["validation"], features["test"]
        )
        found["linear"].append(classification_figures(fitted.predicted, truth["test"], classes)["accuracy"])
        found["linear_pool"].append(fitted.pool)
        k, accuracy = _best_knn(train, truth["train"][rows], features, truth)
        found["knn"].append(accuracy)
        found["k"].append(k)
    return found


def _best_knn(train: Any, labels: Any, features: Any, truth: Any) -> tuple[int, float]:
    def accuracy(pool: probe.Pool, k: int, split: str) -> float:
        predicted = probe.knn(train[pool], torch.from_numpy(labels), features[split][pool], k=k).numpy()
        return float((predicted == truth[split]).mean())

    choices: list[tuple[probe.Pool, int]] = [(pool, k) for pool in train for k in NEIGHBOURS]
    pool, k = max(choices, key=lambda choice: accuracy(*choice, "validation"))
    return k, accuracy(pool, k, "test")
