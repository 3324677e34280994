"""The recipes that come with the package, by name."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from emssl_hf.errors import EmsslError


def recipe_folder() -> Path:
    """Where the recipes lie: inside an installed wheel, or in training/ of a clone."""
    return shipped("recipes", "training")


def shipped(name: str, room: str) -> Path:
    """A folder that the wheel carries inside the package, and a clone in one of its rooms."""
    package = Path(str(files("emssl_hf")))
    packed = package / "shipped" / name
    return packed if packed.is_dir() else package.parent / room / name


def find_recipe(name: str | Path) -> Path:
    """A recipe file, by path or by the name of one that comes with the package.

    Raises EmsslError listing the names.
    """
    for candidate in (Path(name), recipe_folder() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in recipe_folder().glob("*.yaml")))
    raise EmsslError(f"There is no recipe '{name}': give the path of a YAML file, or one of {known}.")


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The settings of a recipe as nested plain values."""
    settings: dict[str, Any] = yaml.safe_load(find_recipe(name).read_text()) or {}
    return settings
