"""Stochastic depth: nothing at rate 0 or in eval mode, the right rates, the expectation kept."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from emssl_hf.models.drop_path import add_drop_path
from tests.engine.tiny import BACKBONE


def classifier(depth: int = 5) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**{**BACKBONE, "num_hidden_layers": depth}, image_size=16, patch_size=8, num_channels=1)
    return ViTForImageClassification(config)


def hooks(model: ViTForImageClassification) -> list[int]:
    return [len(layer.attention._forward_hooks) + len(layer.mlp._forward_hooks) for layer in model.vit.layers]


def test_rate_zero_and_the_first_block_have_no_hooks() -> None:
    model = classifier()
    add_drop_path(model, 0.0)
    assert hooks(model) == [0, 0, 0, 0, 0]
    add_drop_path(model, 0.2)
    assert hooks(model) == [0, 2, 2, 2, 2]


def test_names_of_weights_stay() -> None:
    model, plain = classifier(), classifier()
    add_drop_path(model, 0.3)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_eval_mode_is_the_plain_model() -> None:
    model, plain = classifier().eval(), classifier().eval()
    add_drop_path(model, 0.9)
    pixels = torch.randn(3, 1, 16, 16)
    assert torch.equal(model(pixels).logits, plain(pixels).logits)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_rates_grow_linearly_and_the_expectation_stays(branch: str) -> None:
    model = classifier().train()
    add_drop_path(model, 0.4)
    tokens, count = torch.ones(1, 3, 32), 4000
    for number, layer in enumerate(model.vit.layers):
        module = getattr(layer, branch)
        plain = module.eval()(tokens)
        plain = plain[0] if isinstance(plain, tuple) else plain
        torch.manual_seed(number)
        made = module.train()(tokens.expand(count, -1, -1))
        made = made[0] if isinstance(made, tuple) else made
        rate = 0.1 * number
        dropped = (made == 0).all(dim=(1, 2))
        assert abs(float(dropped.float().mean()) - rate) <= 5 * (rate * (1 - rate) / count) ** 0.5
        torch.testing.assert_close(made[~dropped], (plain / (1 - rate)).expand_as(made[~dropped]), atol=1e-5, rtol=1e-4)


def test_both_branches_draw_for_themselves() -> None:
    model = classifier(2).train()
    add_drop_path(model, 0.5)
    torch.manual_seed(0)
    layer, tokens = model.vit.layers[1], torch.ones(200, 3, 32)
    attention, mlp = layer.attention(tokens)[0], layer.mlp(tokens)
    gone = [(branch == 0).all(dim=(1, 2)) for branch in (attention, mlp)]
    assert not torch.equal(*gone)
