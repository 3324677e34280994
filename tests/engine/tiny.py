"""Settings of runs that take half a second: ViT of two blocks, 32 pixels, patches of 8, 75 synthetic micrographs."""

from pathlib import Path
from typing import Any

import pytest

from emssl_hf.engine.config import FinetuneConfig, PretrainConfig, merge, parse
from tests.conftest import TINY_SET

BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
HEADS: dict[str, Any] = {"projector_hidden_size": 32, "projection_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "mae": DECODER,
    "mff": {**DECODER, "fused_layers": [0, 1]},
    "mocov3": HEADS,
}
METHODS = tuple(OWN)


def pretrain_settings(method: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of three epochs of nine steps."""
    return merge(
        {
            "method": method,
            "data": _data(changes),
            "model": {"image_size": 32, "patch_size": 8, "options": {**BACKBONE, **OWN.get(method, {})}},
            "optim": {"base_lr": 0.1, "warmup_epochs": 0.5},
            "train": {"epochs": 3, "batch_size": 8, "eval_every": 1, "save_every": 1, "log_every": 1, "threads": 1},
            "output_dir": str(folder),
        },
        changes,
    )


def pretrain_config(method: str, folder: Path, **changes: Any) -> PretrainConfig:
    return parse(PretrainConfig, pretrain_settings(method, folder, **changes))


def finetune_config(folder: Path, **changes: Any) -> FinetuneConfig:
    """A fine-tuning of three epochs, every kind of augmentation and drop path on."""
    return parse(
        FinetuneConfig,
        merge(
            {
                "data": _data(changes),
                "model": {"image_size": 32, "patch_size": 8, "options": BACKBONE},
                "optim": {"base_lr": 0.05, "warmup_epochs": 0.5},
                "train": {"epochs": 3, "batch_size": 8, "save_every": 1, "log_every": 1, "threads": 1},
                "output_dir": str(folder),
            },
            changes,
        ),
    )


def _data(changes: dict[str, Any]) -> dict[str, Any]:
    """The procedural set, unless the test brings its own path."""
    return {} if "path" in changes.get("data", {}) else TINY_SET


class Killed(BaseException):
    """Like a SIGKILL in this: nothing in the run gets to tidy up."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, job: type) -> None:
    """Let the job die in its step number `step`."""
    taken, original = 0, job.after_step

    def after_step(self: Any, progress: float) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        original(self, progress)

    monkeypatch.setattr(job, "after_step", after_step)
