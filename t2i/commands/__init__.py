"""Commands of `t2i`, by topic. Only `t2i.cli` imports them."""

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from t2i.shipped import find_shipped_folder

SHIPPED_MODEL = find_shipped_folder("models") / "emoji"
UNUSED_IN_DRAWING = ("peft", "timm")  # diffusers imports the one and open_clip the other, if they are installed


@contextmanager
def speed_up_imports(without: Sequence[str] = UNUSED_IN_DRAWING) -> Iterator[None]:
    """Import torch and diffusers for the first time without the garbage collector and without some packages.

    The collector would search a million objects that stay, again and again; later it ignores them. A package in
    `without` seems not to be installed while modules are imported; afterwards it can be imported.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
    try:
        yield
    finally:
        for name in without:
            del sys.modules[name]
        gc.freeze()
        # Without this, libraries report what is left at exit as a leak.
        atexit.register(gc.unfreeze)
        gc.enable()
