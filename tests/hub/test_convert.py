"""Original checkpoints in the forms in which they are handed around: wrapped, prefixed, pickled, broken."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, ViTModel

from emssl_hf.errors import EmsslError
from emssl_hf.hub.convert import convert, load_reference
from emssl_hf.models import load_objective
from emssl_hf.models.mae import MAEForPreTraining
from emssl_hf.models.mff import MFFForPreTraining
from emssl_hf.models.mocov3 import MoCoV3ForPreTraining

REFERENCES = Path(__file__).resolve().parents[1] / "references"
DECODER = ("decoder", "mask_token")


def original(name: str) -> dict[str, Tensor]:
    """The state dict as the original project writes it."""
    golden = load_file(REFERENCES / f"{name}_golden.safetensors")
    return {n.removeprefix("state_dict."): t for n, t in golden.items() if n.startswith("state_dict.")}


def load(path: Path, **options: Any) -> Any:
    return load_reference(path, **{"num_attention_heads": 3, "decoder_num_attention_heads": 4, **options})


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize(
    ("name", "kind"), [("mae", MAEForPreTraining), ("mff", MFFForPreTraining), ("mocov3", MoCoV3ForPreTraining)]
)
def test_golden_files_and_plain_files_give_the_same(name: str, kind: type, tmp_path: Path) -> None:
    golden = load(REFERENCES / f"{name}_golden.safetensors")
    save_file(original(name), tmp_path / "plain.safetensors")
    torch.save({"state_dict": original(name), "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save({"model": original(name), "optimizer": {"step": 1}}, tmp_path / "model.pth")
    prefixed = {f"module.{n}": t for n, t in original(name).items()}
    torch.save({"state_dict": prefixed}, tmp_path / "module.pth.tar")
    options = {"fused_layers": (0, 1, 3)} if name == "mff" else {}
    assert type(golden) is kind and not golden.training
    for file in ("plain.safetensors", "wrapped.pth", "model.pth", "module.pth.tar"):
        assert same(load(tmp_path / file, **options), golden)


def test_sizes_come_from_the_tensors() -> None:
    config = load(REFERENCES / "mff_golden.safetensors").config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (24, 4, 96)
    assert (config.image_size, config.patch_size, config.num_channels) == (32, 8, 3)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (16, 2)
    assert config.fused_layers == (0, 1, 3)
    moco = load(REFERENCES / "mocov3_golden.safetensors").config
    assert (moco.projector_hidden_size, moco.projection_size) == (32, 16)


def test_metadata_tell_the_heads_where_no_argument_does() -> None:
    config = load_reference(REFERENCES / "mae_golden.safetensors").config
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == (3, 4)


def test_encoder_alone_is_a_stock_backbone(tmp_path: Path) -> None:
    encoder = {n: t for n, t in original("mae").items() if not n.startswith(DECODER)}
    save_file(encoder, tmp_path / "mae.safetensors")
    model = load(tmp_path / "mae.safetensors")
    full = load(REFERENCES / "mae_golden.safetensors")
    pixels = torch.randn(2, 3, 32, 32)
    assert type(model) is ViTModel and same(model, full.backbone)
    assert torch.equal(model(pixels).last_hidden_state, full.backbone(pixels).last_hidden_state)


def test_positions_are_copied_not_recomputed(tmp_path: Path) -> None:
    tensors = original("mae")
    tensors["pos_embed"] = torch.randn_like(tensors["pos_embed"])
    save_file(tensors, tmp_path / "mae.safetensors")
    model = load(tmp_path / "mae.safetensors")
    assert torch.equal(model.backbone.embeddings.position_embeddings, tensors["pos_embed"])
    assert not model.backbone.embeddings.position_embeddings.requires_grad


def test_grids_that_are_not_square_need_an_image_size(tmp_path: Path) -> None:
    tensors = original("mae")
    for name in ("pos_embed", "decoder_pos_embed"):
        tensors[name] = tensors[name][:, :9]
    path = tmp_path / "mae.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    with pytest.raises(EmsslError, match="8 positions are no square grid: give image_size"):
        load(path)
    with pytest.raises(EmsslError, match="does not give its 8 positions"):
        load(path, image_size=(32, 32))
    assert load(path, image_size=(16, 32)).config.image_size == (16, 32)


def test_heads_of_the_papers() -> None:
    from emssl_hf.hub.convert import _paper_heads
    from emssl_hf.hub.layouts import MAE, MOCOV3

    assert [_paper_heads(MAE, width) for width in (192, 384, 768, 1024)] == [3, 6, 12, 16]
    assert [_paper_heads(MOCOV3, width) for width in (384, 768)] == [12, 12]
    with pytest.raises(ValueError, match="give num_attention_heads"):
        _paper_heads(MAE, 24)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mae", {"head.weight": torch.zeros(10, 24)}, "no place: head.weight"),
        ("mae", {"norm.bias": None}, "lacks: backbone.layernorm.bias"),
        ("mae", {"pos_embed": None}, "lacks the tensor that becomes backbone.embeddings.position_embeddings"),
        ("mae", {"decoder_pred.weight": torch.zeros(10, 16)}, "other shapes for: decoder_pred.weight"),
        ("mae", {"blocks.1.attn.qkv.weight": torch.zeros(70, 24)}, "blocks.1.attn.qkv.weight of shape"),
        ("mae", {"blocks.1.attn.qkv.weight": torch.zeros(69, 24)}, "has other shapes for"),
        ("mae", {"patch_embed.proj.weight": None}, "no checkpoint that can be converted"),
        ("mff", {}, "fuses 3 blocks, not 2: give fused_layers"),
        ("mff", {"neck.fc0.weight": torch.zeros(2, 2)}, "neck.fc0.weight"),
        ("mocov3", {"momentum_encoder.norm.bias": None}, "lacks: momentum_backbone.layernorm.bias"),
    ],
)
def test_every_tensor_is_used_or_named(
    name: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {**original(name), **change}
    path = tmp_path / "changed.safetensors"
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    options = {"fused_layers": (0, 1, 3)} if name == "mff" and change else {}
    with pytest.raises(EmsslError, match=message) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)


class Trap:
    """A pickle that would run a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("was_executed",)


def test_pickles_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": original("mae"), "args": Trap()}, "trap.pth")
    with pytest.raises(EmsslError, match="nothing in it was executed"):
        load(Path("trap.pth"))
    assert not (tmp_path / "was_executed").exists()


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "empty.pth", "list.pth"])
def test_broken_files_are_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pth" else b"\x00no checkpoint" * 9)
    if name == "list.pth":
        torch.save([torch.zeros(2)], path)
    with pytest.raises(EmsslError, match=name) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(EmsslError, match="no checkpoint at"):
        load(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("name", ["mae", "mff", "mocov3"])
@pytest.mark.parametrize("channels", [None, 1])
def test_convert_writes_what_loads_anywhere(name: str, channels: int | None, tmp_path: Path) -> None:
    source = REFERENCES / f"{name}_golden.safetensors"
    heads = {"num_attention_heads": 3}
    written = convert(source, tmp_path, channels=channels, **heads)
    backbone, info = AutoModel.from_pretrained(written["backbone"], output_loading_info=True)
    assert type(backbone) is ViTModel and not info["missing_keys"] and not info["unexpected_keys"]
    truth = load(source)
    grey = torch.randn(2, 1, 32, 32)
    expected = truth.backbone(grey.expand(-1, 3, -1, -1)).last_hidden_state
    hidden = backbone(grey.expand(-1, channels or 3, -1, -1)).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=5e-6)
    again = load_objective(name).from_pretrained(written["pretraining"])
    assert again.config.num_channels == (channels or 3)
    licence = "Apache License 2.0" if name == "mff" else "CC-BY-NC 4.0"
    assert licence in written["readme"].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mae", "mff"])
def test_folded_decoder_predicts_the_mean_colour(name: str, tmp_path: Path) -> None:
    source = REFERENCES / f"{name}_golden.safetensors"
    folder = convert(source, tmp_path, channels=1)["pretraining"]
    folded = load_objective(name).from_pretrained(folder)
    grey, noise = torch.randn(2, 1, 32, 32), torch.rand(2, 16)
    full = load(source)(grey.expand(-1, 3, -1, -1), noise=noise).logits
    expected = full.unflatten(-1, (64, 3)).mean(-1)
    torch.testing.assert_close(folded(grey, noise=noise).logits, expected, rtol=0, atol=5e-6)


def test_processor_beside_the_backbone(tmp_path: Path) -> None:
    written = convert(REFERENCES / "mae_golden.safetensors", tmp_path)
    processor = AutoImageProcessor.from_pretrained(written["backbone"])
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert processor.size["height"] == processor.size["width"] == 32
