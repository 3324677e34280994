"""Self-supervised learning on electron micrographs: pretrain, fine-tune, compare, predict, embed.

The names below are loaded on first use. Importing the package registers the pretraining classes with transformers'
Auto classes, as soon as those are imported themselves.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emssl_hf import _registration

if TYPE_CHECKING:
    from emssl_hf.api import embed, finetune, predict, pretrain, study
    from emssl_hf.errors import EmsslError
    from emssl_hf.models.mae import MAEConfig, MAEForPreTraining
    from emssl_hf.models.mff import MFFConfig, MFFForPreTraining
    from emssl_hf.models.mocov3 import MoCoV3Config, MoCoV3ForPreTraining

__version__ = "0.1.0"

_HOMES = {
    "pretrain": "api",
    "finetune": "api",
    "predict": "api",
    "embed": "api",
    "study": "api",
    "EmsslError": "errors",
    "MAEConfig": "models.mae",
    "MAEForPreTraining": "models.mae",
    "MFFConfig": "models.mff",
    "MFFForPreTraining": "models.mff",
    "MoCoV3Config": "models.mocov3",
    "MoCoV3ForPreTraining": "models.mocov3",
}

__all__ = [
    "EmsslError",
    "MAEConfig",
    "MAEForPreTraining",
    "MFFConfig",
    "MFFForPreTraining",
    "MoCoV3Config",
    "MoCoV3ForPreTraining",
    "embed",
    "finetune",
    "predict",
    "pretrain",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emssl_hf' has no attribute '{name}'")
    return getattr(import_module(f"emssl_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_registration.register()
