"""SimMIM (Xie et al., CVPR 2022) as a user would add it: one file, given as `method: path/to/simmim.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from emssl_hf.models.backbone import build_backbone, final_norm, run_layers
from emssl_hf.models.objective import Objective, ObjectiveConfig
from emssl_hf.models.patches import patchify


@strict
class SimMIMConfig(ObjectiveConfig):
    model_type = "test_simmim"

    mask_ratio: float = 0.6


@dataclass
class SimMIMOutput(ModelOutput):
    loss: Tensor | None = None
    share: Tensor | None = None
    last_hidden_state: Tensor | None = None


class SimMIMForPreTraining(Objective):
    config_class = SimMIMConfig
    title = "SimMIM"
    paper = "https://arxiv.org/abs/2111.09886"
    citation = "@inproceedings{xie2022simmim, title = {SimMIM}, year = {2022}}"

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config(), temperature=config.position_temperature)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.head = nn.Linear(config.hidden_size, config.patch_size**2 * config.num_channels)
        self.post_init()

    @classmethod
    def draws(cls, config: Any) -> dict[str, int]:
        return {"noise": config.num_patches}

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> SimMIMOutput:
        """The masked patches become a token; the head paints them, and the error is absolute."""
        embeddings = self.backbone.embeddings
        tokens = embeddings.patch_embeddings(pixel_values)
        noise = torch.rand(tokens.shape[:2]) if noise is None else noise
        mask = (noise < self.config.mask_ratio).float()[..., None]
        tokens = tokens * (1 - mask) + self.mask_token * mask
        tokens = torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        hidden, _ = run_layers(self.backbone, tokens + embeddings.position_embeddings)
        hidden = final_norm(self.backbone, hidden)
        error = (self.head(hidden[:, 1:]) - patchify(pixel_values, self.config.patch_size)).abs().mean(-1, keepdim=True)
        return SimMIMOutput((error * mask).sum() / mask.sum(), mask.mean(), hidden)
