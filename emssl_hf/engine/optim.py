"""Parameter groups, layer-wise learning-rate decay, and schedules as pure functions of the step."""

import math
import re
from typing import Any

import torch
from torch import nn

from emssl_hf.engine.config import OptimConfig


def absolute_lr(config: OptimConfig, batch_size: int) -> float:
    """The linear scaling rule (Goyal et al. 2017): base_lr * effective batch / 256."""
    return config.base_lr * batch_size / 256


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Learning rate of the optimizer step `step` (from 0): linear from 0 to `peak`, then half a cosine to `floor`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def layer_of(name: str, depth: int) -> int:
    """Position of a ViT parameter from the bottom: embeddings 0, block k -> k + 1, what stands above -> depth + 1."""
    if ".embeddings." in f".{name}":
        return 0
    block = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else depth + 1


def parameter_groups(model: nn.Module, config: OptimConfig, depth: int) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters, each with `lr_scale` (layer decay) and `weight_decay`.

    Biases and one-dimensional parameters are not decayed unless `decay_all`; CLS and mask tokens are (MAE, appendix A).
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.ndim > 1 or config.decay_all else 0.0
        scale = config.layer_decay ** (depth + 1 - layer_of(name, depth)) if config.layer_decay != 1 else 1.0
        group = groups.setdefault((scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimConfig, depth: int) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused into one kernel per device."""
    groups = parameter_groups(model, config, depth)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the scheduled learning rate; layer decay scales the floor too, as in MAE."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
