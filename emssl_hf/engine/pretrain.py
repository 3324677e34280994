"""Pretraining without labels: any method of emssl_hf.models, over any micrographs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from emssl_hf.augment import Augmenter, Geometry
from emssl_hf.data.store import Batch, Store, batches, epoch_order
from emssl_hf.engine import probe
from emssl_hf.engine.config import AugmentConfig, PretrainConfig
from emssl_hf.engine.loop import fit_batch, make_accelerator, on_main, train
from emssl_hf.engine.pictures import reconstruction_sheet
from emssl_hf.engine.run_folder import RunFolder
from emssl_hf.engine.sources import Source, input_size, open_source, share_of, training_resolution, write_skipped
from emssl_hf.errors import EmsslError
from emssl_hf.models import MicrographImageProcessor, Objective, View, load_objective
from emssl_hf.models.backbone import SIZES, load_backbone, publish_backbone
from emssl_hf.models.image_processing import stock_processor
from emssl_hf.randomness import sample_keys, uniform

#: Images that the online probe looks at, at most, on either side.
PROBE_IMAGES = 2000


class Pretraining:
    """The job that `loop.train` runs: batches, views, the objective's loss, and online probes."""

    def __init__(self, config: PretrainConfig, model: Objective, source: Source, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        images = source.pretraining_images()
        self.store = source.store(images, training_resolution(config.data, config.model))
        self.probes = _probe_stores(source, config, images)
        self.samples, self.data_key = len(self.store), self.store.path.name
        self.config = fit_batch(config, self.samples, accelerator)
        self.depth: int = model.config.num_hidden_layers
        self.state: dict[str, Any] = {}
        self.mean, self.std = self.store.mean, self.store.std
        self.augment = Augmenter(
            views_of(model, config.augment), self.mean, self.std, geometry=geometry_of(config.augment)
        )
        self.draws = model.draws(model.config)

    def batches(self, epoch: int, rank: int, world: int) -> Iterator[Batch]:
        size, seed = self.config.train.batch_size, self.config.seed
        return batches(self.store, batch_size=size, seed=seed, epoch=epoch, rank=rank, world=world)

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        keys = sample_keys(self.config.seed, epoch, batch.indices)
        pixels = self.augment(batch.images, batch.extents, keys)
        draws = {name: uniform(keys, count, name) for name, count in self.draws.items()}
        output = model(pixels, **draws, **self.model.training_arguments)
        figures = {name: value for name, value in output.items() if name != "loss" and _is_figure(value)}
        return output.loss, figures

    def after_step(self, progress: float) -> None:
        self.model.after_step(progress)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Collapse alarms of the features, and kNN accuracy where the data set has labels."""
        features = {name: self._features(store) for name, store in self.probes.items()}
        bank = features["train"]
        figures = {
            "feature_std": probe.feature_std(bank["cls"]),
            "effective_rank": probe.effective_rank(bank["mean"]),
        }
        if "validation" in features:
            labels, truth = (torch.from_numpy(self.probes[name].labels) for name in ("train", "validation"))
            known, asked = labels >= 0, truth >= 0  # a labels file need not name every image
            for pool in ("cls", "mean"):
                predicted = probe.knn(bank[pool][known], labels[known], features["validation"][pool][asked])
                figures[f"knn_{pool}"] = float((predicted == truth[asked]).float().mean())
        return figures

    def _features(self, store: Store) -> dict[probe.Pool, Tensor]:
        """Features of the whole store on every process, each having computed its share."""
        rows = share_of(len(store), self.accelerator)
        mine = probe.extract(self.model.backbone, store, mean=self.mean, std=self.std, rows=rows)
        if self.accelerator.num_processes == 1:
            return mine
        parts = gather_object([mine])
        return {pool: torch.cat([part[pool] for part in parts]) for pool in mine}


def pretrain(config: PretrainConfig) -> Path:
    """Pretrain as the settings say; returns the run folder with `pretraining/`, `backbone/` and the metrics.

    Raises EmsslError, in one sentence, for settings or data that cannot work.
    """
    accelerator = make_accelerator(config.train, config.output_dir)
    folder = RunFolder(config, "pretrain")
    on_main(accelerator, folder.prepare)
    if on_main(accelerator, lambda: folder.finished):
        accelerator.print(f"{folder.path} is finished; nothing to do (--overwrite true starts anew)")
        return folder.path
    model = build_objective(config, accelerator)
    source = open_source(config.data, accelerator)
    job = Pretraining(config, model, source, accelerator)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        job.model = nn.SyncBatchNorm.convert_sync_batchnorm(job.model)
    if config.train.gradient_checkpointing:
        job.model.gradient_checkpointing_enable()
    if config.train.compile:
        job.model.compile()
    if config.train.tracker:
        accelerator.init_trackers("emssl_hf")
    figures = train(job, accelerator, folder)
    on_main(accelerator, lambda: save_products(job, folder, figures))
    on_main(accelerator, lambda: write_skipped(folder.path, source, [job.store]))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder.path


def build_objective(config: PretrainConfig, accelerator: Accelerator) -> Objective:
    """The method's model with fresh weights from the seed, or continued from `model.init`."""
    try:
        objective = load_objective(config.method)
        settings = {
            **SIZES[config.model.size],
            "image_size": config.model.image_size,
            "patch_size": config.model.patch_size,
            **config.model.options,
        }
        torch.manual_seed(config.seed)
        model = objective(objective.config_class(**settings))
        if config.model.init:
            _initialise(model, config.model.init, accelerator)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise EmsslError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise EmsslError(
            f"The weights of {config.model.init} belong to a model of another size: give the --model.size, patch_size "
            "and --model.options that they were made with (they stand in its config.json)."
        ) from error
    return model


def _initialise(model: Objective, source: str, accelerator: Accelerator) -> None:
    """Weights from `source`: all of them where it is this method's own checkpoint, else the backbone's."""
    own = Path(source) / "config.json"
    if own.exists() and json.loads(own.read_text()).get("model_type") == model.config.model_type:
        model.load_state_dict(type(model).from_pretrained(source).state_dict())
        accelerator.print(f"all weights from {source}")
        return
    backbone, notes = load_backbone(source, channels=model.config.num_channels, image_size=model.config.image_size)
    model.backbone.load_state_dict(backbone.state_dict())
    model.backbone_replaced()
    new = sorted({name.split(".")[0] for name, _ in model.named_parameters()} - {"backbone"})
    accelerator.print(f"backbone from {source} ({'; '.join(notes) or 'unchanged'}); new: {', '.join(new) or 'nothing'}")


def views_of(model: Objective, config: AugmentConfig) -> tuple[View, ...]:
    """The method's views with the amounts that the recipe overrides."""
    names = ("scale", "brightness", "contrast", "blur_probability", "solarize_probability")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return tuple(dataclasses.replace(view, **changes) for view in model.views(model.config))


def geometry_of(config: AugmentConfig) -> Geometry:
    """The symmetries and the interpolation that the recipe asks for."""
    return Geometry(config.rotate, config.flip, config.interpolation)


def save_products(job: Pretraining, folder: RunFolder, figures: dict[str, float]) -> None:
    """What the run leaves behind: pretraining/, backbone/, a sheet of reconstructions, the closing figures."""
    model, size = job.model.cpu().eval(), input_size(job.config.model)
    model.save_pretrained(folder.path / "pretraining")
    processor = MicrographImageProcessor(
        size={"height": size[0], "width": size[1]}, image_mean=[job.mean], image_std=[job.std]
    )
    processor.save_pretrained(folder.path / "pretraining")
    publish_backbone(model.backbone).save_pretrained(folder.path / "backbone")
    stock_processor(size, job.mean, job.std).save_pretrained(folder.path / "backbone")
    if hasattr(model, "reconstruct"):
        reconstruction_sheet(model, job.probes["train"], job.mean, job.std, folder.path / "reconstructions.png")
    folder.finish(
        {
            "job": "pretrain",
            "method": model.title,
            "images": job.samples,
            "batch_size": job.config.train.batch_size,
            "data": job.data_key,
            "split": job.config.data.split,
            "mean": job.mean,
            "std": job.std,
            **figures,
        }
    )


def _probe_stores(source: Source, config: PretrainConfig, images: Any) -> dict[str, Store]:
    """Images at the model's input size: of the training set, and of a labelled validation split where there is one."""
    size = input_size(config.model)
    stores = {"train": source.store(_some(images), size)}
    splits = source.labelled_splits() if config.data.split == "train" else source.opened.splits
    if source.has_labels and "validation" in splits and "label" in images.features:
        stores["validation"] = source.store(_some(splits["validation"]), size)
    return stores


def _some(images: Any) -> Any:
    """A fixed random choice of at most PROBE_IMAGES images; the files of a set often come class by class."""
    chosen = epoch_order(len(images), 0, 0)[:PROBE_IMAGES]
    return images.select(sorted(chosen.tolist()))


def _is_figure(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0
