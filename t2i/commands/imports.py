"""Quick imports of torch and diffusers, for commands that draw."""

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

UNUSED_IN_DRAWING = ("peft", "timm")  # diffusers imports the one and open_clip the other, if they are installed
COMPILER = "torch._dynamo"
# What these versions want of the compiler while they are imported is known; others import it
KNOWN_VERSIONS = {"torch": "2.15.", "diffusers": "0.42.", "transformers": "5.23."}


@contextmanager
def speed_up_imports(without: Sequence[str] = UNUSED_IN_DRAWING, needs_compiler: bool = False) -> Iterator[None]:
    """Import torch and diffusers for the first time without the garbage collector and without some packages.

    The collector would search a million objects that stay, again and again; later it ignores them. A package in
    `without` seems not to be installed while modules are imported; afterwards it can be imported.

    Args:
        needs_compiler: False leaves out torch's compiler too, a tenth of the imports' time, until something uses it.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    try:
        with nullcontext() if needs_compiler or not is_compiler_deferrable() else defer_compiler():
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


class DeferredCompiler(ModuleType):
    """`torch._dynamo` while libraries are imported: it keeps the functions that they mark as not to be compiled.

    Whatever else is wanted of it runs the module's own code, in place.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        sys.modules.pop(f"{COMPILER}.utils", None)
        spec.loader.exec_module(self)
        return getattr(self, name)


class LaterCompiler:
    """`torch._dynamo` as an attribute of torch, until the compiler is imported."""

    eval_frame = NoCompiledModel

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(COMPILER), name)


def keep_function(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Return a decorated function as it is."""
    return (lambda decorated: decorated) if function is None else function


def is_compile_supported(device: Any) -> bool:
    """Return what the compiler's own function of this name returns; torchvision calls it before it compiles."""
    return import_module(f"{COMPILER}.utils").is_compile_supported(device)


@contextmanager
def defer_compiler() -> Iterator[None]:
    """Let libraries be imported without torch's compiler and scipy.stats. Afterwards the first use imports them."""
    import torch

    spec = find_spec(COMPILER)
    if spec is None or COMPILER in sys.modules:
        yield
        return
    compiler, utils = module_from_spec(spec), ModuleType(f"{COMPILER}.utils")
    compiler.__class__ = DeferredCompiler
    decorators = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), keep_function)
    vars(compiler).update(decorators, eval_frame=NoCompiledModel)
    vars(utils).update(is_compile_supported=is_compile_supported)
    # diffusers' schedulers import scipy.stats where scipy is installed, for spacings that few use
    stand_ins = {COMPILER: compiler, utils.__name__: utils, "scipy.stats": ModuleType("scipy.stats")}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        is_deferred = isinstance(compiler, DeferredCompiler)
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module and (is_deferred or name != COMPILER):
                del sys.modules[name]
        if is_deferred:
            torch._dynamo = LaterCompiler()


def is_compiler_deferrable() -> bool:
    """Return whether it is known what the installed libraries want of torch's compiler while they are imported."""
    return all(version(name).startswith(known) for name, known in KNOWN_VERSIONS.items())
