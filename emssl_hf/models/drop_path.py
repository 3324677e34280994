"""Stochastic depth (Huang et al. 2016) for the stock ViT, which has none: hooks, so that no weight gets a new name."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification


def add_drop_path(model: ViTForImageClassification, rate: float) -> None:
    """Drop each residual branch per sample, with a probability that grows linearly over depth up to `rate`.

    Works in train mode only; attention and MLP branches draw separately.
    """
    layers = model.vit.layers
    for number, layer in enumerate(layers):
        probability = rate * number / max(1, len(layers) - 1)
        if probability > 0:
            for branch in (layer.get_submodule("attention"), layer.get_submodule("mlp")):
                branch.register_forward_hook(_DropBranch(probability))


class _DropBranch:
    def __init__(self, probability: float) -> None:
        self.keep = 1 - probability

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (self.drop(output[0]), *output[1:])
        return self.drop(output)

    def drop(self, branch: Tensor) -> Tensor:
        """Zero whole samples of (B, T, D) and scale the others up, so that the expectation stays."""
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < self.keep
        return branch * kept.to(branch.dtype) / self.keep
