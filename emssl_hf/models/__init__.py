"""Pretraining methods as PreTrainedModels: a method is one module here, or one file of a user's."""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from transformers import AutoConfig, AutoImageProcessor, AutoModelForPreTraining

from .image_processing import MicrographImageProcessor
from .objective import Objective, ObjectiveConfig, View

__all__ = [
    "MicrographImageProcessor",
    "Objective",
    "ObjectiveConfig",
    "View",
    "load_objective",
    "objective_names",
    "register_auto_classes",
]


def objective_names() -> list[str]:
    """The modules of this package that define a method, such as "mae"."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if _objectives_of(importlib.import_module(f"{__name__}.{name}")))


def load_objective(name_or_path: str | Path) -> type[Objective]:
    """The method's class, by the name of a module here ("mae") or by the path of a .py file that defines one.

    Its config class is `.config_class`. Raises ValueError that lists what there is.
    """
    if str(name_or_path).endswith(".py"):
        return _only_objective(_import_file(Path(name_or_path)), f"The file {name_or_path}")
    names = objective_names()
    if str(name_or_path) not in names:
        raise ValueError(
            f"There is no method '{name_or_path}': choose one of {', '.join(names)}, "
            "or give the path of a .py file that defines an Objective."
        )
    return _only_objective(importlib.import_module(f"{__name__}.{name_or_path}"), f"Method {name_or_path}")


def register_auto_classes() -> None:
    """Make AutoConfig, AutoModelForPreTraining and AutoImageProcessor know every method; may be repeated."""
    for name in objective_names():
        objective = load_objective(name)
        config = objective.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForPreTraining.register(config, objective, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": MicrographImageProcessor}, exist_ok=True)


def _objectives_of(module: ModuleType) -> list[type[Objective]]:
    """Methods that the module defines itself, not those it imports nor the contract."""
    found = (value for value in vars(module).values() if isinstance(value, type) and value is not Objective)
    return [value for value in found if issubclass(value, Objective) and value.__module__ == module.__name__]


def _only_objective(module: ModuleType, where: str) -> type[Objective]:
    found = _objectives_of(module)
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise ValueError(f"{where} must define exactly one subclass of Objective, and defines {names}.")
    return found[0]


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {path} to take a method from; here are {', '.join(objective_names())}.")
    name = f"emssl_objective_{path.stem}"
    if (known := sys.modules.get(name)) is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


register_auto_classes()
