"""The user's callbacks after each step, as diffusers' pipelines call them, and what they may change."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from t2i.checks import check_range
from t2i.diffusion.denoiser import Predict
from t2i.diffusion.guidance import Guidance
from t2i.errors import InputError
from t2i.texts import wrap_text

# Tensors that a callback may ask for. Those of the decoder are its condition, "negative_" what it is guided away from.
PRIOR_CALLBACK_TENSORS = ("latents",)
CALLBACK_TENSORS = ("latents", "image_embeds", "negative_image_embeds", "prompt_embeds", "negative_prompt_embeds")

UserCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class CallState:
    """State of one running call. interrupted: it ends after this step; ends_stage: its stage does."""

    guidance_scale: float | None = None
    num_timesteps: int | None = None
    interrupted: bool = False
    ends_stage: bool = False


class RunningCalls:
    """The states of the calls of one pipeline: those that run, by thread, and the one that ended last."""

    def __init__(self) -> None:
        self.by_thread: dict[int, list[CallState]] = {}  # a call may run inside another
        self.last = CallState()

    def find_own(self) -> CallState | None:
        """Return the state of the call that runs in this thread."""
        states = self.by_thread.get(threading.get_ident())
        return states[-1] if states else None

    def find_affected(self) -> list[CallState]:
        """Return the states that this thread may set: of its own call, or of all that run in other threads."""
        own = self.find_own()
        running = [state for states in list(self.by_thread.values()) for state in list(states)]
        return [own] if own is not None else running or [self.last]


# Not in the pipelines, for a copy of one has calls of its own
RUNNING: WeakKeyDictionary[Any, RunningCalls] = WeakKeyDictionary()
RUNNING_LOCK = threading.Lock()


class CallbackState:
    """Base of all pipelines: what callbacks read, and set, on the pipeline, under diffusers' names.

    Calls in several threads have a state each: a callback reads and sets that of its own call, any other thread sets
    those of all that run. `_guidance_scale` may be set: from the next step on it is the scale; None, and 1 or less, is
    no guidance. `_interrupt = True` ends the stage after this step, and what is there is decoded.
    """

    @property
    def running_calls(self) -> RunningCalls:
        """The states of this pipeline's calls."""
        with RUNNING_LOCK:
            return RUNNING.setdefault(self, RunningCalls())

    @property
    def call_state(self) -> CallState:
        """The state of the call that runs in this thread; of the one that ended last, if there is none."""
        return self.running_calls.find_own() or self.running_calls.last

    @contextmanager
    def track_call(self) -> Iterator[None]:
        """Enter a call of this thread."""
        calls, thread = self.running_calls, threading.get_ident()
        states = calls.by_thread.setdefault(thread, [])
        states.append(CallState())
        try:
            yield
        finally:
            calls.last = states.pop()
            if not states:
                del calls.by_thread[thread]

    def set_call_state(self, **values: Any) -> None:
        """Set fields of the state of this thread's call; of all running calls, if it has none."""
        for state in self.running_calls.find_affected():
            vars(state).update(values)

    @property
    def _guidance_scale(self) -> float | None:
        return self.call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float | None) -> None:
        self.set_call_state(guidance_scale=scale)

    @property
    def _num_timesteps(self) -> int | None:
        return self.call_state.num_timesteps

    @property
    def _interrupt(self) -> bool:
        return self.call_state.ends_stage

    @_interrupt.setter
    def _interrupt(self, ends_stage: bool) -> None:
        self.set_call_state(ends_stage=ends_stage)

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of the stage that runs with a callback, or ran last; None before."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if that stage goes beyond its condition."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """Number of its steps."""
        return self._num_timesteps


class ConditionCallback:
    """The user's callback after each step of a stage, and the prediction by what it changed.

    Args:
        pipeline: argument of the callback, with its `CallbackState`.
        callback: the user's function.
        names: list of the tensors that it gets; None is "latents" alone. A callback of diffusers names them itself.
        guidance: settings of the stage.
        conditions: the condition, and the negative one.
        build_predict: builds the prediction from the two conditions and a guidance.
        allowed: names of the tensors that the callback may change.
    """

    def __init__(
        self,
        pipeline: Any,
        callback: UserCallback,
        names: list[str] | None,
        guidance: Guidance,
        conditions: tuple[Any, Any],
        build_predict: Callable[[Any, Any, Guidance], Predict],
        allowed: tuple[str, ...] = CALLBACK_TENSORS,
    ):
        self.pipeline, self.callback, self.guidance = pipeline, callback, guidance
        self.names = list_tensor_names(callback, names)
        self.conditions = {"": conditions[0], "negative_": conditions[1]}
        self.build_predict, self.allowed = build_predict, allowed
        self.built: tuple[Guidance, Predict] | None = None
        pipeline._guidance_scale = guidance.scale

    def transform(self, predict: Predict) -> Predict:
        """Return a prediction that is `predict` until the callback changes the guidance or a condition."""
        self.built = (self.guidance, predict)

        def predict_by_state(x: Tensor, t: Tensor) -> Tensor:
            guidance = self.read_guidance()
            if self.built is None or self.built[0] != guidance:
                self.built = guidance, self.build_predict(self.conditions[""], self.conditions["negative_"], guidance)
            return self.built[1](x, t)

        return predict_by_state

    def read_guidance(self) -> Guidance:
        """Return the guidance with the scale that the pipeline has now; None, and 1 or less if changed, are off."""
        scale = self.pipeline._guidance_scale
        if scale is None:
            scale = 1.0
        check_range("_guidance_scale", scale, -math.inf, math.inf)
        if scale == self.guidance.scale:
            return self.guidance
        return replace(self.guidance, scale=float(scale) if scale > 1 else 1.0)

    def on_step(self, step: int, t: Tensor, x: Tensor) -> Tensor:
        """Call the callback, take what it returns, and return the latents. None changes nothing."""
        tensors = {name: x if name == "latents" else self.read_tensor(name) for name in self.names}
        # Copies, so that what a callback changes in place is seen
        handed = {name: tensor if name == "latents" else tensor.clone() for name, tensor in tensors.items()}
        returned = self.callback(self.pipeline, step, t, handed)
        if returned is None:
            returned = handed
        if not isinstance(returned, dict):
            raise InputError(f"callback_on_step_end must return a dict or None, got a {type(returned).__name__}")
        for name, value in returned.items():
            if name == "latents":
                check_returned(name, value, x)
                x = value.to(x)
            elif name not in self.allowed:
                known = ", ".join(self.allowed)
                raise InputError(f"callback_on_step_end returned {name!r}; it may return {known}")
            else:
                self.take_tensor(name, value)
        return x

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor of a condition, with a row for each image; without columns if the stage reads no such one."""
        condition = self.conditions["negative_" if name.startswith("negative_") else ""].expand()
        if name.endswith("image_embeds"):
            return condition.embedding
        text = condition.text
        return condition.embedding.new_empty(len(condition), 0, 0) if text is None else text.states

    def take_tensor(self, name: str, value: Any) -> None:
        """Put a tensor into its condition. Nothing changes for the same values, and for the last rows of the same."""
        present = self.read_tensor(name)
        # Callbacks of diffusers drop the rows without a condition, which come first there, and are not here
        if isinstance(value, Tensor) and 0 < len(value) < len(present) and torch.equal(value, present[-len(value) :]):
            return
        check_returned(name, value, present)
        if torch.equal(value, present):
            return
        key = "negative_" if name.startswith("negative_") else ""
        condition, value = self.conditions[key].expand(), value.to(present)
        if name.endswith("image_embeds"):
            self.conditions[key] = replace(condition, embedding=value)
        else:
            self.conditions[key] = replace(condition, text=replace(condition.text, states=value))
        self.built = None


def check_returned(name: str, value: Any, present: Tensor) -> None:
    """Refuse what a callback returned unless it is a finite tensor of the present shape."""
    if not isinstance(value, Tensor) or value.shape != present.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"callback_on_step_end must return {name} as a tensor {tuple(present.shape)}, got {got}")
    if not value.isfinite().all():
        raise InputError(f"callback_on_step_end returned {name} with NaN or infinity")


def list_tensor_names(callback: Any, names: list[str] | None) -> list[str]:
    """Return the names of the tensors that a callback gets."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        return list(dict.fromkeys(callback.tensor_inputs))
    return ["latents"] if names is None else list(wrap_text(names))


def check_callback(name: str, callback: Any, names: list[str] | None, allowed: tuple[str, ...]) -> None:
    """Refuse what cannot be called, and tensors that a stage does not have."""
    if callback is not None and not callable(callback):
        raise InputError(f"{name} must be a function or a callback of diffusers, got {callback!r:.80}")
    parts = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    if any(isinstance(part, IPAdapterScaleCutoffCallback) for part in parts):
        raise InputError(f"{name} is an IPAdapterScaleCutoffCallback, but these models have no IP-Adapter")
    if unknown := [part for part in list_tensor_names(callback, names) if part not in allowed]:
        raise InputError(f"{name}_tensor_inputs may contain {', '.join(map(repr, allowed))}; got {unknown[0]!r}")


def watch_interruption(pipeline: Any, progress: Callable[[Iterable], Iterable]) -> Callable[[Any], Iterator]:
    """Return what iterates over the timesteps of a stage, until `_interrupt` is set, and counts them before."""

    def iterate(timesteps: Any) -> Iterator:
        pipeline.set_call_state(num_timesteps=len(timesteps))
        for t in progress(timesteps):
            if pipeline._interrupt:
                break
            yield t
        pipeline._interrupt = False  # the next stage runs

    return iterate
