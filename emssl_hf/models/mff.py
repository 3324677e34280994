"""Multi-level feature fusion (MFF): Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling
Capability", ICCV 2023.

Predicting pixels makes the last blocks of an MAE encoder carry low-level detail. MFF hands that detail from
shallow blocks to the decoder directly: it sees a weighted sum of several blocks, and all else is MAE. Shapes:
B images, N patches, K visible, D hidden size, F fused blocks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from .backbone import embed_patches, final_norm, run_layers
from .mae import MAEConfig, MAEForPreTraining, MAEOutput
from .objective import View
from .patches import Masking, gather_patches, pair


@strict
class MFFConfig(MAEConfig):
    """MAE's config and the blocks to fuse; by default every second block and the last (MFF, section 4.1)."""

    model_type = "emssl_mff"

    fused_layers: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        last = self.num_hidden_layers - 1
        layers = default_fused_layers(self.num_hidden_layers) if self.fused_layers is None else self.fused_layers
        self.fused_layers = tuple(layers)
        if list(layers) != sorted(set(layers)) or not layers or layers[0] < 0 or layers[-1] != last:
            raise ValueError(
                f"fused_layers {list(layers)} must be block numbers in ascending order that end with the "
                f"last block, {last}."
            )
        super().__post_init__(**kwargs)


def default_fused_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """Every second block from the first, and the last: 0, 2, 4, 6, 8, 11 of 12."""
    return (*range(0, num_hidden_layers - 2, 2), num_hidden_layers - 1)


@dataclass
class MFFOutput(MAEOutput):
    """MAE's output and how much each fused block contributes."""

    fusion_weights: Tensor | None = None
    """(F,), summing to one, detached."""


class MFFForPreTraining(MAEForPreTraining):
    """MAE whose decoder sees several blocks of the encoder; fine-tuning keeps only `backbone`."""

    config_class = MFFConfig
    output_class: ClassVar[type[MAEOutput]] = MFFOutput
    title = "MFF"
    paper = "https://arxiv.org/abs/2308.00261"
    citation = """@inproceedings{liu2023improving,
  title     = {Improving Pixel-based {MIM} by Reducing Wasted Modeling Capability},
  author    = {Liu, Yuan and Zhang, Songyang and Chen, Jiacheng and Yu, Zhaohui and Chen, Kai and Lin, Dahua},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}"""

    def _build_decoder(self, config: Any) -> None:
        super()._build_decoder(config)
        width, count = config.hidden_size, len(config.fused_layers)
        # The last block goes into the sum as it is: the others learn to match its feature space.
        self.fusion_projections = nn.ModuleList(nn.Linear(width, width) for _ in range(count - 1))
        self.fusion_logits = nn.Parameter(torch.ones(count))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MFFForPreTraining):
            init.ones_(module.fusion_logits)

    @classmethod
    def views(cls, config: MFFConfig) -> tuple[View, ...]:
        """MFF keeps the scale: short edge resized, reflected padding of four pixels, random crop."""
        return (View(size=pair(config.image_size), crop="padded", padding=4),)

    def forward_encoder(self, patches: Tensor, masking: Masking) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode the visible patches and fuse the blocks: (B, 1 + K, D) after the final norm."""
        visible = gather_patches(patches, masking.ids_keep)  # (B, K, p*p*C)
        tokens = embed_patches(self.backbone, visible, masking.ids_keep)  # (B, 1 + K, D)
        return self.fuse(tokens), {"fusion_weights": self.fusion_weights().detach()}

    def fuse(self, tokens: Tensor) -> Tensor:
        """Run the blocks on tokens (B, T, D), project the fused outputs but the last, weigh, add, norm."""
        _, outputs = run_layers(self.backbone, tokens, collect=self.config.fused_layers)
        levels = [project(x) for project, x in zip(self.fusion_projections, outputs[:-1], strict=True)]
        weights = self.fusion_weights()
        weighted = [weight * x for weight, x in zip(weights, [*levels, outputs[-1]], strict=True)]
        return final_norm(self.backbone, torch.stack(weighted).sum(dim=0))

    def fusion_weights(self) -> Tensor:
        """(F,) softmax over the trained scalars."""
        return self.fusion_logits.softmax(dim=0)

    def fused_features(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D) for frozen use: the final norm was trained on the fused sequence.

        Nothing is masked here.
        """
        return self.fuse(embed_patches(self.backbone, self.patches_of(pixel_values)))
