"""What a study's frozen backbones know: linear probe and kNN, beside random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from emssl_hf.data.curation import few_labels
from emssl_hf.data.store import Store
from emssl_hf.engine import probe
from emssl_hf.engine.config import FinetuneConfig, StudyConfig, merge, parse, shared_settings, short_name
from emssl_hf.engine.finetune import labelled, scratch_backbone
from emssl_hf.engine.run_folder import DONE, read_summary, write_summary
from emssl_hf.engine.sources import input_size, open_source
from emssl_hf.models.backbone import load_backbone

#: Neighbours that kNN may use; the number is chosen on validation.
NEIGHBOURS = (1, 3, 5, 10, 20)

Features = Mapping[str, dict[probe.Pool, Tensor]]
Labels = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class FrozenProbe:
    """The probes of one backbone of a study: of a method's, or of untrained ones where `method` is `random`."""

    study: StudyConfig
    method: str

    @property
    def output_dir(self) -> Path:
        """Where the figures go."""
        return self.study.output_dir / "probes" / short_name(self.method)


def probe_backbone(job: FrozenProbe) -> Path:
    """Score frozen features on the test split; the figures go to finished.json, which is left alone where it exists.

    `linear_all` is the linear probe on all training labels; `linear` and `knn` have each seed's few labels. Untrained
    weights are drawn anew with every seed.
    """
    if (job.output_dir / DONE).exists():
        return job.output_dir
    config = job.study
    source = open_source(config.data, Accelerator(cpu=not torch.cuda.is_available()))
    splits = source.labelled_splits()
    stores = {split: labelled(source.store(splits[split], input_size(config.model))) for split in splits}
    figures: list[dict[str, Any]] = []
    for number, seed in enumerate(config.seeds):
        if number == 0 or job.method == "random":
            features = _features(job, stores, seed)
            everything = _linear(features, {split: store.labels for split, store in stores.items()})[0]
        figures.append({**_few_labels(features, stores, config, seed), "linear_all": everything})
    by_name = {name: [one[name] for one in figures] for name in figures[0]}
    job.output_dir.mkdir(parents=True, exist_ok=True)
    write_summary(job.output_dir, {"job": "probe", **by_name})
    return job.output_dir


def _features(job: FrozenProbe, stores: dict[str, Store], seed: int) -> Features:
    """Features of every split, normalised as the backbone was trained."""
    mean, std = stores["train"].mean, stores["train"].std
    if job.method == "random":
        settings = parse(FinetuneConfig, merge(shared_settings(job.study), job.study.finetune))
        torch.manual_seed(seed)
        backbone = scratch_backbone(settings.model)
    else:
        run = job.study.output_dir / short_name(job.method)
        backbone, _ = load_backbone(run / "pretraining", image_size=input_size(job.study.model))
        summary = read_summary(run)
        mean, std = summary["mean"], summary["std"]
    backbone = backbone.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return {split: probe.extract(backbone, store, mean=mean, std=std) for split, store in stores.items()}


def _few_labels(features: Features, stores: dict[str, Store], config: StudyConfig, seed: int) -> dict[str, Any]:
    """Linear probe and kNN with the labels that fine-tuning has with this seed."""
    train, labels = stores["train"], {split: store.labels for split, store in stores.items()}
    rows = np.arange(len(train))
    if config.labels_per_class is not None:
        rows = few_labels(train.labels, config.labels_per_class, seed, groups=list(train.groups))
    drawn = {**features, "train": {pool: values[rows] for pool, values in features["train"].items()}}
    truth = {**labels, "train": labels["train"][rows]}
    linear, pool = _linear(drawn, truth)
    accuracy, k = _knn(drawn, truth)
    return {"linear": linear, "linear_pool": pool, "knn": accuracy, "k": k}


def _linear(features: Features, labels: Labels) -> tuple[float, probe.Pool]:
    fitted = probe.linear_probe(
        features["train"], labels["train"], features["validation"], labels["validation"], features["test"]
    )
    return float((fitted.predicted == labels["test"]).mean()), fitted.pool


def _knn(features: Features, labels: Labels) -> tuple[float, int]:
    """kNN on the test split; the features and the number of neighbours are chosen on validation."""
    bank_labels = torch.from_numpy(labels["train"])

    def accuracy(pool: probe.Pool, k: int, split: str) -> float:
        predicted = probe.knn(features["train"][pool], bank_labels, features[split][pool], k=k).numpy()
        return float((predicted == labels[split]).mean())

    choices: list[tuple[probe.Pool, int]] = [(pool, k) for pool in features["train"] for k in NEIGHBOURS]
    pool, k = max(choices, key=lambda choice: accuracy(choice[0], choice[1], "validation"))
    return accuracy(pool, k, "test"), k
