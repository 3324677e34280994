"""What every pretraining method shares: config, views, random draws, freezing, strict loading."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from .backbone import freeze_positions, init_module, stock_size, vit_config
from .patches import grid_size, pair


@dataclass(frozen=True)
class View:
    """How one view of a micrograph is made; the amounts come from the method's paper.

    `crop` is "resized" (random share of the area, resized), "padded" (short edge resized, reflected padding,
    random crop) or "whole" (resized). Flips are for the loop to decide; hue, saturation and greyscale do
    nothing on grey.
    """

    size: tuple[int, int]
    """(height, width) in pixels."""
    crop: Literal["resized", "padded", "whole"] = "resized"
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the area, for "resized"."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height, for "resized"."""
    padding: int = 0
    """Pixels on each side, for "padded"."""
    brightness: float = 0.0
    contrast: float = 0.0
    jitter_probability: float = 0.8
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Pixels."""
    solarize_probability: float = 0.0


# What transformers itself writes into config.json or passes on, beyond the declared fields.
_BOOKKEEPING = frozenset(
    (
        *(
            "model_type",
            "auto_map",
            "architectures",
            "transformers_version",
            "name_or_path",
            "custom_pipelines",
        ),
        *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "per_layer_config"),
        *("num_labels", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "use_cache"),
        *("return_dict", "output_attentions", "output_hidden_states", "tie_last_hidden_states"),
        *(
            "is_encoder_decoder",
            "is_decoder",
            "tie_word_embeddings",
            "base_model_tp_plan",
            "base_model_pp_plan",
        ),
    )
)


@strict
class ObjectiveConfig(PreTrainedConfig):
    """The vision transformer inside every method; a method's config adds its own fields."""

    model_type = "emssl_objective"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    initializer_range: float = 0.02
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 1
    position_temperature: float | int = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        self.image_size = stock_size(self.image_size)
        grid_size(self.image_size, self.patch_size)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        rows, columns = self.grid
        return rows * columns

    def backbone_config(self) -> ViTConfig:
        """The config of the stock ViTModel inside."""
        return vit_config(vars(self), attn_implementation=self._attn_implementation)

    def _refuse_unknown(self, kwargs: Iterable[str]) -> None:
        known = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:
            if name in _BOOKKEEPING or name.startswith("_"):
                continue
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"{type(self).__name__} has no setting '{name}'; the nearest is '{nearest[0]}'.")


class Objective(PreTrainedModel):
    """Base of every pretraining method: a stock ViTModel in `backbone`, and what the method adds around it.

    A method sets `config_class`, builds its modules in __init__, calls `post_init()` last, and returns a
    ModelOutput with `loss` first from `forward(pixel_values, ...)`.
    """

    config_class = ObjectiveConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    title: ClassVar[str]
    paper: ClassVar[str]
    """Address of the paper."""
    citation: ClassVar[str]
    """BibTeX."""
    training_arguments: ClassVar[dict[str, Any]] = {}
    """Extra forward arguments in the training loop."""

    backbone: ViTModel

    @classmethod
    def views(cls, config: Any) -> tuple[View, ...]:
        """The views that `pixel_values` holds: one gives (B, C, H, W), k give (B, k, C, H, W)."""
        return (View(size=pair(config.image_size)),)

    @classmethod
    def draws(cls, config: Any) -> dict[str, int]:
        """Forward arguments that are uniform random numbers in [0, 1): name -> how many per sample."""
        return {}

    def after_step(self, progress: float) -> None:
        """Called once after every optimizer step; `progress` runs from 0 to 1 over the training."""

    def backbone_replaced(self) -> None:
        """Called when the backbone has been given other weights, before training: what is derived from it follows."""

    def freeze(self) -> None:
        """Take what the method does not train from the optimizer; extended by methods that freeze more."""
        freeze_positions(self.backbone)

    def post_init(self) -> None:
        """Initialise the weights, then freeze."""
        super().post_init()
        self.freeze()

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load strictly, and freeze again, for loading by way of the meta device forgets it.

        Raises ValueError naming tensors that the files lack or hold too many of.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys"):
            if names := sorted(info[problem]):
                raise ValueError(
                    f"{cls.__name__} at {args[0] if args else 'the given place'}: {len(names)} "
                    f"{problem.replace('_', ' ')}, first {names[0]}; these weights belong to another model."
                )
        model.freeze()
        return (model, info) if with_info else model
