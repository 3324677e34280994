"""How the original projects lay out their checkpoints: knowing a file, giving its tensors our names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emssl_hf.errors import EmsslError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Project:
    """Who wrote a checkpoint, how it is recognised, and how its names become ours."""

    name: str
    marker: str
    """A tensor that every checkpoint of the project holds."""
    renames: tuple[tuple[str, str], ...]
    """Patterns and replacements, applied one after another to every name."""
    licence: str
    licence_id: str
    """As the Hub writes it."""


_BLOCK = (
    (r"\b(?:norm1|ln1)\.(?=weight|bias)", "layernorm_before."),
    (r"\b(?:norm2|ln2)\.", "layernorm_after."),
    (r"\battn\.qkv\.", "attention.qkv."),
    (r"\battn\.proj\.", "attention.o_proj."),
)
_EMBEDDINGS = (
    (r"\bcls_token$", "embeddings.cls_token"),
    (r"\bpatch_embed\.(?:proj|projection)\.", "embeddings.patch_embeddings.projection."),
)
_CC_BY_NC = "Creative Commons Attribution-NonCommercial 4.0 (CC-BY-NC 4.0)"

MAE = Project(
    name="facebookresearch/mae",
    marker="patch_embed.proj.weight",
    renames=(
        (r"^decoder_pos_embed$", "decoder_position_embeddings"),
        (r"^decoder_blocks\.", "decoder_layers."),
        (r"^pos_embed$", "backbone.embeddings.position_embeddings"),
        (r"^norm\.", "backbone.layernorm."),
        (r"^(?=cls_token|patch_embed|blocks)", "backbone."),
        (r"^backbone\.blocks\.", "backbone.layers."),
        *_BLOCK,
        *_EMBEDDINGS,
    ),
    licence=_CC_BY_NC,
    licence_id="cc-by-nc-4.0",
)
MOCOV3 = Project(
    name="facebookresearch/moco-v3",
    marker="base_encoder.patch_embed.proj.weight",
    renames=(
        (r"^base_encoder\.head\.", "projector."),
        (r"^momentum_encoder\.head\.", "momentum_projector."),
        (r"^base_encoder\.", "backbone."),
        (r"^momentum_encoder\.", "momentum_backbone."),
        (r"backbone\.pos_embed$", "backbone.embeddings.position_embeddings"),
        (r"backbone\.norm\.", "backbone.layernorm."),
        (r"backbone\.blocks\.", "backbone.layers."),
        *_BLOCK,
        *_EMBEDDINGS,
    ),
    licence=_CC_BY_NC,
    licence_id="cc-by-nc-4.0",
)
MMPRETRAIN = Project(
    name="open-mmlab/mmpretrain",
    marker="backbone.patch_embed.projection.weight",
    renames=(
        (r"^neck\.decoder_pos_embed$", "decoder_position_embeddings"),
        (r"^neck\.decoder_blocks\.", "decoder_layers."),
        (r"^neck\.ln1\.", "decoder_norm."),
        (r"^neck\.(?=decoder_embed|decoder_pred|mask_token)", ""),
        (r"^backbone\.pos_embed$", "backbone.embeddings.position_embeddings"),
        (r"^backbone\.ln1\.", "backbone.layernorm."),
        (r"^backbone\.proj_layers\.", "fusion_projections."),
        (r"^backbone\.proj_weights$", "fusion_logits"),
        (r"\bffn\.layers\.0\.0\.", "mlp.fc1."),
        (r"\bffn\.layers\.1\.", "mlp.fc2."),
        *_BLOCK,
        *_EMBEDDINGS,
    ),
    licence="Apache License 2.0",
    licence_id="apache-2.0",
)
PROJECTS = (MOCOV3, MMPRETRAIN, MAE)


@dataclass(frozen=True)
class Checkpoint:
    """A file whose names are already ours."""

    path: Path
    project: Project
    tensors: Tensors
    metadata: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read .safetensors, or a pickle with `weights_only=True`; know the project; rename and split q, k, v."""
    path = Path(path)
    if not path.is_file():
        raise EmsslError(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = _read_pickle(path), {}
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for project in PROJECTS:
        if project.marker in tensors:
            return Checkpoint(path, project, _rename(tensors, project, path), metadata)
    known = ", ".join(project.name for project in PROJECTS)
    raise EmsslError(
        f"{path} is no checkpoint that can be converted: it begins with {', '.join(list(tensors)[:3])}; the "
        f"layouts known are those of {known}."
    )


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise EmsslError(f"{path} is not a readable safetensors file ({error}).") from error
    wrapped = {name: tensor for name, tensor in tensors.items() if name.startswith("state_dict.")}
    if wrapped:
        tensors = {name.removeprefix("state_dict."): tensor for name, tensor in wrapped.items()}
    return tensors, _known_metadata(metadata)


def _known_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Those settings that tensors cannot tell, where the file's metadata hold them as JSON."""
    names = ("num_attention_heads", "decoder_num_attention_heads", "fused_layers", "mask_ratio")
    return {name: json.loads(value) for name, value in metadata.items() if name in names}


def _read_pickle(path: Path) -> Tensors:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails anywhere inside torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EmsslError(
            f"{path} cannot be read as plain tensors ({reason}); nothing in it was executed. "
            "Save its state dict with safetensors and convert that."
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EmsslError(
            f"{path} holds no state dict: expected names and tensors, at most under 'model' or 'state_dict'."
        )
    return content


def _rename(tensors: Tensors, project: Project, path: Path) -> Tensors:
    """Our names; the fused rows of q, k and v become three tensors."""
    renamed: Tensors = {}
    for original, tensor in tensors.items():
        name = original
        for pattern, replacement in project.renames:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            if tensor.ndim == 0 or len(tensor) % 3:
                raise EmsslError(f"{path}: {original} of shape {tuple(tensor.shape)} is not q, k and v in equal parts.")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = rows.clone()
        else:
            renamed[name] = tensor.flatten() if name == "fusion_logits" else tensor
    return renamed
