"""Second names for packages: `pipelines` and `training` in a checkout are `t2i.pipelines` and `t2i.training`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AliasFinder(MetaPathFinder, Loader):
    """An import hook that returns the modules below `package` for names below `alias`, never a second copy."""

    def __init__(self, alias: str, package: str):
        self.alias, self.package = alias, package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{self.alias}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.package + spec.name.removeprefix(self.alias))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just replaced the spec of the module by that of the alias: put it back.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def alias_package(alias: str, package: str) -> None:
    """Make `import alias` and everything below it return the modules of `package`."""
    sys.modules[alias] = import_module(package)
    sys.meta_path.insert(0, AliasFinder(alias, package))
