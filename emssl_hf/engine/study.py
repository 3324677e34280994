"""The comparison of pretraining methods with training from scratch: which runs it takes, in which order, how read."""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils import logging

from emssl_hf.data.curation import overlap
from emssl_hf.engine.config import (
    FinetuneConfig,
    PretrainConfig,
    StudyConfig,
    merge,
    parse,
    shared_settings,
    short_name,
)
from emssl_hf.engine.finetune import finetune
from emssl_hf.engine.frozen import FrozenProbe, probe_backbone
from emssl_hf.engine.pretrain import pretrain
from emssl_hf.engine.report import write_report
from emssl_hf.engine.run_folder import RunFolder, read_metrics, read_summary
from emssl_hf.engine.sources import Source, input_size, open_source, training_resolution
from emssl_hf.errors import EmsslError
from emssl_hf.machine import cores
from emssl_hf.models.backbone import load_backbone, publish_backbone

Settings = PretrainConfig | FinetuneConfig | FrozenProbe


@dataclass(frozen=True)
class Stage:
    """One run of the study; its settings may depend on the stages that it needs, so they are asked for late."""

    name: str
    make: Callable[[], Settings]
    epochs: int
    needs: tuple[str, ...] = ()


def study(config: StudyConfig) -> Path:
    """Run the comparison, or what is left of it, and write report.md and report.json; returns the study's folder.

    Raises EmsslError where a stage fails, naming the stage; finished stages are kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EmsslError("A study starts its own processes: run it without a launcher, as `emssl study ...`.")
    logging.disable_progress_bar()  # the study has its own
    config = with_split(config)
    folder = RunFolder(config, "study")
    folder.prepare()
    if folder.finished:
        print(f"{folder.path} is finished; nothing to do (--overwrite true starts anew)")
        return folder.path
    source = open_source(config.data, Accelerator(cpu=not torch.cuda.is_available()))
    facts = prepare_data(source, config)
    print(f"study in {folder.path}: {facts['images']:,} images for pretraining, {facts['overlap']} shared with test")
    pretraining, sweep = pretraining_stages(config), sweep_stages(config)
    stages = [*pretraining, *sweep, *finetuning_stages(config), *probe_stages(config)]
    run_stages(stages, config.jobs or default_jobs())
    recipe = best_scratch(config)
    for method in ["scratch", *config.methods]:
        collect_products(config, method)
    write_report(config, facts, recipe)
    folder.finish({"job": "study"})
    print((folder.path / "report.md").read_text().split("\n## ")[0])
    print(f"report: {folder.path / 'report.md'}")
    return folder.path


def with_split(config: StudyConfig) -> StudyConfig:
    """`pretrain.split` is short for `data.split`, which says what pretraining sees.

    Raises EmsslError where any run would have other data than the study.
    """
    pretrain = dict(config.pretrain)
    split = pretrain.pop("split", config.data.split)
    if any("data" in settings for settings in (pretrain, config.finetune, *config.scratch, *config.methods.values())):
        raise EmsslError("All runs of a study have the same data: set it once, as --data.path, --data.split and so on.")
    if not config.methods or not config.seeds or not config.scratch:
        raise EmsslError("A study needs at least one entry in methods, in seeds and in scratch.")
    data = dataclasses.replace(config.data, split=split)
    return dataclasses.replace(config, data=data, pretrain=pretrain, seeds=list(dict.fromkeys(config.seeds)))


def default_jobs() -> int:
    """Small runs use cores better side by side than one after another; a GPU takes one run at a time."""
    return 1 if torch.cuda.is_available() else min(cores(), 8)


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
    """One pretraining per method."""
    stages = []
    for method, own in config.methods.items():
        fixed = {"method": method, "output_dir": str(config.output_dir / short_name(method))}
        settings = parse(PretrainConfig, merge(shared_settings(config), config.pretrain, own, fixed))
        stages.append(Stage(method, partial(_same, settings), settings.train.epochs))
    return stages


def sweep_stages(config: StudyConfig) -> list[Stage]:
    """Scratch's candidates, each with the first seed; none where there is nothing to choose."""
    if len(config.scratch) == 1:
        return []
    stages = []
    for number, candidate in enumerate(config.scratch):
        settings = _finetuning(config, f"sweep/{number}", config.seeds[0], merge(candidate, {"test": False}))
        stages.append(Stage(f"scratch, candidate {number}", partial(_same, settings), settings.train.epochs))
    return stages


def best_scratch(config: StudyConfig) -> dict[str, Any]:
    """The candidate with the highest validation accuracy: its number and settings, and what all of them reached."""
    runs = [config.output_dir / "sweep" / str(number) for number in range(len(config.scratch))]
    reached = [read_summary(run)["validation_accuracy"] for run in runs] if len(runs) > 1 else []
    chosen = int(np.argmax(reached)) if reached else 0
    return {"settings": config.scratch[chosen], "chosen": chosen, "validation_accuracy": reached}


def finetuning_stages(config: StudyConfig) -> list[Stage]:
    """Every method and scratch with every seed, and scratch's long run."""
    sweep = tuple(stage.name for stage in sweep_stages(config))
    epochs = _finetuning(config, "finetune/any", 0, {}).train.epochs
    stages = []
    if config.scratch_long:
        stages.append(
            Stage("scratch, long", partial(_scratch, config, config.seeds[0], True), config.scratch_long, sweep)
        )
    for seed in config.seeds:
        stages.append(Stage(f"scratch, seed {seed}", partial(_scratch, config, seed, False), epochs, sweep))
        for method in config.methods:
            own = {"model": {"init": str(config.output_dir / short_name(method) / "pretraining")}}
            settings = _finetuning(config, f"finetune/{short_name(method)}-{seed}", seed, own)
            stages.append(Stage(f"{method}, seed {seed}", partial(_same, settings), epochs, (method,)))
    return stages


def probe_stages(config: StudyConfig) -> list[Stage]:
    """Linear probe and kNN on every frozen backbone, and on random weights."""
    stages = [Stage("random weights, probes", partial(_same, FrozenProbe(config, "random")), 0)]
    for method in config.methods:
        stages.append(Stage(f"{method}, probes", partial(_same, FrozenProbe(config, method)), 0, (method,)))
    return stages


def _same(settings: Settings) -> Settings:
    return settings


def _scratch(config: StudyConfig, seed: int, long: bool) -> FinetuneConfig:
    """Training from scratch with the recipe that the sweep chose."""
    own = best_scratch(config)["settings"]
    if not long:
        return _finetuning(config, f"finetune/scratch-{seed}", seed, own)
    longer = {"train": {"epochs": config.scratch_long, "eval_every": max(1, config.scratch_long // 20)}}
    return _finetuning(config, "finetune/scratch-long", seed, merge(own, longer))


def _finetuning(config: StudyConfig, place: str, seed: int, own: dict[str, Any]) -> FinetuneConfig:
    fixed = {
        "seed": seed,
        "output_dir": str(config.output_dir / place),
        "labels_per_class": config.labels_per_class,
    }
    return parse(FinetuneConfig, merge(shared_settings(config), config.finetune, own, fixed))


def run_stages(stages: list[Stage], workers: int) -> None:
    """Run the stages in `workers` processes, the first that is ready first; a progress bar counts their epochs."""
    waiting, done = list(stages), set[str]()
    running: dict[Future[Path], tuple[Stage, Path]] = {}
    threads = max(1, cores() // workers)
    # Linear algebra libraries read this when they load; more threads than cores would wait for each other.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=sum(stage.epochs for stage in stages), unit="epoch", smoothing=0.05, disable=None)
    with bar, ProcessPoolExecutor(workers, mp_context=context) as pool:
        while waiting or running:
            for stage in [stage for stage in waiting if done.issuperset(stage.needs)][: workers - len(running)]:
                waiting.remove(stage)
                settings = stage.make()
                running[pool.submit(run_stage, settings, threads)] = stage, settings.output_dir
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                stage, folder = running.pop(future)
                _check(future, stage, folder, pool)
                done.add(stage.name)
                tqdm.write(f"  {stage.name}: {closing_line(folder)}")
            finished = sum(stage.epochs for stage in stages if stage.name in done)
            bar.n = finished + sum(epochs_done(folder) for _, folder in running.values())
            bar.refresh()


def _check(future: "Future[Path]", stage: Stage, folder: Path, pool: ProcessPoolExecutor) -> None:
    error = future.exception()
    if error is None:
        return
    pool.shutdown(wait=False, cancel_futures=True)
    raise EmsslError(
        f"The stage '{stage.name}' failed: {error} Its log is {log_file(folder)}; the same command goes on from what "
        "is finished."
    ) from error


def run_stage(settings: Settings, threads: int) -> Path:
    """One stage in a process of its own; what it says goes to its log."""
    torch.set_num_threads(threads)
    os.environ["EMSSL_QUIET"] = "1"
    file = log_file(settings.output_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            match settings:
                case PretrainConfig():
                    return pretrain(settings)
                case FinetuneConfig():
                    return finetune(settings)
                case FrozenProbe():
                    return probe_backbone(settings)
        except Exception:
            traceback.print_exc()  # into the log; the message alone goes up
            raise


def log_file(run: Path) -> Path:
    """Where a stage's words go: beside its run folder, which is not there yet when it starts."""
    return run.with_name(f"{run.name}.log")


def epochs_done(run: Path) -> int:
    """Epochs that the run's metrics speak of."""
    metrics = read_metrics(run)
    return int(metrics[-1]["epoch"]) if metrics else 0


def closing_line(run: Path) -> str:
    """What a finished stage came to, in a few words."""
    summary = read_summary(run)
    if summary["job"] == "pretrain":
        return f"pretrained in {summary['seconds']:.0f} s, loss {summary['loss']:.4f}"
    if summary["job"] == "probe":
        return f"linear probe {100 * np.mean(summary['linear']):.1f} %, kNN {100 * np.mean(summary['knn']):.1f} %"
    return f"validation accuracy {100 * summary['validation_accuracy']:.1f} % in {summary['seconds']:.0f} s"


def collect_products(config: StudyConfig, method: str) -> None:
    """`<study>/<method>/` gets the classifier that is best on validation; scratch gets its backbone too."""
    runs = [config.output_dir / "finetune" / f"{short_name(method)}-{seed}" for seed in config.seeds]
    best = max(runs, key=lambda run: read_summary(run)["validation_accuracy"])
    home = config.output_dir / short_name(method)
    shutil.copytree(best / "classifier", home / "classifier", dirs_exist_ok=True)
    if method == "scratch":
        publish_backbone(load_backbone(best / "classifier")[0]).save_pretrained(home / "backbone")
        shutil.copy(best / "classifier" / "preprocessor_config.json", home / "backbone")
