"""What MAE, MFF and MoCo v3 do each: targets, limits, momentum, views."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emssl_hf.models.backbone import build_backbone, embed_patches, vit_config
from emssl_hf.models.mff import default_fused_layers
from emssl_hf.models.mocov3 import contrastive_loss
from emssl_hf.models.patches import patchify, random_masking

from .conftest import DECODER, TINY, Build, gradients, inputs


@pytest.mark.parametrize("method", ["mae", "mff"])
@pytest.mark.parametrize("changes", [{}, {"num_channels": 3, "image_size": (16, 32)}])
def test_loss_only_gives_the_same_loss_and_gradients(build: Build, method: str, changes: dict[str, Any]) -> None:
    model = build(method, **changes).train()
    full = model(**inputs(model))
    full.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    short = model(**inputs(model), loss_only=True)
    short.loss.backward()
    assert short.logits is None and full.logits.shape[1] == model.config.num_patches
    torch.testing.assert_close(short.loss, full.loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", ["patch", "image", "raw"])
@pytest.mark.parametrize("contrast", [1.0, 1e-3])
def test_mae_loss_by_hand(build: Build, target: str, contrast: float) -> None:
    flags = {"norm_pix_loss": target == "patch", "norm_image_loss": target == "image"}
    model = build("mae", num_channels=2, **flags).eval()
    batch = inputs(model, batch=2)
    batch["pixel_values"] *= contrast
    output = model(**batch)
    patches = patchify(batch["pixel_values"], 8).double().numpy()
    errors = []
    for image, predicted, mask in zip(patches, output.logits.detach().numpy(), output.mask, strict=True):
        for place in np.flatnonzero(mask.numpy()):
            sample = {"patch": image[place], "image": image, "raw": None}[target]
            mean, std = (0, 1) if sample is None else (sample.mean(), math.sqrt(sample.var(ddof=1) + 1e-6))
            errors.append(((predicted[place] - (image[place] - mean) / std) ** 2).mean())
    assert len(errors) == 2 * 12
    assert output.loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_masked_pixels_do_not_reach_the_encoder(build: Build) -> None:
    model = build("mae").eval()
    batch = inputs(model)
    masking = random_masking(batch["noise"], 0.75)
    other = patchify(batch["pixel_values"], 8)
    other = other + masking.mask.unsqueeze(-1)
    changed = other.reshape(4, 4, 4, 8, 8, 1).permute(0, 5, 1, 3, 2, 4).reshape(4, 1, 32, 32)
    first, second = model(**batch), model(pixel_values=changed, noise=batch["noise"])
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("shape", [(2, 1, 16, 32), (2, 3, 32, 32), (2, 1, 64, 64)])
def test_images_of_another_size_are_refused(build: Build, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(1, 32, 32\)"):
        build("mae")(torch.randn(shape))
    with pytest.raises(ValueError, match=r"must be \(1, 32, 32\)"):
        build("mff").fused_features(torch.randn(shape))


def test_noise_is_drawn_where_none_is_given(build: Build) -> None:
    model = build("mae").eval()
    pixels = inputs(model)["pixel_values"]
    assert not torch.equal(model(pixels).mask, model(pixels).mask)


@pytest.mark.parametrize("flags", [{}, {"norm_pix_loss": False}, {"norm_pix_loss": False, "norm_image_loss": True}])
def test_reconstruction_keeps_visible_patches(build: Build, flags: dict[str, bool]) -> None:
    model = build("mae", image_size=(16, 48), **flags).eval()
    batch = inputs(model, batch=2)
    reconstruction, masked, mask = model.reconstruct(**batch)
    pixels = batch["pixel_values"]
    assert reconstruction.shape == masked.shape == mask.shape == pixels.shape
    assert mask.mean().item() == pytest.approx(0.75)
    assert torch.equal(reconstruction * (1 - mask), pixels * (1 - mask))
    assert torch.equal(masked, pixels * (1 - mask))
    assert not torch.equal(reconstruction, pixels)


def test_a_perfect_prediction_reconstructs_the_image(build: Build) -> None:
    model = build("mae").eval()
    batch = inputs(model)
    patches = patchify(batch["pixel_values"], 8)
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    masking = random_masking(batch["noise"], 0.75)
    order = torch.cat([masking.ids_keep, masking.ids_masked], dim=1)
    perfect = ((patches - mean) / (variance + 1e-6).sqrt()).gather(1, order.unsqueeze(-1).expand_as(patches))
    model.forward_decoder = lambda *args, **kwargs: perfect
    torch.testing.assert_close(model.reconstruct(**batch)[0], batch["pixel_values"])


def test_mff_with_all_weight_on_the_last_block_is_mae(build: Build) -> None:
    mff, mae = build("mff").eval(), build("mae").eval()
    mae.load_state_dict({n: t for n, t in mff.state_dict().items() if not n.startswith("fusion")})
    nn.init.constant_(mff.fusion_logits, -1e4)
    mff.fusion_logits.data[-1] = 0
    batch = inputs(mae)
    one, other = mff(**batch), mae(**batch)
    assert one.fusion_weights.tolist() == [0, 1]
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.loss, other.loss)
    pixels = batch["pixel_values"]
    hidden = mae.backbone(pixels).last_hidden_state
    torch.testing.assert_close(mff.fused_features(pixels), hidden, rtol=0, atol=1e-5)


def test_mff_fused_layers() -> None:
    assert default_fused_layers(12) == (0, 2, 4, 6, 8, 11)
    assert default_fused_layers(24)[-2:] == (20, 23)
    assert default_fused_layers(1) == (0,)


def test_embedding_some_patches_is_the_stock_embedding() -> None:
    config = vit_config({**TINY, "num_channels": 3, "image_size": (16, 32)})
    model = build_backbone(config)
    pixels = torch.randn(2, 3, 16, 32)
    stock = model.embeddings(pixels)
    ids = torch.tensor([[5, 0, 7], [1, 2, 3]])
    tokens = embed_patches(model, patchify(pixels, 8)[torch.arange(2).unsqueeze(1), ids], ids)
    torch.testing.assert_close(embed_patches(model, patchify(pixels, 8)), stock, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[:, 0], stock[:, 0])
    torch.testing.assert_close(tokens[:, 1:], stock[:, 1:][torch.arange(2).unsqueeze(1), ids], rtol=0, atol=1e-6)


def test_initialisation_follows_the_papers(build: Build) -> None:
    wide = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 1}
    mae, moco = build("mae", **wide), build("mocov3", **wide)

    def xavier(fan_in: int, fan_out: int) -> float:
        return math.sqrt(2 / (fan_in + fan_out))

    layer = mae.backbone.layers[0]
    query = layer.attention.q_proj.weight.std().item()
    separate = moco.backbone.layers[0].attention.q_proj.weight.std().item()
    patch = mae.backbone.embeddings.patch_embeddings.projection.weight
    assert query == pytest.approx(xavier(192, 3 * 192), rel=0.03)
    assert separate == pytest.approx(xavier(192, 192), rel=0.03)
    assert layer.mlp.fc1.weight.std().item() == pytest.approx(xavier(192, 768), rel=0.03)
    assert patch.std().item() == pytest.approx(xavier(64, 192), rel=0.03)
    assert mae.backbone.embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert moco.backbone.embeddings.cls_token.abs().max().item() < 1e-5
    assert build("mae", decoder_hidden_size=256).mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not layer.attention.q_proj.bias.any() and not mae.decoder_pred.bias.any()
    assert mae.decoder_layers[0].attention.q_proj.weight.std().item() > 0.05


def test_momentum_network_starts_as_a_copy_and_takes_no_gradient(build: Build) -> None:
    model = build("mocov3")
    pairs = [(model.backbone, model.momentum_backbone), (model.projector, model.momentum_projector)]
    for fast, slow in pairs:
        for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
            assert torch.equal(one, other) and not other.requires_grad
    free = build("mocov3", freeze_patch_embedding=False).backbone.embeddings.patch_embeddings.projection
    assert free.weight.requires_grad


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_momentum_update_by_hand(build: Build, progress: float) -> None:
    model = build("mocov3", momentum=0.9)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.projector[1].running_mean.fill_(3.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.after_step(progress)
    m = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    for name, after in model.state_dict().items():
        expected = before[name]
        if name.startswith("momentum_backbone"):
            expected = m * before[name] + (1 - m) * before[name.removeprefix("momentum_")]
        torch.testing.assert_close(after, expected)


def test_contrastive_loss_by_hand() -> None:
    queries, keys = torch.randn(5, 8), torch.randn(5, 8)
    q = queries.numpy() / np.linalg.norm(queries.numpy(), axis=1, keepdims=True)
    k = keys.numpy() / np.linalg.norm(keys.numpy(), axis=1, keepdims=True)
    logits = q @ k.T / 0.2
    expected = 0.4 * np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    loss, accuracy = contrastive_loss(queries, keys, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == np.arange(5)).mean())
    assert contrastive_loss(queries, queries, 0.2)[1] == 1


def test_batch_norm_sees_one_view_at_a_time(build: Build) -> None:
    model = build("mocov3").train()
    views = inputs(model)["pixel_values"]
    model(views)
    seen = nn.BatchNorm1d(32)
    with torch.no_grad():
        for number in range(2):
            seen(model.projector[0](model.backbone(views[:, number]).last_hidden_state[:, 0]))
    torch.testing.assert_close(model.projector[1].running_var, seen.running_var, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.momentum_projector[1].running_var, seen.running_var, rtol=1e-4, atol=1e-6)


def test_views_follow_the_papers(build: Build) -> None:
    (mae,) = build("mae", image_size=(16, 32)).views(build("mae", image_size=(16, 32)).config)
    (mff,) = build("mff").views(build("mff").config)
    first, second = build("mocov3").views(build("mocov3").config)
    assert (mae.size, mae.crop, mae.scale) == ((16, 32), "resized", (0.2, 1.0))
    assert (mff.size, mff.crop, mff.padding) == ((32, 32), "padded", 4)
    assert {view.scale for view in (first, second)} == {(0.08, 1.0)}
    assert (first.blur_probability, first.solarize_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    assert (first.brightness, first.contrast, first.jitter_probability) == (0.4, 0.4, 0.8)


def test_draws(build: Build) -> None:
    assert build("mae").draws(build("mae").config) == {"noise": 16}
    assert build("mocov3").draws(build("mocov3").config) == {}
    assert DECODER["decoder_hidden_size"] == build("mae").decoder_embed.out_features
