"""What every method must hold, whatever it does."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from emssl_hf.models import load_objective, objective_names, register_auto_classes
from emssl_hf.models.backbone import publish_backbone

from .conftest import METHODS, Build, gradients, inputs

every_method = pytest.mark.parametrize("method", METHODS)
SHAPES = [{}, {"num_channels": 3}, {"image_size": (32, 16)}, {"num_channels": 2, "image_size": [16, 48]}]


def positions_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.endswith("position_embeddings")}


@every_method
@pytest.mark.parametrize("changes", SHAPES)
def test_loss_is_finite_and_every_trainable_parameter_gets_a_gradient(
    build: Build, method: str, changes: dict[str, Any]
) -> None:
    model = build(method, **changes).train()
    loss = model(**inputs(model), **model.training_arguments).loss
    loss.backward()
    assert loss.isfinite()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert (missing, frozen) == ([], [])


@every_method
def test_loss_falls_in_forty_steps(build: Build, method: str) -> None:
    model = build(method).train()
    batch = inputs(model, batch=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(40):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step((step + 1) / 40)
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


@every_method
def test_saved_model_is_the_same_after_loading(build: Build, method: str, tmp_path: Path) -> None:
    model = build(method, image_size=(32, 16)).eval()
    model.save_pretrained(tmp_path)
    loaded = load_objective(method).from_pretrained(tmp_path)
    assert torch.equal(model(**inputs(model)).loss, loaded(**inputs(model)).loss)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }
    assert loaded.config.image_size == (32, 16)


@every_method
def test_positions_are_never_zero(build: Build, method: str, tmp_path: Path) -> None:
    model = build(method)
    model.save_pretrained(tmp_path)
    loaded = load_objective(method).from_pretrained(tmp_path, low_cpu_mem_usage=True)
    with torch.device("meta"):
        empty = build(method)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    truth = positions_of(model)
    assert truth and all((table[:, 1:].abs().sum(-1) > 0).all() for table in truth.values())
    for other in (loaded, empty):
        assert all(torch.equal(table, truth[name]) for name, table in positions_of(other).items())
    assert not loaded.backbone.embeddings.position_embeddings.requires_grad


@every_method
def test_files_that_lack_a_tensor_are_refused(build: Build, method: str, tmp_path: Path) -> None:
    model = build(method)
    state = {n: t for n, t in model.state_dict().items() if n != "backbone.layernorm.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing keys.*backbone\.layernorm\.weight"):
        load_objective(method).from_pretrained(tmp_path)


@every_method
def test_published_backbone_is_the_training_backbone(build: Build, method: str, tmp_path: Path) -> None:
    model = build(method).eval()
    publish_backbone(model.backbone).save_pretrained(tmp_path)
    published, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    grey = torch.randn(2, 1, 32, 32)
    output = published(grey.expand(-1, 3, -1, -1))
    hidden = model.backbone(grey).last_hidden_state
    assert type(published).__name__ == "ViTModel"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(output.last_hidden_state, hidden, rtol=0, atol=5e-6)
    torch.testing.assert_close(output.pooler_output, hidden[:, 0], rtol=0, atol=5e-6)


@every_method
def test_backbone_never_masks(build: Build, method: str) -> None:
    backbone = build(method).backbone
    grey = torch.randn(2, 1, 32, 32)
    outputs = [backbone.train(mode)(grey).last_hidden_state for mode in (True, True, False, False)]
    assert outputs[0].shape == (2, 17, 24)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@every_method
def test_compiles_without_a_graph_break(build: Build, method: str) -> None:
    model = build(method).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {**inputs(model), **model.training_arguments}
    expected = model(**arguments).loss
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**arguments).loss, expected)


@every_method
def test_bfloat16_autocast_stays_finite_and_close(build: Build, method: str) -> None:
    model = build(method).eval()
    expected = model(**inputs(model)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs(model)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


@every_method
def test_gradient_checkpointing_changes_nothing(build: Build, method: str) -> None:
    model = build(method).train()
    model(**inputs(model)).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(**inputs(model)).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@every_method
def test_auto_classes_know_the_method(build: Build, method: str, tmp_path: Path) -> None:
    register_auto_classes()
    register_auto_classes()
    model = build(method, image_size=(16, 32))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert config.model_type == f"emssl_{method}" and config.image_size == (16, 32)
    assert type(loaded) is load_objective(method)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


@every_method
def test_tuple_outputs(build: Build, method: str) -> None:
    model = build(method).eval()
    output = model(**inputs(model), return_dict=False)
    assert isinstance(output, tuple) and torch.equal(output[0], model(**inputs(model)).loss)


@every_method
def test_unknown_settings_are_refused(method: str) -> None:
    config = load_objective(method).config_class
    with pytest.raises(ValueError, match="no setting 'num_hiden_layers'; the nearest is 'num_hidden_layers'"):
        config(num_hiden_layers=3)
    restored = config.from_dict(config().to_dict())
    assert restored.to_dict() == config().to_dict()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("mae", {"mask_ratio": 1.0}, "mask_ratio"),
        ("mae", {"image_size": 30}, "do not tile"),
        ("mae", {"num_attention_heads": 5}, "num_attention_heads"),
        ("mae", {"norm_image_loss": True}, "norm_pix_loss to false"),
        ("mff", {"fused_layers": [0, 2]}, "last block, 3"),
        ("mff", {"fused_layers": [1, 0, 3]}, "ascending"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    build: Build, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(method, **changes)


def test_a_fourth_method_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "identity.py"
    file.write_text(
        "from emssl_hf.models.mae import MAEConfig, MAEForPreTraining\n"
        "class IdentityConfig(MAEConfig):\n    model_type = 'identity'\n"
        "class IdentityForPreTraining(MAEForPreTraining):\n    config_class = IdentityConfig\n"
    )
    objective = load_objective(file)
    assert objective.__name__ == "IdentityForPreTraining" and objective.config_class.model_type == "identity"
    assert load_objective(str(file)) is objective


def test_missing_methods_are_named() -> None:
    assert objective_names() == list(METHODS)
    with pytest.raises(ValueError, match="no method 'simmim': choose one of mae, mff, mocov3"):
        load_objective("simmim")
    with pytest.raises(ValueError, match="no method 'backbone'"):
        load_objective("backbone")
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ValueError, match="no file"):
        load_objective(Path(folder) / "nothing.py")
