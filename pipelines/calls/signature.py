"""Signatures of pipelines: a call that takes `**options` shows them one by one, with defaults, types and help."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any, TypeVar, cast, get_args

import torch
from t2i.pipelines.calls.aliases import resolve_aliases
from t2i.pipelines.calls.arguments import check_argument_order
from t2i.pipelines.calls.effects import CallEffects, Idle, warn_of_idle_arguments
from t2i.pipelines.calls.offload import remember_devices
from t2i.pipelines.calls.unknown_words import collect_texts, report_unknown_words
from t2i.pipelines.options import GUIDANCE_OPTIONS, OPTION_NAMES, DecoderOptions, PriorOptions

from t2i.errors import InputError

Call = TypeVar("Call", bound=Callable[..., Any])

# Their defaults are the model's or the pipeline's, not the dataclasses': a signature shows None
MODEL_DEFAULTS = frozenset({"num_inference_steps", "prior_candidates", *GUIDANCE_OPTIONS})


def declare_pipeline_call(
    idle: Mapping[str, tuple[Idle, ...]] | None = None, aliases: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Call], Call]:
    """Return a decorator for the `__call__` of a pipeline, whose `**options` are typed by `calls/call_keywords.py`.

    `inspect.signature`, the annotations and `help` of the call show each option by itself. The call computes no
    gradients. What all calls have in common is done here: checks of names and of the order of texts and images, and
    warnings of arguments that have no effect. idle: the cases of the call's own arguments; those of options are in
    their fields. aliases: other names of options, which are among the keywords.

    Raises:
        InputError: for an image in the place of a text.
        TypeError: for an unknown keyword, with the nearest name.
    """

    def decorate(call: Call) -> Call:
        """Return the call with checks before it, and with the signature of all its options."""
        # What the call takes: its own arguments and the options, each with its default
        keywords = find_keywords(call)
        signature = build_call_signature(call, keywords)
        own = inspect.signature(call).parameters
        taken = (OPTION_NAMES & signature.parameters.keys()) - aliases.keys() if keywords else frozenset()
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

        @wraps(call)
        @torch.no_grad()
        def checked_call(pipeline: Any, *arguments: Any, **named: Any) -> Any:
            """Check the arguments, warn of idle ones, and return the output with the unknown words of its texts."""
            # Refuse what a call would ignore, before anything is computed
            check_keywords(named, list(signature.parameters)[1:])
            named = resolve_aliases(named, aliases)
            if named.get("resolved") is not None and (beside := sorted(named.keys() - own.keys() - {"resolved"})):
                raise InputError(f"{beside[0]} has no effect beside resolved, which has all options; leave one out")
            bound = signature.bind_partial(pipeline, *arguments, **named).arguments
            check_argument_order(bound)
            if "resolved" not in bound and (resolved := warn_of_idle_arguments(pipeline, bound)) is not None:
                named = {name: value for name, value in named.items() if name in own} | {"resolved": resolved}
            unknown = report_unknown_words(pipeline, collect_texts(bound))
            with pipeline.track_call(), remember_devices():
                output = call(pipeline, *arguments, **named)
            if unknown and not isinstance(output, tuple):
                output.unknown_words = unknown
            return output

        # inspect, help() and diffusers' own tools read these three attributes
        shown: Any = checked_call
        shown.__signature__ = signature
        shown.effects = CallEffects(defaults, taken, collect_idle_cases(taken) | dict(idle or {}))
        shown.__annotations__ = {
            name: parameter.annotation for name, parameter in signature.parameters.items() if name != "self"
        } | {"return": signature.return_annotation}
        shown.__doc__ = inspect.getdoc(call) or ""
        if texts := collect_option_texts(taken - own.keys()):
            shown.__doc__ += "\n\nOptions:\n" + "\n".join(texts.values())
        return cast(Call, shown)

    return decorate


def find_keywords(call: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a call's options by name: of `Keywords`, if it takes `**options: Unpack[Keywords]`."""
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            [keywords] = get_args(parameter.annotation)
            return keywords.__annotations__
    return {}


def build_call_signature(call: Callable[..., Any], keywords: Mapping[str, Any]) -> Signature:
    """Return the signature of a call with its options, one by one, in the place of its `**options`."""
    signature = inspect.signature(call)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    shown = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=keywords[name])
        for name, default in list_option_defaults().items()
        if name in keywords
    ]
    return signature.replace(parameters=[*own, *shown])


def list_option_defaults() -> dict[str, Any]:
    """Return the defaults of all options as a signature shows them, in its order."""
    all_fields = [*fields(PriorOptions), *fields(DecoderOptions)]
    assert all(field.default is not MISSING for field in all_fields), "all options have defaults"
    defaults = {field.name: None if field.name in MODEL_DEFAULTS else field.default for field in all_fields}
    return {**defaults, "resolved": None}


def collect_idle_cases(options: frozenset[str]) -> dict[str, tuple[Idle, ...]]:
    """Return the cases in which these options have no effect, by name."""
    shown = [field for options_class in (PriorOptions, DecoderOptions) for field in fields(options_class)]
    return {field.name: field.metadata.get("idle", ()) for field in shown if field.name in options}


def collect_option_texts(options: frozenset[str]) -> dict[str, str]:
    """Return the descriptions of these options from the dataclasses' docstrings, by name, indented."""
    texts = {}
    for options_class in (PriorOptions, DecoderOptions):
        section = (inspect.getdoc(options_class) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?=    \w)", section):
            names = entry.partition(":")[0].strip()
            if options.intersection(names.split(", ")):
                texts[names] = entry
    return texts


def check_keywords(keywords: Iterable[str], allowed: list[str]) -> None:
    """Raise TypeError, in one line with the nearest name, for a keyword that is not among `allowed`."""
    for name in keywords:
        if name not in allowed:
            near = get_close_matches(name, allowed, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"the arguments are {', '.join(allowed)}"
            raise TypeError(f"unknown argument {name!r}; {advice}")
