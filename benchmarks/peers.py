"""Import dalle2-pytorch, which is installed for comparisons only, in benchmarks and in tests.

It is installed without its dependencies (see the Makefile): they include an older open_clip than this project has, and
libraries that its priors and U-Nets do not use. Empty modules stand in for those that are absent.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from typing import Any

import diffusers  # noqa: F401  (before the empty modules: it looks for some of those libraries)

from t2i.errors import InputError

NEEDED = ("dalle2_pytorch", "einops", "rotary_embedding_torch")
UNUSED = {  # modules that it imports at its start, with the names that it takes from them
    "kornia": (),
    "kornia.filters": ("gaussian_blur2d",),
    "kornia.augmentation": (),
    "vector_quantize_pytorch": ("VectorQuantize",),
    "resize_right": ("resize",),
    "x_clip": ("CLIP",),
    "coca_pytorch": ("CoCa",),
    "pytorch_warmup": (),
    "ema_pytorch": ("EMA",),
}


def import_dalle2_pytorch() -> Any:
    """Return the module `dalle2_pytorch.dalle2_pytorch`. Raises InputError where it is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} not installed: `make test` installs what is compared with here")
    absent = [name for name in UNUSED if importlib.util.find_spec(name.split(".")[0]) is None]
    for name in absent:
        module: Any = types.ModuleType(name)
        module.__path__ = []
        for part in UNUSED[name]:
            setattr(module, part, type(part, (), {}))
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules[name.split(".")[0]], name.split(".")[1], module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("dalle2_pytorch.dalle2_pytorch")
    finally:
        for name in absent:
            del sys.modules[name]


def has_dalle2_pytorch() -> bool:
    """Return True if dalle2-pytorch is installed; print a line if not."""
    try:
        import_dalle2_pytorch()
    except InputError as missing:
        print(missing, file=sys.stderr)
        return False
    return True
