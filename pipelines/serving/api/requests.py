"""From the fields and files of a request to what is drawn: which task it is, and what goes with what."""

from functools import partial
from typing import Any

from PIL import Image
from t2i.pipelines.interpolation import build_mixing_weights
from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.fields import FIELDS, choose_seed, collect_settings
from t2i.pipelines.serving.api.images import StoredImage, read_mask_values
from t2i.pipelines.serving.api.uploads import Upload
from t2i.pipelines.serving.draw_request import DrawRequest
from t2i.pipelines.serving.tasks import MARGINS, TASKS

from t2i.errors import InputError

MAX_IMAGES = 16  # as OpenAI's API takes
# The task that a field of edits and generations asks for
TASK_FIELDS = {
    **dict.fromkeys(("source", "target", "direction", "theta"), "text_diff"),
    **dict.fromkeys(("weights", "frames", "texts"), "mix"),
    **dict.fromkeys(MARGINS, "outpaint"),
}
TASK_NAMES = {
    "text": "images of a prompt",
    "variation": "variations",
    "image_to_image": "an edit of the whole image",
    "inpaint": "an edit with a mask",
    "outpaint": "outpainting",
    "text_diff": "a change from source to target",
    "mix": "a mix",
    "upsample": "upsampling",
}


def plan_draw_request(
    route: str, values: dict[str, Any], images: list[Upload], mask: Upload | None = None, max_count: int = 10
) -> DrawRequest:
    """Return what a request draws, without its images, of which none is decoded; `add_images` completes it.

    values: of `read_fields`. images, mask: of the form. max_count: images that a request may draw. Raises ApiError for
    values that do not go together.
    """
    if route != "generations" and not images:
        raise build_field_error("image", "image is missing; give one", "missing_required_parameter")
    if len(images) > MAX_IMAGES:
        raise build_field_error("image", f"image must be at most {MAX_IMAGES} files, got {len(images)}")
    values = drop_empty_margins(values)
    task = choose_task(route, values, len(images), mask is not None)
    if task != "image_to_image":  # an image may have a transparent part, to be painted
        check_settings(task, values)
    request = DrawRequest(
        task,
        collect_settings(values),
        # `t2i edit` takes 0 too: of a text diff at most the prior's noise is drawn by chance
        choose_seed(values) if task != "text_diff" else values.get("seed", 0),
        names=[upload.base_name for upload in images],
        previews=values.get("partial_images", 0),
        progress=values.get("progress", False),
        strict=values.get("strict", False),
    )
    add_texts(request, values)
    if task == "mix":
        add_weights(request, values)
    request.count = count_images(request, values, max_count)
    return request


def add_images(request: DrawRequest, values: dict[str, Any], images: list[Upload], mask: Upload | None) -> None:
    """Add the images of the form to a request, before its texts, and the mask. Raises ApiError."""
    request.inputs[:0] = [upload.image.pixels for upload in images]
    # Without a mask, the transparent part of an image is painted
    transparent = images[0].image.transparent if images else None
    if request.task == "image_to_image":
        request.task = "image_to_image" if transparent is None else "inpaint"
        check_settings(request.task, drop_empty_margins(values))
    if request.task == "inpaint":
        request.mask = transparent if mask is None else read_mask(values, mask, images[0].image.pixels)
        channel = {} if values.get("mask_mode") == "white" else {"mask_channel": "alpha"}
        request.mask_record = {"mask_image": (mask or images[0]).base_name, **channel}
    request.settings = TASKS[request.task].defaults | request.settings


def drop_empty_margins(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without margins of 0, which ask for nothing."""
    return {name: value for name, value in values.items() if name not in MARGINS or value}


def choose_task(route: str, values: dict[str, Any], images: int, has_mask: bool) -> str:
    """Return the task: that of the route, else by the fields and files. Raises ApiError for those of two tasks.

    It is "image_to_image" for an image that may also turn out to have a transparent part, which is "inpaint".
    """
    if route in ("variations", "upsamplings"):
        if images > 1:
            raise build_field_error("image", f"image must be one file, got {images}")
        return "variation" if route == "variations" else "upsample"
    asked = {name: task for name, task in TASK_FIELDS.items() if name in values}
    asked |= ({"image": "mix"} if images > 1 else {}) | ({"mask": "inpaint"} if has_mask else {})
    tasks = list(dict.fromkeys(asked.values()))
    if len(tasks) > 1:
        first, second = (next(name for name in asked if asked[name] == task) for task in tasks[:2])
        if "image" in (first, second):
            other = first if second == "image" else second
            what = f"several images, which are mixed, do not go with {other}"
            raise build_field_error(second, f"{what}; send one image, or leave {other} out")
        raise build_field_error(second, f"{second} does not go with {first}; leave one of them out")
    if tasks:
        return tasks[0]
    if route == "generations":
        return "text"
    return "image_to_image"


def check_settings(task: str, values: dict[str, Any]) -> None:
    """Refuse fields that the task's pipeline does not take. Raises ApiError."""
    taken = TASKS[task].list_settings()
    idle = [name for name, field in FIELDS.items() if field.setting is not None and field.setting not in taken]
    idle += [] if "height" in taken else ["size"]
    idle += [] if task == "inpaint" else ["mask_mode"]
    for name in idle:
        if name in values:
            raise build_field_error(name, f"{name} has no meaning for {TASK_NAMES[task]}; leave it out")


def add_texts(request: DrawRequest, values: dict[str, Any]) -> None:
    """Add the prompt and other texts to a request. Raises ApiError for one that is missing."""
    prompt = values.get("prompt")
    if request.task == "text_diff":
        captions = {"source": values.get("source"), "target": values.get("target", prompt)}
        for name, caption in captions.items():
            if caption is None:
                raise build_field_error(name, f"{name} is missing; source and target go together")
        if prompt not in (None, captions["target"]):
            raise build_field_error("prompt", "prompt and target differ, and both say what to show; give one of them")
        request.settings |= captions
    elif request.task in ("text", "mix"):
        texts = ([] if prompt is None else [prompt]) + values.get("texts", [])
        request.inputs += texts
        request.names += texts
        if not request.names:
            raise build_field_error("prompt", "prompt is missing; give a text", "missing_required_parameter")
    elif prompt is not None:
        request.settings["prompt"] = prompt
    elif request.task != "variation" and request.task != "upsample":
        raise build_field_error("prompt", "prompt is missing; give a text", "missing_required_parameter")


def add_weights(request: DrawRequest, values: dict[str, Any]) -> None:
    """Set the weights of a mix: those given, those of a strip from each input to the next, else equal ones."""
    count, weights = len(request.names), values.get("weights")
    frames = request.settings.pop("frames", None)
    name = "weights" if weights is not None else "frames" if frames is not None else "texts"
    if weights is not None and frames is not None:
        raise build_field_error("frames", "frames does not go with weights; leave one of them out")
    if count < 2:
        raise build_field_error(name, f"{name} needs two inputs or more, of images, the prompt and texts; got {count}")
    # In a form a list of lists has no marks between the lists
    if weights and isinstance(weights[0], list) and len(weights) == 1 and len(weights[0]) % count == 0:
        weights = [weights[0][first : first + count] for first in range(0, len(weights[0]), count)]
    if weights is None and frames is None:
        weights = [1.0] * count
    try:
        rows = [row for row in weights if isinstance(row, list)] if weights else []
        for row in rows:
            build_mixing_weights(count, row, 2)
        mixes = build_mixing_weights(count, weights, frames or 2)
    except InputError as error:
        raise build_field_error(name, str(error)) from error
    request.settings["weights"] = weights or mixes.tolist()


def count_images(request: DrawRequest, values: dict[str, Any], max_count: int) -> int:
    """Return the number of images that a request draws. Raises ApiError for more than `max_count`."""
    count, name = values.get("n") or 1, "n"
    several = {"text_diff": request.settings.get("theta"), "mix": request.settings.get("weights")}.get(request.task)
    is_strip = isinstance(several, list) and (request.task == "text_diff" or isinstance(several[0], list))
    if count > 1 and (is_strip or request.task == "text_diff"):
        reason = "it has an image for each place" if is_strip else "it has an image for each theta"
        raise build_field_error("n", f"n must be 1 for {TASK_NAMES[request.task]} like this, for {reason}")
    if is_strip:
        count = len(several or [])
        name = "theta" if request.task == "text_diff" else "frames" if "frames" in values else "weights"
    if count > max_count:
        raise build_field_error(
            name, f"{name} asks for {count} images; this server draws at most {max_count} a request"
        )
    return count


def read_mask(values: dict[str, Any], mask: Upload, image: Image.Image) -> Image.Image:
    """Return the mask, white where there is to be painted.

    By `mask_mode`, what is transparent is painted, as OpenAI's masks have it, or what is white. Raises ApiError.
    """
    mode = values.get("mask_mode", "alpha")
    painted = read_mask_values(mask.data, mode)
    if painted is None:
        hint = "send mask_mode=white for a black and white one"
        raise build_field_error("mask", f"mask has no transparency, which marks what to paint; {hint}")
    if painted.size != image.size:
        sizes = f"mask has {painted.width} x {painted.height} pixels, image {image.width} x {image.height}"
        raise build_field_error("mask", f"{sizes}; both must be of one size")
    # Of one value it would paint nothing, or keep nothing
    if painted.getextrema() != (0, 255):
        part = "transparent" if mode == "alpha" else "white"
        how_much = "all" if painted.getextrema()[0] else "nothing"
        raise build_field_error("mask", f"mask paints where it is {part}, and {how_much} is {part}")
    return StoredImage(painted, partial(read_mask_values, mask.data, mode))


def check_known_model(values: dict[str, Any], names: list[str], aliases: dict[str, str]) -> str:
    """Return the name of the model that a request asks for; the first one if it names none. Raises ApiError."""
    name = values.get("model", names[0])
    name = aliases.get(name, name)
    if name not in names:
        raise ApiError(404, "model_not_found", f"no model {name!r:.100}; there are {', '.join(names)}", "model")
    return name
