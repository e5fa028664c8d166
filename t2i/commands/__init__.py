"""The commands of `t2i` by what they are for: drawing, measuring. Only `t2i.cli` imports them."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from t2i.shipped import find_shipped_folder

SHIPPED_MODEL = find_shipped_folder("models") / "emoji"


@contextmanager
def speed_up_imports() -> Iterator[None]:
    """The first import of torch and diffusers, a quarter faster: without the garbage collector.

    It looks again and again through a million objects that stay; nor need it do so later.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or what is left at the end looks like a leak to libraries
        gc.enable()
