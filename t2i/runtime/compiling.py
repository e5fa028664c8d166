"""A denoiser's steps compiled: for many pictures of one size, for compiling takes its time."""

import copy
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from t2i.errors import InputError

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = (
    2**16
)  # compilations of a step; torch's own limit is 8, beyond which it does not compile and does not say so

# Shape, dtype and device of x, of the timesteps and of what the context holds: captions of another length are another.
ShapeKey: TypeAlias = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


class CompiledStep:
    """A denoiser's `step`, compiled anew for whatever has other shapes: static shapes make the fastest code.

    warm_up: seconds that the first step took of each `ShapeKey`; the log says them too.
    """

    def __init__(self, step: Callable[..., Tensor], backend: str | Callable[..., Any] = "inductor"):
        self.step, self.backend = step, backend
        self.compiled = torch.compile(step, dynamic=False, backend=backend)
        self.warm_up: dict[ShapeKey, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledStep":
        return CompiledStep(copy.deepcopy(self.step, memo), self.backend)  # of the copied denoiser

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor:
        from torch._dynamo import config  # a second or two, for who compiles alone
        from torch._dynamo.exc import ShortenTraceback  # what every backend's failure is, and Triton's absence

        key: ShapeKey = tuple((tuple(one.shape), one.dtype, one.device) for one in iterate_tensors((x, t, context)))
        with config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            if key in self.warm_up:
                return self.compiled(x, t, context)
            what = self.format_shape_key(key)
            logger.warning("compiling the decoder for %s", what)  # the command line shows warnings
            begun = time.perf_counter()
            try:
                out = self.compiled(x, t, context)
            except ShortenTraceback as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise InputError(f"the decoder cannot be compiled here ({why:.200}); leave out compile") from error
        self.warm_up[key] = time.perf_counter() - begun
        logger.warning("compiled the decoder for %s: the first step took %.1f s", what, self.warm_up[key])
        return out

    def format_shape_key(self, key: ShapeKey) -> str:
        """The noisy latents, and what is new in the context where such latents were compiled before."""
        text = f"noisy latents {key[0][0]}"
        before = next((one for one in reversed(self.warm_up) if one[0] == key[0]), None)
        new = before and next((mine for mine, other in zip_longest(key, before) if mine and mine != other), None)
        return f"{text} and a context with {new[0]} of {str(new[1]).removeprefix('torch.')}" if new else text


def iterate_tensors(tree: Any) -> Iterator[Tensor]:
    """All of them in containers and dataclasses, in their order."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from iterate_tensors([getattr(leaf, field.name) for field in fields(leaf)])


def compile_steps(denoiser: Any, backend: str | Callable[..., Any] = "inductor") -> CompiledStep:
    """Compile a denoiser's steps from now on. Raises InputError where there is no compiler."""
    if backend == "inductor":
        check_compiler()
    if not isinstance(denoiser.step, CompiledStep):
        denoiser.step = CompiledStep(denoiser.step, backend)
    return denoiser.step


def check_compiler() -> None:
    """torch writes C++ for processors and needs a compiler of it on GPUs too, where Triton writes the rest."""
    named = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # which torch takes
    if shutil.which(named) is None:
        raise InputError(f"compile needs a C++ compiler, and there is no {named} here; install one, or name one as CXX")
