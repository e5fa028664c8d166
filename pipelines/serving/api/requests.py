"""From the fields and files of a request to what is drawn: which task it is, and what goes with what."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.fields import choose_seed, collect_settings
from t2i.pipelines.serving.api.images import read_alpha, read_upload
from t2i.pipelines.serving.drawing import DrawRequest

MARGINS = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Upload:
    """A file of a form."""

    name: str
    data: bytes = field(repr=False)

    @property
    def base_name(self) -> str:
        """The name without folders, as records have it."""
        # Some clients send a whole path, also one of Windows
        return self.name.replace("\\", "/").rsplit("/", 1)[-1][:200] or "image"


def build_draw_request(
    route: str, values: dict[str, Any], images: list[Upload], mask: Upload | None = None
) -> DrawRequest:
    """Return what a request draws.

    values: of `read_fields`. images, mask: of the form. Raises ApiError for values that do not go together.
    """
    settings, seed, count = collect_settings(values), choose_seed(values), values.get("n") or 1
    watched = {"previews": values.get("partial_images", 0), "progress": values.get("progress", False)}
    if route == "generations":
        if "prompt" not in values:
            raise build_field_error("prompt", "prompt is missing; give a text", "missing_required_parameter")
        return DrawRequest("text", {"prompt": values["prompt"], **settings}, seed, count, **watched)
    # All else draws from an image
    if len(images) != 1:
        what = "image is missing; give one" if not images else f"{len(images)} images; one is taken"
        raise build_field_error("image", what, "missing_required_parameter" if not images else "invalid_value")
    image = read_upload("image", images[0].data)
    # Without a mask, the transparency of the image itself marks what to paint
    names = {"image": images[0].base_name, "mask": (mask or images[0]).base_name}
    task, painted = "variation", None
    if route == "edits":
        task, painted = choose_edit(values, images[0], mask, image)
        if task != "text_diff":
            settings["prompt"] = values["prompt"]
    return DrawRequest(task, settings, seed, count, image, painted, names=names, **watched)


def choose_edit(
    values: dict[str, Any], upload: Upload, mask: Upload | None, image: Image.Image
) -> tuple[str, Image.Image | None]:
    """Return the task of an edit, and what to paint: by its margins, its two captions, its mask, else as a whole.

    Without a mask, what is transparent in the image is painted. Raises ApiError for two ways at once.
    """
    margins = [name for name in MARGINS if values.get(name)]
    captions = [name for name in ("source", "target", "theta") if name in values]
    if margins and (captions or mask is not None):
        raise build_field_error(margins[0], f"{margins[0]} paints around the image; leave out mask, source and target")
    if captions:
        check_text_diff(values, mask)
        return "text_diff", None
    if "prompt" not in values:
        raise build_field_error("prompt", "prompt is missing; give a text", "missing_required_parameter")
    if margins:
        return "outpaint", None
    painted = read_alpha("image", upload.data) if mask is None else read_mask(values, mask, image)
    # Both values: something is painted, and something stays
    if painted is not None and painted.getextrema() == (0, 255):
        return "inpaint", painted
    # A mask of one value is a mistake; an image without transparency is redrawn as a whole
    if mask is not None:
        what = "nothing is transparent" if painted is None or painted.getextrema()[1] == 0 else "all is transparent"
        raise build_field_error("mask", f"mask paints where it is transparent, and {what}")
    return "image_to_image", None


def check_text_diff(values: dict[str, Any], mask: Upload | None) -> None:
    """Refuse fields that do not go with a change from one caption to another."""
    for name in ("source", "target"):
        if name not in values:
            raise build_field_error(name, f"{name} is missing; source and target go together")
    for name in ("negative_prompt", "strength"):
        if name in values:
            raise build_field_error(name, f"{name} does not go with source and target; leave it out")
    if mask is not None:
        raise build_field_error("mask", "mask does not go with source and target; leave it out")


def read_mask(values: dict[str, Any], mask: Upload, image: Image.Image) -> Image.Image:
    """Return the mask, white where there is to be painted.

    By `mask_mode`, what is transparent is painted, as OpenAI's masks have it, or what is white. Raises ApiError.
    """
    if values.get("mask_mode") == "white":
        gray = read_upload("mask", mask.data).convert("L")
        painted = gray.point([255 if value > 127 else 0 for value in range(256)])
    else:
        alpha = read_alpha("mask", mask.data)
        if alpha is None:
            hint = "send mask_mode=white for a black and white one"
            raise build_field_error("mask", f"mask has no transparency, which marks what to paint; {hint}")
        painted = alpha
    if painted.size != image.size:
        sizes = f"mask has {painted.width} x {painted.height} pixels, image {image.width} x {image.height}"
        raise build_field_error("mask", f"{sizes}; both must be of one size")
    return painted


def check_known_model(values: dict[str, Any], names: list[str], aliases: dict[str, str]) -> str:
    """Return the name of the model that a request asks for; the first one if it names none. Raises ApiError."""
    name = values.get("model", names[0])
    name = aliases.get(name, name)
    if name not in names:
        raise ApiError(404, "model_not_found", f"no model {name!r:.100}; there are {', '.join(names)}", "model")
    return name
