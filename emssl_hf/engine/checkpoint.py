"""Checkpoints of a training run: safetensors and JSON, written aside and renamed, so that a good one always stands."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emssl_hf.errors import EmsslError

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: epochs that are complete, and optimizer steps taken in all."""

    epoch: int = 0
    step: int = 0


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run.glob("checkpoints/epoch-*/state.json"))


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    data: str,
    keep: int,
    scaler: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write checkpoints/epoch-NNNNN with model, optimizer and progress, and delete all but the last `keep`."""
    folder = run / "checkpoints" / f"epoch-{progress.epoch:05d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
    save_file(_contiguous(_optimizer_tensors(optimizer)), temporary / "optimizer.safetensors")
    state = {"format": FORMAT, **asdict(progress), "data": data, "scaler": scaler, "extra": extra or {}}
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    for file in temporary.iterdir():
        _sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    for old in checkpoints(run)[: -max(1, keep)]:
        shutil.rmtree(old)
    return folder


def restore(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, data: str
) -> tuple[Progress, dict[str, Any]]:
    """Load the newest checkpoint into model and optimizer; returns the progress and the stored state.

    Without a checkpoint the progress is zero. Raises EmsslError where the data or the parameters differ.
    """
    found = checkpoints(run)
    if not found:
        return Progress(), {}
    state = json.loads((found[-1] / "state.json").read_text())
    if state["format"] != FORMAT:
        raise EmsslError(f"{found[-1]} has checkpoint format {state['format']}; this version reads {FORMAT}.")
    if state["data"] != data:
        raise EmsslError(
            f"{run} was trained on other images than the data path holds now: bring those back, or choose another "
            "--output_dir."
        )
    model.load_state_dict(load_file(found[-1] / "model.safetensors"), strict=True)
    _restore_optimizer(optimizer, load_file(found[-1] / "optimizer.safetensors"))
    return Progress(state["epoch"], state["step"]), state


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer).items()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in _named(optimizer).items():
        own = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
