"""Fields of the images API: what each route takes, and how their values become what a request draws.

A JSON body and a form give the same fields. docs/how-to/serve.md says what they mean.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.values import (
    Anything,
    Choice,
    Flag,
    Kind,
    Number,
    Numbers,
    Size,
    Text,
    Texts,
    Weights,
)
from t2i.pipelines.text_diff import DIRECTIONS

from t2i.diffusion.samplers import SAMPLERS
from t2i.diffusion.sampling_loop import MAX_STEPS

MAX_COUNT = 1024  # of the field; a server's own limit is lower
MAX_PARTIAL_IMAGES = 3
MAX_SEED = 2**53 - 1  # the largest whole number that JSON's readers in browsers keep
MAX_SIDE = 4096
OUTPUT_FORMATS = ("png", "jpeg", "webp")
# Steps of the decoder for the API's `quality`; others leave them to the model
QUALITY_STEPS = {"low": 10, "medium": 25, "high": 50, "hd": 50, "xhigh": 75, "max": 100}
QUALITIES = ("auto", "standard", *QUALITY_STEPS)
ABSENT: tuple[Any, ...] = (None, "", {}, [])  # values by which clients say that they give none


@dataclass(frozen=True)
class Field:
    """A field of the API.

    kind: of its values. routes: first letters of those that take it. setting: the pipeline's name for it; None: the
    server reads it.
    """

    kind: Kind
    routes: str
    setting: str | None = None


IGNORED = ("style", "moderation", "input_fidelity", "complexity", "user")
OPENAI_FIELDS: dict[str, Field] = {
    "prompt": Field(Text(), "gev"),
    "model": Field(Text(), "gevut"),
    "n": Field(Number(0, MAX_COUNT, whole=True), "gev"),  # some clients send 0, which is 1
    "size": Field(Size(MAX_SIDE), "gev"),
    "response_format": Field(Choice(("b64_json", "url")), "gevu"),
    "output_format": Field(Choice(OUTPUT_FORMATS), "gevu"),
    "output_compression": Field(Number(0, 100, whole=True), "gevu"),
    "stream": Field(Flag(), "gevu"),
    "partial_images": Field(Number(0, MAX_PARTIAL_IMAGES, whole=True), "gev"),
    "quality": Field(Choice(QUALITIES), "gev"),
    "background": Field(Choice(("auto", "opaque")), "ge"),  # has no effect; transparent is refused
    **dict.fromkeys(IGNORED, Field(Anything(), "gevu")),
    "safety_identifier": Field(Text(), "gevu"),  # sent back
}
EXTENSIONS: dict[str, Field] = {
    # All tasks
    "seed": Field(Number(0, MAX_SEED, whole=True), "gevu"),
    "progress": Field(Flag(), "gevu"),
    "strict": Field(Flag(), "gev"),
    # The stages
    "steps": Field(Number(1, MAX_STEPS, whole=True), "gevu", "num_inference_steps"),
    "guidance_scale": Field(Number(0, 1000), "gev", "guidance_scale"),
    "sampler": Field(Choice(tuple(SAMPLERS)), "gev", "sampler"),
    "eta": Field(Number(0, 1), "gev", "eta"),
    "noise_level": Field(Number(0, 999, whole=True), "gev", "noise_level"),
    "prior_steps": Field(Number(1, MAX_STEPS, whole=True), "ge", "prior_num_inference_steps"),
    "prior_guidance_scale": Field(Number(0, 1000), "ge", "prior_guidance_scale"),
    "prior_sampler": Field(Choice(tuple(SAMPLERS)), "ge", "prior_sampler"),
    "candidates": Field(Number(1, 64, whole=True), "ge", "prior_candidates"),
    "negative_prompt": Field(Text(), "gev", "negative_prompt"),
    "decoder_negative_prompt": Field(Text(), "g", "decoder_negative_prompt"),
    "upsample": Field(Number(0, 8, whole=True), "gevu", "upsample"),
    "level": Field(Number(0, 1), "u", "level"),
    # Edits
    "strength": Field(Number(0.001, 1), "e", "strength"),
    "mask_mode": Field(Choice(("alpha", "white")), "e"),  # what is painted: OpenAI's masks have holes there
    **{
        side: Field(Number(0, MAX_SIDE, whole=True), "e", side)  # pixels to paint beside the image
        for side in ("left", "right", "top", "bottom")
    },
    "source": Field(Text(), "e", "source"),
    "target": Field(Text(), "e", "target"),
    "direction": Field(Choice(DIRECTIONS), "e", "direction"),
    "theta": Field(Numbers(Number(0, 1)), "e", "theta"),
    # Mixes
    "texts": Field(Texts(), "get"),
    "weights": Field(Weights(), "ge", "weights"),  # of the images, the prompt and the texts, in this order
    "frames": Field(Number(2, 64, whole=True), "ge", "frames"),  # from each input to the next, both included
    "inverted": Field(Flag(), "e", "inverted"),
}
FIELDS = OPENAI_FIELDS | EXTENSIONS
ROUTES = {"generations": "g", "edits": "e", "variations": "v", "upsamplings": "u"}  # of /v1/images
PATHS = {f"/v1/images/{route}": letter for route, letter in ROUTES.items()} | {"/v1/texts": "t"}
FILES = {"image": "evu", "mask": "e"}  # and the routes that take them
# Names by which messages of pipelines begin, where they are not those of fields or settings
OTHER_NAMES = {
    **dict.fromkeys(("height", "width"), "size"),
    **dict.fromkeys(("anchors", "images"), "image"),
    **dict.fromkeys(("upsampled", "times"), "upsample"),
    "mask_image": "mask",
}


def list_fields(path: str) -> list[str]:
    """Return the names of the fields that a path takes."""
    return [name for name, field in FIELDS.items() if PATHS[path] in field.routes]


def read_fields(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a request's fields, read and checked, without absent ones.

    given: of the JSON body, or of the form without its files. Raises ApiError, with the field, for one that the route
    does not take, and for a value that is not allowed.
    """
    letter, values = PATHS[path], {}
    for name, value in given.items():
        if value in ABSENT:
            continue
        field = FIELDS.get(name)
        if field is None or letter not in field.routes:
            what = f"{path} takes no {name[:60]}; it takes {', '.join(list_fields(path))}"
            raise ApiError(400, "unknown_parameter", what, name)
        try:
            read = field.kind.read(name, value)
        except RecursionError as error:
            raise build_field_error(name, f"{name} must be {field.kind.describe()}, got lists in lists") from error
        # Kinds return None for what says nothing, such as "auto"
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


def name_field(message: str) -> tuple[str | None, str]:
    """Return the field that a message of a pipeline begins with, None if it is none, and the message with its name."""
    first, _, rest = message.partition(" ")
    setting = first.partition(".")[0]
    for name, field in FIELDS.items():
        if setting in (name, field.setting):
            return name, f"{name}{first.removeprefix(setting)} {rest}"
    return (setting if setting in FILES else OTHER_NAMES.get(setting)), message
