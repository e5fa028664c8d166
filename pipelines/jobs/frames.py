"""From pictures and texts to the pictures between them, as files: what `t2i interpolate` does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from t2i.pipelines.interpolation import InterpolationPipeline, build_mixing_weights, check_anchors
from t2i.pipelines.inversion import INVERSION_DEFAULTS
from t2i.pipelines.jobs.generation import (
    build_image_record,
    check_first_seed,
    check_output_path,
    encode_png_image,
    format_model_name,
    load_pipeline,
    replace_upsampler,
    write_new_image,
)
from t2i.pipelines.options import build_options
from torch import Generator

from t2i.checks import check_range
from t2i.data.pictures import open_image
from t2i.errors import InputError

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def interpolate_files(
    arguments: list[str],
    out: Path,
    model: str,
    weights: list[float] | None,
    frames: int,
    strip: bool,
    video: Path | None,
    fps: float,
    inverted: bool,
    seed: int | None,
    device: str,
    settings: dict[str, Any],
    upsampler: str | None = None,
    prior: str | None = None,
    clip: str | None = None,
) -> Iterator[Path]:
    """Draw the way between pictures (names of files) and texts, or their mix, and write it. Nothing is overwritten.

    As frames; as one picture of all of them with `strip`; and as a moving picture, if `video` names one. Raises
    InputError for what is not allowed, before the model loads where that can be.
    """
    anchors = [parse_anchor(one) for one in arguments]
    check_anchors(anchors)
    total = len(build_mixing_weights(len(anchors), weights, frames))
    if inverted and not all(isinstance(anchor, str) for anchor in anchors):
        settings = INVERSION_DEFAULTS | settings
    build_options(settings)
    seed = check_first_seed(seed, 1, total)
    check_output_path(out, 1 if strip else total)
    check_range("fps", fps, 0.1, 100)
    if video is not None:
        check_video_path(video)
    known = [anchor if isinstance(anchor, str) else open_image(anchor) for anchor in anchors]
    pipeline = replace_upsampler(load_pipeline(model, device, InterpolationPipeline, prior, clip=clip), upsampler)
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator().manual_seed(seed)
    images = pipeline(known, weights, frames, inverted, generator, **settings).images

    used: dict[str, Any] = {"anchors": [Path(one).name if isinstance(one, Path) else one for one in anchors]}
    used |= {"weights": weights, "seed": seed, "model": format_model_name(model), "inverted": inverted}
    by_prior = any(isinstance(anchor, str) for anchor in anchors)
    used |= build_image_record(
        settings, pipeline.default_decoder_options, pipeline.prior if by_prior else None, upsampler, prior, clip
    )
    name = "strip" if strip else "mix" if weights else "frame"
    shown = [paste_side_by_side(images)] if strip else images
    for i, image in enumerate(shown):
        number = f" {i + 1:0{len(str(total))}}" if len(shown) > 1 else ""
        yield write_new_image(
            out, f"{name}{number} of {arguments[0]} to {arguments[-1]}", seed, encode_png_image(image, used)
        )
    if video is not None:
        from t2i.pipelines.jobs.video import write_video

        yield write_video(images, video, fps)


def parse_anchor(argument: str) -> str | Path:
    """A picture where there is a file of this name, else a text. Raises InputError for a picture that is not there."""
    path = Path(argument)
    try:
        found = path.is_file()
    except OSError:  # too long for a name
        found = False
    if not found and path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"no picture {argument!r}; an anchor is a picture's file or a text")
    return path if found else argument


def check_video_path(path: Path) -> None:
    """Refuse what could not be written, before anything is drawn."""
    from t2i.pipelines.jobs.video import VIDEO_SUFFIXES, check_video_extra

    if path.exists():
        raise InputError(f"{str(path)!r} exists and is not overwritten; give another name")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(f"video must end in {', '.join(VIDEO_SUFFIXES)}; got {str(path)!r}")
    if path.suffix.lower() == ".mp4":
        check_video_extra(path)


def paste_side_by_side(images: list[Image.Image]) -> Image.Image:
    """All in one row."""
    strip = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    return strip
