"""Tiny models of every method, shared by the tests of this room."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emssl_hf.models import Objective, load_objective

TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 32,
}
HEADS: dict[str, Any] = {"projector_hidden_size": 32, "projection_size": 16}
METHODS = ("mae", "mff", "mocov3")

Build = Callable[..., Objective]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build() -> Build:
    """`build("mae", num_channels=3)`: a tiny model of the method."""

    def make(method: str, **changes: Any) -> Objective:
        objective = load_objective(method)
        own = HEADS if method == "mocov3" else DECODER
        return objective(objective.config_class(**{**TINY, **own, **changes}))

    return make


def inputs(model: Objective, batch: int = 4) -> dict[str, torch.Tensor]:
    """Random arguments of forward that are the same at every call: pixels and the method's draws."""
    generator = torch.Generator().manual_seed(7)
    config, views = model.config, model.views(model.config)
    shape = (batch, config.num_channels, *views[0].size)
    pixels = [torch.randn(shape, generator=generator) for _ in views]
    draws = {name: torch.rand(batch, count, generator=generator) for name, count in model.draws(config).items()}
    return {"pixel_values": pixels[0] if len(views) == 1 else torch.stack(pixels, dim=1), **draws}


def gradients(model: Objective) -> dict[str, torch.Tensor]:
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
