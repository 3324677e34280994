"""What a run is: frozen dataclasses that a recipe (YAML) and the command line fill.

Fields marked `_free` say where and how a run works, not what comes out of it: they may change when a run is resumed.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from emssl_hf.errors import EmsslError

T = TypeVar("T")


def _free(default: Any) -> Any:
    return field(default=default, metadata={"affects_results": False})


@dataclass(frozen=True)
class DataConfig:
    """Which micrographs, and how they become the store that training reads.

    Args:
        path: A folder of micrographs, a saved `datasets` folder, a Hub id, or `synthsem`.
        options: Options of the synthetic set (images, size, imbalance, seed); other data has none.
        labels: `auto` (class folders or labels.csv), `none`, or the path of a CSV with the columns path and label.
        split: Which images pretraining sees: `given` is the set's own train split, or every image where it has none;
            `train` makes a split first where none is given; `all` includes validation and test (transductive).
        split_seed: Seed of splits that the set does not bring along.
        min_per_class: Classes with fewer images are left out when splits are made.
        databar: `crop` cuts the data bar and what lies below it, `keep` leaves it in.
        dtype: Depth of the store; deeper micrographs are stretched once per image (0.1-99.9 percentile).
        resolution: Short edge of the stored images in pixels; by default 8/7 of the model's image size.
        store: Folder for the stores, for instance on node-local scratch; by default the user's cache.
        workers: Threads that decode; by default one per core.
    """

    path: str = _free("synthsem")
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = "auto"
    split: Literal["given", "train", "all"] = "given"
    split_seed: int = 0
    min_per_class: int = 1
    databar: Literal["crop", "keep"] = "crop"
    dtype: Literal["uint8", "uint16"] = "uint8"
    resolution: int | None = None
    store: Path | None = _free(None)
    workers: int | None = _free(None)


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer.

    Args:
        size: tiny, small, base or large (192, 384, 768, 1024 wide).
        image_size: Pixels of the square input, or [height, width].
        patch_size: Pixels of a square patch.
        init: Start from these weights: a `pretraining/` or `backbone/` folder, any stock ViT here or on the Hub. A
            classifier then takes its width, depth and patches from there.
        options: Any other field of the method's configuration, such as mask_ratio or hidden_size.
    """

    size: Literal["tiny", "small", "base", "large"] = "small"
    image_size: int | list[int] = 224
    patch_size: int = 16
    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation on the device; `null` means the method's own amount.

    Args:
        rotate: Random quarter turns: micrographs have no up or down.
        flip: Random horizontal and vertical flips.
        scale: Share of the image that a random resized crop covers, [least, most].
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        blur_probability: Probability of Gaussian blur, the same for every view.
        solarize_probability: Probability of solarising, the same for every view.
        interpolation: bicubic as the originals, or bilinear, which is faster.
        mixup: Alpha of mixup (fine-tuning); 0 is off.
        cutmix: Alpha of CutMix (fine-tuning); 0 is off.
        erasing: Probability of random erasing (fine-tuning).
    """

    rotate: bool = True
    flip: bool = True
    scale: tuple[float, float] | None = None
    brightness: float | None = None
    contrast: float | None = None
    blur_probability: float | None = None
    solarize_probability: float | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, both per iteration.

    Args:
        base_lr: Learning rate for an effective batch of 256; the absolute rate is base_lr * batch_size / 256.
        min_lr: Absolute learning rate at the end.
        betas: Decay rates of AdamW's moments.
        weight_decay: Decoupled weight decay.
        decay_all: Decay biases and one-dimensional parameters too, as MoCo v3 does.
        warmup_epochs: Epochs of linear warm-up from 0.
        layer_decay: Factor per layer, from the head down (fine-tuning; 1 is off).
        clip_grad: Largest norm of the gradient; `null` is off.
    """

    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    decay_all: bool = False
    warmup_epochs: float = 40.0
    layer_decay: float = 1.0
    clip_grad: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision.

    Args:
        epochs: Passes over the training images.
        batch_size: Effective batch: images per optimizer step over all processes and accumulation steps.
        accumulation: Micro-steps per optimizer step; more of them need less memory.
        precision: auto takes bf16 on GPUs that have it and fp32 elsewhere.
        compile: Compile the model with torch.compile.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        label_smoothing: Share of the target spread over all classes (fine-tuning).
        drop_path: Largest rate of stochastic depth, linear in depth (fine-tuning).
        eval_every: Epochs between online kNN (pretraining) or validation (fine-tuning); 0 is off.
        save_every: Epochs between checkpoints; 0 keeps none.
        keep: Number of checkpoints that are kept.
        log_every: Optimizer steps between two lines of metrics.jsonl.
        threads: CPU threads of torch; by default torch's own choice.
        tracker: Also log to a tracker that Accelerate knows, such as tensorboard or trackio.
    """

    epochs: int = 100
    batch_size: int = 256
    accumulation: int = 1
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = _free(False)
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    eval_every: int = _free(10)
    save_every: int = _free(10)
    keep: int = _free(2)
    log_every: int = _free(10)
    threads: int | None = _free(None)
    tracker: str | None = _free(None)


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining without labels.

    Args:
        method: A method of emssl_hf.models (mae, mff, mocov3), or the path of a Python file that defines one.
        output_dir: The run folder.
        seed: Seed of weights, data order, crops and masks.
        overwrite: Delete the run that the output folder holds and start anew.
    """

    method: str = "mae"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    seed: int = 0
    output_dir: Path = _free(Path("runs/pretrain"))
    overwrite: bool = _free(False)


@dataclass(frozen=True)
class FinetuneConfig:
    """Supervised training of a classifier, from pretrained weights or from scratch.

    Args:
        labels_per_class: Train on this many labelled images per class, drawn with the seed; `null` is all.
        select: The model that is tested and published: the best on the validation split, or the last.
        test: Score that model on the test split, once, at the end.
        output_dir: The run folder.
        seed: Seed of the label draw, the head, data order, crops and drop path.
        overwrite: Delete the run that the output folder holds and start anew.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig(mixup=0.8, cutmix=1.0, erasing=0.25)
    optim: OptimConfig = OptimConfig(base_lr=5e-4, min_lr=1e-6, betas=(0.9, 0.999), warmup_epochs=5.0, layer_decay=0.65)
    train: TrainConfig = TrainConfig(label_smoothing=0.1, drop_path=0.1, eval_every=1)
    labels_per_class: int | None = None
    select: Literal["best", "last"] = "best"
    test: bool = True
    seed: int = 0
    output_dir: Path = _free(Path("runs/finetune"))
    overwrite: bool = _free(False)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings: what YAML and JSON can hold."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any) -> str:
    """The configuration as a recipe that the same command accepts."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def result_settings(config: Any) -> dict[str, Any]:
    """The settings that decide what comes out, as {'train.epochs': 100, ...}."""
    return dict(_walk(config, ""))


def _walk(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        elif item.metadata.get("affects_results", True):
            yield f"{prefix}{item.name}", _plain(value)


@dataclass(frozen=True)
class StudyConfig:
    """The comparison: every method pretrained alike, fine-tuned alike, beside training from scratch.

    Args:
        data: The labelled data set; its validation and test images, and the specimens of these, are kept out of
            pretraining unless data.split is `all`.
        model: The vision transformer that all runs share.
        methods: Methods, each with the settings in which its pretraining differs from `pretrain`.
        pretrain: Settings of every pretraining (optim, train, augment, seed).
        finetune: Settings of every fine-tuning (optim, train, augment).
        scratch: Candidate settings for training from scratch; the best on validation is the baseline.
        scratch_long: Epochs of one more run from scratch, to show what time alone gives; 0 is off.
        labels_per_class: Labelled images per class; `null` is all.
        seeds: One label draw, head, order and augmentation per seed, the same for every method.
        jobs: Runs at the same time; by default one per core on the CPU, at most eight, and one on a GPU.
        output_dir: The study's folder.
        overwrite: Delete the study that the output folder holds and start anew.
    """

    data: DataConfig = DataConfig(split="train")
    model: ModelConfig = ModelConfig()
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"mae": {}, "mff": {}, "mocov3": {}})
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    scratch: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    scratch_long: int = 0
    labels_per_class: int | None = 20
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    jobs: int | None = _free(None)
    output_dir: Path = _free(Path("runs/study"))
    overwrite: bool = _free(False)


def parse(kind: type[T], values: dict[str, Any]) -> T:
    """A configuration from nested plain values, with names and types checked.

    Raises EmsslError that names the setting.
    """
    from jsonargparse import (
        ArgumentError,
        ArgumentParser,
    )  # here: reading a config must not cost the library's import

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    try:
        config: T = parser.instantiate(parser.parse_object({"it": values})).it
    except ArgumentError as error:
        raise EmsslError(" ".join(str(error).replace("it.", "").split())) from error
    return config


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, the later ones winning key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def shared_settings(config: StudyConfig) -> dict[str, Any]:
    """The data and the model that all runs of a study have in common."""
    model = to_dict(config.model)
    return {"data": to_dict(config.data), "model": {key: model[key] for key in model if key != "init"}}


def short_name(method: str) -> str:
    """What folders are called after a method, which may be the path of a file."""
    return Path(method).stem
