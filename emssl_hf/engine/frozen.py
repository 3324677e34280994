"""What a study's frozen backbones know: linear probe and kNN, beside random weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ViTModel

from emssl_hf.data.curation import few_labels
from emssl_hf.data.store import Store
from emssl_hf.engine import probe
from emssl_hf.engine.config import FinetuneConfig, StudyConfig, merge, parse, shared_settings
from emssl_hf.engine.finetune import scratch_backbone
from emssl_hf.engine.run_folder import read_summary
from emssl_hf.engine.sources import Source, input_size
from emssl_hf.models.backbone import load_backbone

#: Neighbours that kNN may use; the number is chosen on validation.
NEIGHBOURS = (1, 3, 5, 10, 20)

Features = Mapping[str, dict[probe.Pool, Tensor]]
Labels = Mapping[str, NDArray[np.int64]]


def probe_backbones(source: Source, config: StudyConfig) -> dict[str, dict[str, list[Any]]]:
    """Test accuracies by method, and by `random`: untrained weights, drawn anew with every seed.

    `linear_all` is the linear probe on all training labels; `linear` and `knn` have each seed's few labels.
    """
    splits = source.labelled_splits()
    stores = {split: source.store(splits[split], input_size(config.model)) for split in splits}
    labels = {split: store.labels for split, store in stores.items()}
    results: dict[str, dict[str, list[Any]]] = {}
    for method in config.methods:
        backbone, _ = load_backbone(config.output_dir / method / "pretraining", image_size=input_size(config.model))
        summary = read_summary(config.output_dir / method)
        features = _features(backbone, stores, summary["mean"], summary["std"])
        few = [_few_labels(features, labels, stores["train"], config, seed) for seed in config.seeds]
        results[method] = {**_by_name(few), "linear_all": [_linear(features, labels)[0]]}
    figures = []
    for seed in config.seeds:
        backbone = _random(config, seed)
        features = _features(backbone, stores, stores["train"].mean, stores["train"].std)
        few_and_all = _few_labels(features, labels, stores["train"], config, seed)
        figures.append({**few_and_all, "linear_all": _linear(features, labels)[0]})
    results["random"] = _by_name(figures)
    return results


def _by_name(figures: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [one[name] for one in figures] for name in figures[0]}


def _features(backbone: ViTModel, stores: dict[str, Store], mean: float, std: float) -> Features:
    backbone = backbone.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return {split: probe.extract(backbone, store, mean=mean, std=std) for split, store in stores.items()}


def _random(config: StudyConfig, seed: int) -> ViTModel:
    settings = parse(FinetuneConfig, merge(shared_settings(config), config.finetune, {"seed": seed}))
    torch.manual_seed(seed)
    return scratch_backbone(settings.model)


def _few_labels(features: Features, labels: Labels, train: Store, config: StudyConfig, seed: int) -> dict[str, Any]:
    """Linear probe and kNN with the labels that fine-tuning has with this seed."""
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
