"""Settings of a run that have no effect: without others, beside others, or in this stage. A run names each in one line.

A script lists the cases of its own settings in `Config.idle`, and adds those of the settings that stages share.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from t2i.terminal import print_note


@dataclass(frozen=True)
class Idle:
    """A case in which a setting has no effect. reason: text after "KEY=VALUE has no effect"."""

    reason: str
    holds: Callable[[Any], bool] = lambda config: True  # of the script's configuration


IdleCases = Mapping[str, tuple[Idle, ...]]


def read_setting(config: Any, key: str) -> Any:
    """Return the setting `key` of a script's configuration, such as train.sample_every; None if a mapping lacks it."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name)
    return config


def require_setting(key: str) -> Idle:
    """Return the case of a setting that has an effect only with another one, `key`, which is neither null nor 0."""
    return Idle(f" without {key}", lambda config: not read_setting(config, key))


def exclude_setting(key: str) -> Idle:
    """Return the case of a setting that another one, `key`, replaces."""
    return Idle(f" beside {key}", lambda config: bool(read_setting(config, key)))


NO_BUCKETS = require_setting("data.buckets")
NO_PREVIEWS = require_setting("train.sample_every")
# What stages share. Each script adds what its previews and its data leave unused
COMMON: IdleCases = {
    "data.bucket_step": (NO_BUCKETS,),
    "train.schedule_offset": (require_setting("train.warmup_steps"),),
    "train.validation_samples": (require_setting("train.validate_every"),),
}
CAPTION_SETTINGS = ("data.keyword_alone", "data.in_sentence", "data.sentences")
PREVIEW_SETTINGS = (
    "count",
    "prompts",
    "seed",
    "prior",
    "decoder",
    "autoencoder",
    "prior_num_inference_steps",
    "prior_guidance_scale",
    "prior_candidates",
    "num_inference_steps",
    "guidance_scale",
)
# Of stages that train on images, their embeddings or their labels alone
UNREAD_CAPTIONS = Idle(": this stage reads no captions")
WEIGHTED_LOSS: IdleCases = {
    "min_snr_gamma": (Idle(" without loss_weighting=min_snr", lambda config: config.loss_weighting != "min_snr"),)
}


# Of `t2i data cache`
NO_TEXT = Idle(": captions are not encoded", lambda config: not (config.text or config.text_encoder))
EVERY_IMAGE = (Idle(": a cache has every image once"),)
CACHE_CASES: IdleCases = {
    "data.bucket_step": (NO_BUCKETS,),
    "data.balance_by": EVERY_IMAGE,
    "data.neighbours": EVERY_IMAGE,
    **dict.fromkeys((*CAPTION_SETTINGS, "variations"), (NO_TEXT,)),
    **dict.fromkeys(("text_encoder_tokens", "text_encoder_dtype"), (require_setting("text_encoder"),)),
    "dtype": (Idle(": image embeddings are float32", lambda config: not config.autoencoder and NO_TEXT.holds(config)),),
}


def list_preview_cases(**needs: tuple[Idle, ...]) -> IdleCases:
    """Return the cases of `sample`. needs: those of each setting that this stage's previews read, () for none."""
    unread = (Idle(": this stage's previews do not read it"),)
    return {f"sample.{name}": (NO_PREVIEWS, *needs.get(name, unread)) for name in PREVIEW_SETTINGS}


def iterate_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, the value and the default of each setting of a configuration and of those in it."""
    for entry in fields(config):
        value, default = getattr(config, entry.name), entry.default
        # Only keys that every file must contain have neither a default nor a factory
        if default is MISSING:
            default = None if entry.default_factory is MISSING else entry.default_factory()
        if not is_dataclass(value):
            yield f"{prefix}{entry.name}", value, default
            continue
        defaults = {name: each for name, _, each in iterate_settings(value)}
        # A script may have defaults of its own for a shared part
        if is_dataclass(default):
            defaults |= {name: getattr(default, name) for name in defaults}
        for name in defaults:
            yield f"{prefix}{entry.name}.{name}", getattr(value, name), defaults[name]


def find_idle_settings(config: Any) -> list[str]:
    """Return a line for each setting that differs from its default, but has no effect. 0 and null switch off."""
    lines = []
    for key, value, default in iterate_settings(config):
        # A file may switch off what its overrides leave unused, and has the defaults of what it does not name
        if not value or value == default:
            continue
        if reason := next((idle.reason for idle in config.idle.get(key, ()) if idle.holds(config)), None):
            lines.append(f"{key}={value} has no effect{reason}")
    return lines


def warn_of_idle_settings(config: Any) -> None:
    """Print a warning for each setting that has no effect."""
    for line in find_idle_settings(config):
        print_note(f"warning: {line}")
