"""Resizing, folding, publishing and loading of stock backbones."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from emssl_hf.models.backbone import (
    SIZES,
    build_backbone,
    load_backbone,
    publish_backbone,
    to_channels,
    to_image_size,
    vit_config,
)

from .conftest import METHODS, TINY, Build


@pytest.fixture
def backbone() -> ViTModel:
    return build_backbone(vit_config({**TINY, "num_channels": 1, "layer_norm_eps": 1e-6})).eval()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_fold_there_and_back(backbone: ViTModel, channels: int) -> None:
    grey = torch.randn(2, 1, 32, 32)
    wide = to_channels(backbone, channels)
    expected = backbone(grey).last_hidden_state
    assert wide.config.num_channels == channels and wide is not backbone
    for model, pixels in ((wide, grey.expand(-1, channels, -1, -1)), (to_channels(wide, 1), grey)):
        torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=0, atol=5e-6)
    assert not wide.embeddings.position_embeddings.requires_grad


def test_classifiers_fold_too() -> None:
    config = ViTConfig(**{**TINY, "num_channels": 3, "id2label": {0: "a", 1: "b", 2: "c"}})
    model = ViTForImageClassification(config).eval()
    grey = torch.randn(2, 1, 32, 32)
    folded = to_channels(model, 1)
    assert isinstance(folded, ViTForImageClassification) and folded.config.id2label == config.id2label
    torch.testing.assert_close(folded(grey).logits, model(grey.expand(-1, 3, -1, -1)).logits, rtol=0, atol=5e-6)


def test_image_size_changes_positions_only(backbone: ViTModel) -> None:
    wide = to_image_size(backbone, (16, 48))
    assert wide.config.image_size == (16, 48)
    assert wide(torch.randn(1, 1, 16, 48)).last_hidden_state.shape == (1, 13, 24)
    before = backbone.state_dict()
    changed = [
        name
        for name, tensor in wide.state_dict().items()
        if tensor.shape != before[name].shape or not torch.equal(tensor, before[name])
    ]
    assert changed == ["embeddings.position_embeddings"]
    same = to_image_size(backbone, 32)
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in backbone.state_dict().items())


def test_publishing_twice_changes_nothing(backbone: ViTModel) -> None:
    once = publish_backbone(backbone)
    twice = publish_backbone(once)
    assert all(torch.equal(t, twice.state_dict()[n]) for n, t in once.state_dict().items())
    assert publish_backbone(backbone, channels=1).config.num_channels == 1


@pytest.mark.parametrize("method", METHODS)
def test_load_from_pretraining_folder(build: Build, method: str, tmp_path: Path) -> None:
    model = build(method, image_size=(32, 16)).eval()
    model.save_pretrained(tmp_path)
    loaded, notes = load_backbone(tmp_path)
    grey = torch.randn(2, 1, 32, 16)
    assert torch.equal(loaded(grey).last_hidden_state, model.backbone(grey).last_hidden_state)
    assert loaded.pooler is None and len(notes) == 1 and notes[0].startswith("left out")


def test_load_published_folder_for_another_size(backbone: ViTModel, tmp_path: Path) -> None:
    publish_backbone(backbone).save_pretrained(tmp_path)
    grey = torch.randn(2, 1, 32, 32)
    loaded, _ = load_backbone(str(tmp_path))
    torch.testing.assert_close(loaded(grey).last_hidden_state, backbone(grey).last_hidden_state, rtol=0, atol=5e-6)
    wide, notes = load_backbone(tmp_path, channels=3, image_size=(64, 32))
    assert wide(torch.randn(1, 3, 64, 32)).last_hidden_state.shape == (1, 33, 24)
    assert any("positions interpolated from 32 to (64, 32)" in note for note in notes)


def test_load_classifier_and_vitmae(tmp_path: Path) -> None:
    classifier = ViTForImageClassification(ViTConfig(**{**TINY, "num_channels": 3})).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    mae = ViTMAEForPreTraining(ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_attention_heads=4))
    mae.save_pretrained(tmp_path / "mae")
    loaded, notes = load_backbone(tmp_path / "classifier", channels=3)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in classifier.vit.state_dict().items())
    assert notes == ["left out classifier (2 tensors)"]
    loaded, notes = load_backbone(tmp_path / "mae", channels=3)
    ours = loaded.state_dict()
    assert torch.equal(ours["embeddings.cls_token"], mae.vit.embeddings.cls_token)
    assert torch.equal(ours["layernorm.weight"], mae.vit.layernorm.weight) and len(notes) == 1


def test_other_files_are_refused_in_words(backbone: ViTModel, tmp_path: Path) -> None:
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)).save_pretrained(
        tmp_path / "bert"
    )
    short = {n: t for n, t in backbone.state_dict().items() if not n.startswith("layers.3.")}
    backbone.save_pretrained(tmp_path / "short", state_dict=short)
    backbone.config.num_hidden_layers = 3
    long = {n: t.clone() for n, t in backbone.state_dict().items()}
    backbone.save_pretrained(tmp_path / "long", state_dict=long)
    for folder, message in [
        ("bert", "'bert' model"),
        ("short", "lacks 16 tensor"),
        ("long", "holds more than its config says: 16 tensor"),
        ("nowhere", "neither a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_backbone(tmp_path / folder)


def test_sizes() -> None:
    assert SIZES["base"] == {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    assert [size["hidden_size"] // size["num_attention_heads"] for size in SIZES.values()] == [64] * 4
