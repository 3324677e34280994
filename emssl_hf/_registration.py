"""Registers our classes with transformers' Auto classes, without importing torch for those who only want `--help`.

Where the Auto classes are loaded already this happens at once, else at the end of the import that loads them: until
then parts of transformers are half initialised, and our models could not import them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register now, or as soon as somebody imports the Auto classes."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    """The models register themselves when imported."""
    import_module("emssl_hf.models")


class _Watcher(MetaPathFinder):
    """Counts how many modules of transformers are being imported inside one another."""

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec

    def left(self) -> None:
        """A module is done: register after the outermost one, once the Auto classes are among them."""
        self.depth -= 1
        if self.depth == 0 and AUTO in sys.modules:
            sys.meta_path.remove(self)
            _register()


class _Counted(Loader):
    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader, self.watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # the module keeps no trace of having been watched
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watcher.depth += 1
        try:
            self.loader.exec_module(module)
        except BaseException:
            self.watcher.depth -= 1
            raise
        self.watcher.left()
