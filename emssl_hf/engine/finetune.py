"""Supervised training of a classifier: from pretrained weights, or from scratch as the baseline."""

import csv
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from emssl_hf.augment import Augmenter, erase, mix, to_unit
from emssl_hf.data.curation import few_labels
from emssl_hf.data.store import Batch, Store, batches
from emssl_hf.engine.config import FinetuneConfig, ModelConfig
from emssl_hf.engine.loop import fit_batch, make_accelerator, on_main, train
from emssl_hf.engine.metrics import classification_figures
from emssl_hf.engine.pretrain import geometry_of
from emssl_hf.engine.run_folder import RunFolder
from emssl_hf.engine.sources import Source, input_size, open_source, share_of, training_resolution, write_skipped
from emssl_hf.errors import EmsslError
from emssl_hf.models import View
from emssl_hf.models.backbone import SIZES, build_backbone, load_backbone, to_channels
from emssl_hf.models.drop_path import add_drop_path
from emssl_hf.models.image_processing import stock_processor
from emssl_hf.randomness import sample_keys, step_seed

BEST = "best.safetensors"


class Finetuning:
    """The job that `loop.train` runs: labelled batches, augmentation, cross-entropy, validation."""

    def __init__(
        self,
        config: FinetuneConfig,
        model: ViTForImageClassification,
        stores: dict[str, Store],
        folder: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.stores, self.folder, self.accelerator = model, stores, folder, accelerator
        self.store = stores["train"]
        self.samples, self.data_key = len(self.store), _data_key(self.store)
        self.config = fit_batch(config, self.samples, accelerator)
        self.depth: int = model.config.num_hidden_layers
        self.state: dict[str, Any] = {"best": -1.0, "best_epoch": 0}
        self.mean, self.std = self.store.mean, self.store.std
        self.classes = len(self.store.label_names or [])
        self.augment = Augmenter([self._view()], self.mean, self.std, geometry=geometry_of(config.augment))

    def _view(self) -> View:
        config = self.config.augment
        return View(
            size=input_size(self.config.model),
            scale=config.scale or (0.2, 1.0),
            brightness=config.brightness or 0.0,
            contrast=config.contrast or 0.0,
            blur_probability=config.blur_probability or 0.0,
            solarize_probability=config.solarize_probability or 0.0,
        )

    def batches(self, epoch: int, rank: int, world: int) -> Iterator[Batch]:
        size, seed = self.config.train.batch_size, self.config.seed
        return batches(self.store, batch_size=size, seed=seed, epoch=epoch, rank=rank, world=world)

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        config, keys = self.config.augment, sample_keys(self.config.seed, epoch, batch.indices)
        pixels = self.augment(batch.images, batch.extents, keys)
        if config.erasing:
            pixels = erase(pixels, keys, config.erasing)
        smoothing = self.config.train.label_smoothing
        targets = F.one_hot(batch.labels, self.classes).float() * (1 - smoothing) + smoothing / self.classes
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, epoch, int(batch.indices[0])))
        pixels, targets = mix(pixels, targets, mixup=config.mixup, cutmix=config.cutmix, generator=generator)
        logits = model(pixels).logits
        return F.cross_entropy(logits.float(), targets), {}

    def after_step(self, progress: float) -> None:
        """Nothing to do between steps."""

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Accuracy and macro-F1 on the validation split; the best model so far is kept."""
        figures = classification_figures(
            self.predict("validation").argmax(1), self.stores["validation"].labels, self.classes
        )
        if figures["accuracy"] > self.state["best"]:
            self.state.update(best=figures["accuracy"], best_epoch=epoch + 1)
            if self.accelerator.is_main_process:
                temporary = self.folder.path / f".{BEST}.tmp"
                save_file(self.model.state_dict(), temporary)
                temporary.replace(self.folder.path / BEST)
        return {f"validation_{name}": figures[name] for name in ("accuracy", "macro_f1")}

    def predict(self, split: str) -> NDArray[np.float32]:
        """Class probabilities (N, K) of a split, each process computing its share."""
        store, accelerator = self.stores[split], self.accelerator
        mine = classify(self.model, store, self.mean, self.std, rows=share_of(len(store), accelerator))
        return np.concatenate(gather_object([mine])) if accelerator.num_processes > 1 else mine


@torch.no_grad()
def classify(
    model: ViTForImageClassification,
    store: Store,
    mean: float,
    std: float,
    *,
    rows: range,
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """Class probabilities of stored images that have the model's input size."""
    found = [np.zeros((0, len(store.label_names or [])), np.float32)]
    for start in range(rows.start, rows.stop, batch_size):
        images, _ = store.gather(np.arange(start, min(start + batch_size, rows.stop)))
        pixels = (to_unit(images.to(model.device)) - mean) / std
        logits = model(pixels.expand(-1, model.config.num_channels, -1, -1)).logits
        found.append(logits.float().softmax(1).cpu().numpy())
    return np.concatenate(found)


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune as the settings say; returns the run folder with `classifier/` and the test figures.

    The test split is touched once, at the end, by the selected model. Raises EmsslError in one sentence.
    """
    accelerator = make_accelerator(config.train, config.output_dir)
    folder = RunFolder(config, "finetune")
    on_main(accelerator, folder.prepare)
    if on_main(accelerator, lambda: folder.finished):
        accelerator.print(f"{folder.path} is finished; nothing to do (--overwrite true starts anew)")
        return folder.path
    if config.select == "best" and not config.train.eval_every:
        raise EmsslError("Without --train.eval_every there is no best model on validation: give --select last.")
    source = open_source(config.data, accelerator)
    stores = labelled_stores(source, config)
    model = build_classifier(config, stores["train"].label_names or [], accelerator)
    job = Finetuning(config, model, stores, folder, accelerator)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile()
    if config.train.tracker:
        accelerator.init_trackers("emssl_hf")
    figures = train(job, accelerator, folder)
    on_main(accelerator, lambda: write_skipped(folder.path, source, list(stores.values())))
    close(job, accelerator, figures)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder.path


def labelled_stores(source: Source, config: FinetuneConfig) -> dict[str, Store]:
    """train (the drawn labels, with room for crops), validation and test (at the model's input size)."""
    splits = source.labelled_splits()
    size = input_size(config.model)
    train_store = labelled(source.store(splits["train"], training_resolution(config.data, config.model)))
    if config.labels_per_class is not None:
        drawn = few_labels(train_store.labels, config.labels_per_class, config.seed, groups=list(train_store.groups))
        train_store = train_store.subset(drawn)
    stores = {"train": train_store}
    for split in ("validation", "test"):
        stores[split] = labelled(source.store(splits[split], size))
    return stores


def _data_key(store: Store) -> str:
    """Which images these are, and what their labels are."""
    return f"{store.path.name}-{zlib.crc32(store.rows.tobytes() + store.labels.tobytes()):08x}"


def labelled(store: Store) -> Store:
    """The images that have a label: a labels file need not name all of them."""
    return store if (store.labels >= 0).all() else store.subset(np.flatnonzero(store.labels >= 0))


def build_classifier(
    config: FinetuneConfig, label_names: list[str], accelerator: Accelerator
) -> ViTForImageClassification:
    """A stock classifier on one grey channel, from `model.init` or from the seed, with drop path."""
    try:
        torch.manual_seed(config.seed)
        backbone = _backbone(config, accelerator)
        names = dict(enumerate(label_names))
        settings = {
            **backbone.config.to_dict(),
            "id2label": names,
            "label2id": {n: i for i, n in names.items()},
        }
        model = ViTForImageClassification(ViTConfig(**settings))
        model.vit.load_state_dict(backbone.state_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise EmsslError(" ".join(str(error).split())) from error
    head = cast(nn.Linear, model.classifier)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    add_drop_path(model, config.train.drop_path)
    return model


def _backbone(config: FinetuneConfig, accelerator: Accelerator) -> ViTModel:
    if not config.model.init:
        return scratch_backbone(config.model)
    backbone, notes = load_backbone(config.model.init, channels=1, image_size=input_size(config.model))
    accelerator.print(f"backbone from {config.model.init} ({'; '.join(notes) or 'unchanged'}); new: classifier")
    return backbone


def scratch_backbone(config: ModelConfig) -> ViTModel:
    """A ViT with fresh weights from torch's generator, initialised as for pretraining.

    Raises ValueError for an option that ViTConfig does not know.
    """
    size, options = input_size(config), dict(config.options)
    temperature = options.pop("position_temperature", 10000.0)
    settings = {
        **SIZES[config.size],
        "image_size": size if size[0] != size[1] else size[0],
        "patch_size": config.patch_size,
        "encoder_stride": config.patch_size,
        "num_channels": 1,
        "layer_norm_eps": 1e-6,
    }
    unknown = sorted(set(options) - set(ViTConfig().to_dict()))
    if unknown:
        raise ValueError(f"A vision transformer has no setting '{unknown[0]}' (model.options).")
    return build_backbone(ViTConfig(**{**settings, **options}), temperature=temperature)


def close(job: Finetuning, accelerator: Accelerator, figures: dict[str, float]) -> None:
    """Score the selected model on the test split, once and only if asked to, and write what the run leaves behind."""
    folder = job.folder.path
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(job, folder / "classifier_last")
    if job.config.select == "best" and (folder / BEST).exists():
        job.model.load_state_dict(load_file(folder / BEST))
    job.model.eval()
    test = job.stores["test"]
    scores = job.predict("test") if job.config.test else None
    result = None if scores is None else classification_figures(scores.argmax(1), test.labels, job.classes)
    if accelerator.is_main_process:
        _publish(job, folder / "classifier")
        if scores is not None:
            _write_predictions(folder / "predictions.csv", test, scores)
        summary = {
            "job": "finetune",
            "images": job.samples,
            "batch_size": job.config.train.batch_size,
            "classes": test.label_names,
            "mean": job.mean,
            "std": job.std,
            "validation_accuracy": job.state["best"] if job.state["best_epoch"] else None,
            "best_epoch": job.state["best_epoch"],
            **figures,
            "test": result,
        }
        job.folder.finish(summary)
        (folder / BEST).unlink(missing_ok=True)
    if result is not None:
        accelerator.print(
            f"test accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}, {len(test)} images"
        )


def _publish(job: Finetuning, folder: Path) -> None:
    to_channels(job.model.cpu(), 3).save_pretrained(folder)
    stock_processor(input_size(job.config.model), job.mean, job.std).save_pretrained(folder)
    job.model.to(job.accelerator.device)


def _write_predictions(file: Path, store: Store, scores: NDArray[np.float32]) -> None:
    names = store.label_names or []
    lines = [["id", "group", "label", "predicted", *(f"score_{name}" for name in names)]]
    for row, score in enumerate(scores):
        values = [f"{value:.6f}" for value in score]
        truth, predicted = names[store.labels[row]], names[int(score.argmax())]
        lines.append([str(store.ids[row]), str(store.groups[row]), truth, predicted, *values])
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(lines)
