"""A denoiser's steps compiled: for many pictures of one size, for compiling takes its time."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2i.errors import InputError

logger = logging.getLogger(__name__)


class CompiledStep:
    """A denoiser's `step`, compiled anew for every shape: static shapes make the fastest code.

    warm_up: seconds that the first step took of each shape of x; the log says them too.
    """

    def __init__(self, step: Callable[..., Tensor], backend: str = "inductor"):
        self.compiled = torch.compile(step, dynamic=False, backend=backend)
        self.warm_up: dict[tuple[int, ...], float] = {}

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor:
        shape = tuple(x.shape)
        if shape in self.warm_up:
            return self.compiled(x, t, context)
        from torch._dynamo.exc import BackendCompilerFailed  # a second or two, for who compiles alone

        logger.warning("compiling the decoder for noisy latents %s", shape)  # the command line shows warnings
        begun = time.perf_counter()
        try:
            out = self.compiled(x, t, context)
        except BackendCompilerFailed as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"the decoder cannot be compiled here ({why:.200}); leave out compile") from error
        self.warm_up[shape] = time.perf_counter() - begun
        logger.warning(
            "compiled the decoder for noisy latents %s: the first step took %.1f s", shape, self.warm_up[shape]
        )
        return out


def compile_steps(denoiser: Any, backend: str = "inductor") -> CompiledStep:
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
