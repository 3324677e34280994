"""MoCo v3: Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021.

Two views of a micrograph must recognise each other among all others in the batch; the keys come from a slowly
moving copy of the network. Shapes: B micrographs, two views each, C channels, N patches, D hidden size, P
projection size.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ViTModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .backbone import build_backbone, freeze_patch_embedding
from .objective import Objective, ObjectiveConfig, View
from .patches import pair


@strict
class MoCoV3Config(ObjectiveConfig):
    """Defaults are the paper's ViT-B on one grey channel; the paper's ViT-S has 12 heads."""

    model_type = "emssl_mocov3"

    projector_hidden_size: int = 4096
    projection_size: int = 256
    temperature: float | int = 0.2
    momentum: float | int = 0.99
    """Where the momentum starts; it ends at 1."""
    freeze_patch_embedding: bool = True
    """Keep the random patch projection, which stabilises training (section 4.1)."""


@dataclass
class MoCoV3Output(ModelOutput):
    """What a step of MoCo v3 gives."""

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    """Share of queries whose nearest key is the right one, detached."""
    last_hidden_state: Tensor | None = None
    """(2B, 1 + N, D) after the final norm, all first views and then all second views."""


class MoCoV3ForPreTraining(Objective):
    """A ViT in `backbone` with projector and predictor, and the momentum copies that give the keys.

    BatchNorm sees one view at a time, and the momentum copies keep statistics of their own. Turning BatchNorm
    into its synchronised form is for the training loop.
    """

    config_class = MoCoV3Config
    title = "MoCo v3"
    paper = "https://arxiv.org/abs/2104.02057"
    citation = """@inproceedings{chen2021empirical,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}"""

    def __init__(self, config: MoCoV3Config) -> None:
        super().__init__(config)
        width, hidden, size = config.hidden_size, config.projector_hidden_size, config.projection_size
        self.backbone = _moco_backbone(config)
        self.projector = projection_head(width, hidden, hidden, size)
        self.predictor = projection_head(size, hidden, size)
        self.momentum_backbone = _moco_backbone(config)
        self.momentum_projector = projection_head(width, hidden, hidden, size)
        self.post_init()

    def post_init(self) -> None:
        """Initialise; the momentum network starts as a copy of the trained one."""
        super().post_init()
        self.update_momentum(0.0)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The heads keep torch's own initialisation of a linear layer, as in the original.
        if isinstance(module, nn.Linear | nn.BatchNorm1d):
            module.reset_parameters()

    def freeze(self) -> None:
        """Positions, the momentum network and, if asked for, the patch projection take no gradient."""
        super().freeze()
        if self.config.freeze_patch_embedding:
            freeze_patch_embedding(self.backbone)
        self.momentum_backbone.requires_grad_(False)
        self.momentum_projector.requires_grad_(False)

    @classmethod
    def views(cls, config: MoCoV3Config) -> tuple[View, ...]:
        """BYOL's two asymmetric views: always blurred, or seldom blurred and at times solarised."""
        amounts: dict[str, Any] = {
            "scale": (0.08, 1.0),
            "brightness": 0.4,
            "contrast": 0.4,
            "jitter_probability": 0.8,
        }
        size = pair(config.image_size)
        first = View(size=size, blur_probability=1.0, **amounts)
        second = View(size=size, blur_probability=0.1, solarize_probability=0.2, **amounts)
        return first, second

    @can_return_tuple
    def forward(self, pixel_values: Tensor) -> MoCoV3Output:
        """Two views of each micrograph (B, 2, C, H, W): symmetric contrastive loss (algorithm 1)."""
        views = pixel_values.transpose(0, 1).flatten(0, 1)  # (2B, C, H, W), first views first
        hidden = self.backbone(views).last_hidden_state  # (2B, 1 + N, D)
        first, second = (self.predictor(self.projector(x)) for x in hidden[:, 0].chunk(2))
        with torch.no_grad():
            keys = self.momentum_backbone(views).last_hidden_state[:, 0]
            first_key, second_key = (self.momentum_projector(x) for x in keys.chunk(2))
        loss_1, accuracy_1 = contrastive_loss(first, second_key, self.config.temperature)
        loss_2, accuracy_2 = contrastive_loss(second, first_key, self.config.temperature)
        return MoCoV3Output(loss_1 + loss_2, (accuracy_1 + accuracy_2) / 2, hidden)

    def backbone_replaced(self) -> None:
        """The momentum network starts as a copy of the trained one."""
        self.update_momentum(0.0)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Parameters of the momentum network become m * old + (1 - m) * trained; buffers stay."""
        pairs = (self.momentum_backbone, self.backbone), (self.momentum_projector, self.projector)
        for slow, fast in pairs:
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1.0 - momentum)

    def after_step(self, progress: float) -> None:
        """Update with a momentum that rises by cosine from the config's to 1 over training (section 3)."""
        self.update_momentum(1.0 - (1.0 - self.config.momentum) * (math.cos(math.pi * progress) + 1.0) / 2.0)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE over queries and keys (B, P), times 2 * temperature, and the share of right answers.

    Keys are gathered from all processes without gradient; each process must hold equally many.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        keys, rank = gather_keys(keys)
        logits = queries @ keys.T / temperature  # (B, B * processes)
        labels = torch.arange(len(queries), device=queries.device) + len(queries) * rank
        loss = F.cross_entropy(logits, labels) * (2.0 * temperature)
    return loss, (logits.argmax(dim=1) == labels).float().mean().detach()


@torch.no_grad()
def gather_keys(keys: Tensor) -> tuple[Tensor, int]:
    """Keys of all processes in the order of their ranks, and this process's rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return keys, 0
    gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, keys.contiguous())
    return torch.cat(gathered), dist.get_rank()


def projection_head(*sizes: int) -> nn.Sequential:
    """Linear layers without bias, BatchNorm after each (the last without affine part), ReLU between."""
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for number, (width, out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out, affine=number < last)]
        if number < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _moco_backbone(config: MoCoV3Config) -> ViTModel:
    return build_backbone(
        config.backbone_config(),
        temperature=config.position_temperature,
        row_first=True,
        fused_qkv=False,
        cls_std=1e-6,
    )
