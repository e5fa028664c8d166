"""Fields of the images API: what each route takes, and how their values become what a request draws.

A JSON body and a form give the same fields. `list_rows` is the table of them for documents.
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
    server reads it. help: for documents, after the field's name and its kind.
    """

    kind: Kind
    routes: str
    setting: str | None
    help: str


IGNORED = ("style", "moderation", "input_fidelity", "complexity", "user")
OPENAI_FIELDS: dict[str, Field] = {
    "prompt": Field(Text(), "gev", None, "what the images show; a caption for variations"),
    "model": Field(Text(), "gevut", None, "name of a model, as /v1/models lists them"),
    "n": Field(Number(0, MAX_COUNT, whole=True), "gev", None, "number of images; 0 is 1"),
    "size": Field(Size(MAX_SIDE), "gev", None, "of the images; auto is the model's"),
    "response_format": Field(Choice(("b64_json", "url")), "gevu", None, "the images themselves, or links to them"),
    "output_format": Field(Choice(OUTPUT_FORMATS), "gevu", None, "file format of the images"),
    "output_compression": Field(Number(0, 100, whole=True), "gevu", None, "quality of jpeg and webp"),
    "stream": Field(Flag(), "gevu", None, "send events while the images are drawn"),
    "partial_images": Field(Number(0, MAX_PARTIAL_IMAGES, whole=True), "gev", None, "previews, with stream"),
    "quality": Field(
        Choice(QUALITIES),
        "gev",
        None,
        "steps: " + ", ".join(f"{name} {steps}" for name, steps in QUALITY_STEPS.items()),
    ),
    "background": Field(Choice(("auto", "opaque")), "ge", None, "has no effect; transparent is refused"),
    **dict.fromkeys(IGNORED, Field(Anything(), "gevu", None, "has no effect")),
    "safety_identifier": Field(Text(), "gevu", None, "has no effect, and is sent back"),
}
EXTENSIONS: dict[str, Field] = {
    # All tasks
    "seed": Field(Number(0, MAX_SEED, whole=True), "gevu", None, "of the first image; others count up from it"),
    "progress": Field(Flag(), "gevu", None, "send an event t2i.progress for every step, with stream"),
    "strict": Field(Flag(), "gev", None, "refuse texts with words that the model never saw"),
    # The stages
    "steps": Field(Number(1, MAX_STEPS, whole=True), "gevu", "num_inference_steps", "of the decoder or the upsampler"),
    "guidance_scale": Field(Number(0, 1000), "gev", "guidance_scale", "of the decoder; 1 is off"),
    "sampler": Field(Choice(tuple(SAMPLERS)), "gev", "sampler", "of the decoder"),
    "eta": Field(
        Number(0, 1), "gev", "eta", "new noise in each step; for variations, 0 gives the image itself, absent all of it"
    ),
    "noise_level": Field(Number(0, 999, whole=True), "gev", "noise_level", "noise on z_i, for Stable unCLIP"),
    "prior_steps": Field(Number(1, MAX_STEPS, whole=True), "ge", "prior_num_inference_steps", "of the prior"),
    "prior_guidance_scale": Field(Number(0, 1000), "ge", "prior_guidance_scale", "of the prior; 1 is off"),
    "prior_sampler": Field(Choice(tuple(SAMPLERS)), "ge", "prior_sampler", "of the prior"),
    "candidates": Field(Number(1, 64, whole=True), "ge", "prior_candidates", "embeddings to choose from"),
    "negative_prompt": Field(Text(), "gev", "negative_prompt", "what the images are guided away from"),
    "decoder_negative_prompt": Field(Text(), "g", "decoder_negative_prompt", "what the decoder is guided away from"),
    "upsample": Field(Number(0, 8, whole=True), "gevu", "upsample", "passes through the upsampler"),
    "level": Field(Number(0, 1), "u", "level", "noise added before upsampling; more redraws more"),
    # Edits
    "strength": Field(Number(0.001, 1), "e", "strength", "fraction of the steps that redraw; 1 keeps nothing"),
    "mask_mode": Field(Choice(("alpha", "white")), "e", None, "paint where the mask is transparent, or white"),
    **{
        side: Field(Number(0, MAX_SIDE, whole=True), "e", side, f"pixels to paint {where} the image")
        for side, where in {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}.items()
    },
    "source": Field(Text(), "e", "source", "what the image shows, to change its meaning"),
    "target": Field(Text(), "e", "target", "what it should show; absent, the prompt says it"),
    "theta": Field(Numbers(Number(0, 1)), "e", "theta", "how far to go from source to target"),
    # Mixes
    "texts": Field(Texts(), "get", None, "texts to mix, beside the images and the prompt"),
    "weights": Field(Weights(), "ge", "weights", "of the images, the prompt and the texts, in this order"),
    "frames": Field(Number(2, 64, whole=True), "ge", "frames", "images from each input to the next, both included"),
    "inverted": Field(Flag(), "e", "inverted", "mixes end with the very images; false draws them anew"),
}
FIELDS = OPENAI_FIELDS | EXTENSIONS
ROUTES = {"generations": "g", "edits": "e", "variations": "v", "upsamplings": "u"}  # of /v1/images
PATHS = {f"/v1/images/{route}": letter for route, letter in ROUTES.items()} | {"/v1/texts": "t"}
READ_TEXTS = ("prompt", "texts", "source", "target", "negative_prompt", "decoder_negative_prompt")  # by the model
FILES = {"image": "evu", "mask": "e"}  # and the routes that take them
# Names by which messages of pipelines begin, where they are not those of fields or settings
OTHER_NAMES = {
    **dict.fromkeys(("height", "width"), "size"),
    **dict.fromkeys(("anchors", "images"), "image"),
    **dict.fromkeys(("upsampled", "times"), "upsample"),
    "mask_image": "mask",
}


def list_rows() -> list[tuple[str, str, str, str]]:
    """Return each field's name, its paths, its kind of value and its meaning, for documents."""
    rows = [(name, field.routes, field.kind.describe(), field.help) for name, field in FIELDS.items()]
    return [
        (name, ", ".join(path for path, letter in PATHS.items() if letter in routes), kind, help)
        for name, routes, kind, help in rows
    ]


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


def collect_texts(values: dict[str, Any]) -> list[str]:
    """Return the texts among a request's values that the model reads."""
    found = [values[name] for name in READ_TEXTS if name in values]
    return [text for value in found for text in (value if isinstance(value, list) else [value])]


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
