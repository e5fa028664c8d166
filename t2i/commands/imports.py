"""Quick imports of torch and diffusers, for commands that draw."""

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

UNUSED_IN_DRAWING = ("peft", "timm")  # diffusers imports the one and open_clip the other, if they are installed
COMPILER = "torch._dynamo"
LIGHT_MODULES = (f"{COMPILER}._trace_wrapped_higher_order_op",)  # of the compiler, which transformers imports
# What these versions want of the compiler while they are imported is known; others import it
KNOWN_VERSIONS = {"torch": "2.15.", "diffusers": "0.42.", "transformers": "5.23."}


@contextmanager
def speed_up_imports(without: Sequence[str] = UNUSED_IN_DRAWING, needs_compiler: bool = False) -> Iterator[None]:
    """Import torch and diffusers for the first time without the garbage collector and without some packages.

    The collector would search a million objects that stay, again and again; later it ignores them. A package in
    `without` seems not to be installed while modules are imported; afterwards it can be imported.

    Args:
        needs_compiler: False leaves out torch's compiler too, a sixth of the time to an image, until something uses it.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    try:
        if not needs_compiler and is_compiler_deferrable():
            defer_unused_modules()
        yield
    finally:
        for name in without:
            del sys.modules[name]
        gc.freeze()
        # Without this, libraries report what is left at exit as a leak.
        atexit.register(gc.unfreeze)
        gc.enable()


class NoCompiledModel:
    """A stand-in for the compiler's `eval_frame`: before the compiler is imported no model is compiled."""

    class OptimizedModule:
        pass


class DeferredModule(ModuleType):
    """A module that answers what libraries ask of it at first, and runs its code, in place, once more is wanted."""

    answers: dict[str, Any]

    @classmethod
    def install(cls, name: str, **answers: Any) -> None:
        """Put a module into the table of imported ones, if it is installed and not imported yet."""
        if name in sys.modules or (spec := find_spec(name)) is None:
            return
        module = module_from_spec(spec)
        module.__class__ = cls
        vars(module).update(answers, answers=answers)
        # As an attribute of its package too, as an import would set it
        package, _, part = name.rpartition(".")
        sys.modules[name] = vars(sys.modules[package])[part] = module

    def __getattr__(self, name: str) -> Any:
        # `inspect` asks every module for its file and the like, which is no use of it
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Run the module's code, after that of the package that it belongs to."""
        if (package := find_deferred(self.__name__.rpartition(".")[0])) is not None:
            package.load()
        # The package may have loaded it
        if isinstance(self, DeferredModule):
            for name in [*self.answers, "answers"]:
                del vars(self)[name]
            self.__class__ = ModuleType  # type: ignore[assignment]
            assert self.__spec__ is not None and self.__spec__.loader is not None, "it was found"
            self.__spec__.loader.exec_module(self)


class DeferredFinder(MetaPathFinder):
    """Loads a deferred package before any module of it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = find_deferred(name.rpartition(".")[0])
        if package is None or name in LIGHT_MODULES:
            return None
        package.load()
        # Not a second time: there would be two copies of its functions and settings
        return spec_from_loader(name, ImportedLoader()) if name in sys.modules else None


class ImportedLoader(Loader):
    """Returns a module that its package has imported in the meantime."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


def find_deferred(name: str) -> DeferredModule | None:
    module = sys.modules.get(name)
    return module if isinstance(module, DeferredModule) else None


def keep_function(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Return a decorated function as it is."""
    return (lambda decorated: decorated) if function is None else function


def is_compile_supported(device: Any) -> bool:
    """Return what the compiler's own function of this name returns; torchvision calls it before it compiles."""
    if (utils := find_deferred(f"{COMPILER}.utils")) is not None:
        utils.load()
    return import_module(f"{COMPILER}.utils").is_compile_supported(device)


def defer_unused_modules() -> None:
    """Let libraries import torch's compiler and scipy.stats without loading them before something uses them.

    They import the compiler to mark functions that are not to be compiled, and to see whether a model is compiled;
    diffusers' schedulers import scipy.stats for spacings that few use.
    """
    # Used at import by diffusers, transformers and diffusers' hooks, in this order
    decorators = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), keep_function)
    DeferredModule.install(COMPILER, **decorators, eval_frame=NoCompiledModel)
    DeferredModule.install(f"{COMPILER}.utils", is_compile_supported=is_compile_supported)
    if find_spec("scipy") is not None:
        DeferredModule.install("scipy.stats")
    # After these, whose own search would load what they defer
    sys.meta_path.insert(0, DeferredFinder())


def is_compiler_deferrable() -> bool:
    """Return whether it is known what the installed libraries want of torch's compiler while they are imported."""
    return all(version(name).startswith(known) for name, known in KNOWN_VERSIONS.items())
