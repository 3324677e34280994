"""Checkpoints of the original MAE, MoCo v3 and mmpretrain -> our models; positions are copied."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTModel

from emssl_hf.errors import EmsslError
from emssl_hf.hub.layouts import MOCOV3, Checkpoint, Project, Tensors, read_checkpoint
from emssl_hf.models.backbone import mix_channels, publish_backbone, vit_config
from emssl_hf.models.image_processing import MicrographImageProcessor, stock_processor
from emssl_hf.models.mae import MAEConfig, MAEForPreTraining
from emssl_hf.models.mff import MFFConfig, MFFForPreTraining, default_fused_layers
from emssl_hf.models.mocov3 import MoCoV3Config, MoCoV3ForPreTraining
from emssl_hf.models.objective import Objective
from emssl_hf.models.patches import pair

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_reference(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    decoder_num_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    fused_layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> ViTModel | Objective:
    """The original checkpoint as our model: ViTModel for an encoder alone, else the pretraining class.

    Sizes come from the tensors. What these cannot tell is, in this order, the argument, the metadata of a
    safetensors file, or the paper's: 64 channels a head (12 heads for MoCo v3's ViT-S), 16 decoder heads,
    MFF's every second block; `image_size` is needed for a non-square grid only. Whether MAE was trained on
    standardised pixels no tensor tells: `norm_pix_loss` is set, which is wrong for the `mae_visualize` files.

    Raises EmsslError for a file that is unreadable, of no known project, or with tensors too many or too few.
    """
    given = {
        "num_attention_heads": num_attention_heads,
        "decoder_num_attention_heads": decoder_num_attention_heads,
        "image_size": image_size,
        "fused_layers": fused_layers,
    }
    model = _model_of(read_checkpoint(path), given)
    torch.nn.Module.to(model, device=device)
    return model


def _model_of(checkpoint: Checkpoint, given: Mapping[str, Any]) -> ViTModel | Objective:
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        model = _build(checkpoint, {**checkpoint.metadata, **chosen})
    except ValueError as error:
        raise EmsslError(f"{checkpoint.path}: {error}") from error
    _load(model, checkpoint)
    return model.eval()


# Sizes


def _build(checkpoint: Checkpoint, settings: dict[str, Any]) -> ViTModel | Objective:
    """An empty model of the kind and the sizes that the tensors tell."""
    tensors = checkpoint.tensors
    sizes = _backbone_sizes(checkpoint, settings)
    if checkpoint.project is MOCOV3:
        return MoCoV3ForPreTraining(MoCoV3Config(**sizes, **_projector_sizes(tensors)))
    if "decoder_embed.weight" not in tensors:
        return ViTModel(vit_config({**sizes, "layer_norm_eps": 1e-6}), add_pooling_layer=False)
    sizes |= _decoder_sizes(tensors, settings)
    if "fusion_logits" not in tensors:
        return MAEForPreTraining(MAEConfig(**sizes))
    return MFFForPreTraining(MFFConfig(**sizes, fused_layers=_fused_layers(tensors, sizes, settings)))


def _backbone_sizes(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    tensors = checkpoint.tensors
    width, channels, patch_size, _ = tensors["backbone.embeddings.patch_embeddings.projection.weight"].shape
    heads = settings.get("num_attention_heads") or _paper_heads(checkpoint.project, width)
    return {
        "hidden_size": width,
        "num_hidden_layers": _depth(tensors, "backbone.layers."),
        "num_attention_heads": heads,
        "intermediate_size": _need(tensors, "backbone.layers.0.mlp.fc1.weight").shape[0],
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": _image_size(tensors, patch_size, settings.get("image_size")),
        "qkv_bias": "backbone.layers.0.attention.q_proj.bias" in tensors,
    }


def _paper_heads(project: Project, width: int) -> int:
    if project is MOCOV3 and width == 384:
        return 12
    if width % 64:
        raise ValueError(f"the number of heads cannot be told for a width of {width}: give num_attention_heads.")
    return width // 64


def _image_size(tensors: Tensors, patch_size: int, given: int | Sequence[int] | None) -> int | tuple[int, int]:
    num_patches = _need(tensors, "backbone.embeddings.position_embeddings").shape[1] - 1
    side = round(num_patches**0.5)
    if given is None:
        if side * side != num_patches:
            raise ValueError(f"its {num_patches} positions are no square grid: give image_size as (height, width).")
        return side * patch_size
    height, width = pair(given if isinstance(given, int) else (given[0], given[1]))
    if (height // patch_size) * (width // patch_size) != num_patches:
        raise ValueError(
            f"image_size {height} x {width} in patches of {patch_size} pixels does not give its "
            f"{num_patches} positions."
        )
    return height, width


def _decoder_sizes(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    width = tensors["decoder_embed.weight"].shape[0]
    chosen = {name: settings[name] for name in ("mask_ratio",) if name in settings}
    return chosen | {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": _depth(tensors, "decoder_layers."),
        "decoder_num_attention_heads": settings.get("decoder_num_attention_heads", 16),
        "decoder_intermediate_size": _need(tensors, "decoder_layers.0.mlp.fc1.weight").shape[0],
    }


def _projector_sizes(tensors: Tensors) -> dict[str, Any]:
    return {
        "projector_hidden_size": _need(tensors, "projector.0.weight").shape[0],
        "projection_size": _need(tensors, "predictor.0.weight").shape[1],
    }


def _fused_layers(tensors: Tensors, sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Which blocks are fused: the checkpoint tells only how many."""
    count = len(tensors["fusion_logits"])
    layers = tuple(settings.get("fused_layers") or default_fused_layers(sizes["num_hidden_layers"]))
    if len(layers) != count:
        raise ValueError(f"it fuses {count} blocks, not {len(layers)}: give fused_layers with their numbers.")
    return layers


def _depth(tensors: Tensors, prefix: str) -> int:
    """Blocks under the prefix."""
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _need(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"it lacks the tensor that becomes {name}.")
    return tensors[name]


def _load(model: ViTModel | Objective, checkpoint: Checkpoint) -> None:
    """Copy every tensor; raises EmsslError naming those without a place and the places without a tensor."""
    bare = isinstance(model, ViTModel)
    tensors = {name.removeprefix("backbone.") if bare else name: t for name, t in checkpoint.tensors.items()}
    wanted = model.state_dict()
    problems = {
        "holds tensors that have no place": [name for name in tensors if name not in wanted],
        "lacks": [name for name in wanted if name not in tensors],
        "has other shapes for": [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape],
    }
    for problem, names in problems.items():
        if names:
            kind, first = type(model).__name__, ", ".join(names[:3])
            raise EmsslError(
                f"{checkpoint.path}, read as {checkpoint.project.name} for {kind}, {problem}: {first}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}."
            )
    model.load_state_dict(tensors)


# Writing


def convert(
    file: str | Path,
    out: str | Path,
    *,
    channels: int | None = None,
    **given: Any,
) -> dict[str, Path]:
    """Convert a checkpoint into folders under `out`, and return what was written.

    `backbone/` is the stock ViTModel with its processor; `pretraining/`, where the file has a decoder or
    heads, our class to continue from; `README.md` names the origin and the licence that stays on the weights.
    With `channels` both take that many: the patch embedding is summed over its colours and shared, and the
    decoder's prediction is the mean of the colours' predictions, which is exact for grey images.
    """
    checkpoint = read_checkpoint(file)
    model = _model_of(checkpoint, given)
    out = Path(out)
    written = {"backbone": out / "backbone"}
    backbone = model if isinstance(model, ViTModel) else model.backbone
    published = publish_backbone(backbone, channels or backbone.config.num_channels)
    published.save_pretrained(written["backbone"])
    _processor(published).save_pretrained(written["backbone"])
    if isinstance(model, Objective):
        written["pretraining"] = out / "pretraining"
        objective = fold_objective(model, channels or model.config.num_channels)
        objective.save_pretrained(written["pretraining"])
    written["readme"] = out / "README.md"
    written["readme"].write_text(_readme(checkpoint, model, sorted(written)), encoding="utf-8")
    return written


def fold_objective(model: Objective, channels: int) -> Objective:
    """The pretraining model for another channel count.

    Patch embeddings are mixed as in `to_channels`. A decoder's prediction becomes the mean over the old
    channels in each new one: on grey images standardised targets are the same in every channel.
    """
    old = model.config.num_channels
    if old == channels:
        return model
    config = type(model.config)(**{**model.config.to_dict(), "num_channels": channels})
    folded = type(model)(config)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("patch_embeddings.projection.weight"):
            state[name] = mix_channels(tensor, channels)
        elif name.startswith("decoder_pred."):
            pixels = tensor.unflatten(0, (-1, old)).mean(dim=1, keepdim=True)  # (p*p, 1, ...), channel last
            state[name] = pixels.expand(-1, channels, *pixels.shape[2:]).flatten(0, 1)
    folded.load_state_dict(state)
    return folded.eval()


def _processor(model: ViTModel) -> Any:
    """ImageNet's normalisation, with which all these were trained; its mean over colours for grey."""
    size = model.config.image_size
    if model.config.num_channels == 3:
        return stock_processor(size, IMAGENET_MEAN, IMAGENET_STD)
    height, width = pair(size)
    mean, std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    return MicrographImageProcessor(size={"height": height, "width": width}, image_mean=[mean], image_std=[std])


def _readme(checkpoint: Checkpoint, model: ViTModel | Objective, written: Sequence[str]) -> str:
    folders = ", ".join(f"`{part}/`" for part in written if part != "readme")
    return (
        f"---\nlicense: {checkpoint.project.licence_id}\nlibrary_name: transformers\n---\n\n"
        f"# {checkpoint.path.name}, converted\n\n"
        f"Weights of {checkpoint.project.name}, converted by `emssl convert` to {type(model).__name__}: "
        f"{folders}.\n"
        f"{model.config.num_attention_heads} attention heads, images of {model.config.image_size} pixels, "
        f"{model.config.num_channels} channel(s) in the original.\n\n"
        f"Licence: {checkpoint.project.licence}. It came with the weights and stays on them, whatever the "
        "licence of this software is.\n"
    )
