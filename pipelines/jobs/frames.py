"""Draw the images between images and texts, as files: the job of `t2i interpolate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from t2i.pipelines.calls.effects import warn_of_idle_arguments
from t2i.pipelines.interpolation import InterpolationPipeline, build_mixing_weights, list_anchors
from t2i.pipelines.jobs.batches import write_new_image
from t2i.pipelines.jobs.planning import ModelSource, Output, load_pipeline
from t2i.pipelines.jobs.records import Record, build_settings_record, format_model_name
from t2i.pipelines.jobs.video import check_new_video, write_video
from torch import Generator

from t2i.checks import check_range
from t2i.data.pictures import open_image
from t2i.errors import InputError
from t2i.progress import Progress

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FrameSettings:
    """Frames to draw between the anchors, and the form in which they are written."""

    weights: list[float] | None = None  # one for each anchor, for one mix; None is the way from each to the next
    frames: int = 8  # from each anchor to the next, both included
    inverted: bool = True  # start and end with the very images, by their own noise
    strip: bool = False  # write one image with all frames side by side
    video: Path | None = None  # also write the frames as a video
    fps: float = 12.0


def interpolate_files(
    arguments: list[str], source: ModelSource, output: Output, frames: FrameSettings, settings: dict[str, Any]
) -> Iterator[Path]:
    """Draw the images between anchors, which are names of image files and texts, and write them; yield the paths.

    settings: options of `InterpolationPipeline`.

    Raises InputError for a value that is not allowed, before the model loads where that is possible.
    """
    # Check everything that needs no model
    anchors = [parse_anchor(argument) for argument in arguments]
    list_anchors(anchors)
    texts = [anchor for anchor in anchors if isinstance(anchor, str)]
    total = len(build_mixing_weights(len(anchors), frames.weights, frames.frames))
    options = {**settings, "inverted": frames.inverted and len(texts) < len(anchors)}
    InterpolationPipeline.build_options(options)
    seed = output.choose_first_seed(total)
    output.check_path(1 if frames.strip else total)
    check_range("fps", frames.fps, 0.1, 100)
    if frames.video is not None:
        check_new_video(frames.video)
    # Opened before the model loads, so that a damaged file is refused at once
    images = [anchor if isinstance(anchor, str) else open_image(anchor) for anchor in anchors]

    # Draw
    pipeline = load_pipeline(source, InterpolationPipeline)
    resolved = pipeline.resolve_options(**options)
    given = settings | {"anchors": anchors, "inverted": frames.inverted}
    warn_of_idle_arguments(pipeline, given, resolved)
    generator = Generator().manual_seed(seed)
    with Progress("drawing", total, "frames"):
        result: Any = pipeline(images, frames.weights, frames.frames, frames.inverted, generator, resolved=resolved)
    drawn = result.images

    # Write
    names = [anchor if isinstance(anchor, str) else anchor.name for anchor in anchors]
    uses_prior = bool(texts) and pipeline.prior is not None
    used = build_settings_record(source, settings, resolved, uses_prior)
    record = build_mix_record(names, frames.weights, seed, source, frames.inverted) | used
    kind = "strip" if frames.strip else "mix" if frames.weights else "frame"
    shown = [paste_side_by_side(drawn)] if frames.strip else drawn
    for i, image in enumerate(shown):
        number = f" {i + 1:0{len(str(total))}}" if len(shown) > 1 else ""
        yield write_new_image(output.path, f"{kind}{number} of {arguments[0]} to {arguments[-1]}", image, record)
    if frames.video is not None:
        yield write_video(drawn, frames.video, frames.fps)


def build_mix_record(
    names: list[str], weights: list[float] | None, seed: int, source: ModelSource, inverted: bool
) -> Record:
    """Return what a mix records of its anchors, which are names of images and texts, before its settings."""
    model = format_model_name(source.model)
    return {"anchors": names, "weights": weights, "seed": seed, "model": model, "inverted": inverted}


def parse_anchor(argument: str) -> str | Path:
    """Return the path of an image if there is a file of this name, else the text.

    Raises InputError for a name with the suffix of an image that does not exist.
    """
    path = Path(argument)
    try:
        is_file = path.is_file()
    except OSError:
        # The text is too long for a name
        is_file = False
    if not is_file and path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"no image file {argument!r}; an anchor is an image file or a text")
    return path if is_file else argument


def paste_side_by_side(images: list[Image.Image]) -> Image.Image:
    """Return one image with all of them in a row, on white."""
    strip = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    return strip
