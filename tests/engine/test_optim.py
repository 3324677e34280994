"""Schedules and parameter groups against formulas and names written down by hand."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from emssl_hf.engine.config import OptimConfig
from emssl_hf.engine.optim import absolute_lr, build_optimizer, layer_of, lr_at, parameter_groups, set_lr
from emssl_hf.models import load_objective
from tests.engine.tiny import BACKBONE, DECODER, HEADS


def classifier() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**BACKBONE, image_size=32, patch_size=8, num_channels=1, num_labels=3))


def by_name(model: torch.nn.Module, config: OptimConfig) -> dict[str, tuple[float, float]]:
    """Parameter name -> (lr_scale, weight_decay)."""
    groups = parameter_groups(model, config, depth=2)
    return {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}


def test_the_rate_scales_with_the_effective_batch() -> None:
    assert absolute_lr(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)


def test_warm_up_is_linear_and_cosine_ends_at_the_floor() -> None:
    rates = [lr_at(step, 100, 20, 1.0, 0.1) for step in range(101)]
    assert rates[0] == 0 and rates[10] == pytest.approx(0.5) and rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    for step in (25, 40, 77):
        assert rates[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_schedules_without_warm_up_or_shorter_than_it_are_defined() -> None:
    assert lr_at(0, 10, 0, 1.0, 0.0) == 1.0
    assert lr_at(4, 5, 10, 1.0, 0.0) == pytest.approx(0.4)
    assert lr_at(10, 10, 10, 1.0, 0.2) == 1.0
    assert lr_at(12, 10, 0, 1.0, 0.2) == pytest.approx(0.2)


def test_layers_are_counted_from_the_embeddings_up() -> None:
    names = {name: layer_of(name, 2) for name, _ in classifier().named_parameters()}
    assert names["vit.embeddings.cls_token"] == names["vit.embeddings.patch_embeddings.projection.weight"] == 0
    assert {layer for name, layer in names.items() if ".layers.0." in name} == {1}
    assert {layer for name, layer in names.items() if ".layers.1." in name} == {2}
    assert names["vit.layernorm.weight"] == names["classifier.weight"] == 3
    assert sorted(set(names.values())) == [0, 1, 2, 3]


def test_a_decoder_counts_as_what_stands_above_the_backbone() -> None:
    objective = load_objective("mae")
    model = objective(objective.config_class(**BACKBONE, **DECODER, image_size=32, patch_size=8))
    names = {name: layer_of(name, 2) for name, _ in model.named_parameters()}
    assert names["backbone.layers.0.layernorm_before.weight"] == 1
    assert {layer for name, layer in names.items() if name.startswith("decoder_")} == {3}
    assert names["mask_token"] == 3 and names["backbone.embeddings.cls_token"] == 0


def test_layer_decay_scales_the_rate_from_the_head_down() -> None:
    groups = by_name(classifier(), OptimConfig(layer_decay=0.5))
    assert groups["classifier.weight"][0] == groups["vit.layernorm.bias"][0] == 1
    assert groups["vit.layers.1.mlp.fc1.weight"][0] == 0.5
    assert groups["vit.layers.0.mlp.fc1.weight"][0] == 0.25
    assert groups["vit.embeddings.cls_token"][0] == 0.125
    model = classifier()
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5), 2)
    set_lr(optimizer, 0.8)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["classifier.bias"] == pytest.approx(0.8)
    assert rates["vit.embeddings.cls_token"] == pytest.approx(0.1)


def test_one_dimensional_parameters_are_not_decayed_but_tokens_are() -> None:
    objective = load_objective("mae")
    model = objective(objective.config_class(**BACKBONE, **DECODER, image_size=32, patch_size=8))
    groups = by_name(model, OptimConfig(weight_decay=0.05))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert groups[name] == (1.0, 0.05 if parameter.ndim > 1 else 0.0), name
    assert groups["mask_token"][1] == groups["backbone.embeddings.cls_token"][1] == 0.05
    assert groups["backbone.layernorm.weight"][1] == groups["decoder_pred.bias"][1] == 0
    assert "backbone.embeddings.position_embeddings" not in groups


def test_decay_all_decays_everything_that_is_trained() -> None:
    objective = load_objective("mocov3")
    model = objective(objective.config_class(**BACKBONE, **HEADS, image_size=32, patch_size=8))
    groups = by_name(model, OptimConfig(weight_decay=0.1, decay_all=True))
    assert set(groups.values()) == {(1.0, 0.1)}
    assert set(groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in groups if name.startswith("momentum_") or "patch_embeddings" in name]


def test_one_step_is_adamw_with_decoupled_decay() -> None:
    weight = torch.nn.Linear(2, 1, bias=False)
    start = weight.weight.detach().clone()
    optimizer = build_optimizer(weight, OptimConfig(weight_decay=0.5), 1)
    set_lr(optimizer, 0.01)
    weight.weight.grad = torch.tensor([[3.0, -0.2]])
    optimizer.step()
    expected = start * (1 - 0.01 * 0.5) - 0.01 * torch.tensor([[1.0, -1.0]])  # the first step is the gradient's sign
    torch.testing.assert_close(weight.weight.detach(), expected, atol=1e-6, rtol=0)
