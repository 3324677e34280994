"""Masked autoencoders (MAE): He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

Hide 75 % of the patches, encode the visible ones, let a small decoder paint the hidden ones.
Shapes: B images, C channels, N patches of p x p pixels, K visible, M = N - K masked, D and E the widths of
encoder and decoder.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ViTConfig
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

from .backbone import build_backbone, embed_patches, final_norm, run_layers
from .objective import Objective, ObjectiveConfig
from .patches import Masking, gather_patches, pair, patchify, random_masking, unpatchify
from .positions import sincos_positions


@strict
class MAEConfig(ObjectiveConfig):
    """Defaults are the paper's ViT-B on one grey channel (MAE, tables 1 and 8)."""

    model_type = "emssl_mae"

    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    """Predict each patch standardised by its own mean and deviation."""
    norm_image_loss: bool = False
    """Predict each patch standardised by its image's mean and deviation; leaves the plateau that
    `norm_pix_loss` has on small sets of noisy micrographs, where a flat patch is nothing but amplified
    noise."""
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 < int(self.num_patches * (1 - self.mask_ratio)) < self.num_patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves nothing to see or nothing to predict.")
        if self.norm_pix_loss and self.norm_image_loss:
            raise ValueError("norm_image_loss excludes norm_pix_loss: set norm_pix_loss to false.")
        if self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size {self.decoder_hidden_size} is not a multiple of "
                f"decoder_num_attention_heads {self.decoder_num_attention_heads}."
            )

    def decoder_config(self) -> ViTConfig:
        """The decoder's blocks are those of a stock ViT of another width."""
        config = self.backbone_config()
        config.hidden_size = self.decoder_hidden_size
        config.num_hidden_layers = self.decoder_num_hidden_layers
        config.num_attention_heads = self.decoder_num_attention_heads
        config.intermediate_size = self.decoder_intermediate_size
        return config


@dataclass
class MAEOutput(ModelOutput):
    """What a step of MAE gives; `logits` and `ids_restore` index patches in image order."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """(B, N, p*p*C) predictions for all patches; None with `loss_only`."""
    mask: Tensor | None = None
    """(B, N), 0 kept and 1 removed."""
    ids_restore: Tensor | None = None
    """(B, N)"""
    last_hidden_state: Tensor | None = None
    """(B, 1 + K, D) CLS and visible patches, in shuffled order."""


class MAEForPreTraining(Objective):
    """A ViT encoder in `backbone` and the light decoder that is thrown away after pretraining."""

    config_class = MAEConfig
    title = "MAE"
    paper = "https://arxiv.org/abs/2111.06377"
    citation = """@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and
               Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""
    training_arguments: ClassVar[dict[str, Any]] = {"loss_only": True}
    output_class: ClassVar[type[MAEOutput]] = MAEOutput

    decoder_position_embeddings: Tensor
    """(1, 1 + N, E), fixed"""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config(), temperature=config.position_temperature)
        self._build_decoder(config)
        self.post_init()

    def _build_decoder(self, config: Any) -> None:
        decoder = config.decoder_config()
        width = decoder.hidden_size
        positions = sincos_positions(width, config.grid, temperature=config.position_temperature)
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_position_embeddings", positions)
        self.decoder_layers = nn.ModuleList(ViTLayer(decoder) for _ in range(decoder.num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=decoder.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MAEForPreTraining):
            init.normal_(module.mask_token, std=0.02)

    @classmethod
    def draws(cls, config: MAEConfig) -> dict[str, int]:
        """One number per patch decides what is masked."""
        return {"noise": config.num_patches}

    @can_return_tuple
    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, loss_only: bool = False) -> MAEOutput:
        """Pixels (B, C, H, W), noise (B, N) or drawn here; the patches with the smallest noise stay visible.

        With `loss_only` nothing but the masked patches is predicted, which gives the same loss and gradients.
        """
        patches = self.patches_of(pixel_values)  # (B, N, p*p*C)
        masking = self._masking(patches, noise)
        latent, extras = self.forward_encoder(patches, masking)
        prediction = self.forward_decoder(latent, masking, masked_only=loss_only)
        num_masked = masking.ids_masked.shape[1]
        loss = self.forward_loss(patches, prediction[:, -num_masked:], masking)
        return self.output_class(
            loss=loss,
            logits=None if loss_only else gather_patches(prediction, masking.ids_restore),
            mask=masking.mask,
            ids_restore=masking.ids_restore,
            last_hidden_state=latent,
            **extras,
        )

    def patches_of(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, p*p*C); raises ValueError for images of another size than the positions'."""
        expected = (self.config.num_channels, *pair(self.config.image_size))
        if pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape[1:])} an image, and must be {expected}.")
        return patchify(pixel_values, self.config.patch_size)

    def _masking(self, patches: Tensor, noise: Tensor | None) -> Masking:
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=patches.device)
        return random_masking(noise, self.config.mask_ratio)

    def forward_encoder(self, patches: Tensor, masking: Masking) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode the visible patches: (B, 1 + K, D) after the final norm, and what else to report."""
        visible = gather_patches(patches, masking.ids_keep)  # (B, K, p*p*C)
        tokens = embed_patches(self.backbone, visible, masking.ids_keep)  # (B, 1 + K, D)
        tokens, _ = run_layers(self.backbone, tokens)
        return final_norm(self.backbone, tokens), {}

    def forward_decoder(self, latent: Tensor, masking: Masking, masked_only: bool = False) -> Tensor:
        """Predict patches from the latent (B, 1 + K, D): (B, N, p*p*C), K visible ones first, then M masked.

        Attention does not care about order, so the sequence stays shuffled and every token takes its place's
        position; only predictions are put back in order. With `masked_only` the result is (B, M, p*p*C).
        """
        tokens = self.decoder_embed(latent)
        num_masked = masking.ids_masked.shape[1]
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), num_masked, -1)
        positions = self.decoder_position_embeddings
        places = positions[0, 1:][torch.cat([masking.ids_keep, masking.ids_masked], dim=1)]  # (B, N, E)
        places = torch.cat([positions[:, :1].expand(len(tokens), -1, -1), places], dim=1)
        tokens = torch.cat([tokens, mask_tokens], dim=1) + places  # (B, 1 + N, E)
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        tokens = tokens[:, -num_masked:] if masked_only else tokens[:, 1:]
        prediction: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return prediction

    def forward_loss(self, patches: Tensor, prediction: Tensor, masking: Masking) -> Tensor:
        """Mean squared error on the masked patches: patches (B, N, p*p*C), prediction (B, M, p*p*C)."""
        patches = patches.float()
        target = gather_patches(patches, masking.ids_masked)
        mean, std = self._target_statistics(patches)
        if mean.shape[1] > 1:
            mean, std = gather_patches(mean, masking.ids_masked), gather_patches(std, masking.ids_masked)
        return (prediction.float() - (target - mean) / std).square().mean()

    def _target_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased deviation that standardise targets: (B, N, 1) by patch, (B, 1, 1) by image."""
        if self.config.norm_pix_loss:
            dims: tuple[int, ...] = (2,)
        elif self.config.norm_image_loss:
            dims = (1, 2)
        else:
            return patches.new_zeros(len(patches), 1, 1), patches.new_ones(len(patches), 1, 1)
        variance, mean = torch.var_mean(patches, dim=dims, keepdim=True)
        return mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures of what the model paints: (reconstruction, masked input, mask), each (B, C, H, W).

        Visible patches are the input's own. Predictions are turned back into pixels with each patch's (or
        image's) true mean and deviation, which the model never saw when it was trained on standardised
        targets.
        """
        output = self(pixel_values, noise=noise)
        patches = self.patches_of(pixel_values).float()
        mean, std = self._target_statistics(patches)
        hidden = output.mask.unsqueeze(-1)  # (B, N, 1)
        painted = torch.where(hidden > 0, output.logits.float() * std + mean, patches)
        images = (painted, patches * (1 - hidden), hidden.expand_as(patches))
        size, grid = self.config.patch_size, self.config.grid
        reconstruction, masked, mask = (unpatchify(image, size, grid) for image in images)
        return reconstruction, masked, mask
