"""Arguments that have no effect: without others, beside others, or on this model. A call names each in one line.

The conditions are declared with the arguments: of options in the metadata of their fields, of a pipeline's own
arguments in `declare_pipeline_call`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import resolve_sampler
from t2i.networks.regression_prior import RegressionPrior

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenCall:
    """A call of a pipeline before it begins.

    given: its arguments, without those that are None or empty texts. resolve: returns the checked options.
    """

    pipeline: Any
    given: Mapping[str, Any]
    resolve: Callable[[], Any]

    @cached_property
    def options(self) -> Any:
        # Resolved when a case first asks: most calls need no options here
        return self.resolve()

    @property
    def prior(self) -> Any:
        return getattr(self.pipeline, "prior", None)

    def has(self, name: str) -> bool:
        """Return whether an argument is given, and not as 0 or False, which switch it off."""
        value = self.given.get(name)
        return value is not None and not (isinstance(value, int) and value == 0)

    @property
    def anchors(self) -> list[Any]:
        """The anchors of an interpolation, of which a str is a text."""
        anchors = self.given.get("anchors", [])
        return list(anchors) if isinstance(anchors, list | tuple) else [anchors]

    @property
    def has_texts(self) -> bool:
        """True if there is a text from which the prior makes z_i."""
        anchors = any(isinstance(anchor, str) for anchor in self.anchors)
        return anchors or self.has("prompt") or self.has("prompt_embeds") or self.given.get("direction") == "prior"

    @property
    def inverts_images(self) -> bool:
        """True if an interpolation has images among its anchors."""
        return not all(isinstance(anchor, str) for anchor in self.anchors)

    @property
    def derives_negatives(self) -> bool:
        """True if the prior makes the z_i that the decoder is guided away from."""
        return self.has("decoder_negative_prompt") and not self.has("negative_image_embeds")

    @property
    def reads_captions(self) -> bool:
        return self.pipeline.decoder.config.text_width is not None

    @property
    def is_decoder_guided(self) -> bool:
        # A callback may change the scale
        return not self.options.decoder.guidance_scale.is_off or self.has("callback_on_step_end")

    @property
    def is_prior_guided(self) -> bool:
        guided = not self.options.prior.prior_guidance_scale.is_off or self.has("prior_callback_on_step_end")
        return self.prior is not None and guided and self.has_texts and not self.has("image_embeds")

    @property
    def clips_samples(self) -> bool:
        """True if the decoder's scheduler bounds its clean samples."""
        name, pipeline = self.options.decoder.sampler, self.pipeline
        config = resolve_sampler(name, pipeline.decoder_scheduler, pipeline.decoder).config
        return bool(config.get("clip_sample") or config.get("thresholding"))


@dataclass(frozen=True)
class Idle:
    """A case in which an argument has no effect. reason: text after "NAME has no effect"."""

    reason: str
    holds: Callable[[GivenCall], bool]


def require_argument(name: str) -> Idle:
    """Return the case of an argument that has an effect only with another one, `name`."""
    return Idle(f" without {name}", lambda call: not call.has(name))


def exclude_argument(name: str, reason: str = "", holds: Callable[[GivenCall], bool] = lambda call: True) -> Idle:
    """Return the case of an argument that another one, `name`, replaces. holds: further condition of it."""
    return Idle(f" beside {name}{reason}", lambda call: call.has(name) and holds(call))


def is_scale_alone(guidance: Guidance) -> bool:
    return not guidance.is_off or guidance == Guidance(guidance.scale)


def names_its_tensors(callback: Any) -> bool:
    """Return True for callbacks of diffusers, which list the tensors that they take."""
    return isinstance(callback, PipelineCallback | MultiPipelineCallbacks)


# Cases that several arguments share
NO_PRIOR = (
    Idle(": this model has no prior", lambda call: call.prior is None),
    exclude_argument(
        "image_embeds", ", in place of which the prior would run", lambda call: not call.derives_negatives
    ),
    Idle(" without direction='prior'", lambda call: call.has("source") and not call.has_texts),
    Idle(" without a text, for which the prior would run", lambda call: not (call.has_texts or call.derives_negatives)),
)
ONE_PASS = Idle(": this prior does not denoise in steps", lambda call: not call.prior.needs_scheduler)
ONE_ANSWER = Idle(": this prior has one answer to a text", lambda call: isinstance(call.prior, RegressionPrior))
PRIOR_SCALE_OFF = Idle(
    " beyond its scale: 1 is no guidance", lambda call: not is_scale_alone(call.options.prior.prior_guidance_scale)
)
SCALE_OFF = Idle(
    " beyond its scale: 1 is no guidance",
    lambda call: not (call.has("guidance_rescale") or is_scale_alone(call.options.decoder.guidance_scale)),
)
UNGUIDED_PRIOR = Idle(
    ": it guides the prior, which is not guided or not used here", lambda call: not call.is_prior_guided
)
UNGUIDED_DECODER = Idle(": the decoder is not guided", lambda call: not call.is_decoder_guided)
NO_CAPTIONS = Idle(": this decoder reads no captions", lambda call: not call.reads_captions)
UNREAD_PROMPT = exclude_argument(
    "image_embeds", ", for this decoder reads no captions", lambda call: not call.reads_captions
)
UNREAD_NEGATIVE = exclude_argument(
    "negative_image_embeds", ", for this decoder reads no captions", lambda call: not call.reads_captions
)
NO_CLIPPING = Idle(": this scheduler clips nothing", lambda call: not call.clips_samples)
NO_IMAGES = Idle(" without images among the anchors", lambda call: not call.inverts_images)
UNFINISHED = Idle(" on latents, which are not decoded", lambda call: call.given.get("output_type") == "latent")


def list_named_tensors(callback: str) -> tuple[Idle, Idle]:
    """Return when the names of a callback's tensors have no effect."""
    reason = f" beside this {callback}, which names its tensors itself"
    return require_argument(callback), Idle(reason, lambda call: names_its_tensors(call.given.get(callback)))


@dataclass(frozen=True)
class CallEffects:
    """Facts about the arguments of a pipeline's call: their defaults, the options among them, their conditions."""

    defaults: Mapping[str, Any]
    options: frozenset[str]
    idle: Mapping[str, tuple[Idle, ...]]


def warn_of_idle_arguments(pipeline: Any, arguments: Mapping[str, Any], resolved: Any = None) -> Any:
    """Log each argument that has no effect, in one line with the reason; return the options, None if none was needed.

    See `list_idle_arguments`. A job that calls the pipeline many times with the same arguments calls this once.
    """
    lines, options = list_idle_arguments(pipeline, arguments, resolved)
    for line in lines:
        logger.warning("%s", line)
    return options


def list_idle_arguments(pipeline: Any, arguments: Mapping[str, Any], resolved: Any = None) -> tuple[list[str], Any]:
    """Return a line for each argument that has no effect, which begins with its name; and the options, if needed.

    arguments: of the pipeline's call, those that were given; one with its default value is not named. resolved: the
    options, if they are resolved already.
    """
    call_method: Any = type(pipeline).__call__
    effects: CallEffects = call_method.effects

    def resolve() -> Any:
        options = {name: value for name, value in call.given.items() if name in effects.options}
        if "inverted" in effects.defaults:  # images are inverted unless that is switched off
            options["inverted"] = call.inverts_images and call.given.get("inverted", True)
        return pipeline.resolve_options(**options)

    given = {name: value for name, value in arguments.items() if not is_nothing(value)}
    call = GivenCall(pipeline, given, resolve if resolved is None else lambda: resolved)
    lines = []
    for name, value in given.items():
        if is_same(value, effects.defaults.get(name)):
            continue
        if reason := next((idle.reason for idle in effects.idle.get(name, ()) if idle.holds(call)), None):
            lines.append(f"{name} has no effect{reason}")
    # The options are in `__dict__` once a case has asked for them
    return lines, call.__dict__.get("options", resolved)


def is_nothing(value: Any) -> bool:
    return value is None or isinstance(value, str | list) and not value


def is_same(value: Any, default: Any) -> bool:
    """Return whether a value is the default."""
    if value is default:
        return True
    # Of one type, because True == 1; tensors have no plain comparison
    return type(value) is type(default) and isinstance(value, int | float | str) and value == default
