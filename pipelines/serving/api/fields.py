"""Fields of the images API: what each route takes, and how their values become what a request draws.

A JSON body and a form give the same fields. A form's values are texts, which are read as the field's type.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from t2i.pipelines.serving.api.errors import ApiError, build_field_error

from t2i.checks import MAX_TEXT_CHARACTERS
from t2i.diffusion.samplers import SAMPLERS
from t2i.diffusion.sampling_loop import MAX_STEPS

MAX_COUNT = 10
MAX_PARTIAL_IMAGES = 3
MAX_SEED = 2**53 - 1  # the largest whole number that JSON's readers in browsers keep
MAX_SIDE = 4096
OUTPUT_FORMATS = ("png", "jpeg", "webp")
# Steps of the decoder and the prior for the API's `quality`; others are the model's own
QUALITY_STEPS = {"low": 10, "medium": 25, "high": 50, "hd": 50}
QUALITIES = ("auto", "standard", *QUALITY_STEPS)
ABSENT: tuple[Any, ...] = (None, "", {}, [])  # values by which clients say that they give none

Reader = Callable[[str, Any], Any]  # of a field's name and value; raises ApiError


def read_text(name: str, value: Any) -> str:
    """Return a text with at most `MAX_TEXT_CHARACTERS` characters."""
    if not isinstance(value, str):
        raise build_field_error(name, f"{name} must be a text, got {describe_value(value)}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise build_field_error(name, f"{name} must have at most {MAX_TEXT_CHARACTERS} characters, got {len(value)}")
    return value


def read_bool(name: str, value: Any) -> bool:
    """Return a truth value: true or false, which a form gives as a text."""
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None or not isinstance(value, bool | str):
        raise build_field_error(name, f"{name} must be true or false, got {describe_value(value)}")
    return found


def read_number(name: str, value: Any) -> float:
    """Return a finite number, which a form gives as a text."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, OverflowError):
        raise build_field_error(name, f"{name} must be a number, got {describe_value(value)}") from None


def build_range_reader(low: float, high: float, whole: bool = False) -> Reader:
    """Return a reader of numbers, or of whole ones, in a range."""

    def read(name: str, value: Any) -> float | int:
        number = read_number(name, value)
        if whole and number != int(number) or not low <= number <= high:
            kind = "an integer" if whole else "a number"
            raise build_field_error(
                name, f"{name} must be {kind} from {low:g} to {high:g}, got {describe_value(value)}"
            )
        # Large integers would lose digits as floats
        return (value if isinstance(value, int) else int(value)) if whole else number

    return read


def build_choice_reader(choices: Iterable[str]) -> Reader:
    """Return a reader of one of several words."""
    allowed = tuple(choices)

    def read(name: str, value: Any) -> str:
        if value not in allowed:
            raise build_field_error(name, f"{name} must be one of {', '.join(allowed)}, got {describe_value(value)}")
        return value

    return read


def read_size(name: str, value: Any) -> tuple[int, int] | None:
    """Return width and height of "WIDTHxHEIGHT"; None for "auto"."""
    if value == "auto":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", str(value))
    if match is None or max(map(int, match.groups())) > MAX_SIDE:
        form = f'"auto" or "WIDTHxHEIGHT" with sides of at most {MAX_SIDE}'
        raise build_field_error(name, f"{name} must be {form}, got {describe_value(value)}")
    return int(match[1]), int(match[2])


def read_numbers(name: str, value: Any) -> list[float]:
    """Return a list of numbers; a form gives it as several values, or as one text with commas."""
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list) or not 1 <= len(values) <= 64:
        raise build_field_error(name, f"{name} must be a list of 1 to 64 numbers, got {describe_value(value)}")
    return [read_number(name, item) for item in values]


def ignore_value(name: str, value: Any) -> None:
    """Return nothing: clients send the field, and it means nothing here."""


def describe_value(value: Any) -> str:
    """Return a value as messages show it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Field:
    """A field of the API.

    routes: g, e and v for generations, edits and variations. setting: the pipeline's name for it; None: the server
    reads it. help: for the reference.
    """

    read: Reader
    routes: str
    setting: str | None
    help: str


FIELDS: dict[str, Field] = {
    # Those of OpenAI's API
    "prompt": Field(read_text, "ge", None, "what the images show"),
    "model": Field(read_text, "gev", None, "name of a model, as /v1/models lists them"),
    "n": Field(build_range_reader(0, MAX_COUNT, whole=True), "gev", None, "number of images; 0 counts as absent"),
    "size": Field(read_size, "gev", None, "WIDTHxHEIGHT or auto"),
    "response_format": Field(build_choice_reader(("b64_json", "url")), "gev", None, "b64_json or url"),
    "output_format": Field(build_choice_reader(OUTPUT_FORMATS), "gev", None, "png, jpeg or webp"),
    "output_compression": Field(build_range_reader(0, 100, whole=True), "gev", None, "quality of jpeg and webp"),
    "stream": Field(read_bool, "ge", None, "send events while the images are drawn"),
    "partial_images": Field(
        build_range_reader(0, MAX_PARTIAL_IMAGES, whole=True), "ge", None, "previews while drawing"
    ),
    "quality": Field(build_choice_reader(QUALITIES), "gev", None, "steps: low 10, medium 25, high and hd 50"),
    "background": Field(build_choice_reader(("auto", "opaque")), "ge", None, "opaque; transparent is refused"),
    **dict.fromkeys(
        ("style", "moderation", "input_fidelity", "complexity", "user", "safety_identifier"),
        Field(ignore_value, "gev", None, "has no effect"),
    ),
    # Extensions
    "seed": Field(build_range_reader(0, MAX_SEED, whole=True), "gev", None, "of the first image; others count up"),
    "progress": Field(read_bool, "ge", None, "events t2i.progress for every step, with stream"),
    "negative_prompt": Field(read_text, "gev", "negative_prompt", "what the images are guided away from"),
    "steps": Field(build_range_reader(1, MAX_STEPS, whole=True), "gev", "num_inference_steps", "of the decoder"),
    "prior_steps": Field(
        build_range_reader(1, MAX_STEPS, whole=True), "ge", "prior_num_inference_steps", "of the prior"
    ),
    "guidance_scale": Field(build_range_reader(0, 1000), "gev", "guidance_scale", "of the decoder; 1 is off"),
    "prior_guidance_scale": Field(build_range_reader(0, 1000), "ge", "prior_guidance_scale", "of the prior; 1 is off"),
    "sampler": Field(build_choice_reader(SAMPLERS), "gv", "sampler", "of the decoder"),
    "prior_sampler": Field(build_choice_reader(SAMPLERS), "g", "prior_sampler", "of the prior"),
    "candidates": Field(build_range_reader(1, 64, whole=True), "g", "prior_candidates", "embeddings to choose from"),
    "upsample": Field(build_range_reader(0, 8, whole=True), "gv", "upsample", "passes through the upsampler"),
    "eta": Field(build_range_reader(0, 1), "v", "eta", "new noise of a variation; 0 is the image itself"),
    "strength": Field(build_range_reader(0.001, 1), "e", "strength", "fraction of the steps that redraw the image"),
    "source": Field(read_text, "e", "source", "what the image shows, for a change of meaning"),
    "target": Field(read_text, "e", "target", "what it should show"),
    "theta": Field(build_range_reader(0, 1), "e", "theta", "how far to go from source to target"),
    "mask_mode": Field(build_choice_reader(("alpha", "white")), "e", None, "what is painted: transparent or white"),
    **{
        side: Field(build_range_reader(0, MAX_SIDE, whole=True), "e", side, "pixels to paint beyond that side")
        for side in ("left", "right", "top", "bottom")
    },
}

ROUTES = {"generations": "g", "edits": "e", "variations": "v"}


def read_fields(route: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a request's fields, read and checked, without absent ones.

    given: of the JSON body, or of the form without its files. Raises ApiError, with the field, for one that the route
    does not take, and for a value that is not allowed.
    """
    letter, values = ROUTES[route], {}
    for name, value in given.items():
        if value in ABSENT:
            continue
        field = FIELDS.get(name)
        if field is None or letter not in field.routes:
            known = ", ".join(key for key, other in FIELDS.items() if letter in other.routes)
            raise ApiError(400, "unknown_parameter", f"/v1/images/{route} takes no {name[:60]}; it takes {known}", name)
        read = field.read(name, value)
        # Readers return None for what says nothing, such as "auto"
        if read is not None:
            values[name] = read
    return values


def collect_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the pipeline among a request's values."""
    settings = {field.setting: values[name] for name, field in FIELDS.items() if field.setting and name in values}
    if steps := QUALITY_STEPS.get(values.get("quality", "")):
        # `steps` says it more exactly, and wins
        settings = {"num_inference_steps": steps, **settings}
    if size := values.get("size"):
        settings["width"], settings["height"] = size
    return settings


def choose_seed(values: dict[str, Any]) -> int:
    """Return the given seed, or a random one."""
    return values["seed"] if "seed" in values else secrets.randbelow(2**32)


def find_field(setting: str) -> str | None:
    """Return the field of a setting's name, as messages of the pipeline begin with it; None if there is none."""
    # Width and height are settings without a field of their own: both come from `size`
    names = {field.setting or name: name for name, field in FIELDS.items()}
    return names.get(setting, {"height": "size", "width": "size"}.get(setting))
