"""The only file that looks inside transformers' ViTModel: build it, run parts of it, resize it, publish it.

Shapes: B images, N patches, K of them kept, D hidden size, C channels, p patch size.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, ViTConfig, ViTForImageClassification, ViTModel
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.utils import logging

from .patches import grid_size, pair
from .positions import interpolate_positions, sincos_positions

StockModel = TypeVar("StockModel", ViTModel, ViTForImageClassification)

SIZES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    for name, (width, depth, heads) in {
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }.items()
}
"""The vision transformers of the papers (DeiT and ViT), MLP four times as wide."""

CONFIG_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "qkv_bias",
    "image_size",
    "patch_size",
    "num_channels",
)
"""What of a config describes the backbone: our methods, ViT and ViTMAE share these names."""


# Building


def vit_config(settings: Mapping[str, Any], attn_implementation: str | None = None) -> ViTConfig:
    """The stock config made of those settings that describe a backbone."""
    own = {name: settings[name] for name in CONFIG_FIELDS if name in settings}
    own["image_size"] = stock_size(own.get("image_size", 224))
    own["attn_implementation"] = attn_implementation
    return ViTConfig(**own)


def build_backbone(
    config: ViTConfig,
    *,
    temperature: float = 10000.0,
    row_first: bool = False,
    fused_qkv: bool = True,
    cls_std: float = 0.02,
) -> ViTModel:
    """A stock ViTModel without pooler, initialised as in MAE (appendix A) with frozen sine-cosine positions.

    MoCo v3 differs in three things: its positions have the row first, it initialises q, k and v as separate
    matrices, and its CLS token is almost zero.
    """
    model = ViTModel(config, add_pooling_layer=False)
    grid = grid_size(config.image_size, config.patch_size)
    with torch.no_grad():
        for module in reversed(list(model.modules())):  # inner modules first
            init_module(module, fused_qkv=fused_qkv)
        init.normal_(model.embeddings.cls_token, std=cls_std)
        positions = sincos_positions(config.hidden_size, grid, temperature=temperature, row_first=row_first)
        model.embeddings.position_embeddings.copy_(positions)
    freeze_positions(model)
    return model


def init_module(module: nn.Module, *, fused_qkv: bool = True) -> None:
    """Xavier-uniform weights and zero biases for one module of a transformer, called on inner modules first.

    The patch convolution counts as a (D, C*p*p) matrix and keeps Conv2d's own bias; with `fused_qkv` the
    query, key and value weights are drawn as parts of one (3D, D) matrix, which makes them smaller by
    sqrt(2).
    """
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        module.reset_parameters()
        init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ViTAttention) and fused_qkv:
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))


def freeze_positions(model: ViTModel) -> None:
    """Keep the positions fixed; from_pretrained forgets this, so call it again after loading."""
    model.embeddings.position_embeddings.requires_grad_(False)


def freeze_patch_embedding(model: ViTModel) -> None:
    """Keep the random patch projection fixed (MoCo v3, section 4: stabilises training)."""
    model.embeddings.patch_embeddings.requires_grad_(False)


# Running


def embed_patches(model: ViTModel, patches: Tensor, ids: Tensor | None = None) -> Tensor:
    """Patches (B, K, p*p*C), channel last, at the places `ids` (B, K) -> tokens (B, 1 + K, D) with CLS first.

    Without `ids` the patches are all N in order. One matrix product, equal to the stock patch convolution, so
    that masked patches cost nothing.
    """
    embeddings = model.embeddings
    projection = embeddings.patch_embeddings.projection
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
    tokens = F.linear(patches.to(weight.dtype), weight, projection.bias)
    positions = embeddings.position_embeddings
    places = positions[:, 1:] if ids is None else positions[0, 1:][ids]
    cls_token = (embeddings.cls_token + positions[:, :1]).expand(len(tokens), -1, -1)
    return torch.cat([cls_token, tokens + places], dim=1)


def run_layers(model: ViTModel, tokens: Tensor, collect: Collection[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Run all blocks on tokens (B, T, D); also returns the outputs, before any norm, of blocks `collect`."""
    collected = []
    for number, layer in enumerate(model.layers):
        tokens = layer(tokens)
        if number in collect:
            collected.append(tokens)
    return tokens, collected


def final_norm(model: ViTModel, tokens: Tensor) -> Tensor:
    """The LayerNorm behind the last block."""
    normed: Tensor = model.layernorm(tokens)
    return normed


# Changing size and channels


def mix_channels(weight: Tensor, channels: int) -> Tensor:
    """Patch projection (D, C, p, p) for another channel count that gives the same on grey input.

    The weights are summed over the old channels and shared equally among the new ones.
    """
    summed = weight.double().sum(dim=1, keepdim=True) / channels
    return summed.expand(-1, channels, -1, -1).to(weight.dtype)


def to_channels(model: StockModel, channels: int) -> StockModel:
    """A copy of the model for another channel count: the same function of a grey image in all channels."""
    return _rebuild(model, {"num_channels": channels}, _PROJECTION, lambda weight: mix_channels(weight, channels))


def to_image_size(model: StockModel, image_size: int | tuple[int, int]) -> StockModel:
    """A copy of the model for another image size, also a non-square one, with interpolated positions."""
    old_grid = grid_size(model.config.image_size, model.config.patch_size)
    new_grid = grid_size(image_size, model.config.patch_size)
    changes = {"image_size": stock_size(image_size)}
    return _rebuild(model, changes, _POSITIONS, lambda positions: interpolate_positions(positions, old_grid, new_grid))


def stock_size(size: int | tuple[int, int] | list[int]) -> int | tuple[int, int]:
    """An image size as stock configs write it: one number where it is square."""
    height, width = pair(size)
    return height if height == width else (height, width)


def publish_backbone(model: ViTModel, channels: int = 3) -> ViTModel:
    """The stock form of a backbone: a plain ViTModel that loads anywhere with nothing missing or unexpected.

    Its pooler is the identity, so `pooler_output` is the CLS feature after the final norm.
    """
    model = to_channels(model, channels)
    config = ViTConfig(**{**model.config.to_dict(), "pooler_act": "linear"})
    published = ViTModel(config)
    identity = {
        "pooler.dense.weight": torch.eye(config.hidden_size, dtype=model.dtype),
        "pooler.dense.bias": torch.zeros(config.hidden_size, dtype=model.dtype),
    }
    published.load_state_dict({**model.state_dict(), **identity})
    published.to(dtype=model.dtype)  # type: ignore[call-arg]
    return published.eval()


# Loading


def load_backbone(
    source: str | Path, *, channels: int = 1, image_size: int | tuple[int, int] | None = None
) -> tuple[ViTModel, list[str]]:
    """The backbone, without pooler, of a folder or Hub id, and sentences on what was changed or left out.

    Takes the `pretraining/` folder of any method here, a stock ViTModel or ViTForImageClassification, and a
    ViTMAE; channels are folded and positions interpolated as asked. Raises ValueError naming the tensors
    where one of the backbone is missing or surplus, and naming the architecture where it is none of these.
    """
    settings = _read_config(str(source))
    config = vit_config(settings)
    mapping = {r"^backbone\.": ""} if _is_ours(settings) else None
    with _quiet():
        loaded: Any = ViTModel.from_pretrained(
            str(source),
            config=config,
            add_pooling_layer=False,
            key_mapping=mapping,
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, info = loaded
    surplus = set(info["unexpected_keys"])
    inside = sorted(key for key in surplus if key.removeprefix("vit.").startswith(_INSIDE))
    _refuse(source, "lacks", sorted(info["missing_keys"]))
    _refuse(source, "holds more than its config says:", inside)
    notes = _left_out(surplus)
    if channels != config.num_channels:
        notes.append(f"patch embedding mixed from {config.num_channels} to {channels} channels")
        model = to_channels(model, channels)
    if image_size is not None and pair(image_size) != pair(config.image_size):
        notes.append(f"positions interpolated from {config.image_size} to {image_size} pixels")
        model = to_image_size(model, image_size)
    return model, notes


_INSIDE = ("embeddings.patch", "embeddings.cls", "embeddings.pos", "encoder.", "layers.", "layernorm.")


def _read_config(source: str) -> dict[str, Any]:
    """The settings of config.json; raises ValueError where there is none or its model is no ViT."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise ValueError(
            f"{source} is neither a folder with a model nor a model on the Hub that can be reached."
        ) from error
    if not _is_ours(settings) and settings.get("model_type") not in ("vit", "vit_mae"):
        raise ValueError(
            f"{source} is a '{settings.get('model_type')}' model; a backbone must be a plain ViT, "
            "a ViTMAE or the pretraining folder of a method here."
        )
    return settings


def _is_ours(settings: Mapping[str, Any]) -> bool:
    """Configs of our methods, a user's own included, are known by a field that only they have."""
    return "position_temperature" in settings


def _refuse(source: str | Path, problem: str, names: list[str]) -> None:
    if names:
        raise ValueError(f"{source} {problem} {len(names)} tensor(s) of the backbone, first {', '.join(names[:3])}.")


def _left_out(names: Collection[str]) -> list[str]:
    """One sentence with the parts that are not of the backbone, such as a decoder or a classifier."""
    parts = sorted({name.split(".")[0] for name in names})
    return [f"left out {', '.join(parts)} ({len(names)} tensors)"] if parts else []


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading report on the log: what was left out is returned instead."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_POSITIONS = "embeddings.position_embeddings"


def _rebuild(model: StockModel, changes: dict[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> StockModel:
    """The same model with a changed config and one changed tensor; freezing and train mode are kept."""
    settings = {**model.config.to_dict(), "attn_implementation": model.config._attn_implementation}
    config = ViTConfig(**{**settings, **changes})
    options = {"add_pooling_layer": model.pooler is not None} if isinstance(model, ViTModel) else {}
    rebuilt: StockModel = type(model)(config, **options)
    state = model.state_dict()
    key = name if name in state else f"{model.base_model_prefix}.{name}"
    rebuilt.load_state_dict({**state, key: change(state[key])})
    for old, new in zip(model.parameters(), rebuilt.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    rebuilt.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    rebuilt.train(model.training)
    return rebuilt
