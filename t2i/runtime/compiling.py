"""`torch.compile` for a denoiser's steps."""

import copy
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2i.errors import InputError

RECOMPILE_LIMIT = 2**16  # torch stops compiling after 8 sets of shapes and runs the rest uncompiled, without an error


class CompiledStep:
    """A denoiser's `step`, compiled again for each new set of shapes: fixed shapes give the fastest code."""

    def __init__(self, step: Callable[..., Tensor], backend: str | Callable[..., Any] = "inductor"):
        self.step, self.backend = step, backend
        self.compiled = torch.compile(step, dynamic=False, backend=backend)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledStep":
        # A compiled function is copied as it is, bound to the weights of the original denoiser.
        return CompiledStep(copy.deepcopy(self.step, memo), self.backend)

    def __call__(self, x: Tensor, t: Tensor, context: Any) -> Tensor:
        from torch._dynamo import config
        from torch._dynamo.exc import ShortenTraceback  # the base of every backend's failure, a missing Triton included

        try:
            with config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
                return self.compiled(x, t, context)
        except ShortenTraceback as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"the decoder cannot be compiled here ({reason:.200}); leave out compile") from error


def compile_steps(denoiser: Any, backend: str | Callable[..., Any] = "inductor") -> CompiledStep:
    """Compile a denoiser's steps from now on, and return the compiled step. Raises InputError without a compiler."""
    if backend == "inductor":
        check_compiler()
    if not isinstance(denoiser.step, CompiledStep):
        denoiser.step = CompiledStep(denoiser.step, backend)
    return denoiser.step


def check_compiler() -> None:
    """Raise InputError if there is no C++ compiler. torch needs it on GPUs too, beside Triton."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # torch's own choice
    if shutil.which(name) is None:
        raise InputError(f"compile needs a C++ compiler, but {name} is not installed; install it or set CXX to another")
