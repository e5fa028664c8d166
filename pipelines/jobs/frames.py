"""From pictures and texts to the pictures between them, as files: what `t2i interpolate` does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from t2i.pipelines.interpolation import InterpolationPipeline, check_anchors, mixing_weights
from t2i.pipelines.inversion import INVERSION
from t2i.pipelines.jobs.generation import (
    check_out,
    check_seed,
    load_pipeline,
    name_of,
    recorded,
    to_png,
    with_upsampler,
    write_new,
)
from t2i.pipelines.options import split_options
from torch import Generator

from t2i.checks import check_number
from t2i.data.pictures import open_picture
from t2i.errors import InputError

PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    anchors = [anchor_of(one) for one in arguments]
    check_anchors(anchors)
    total = len(mixing_weights(len(anchors), weights, frames))
    if inverted and not all(isinstance(anchor, str) for anchor in anchors):
        settings = INVERSION | settings
    split_options(settings)
    seed = check_seed(seed, 1, total)
    check_out(out, 1 if strip else total)
    check_number("fps", fps, 0.1, 100)
    if video is not None:
        check_video(video)
    known = [anchor if isinstance(anchor, str) else open_picture(anchor) for anchor in anchors]
    pipeline = with_upsampler(load_pipeline(model, device, InterpolationPipeline, prior, clip=clip), upsampler)
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator().manual_seed(seed)
    images = pipeline(known, weights, frames, inverted, generator, **settings).images

    used: dict[str, Any] = {"anchors": [Path(one).name if isinstance(one, Path) else one for one in anchors]}
    used |= {"weights": weights, "seed": seed, "model": name_of(model), "inverted": inverted}
    by_prior = any(isinstance(anchor, str) for anchor in anchors)
    used |= recorded(settings, pipeline.usual, pipeline.prior if by_prior else None, upsampler, prior, clip)
    name = "strip" if strip else "mix" if weights else "frame"
    shown = [side_by_side(images)] if strip else images
    for i, image in enumerate(shown):
        number = f" {i + 1:0{len(str(total))}}" if len(shown) > 1 else ""
        yield write_new(out, f"{name}{number} of {arguments[0]} to {arguments[-1]}", seed, to_png(image, used))
    if video is not None:
        from t2i.pipelines.jobs.video import write_video

        yield write_video(images, video, fps)


def anchor_of(argument: str) -> str | Path:
    """A picture where there is a file of this name, else a text. Raises InputError for a picture that is not there."""
    path = Path(argument)
    try:
        found = path.is_file()
    except OSError:  # too long for a name
        found = False
    if not found and path.suffix.lower() in PICTURES:
        raise InputError(f"no picture {argument!r}; an anchor is a picture's file or a text")
    return path if found else argument


def check_video(path: Path) -> None:
    """Refuse what could not be written, before anything is drawn."""
    from t2i.pipelines.jobs.video import SUFFIXES, check_extra

    if path.exists():
        raise InputError(f"{str(path)!r} exists and is not overwritten; give another name")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"video must end in {', '.join(SUFFIXES)}; got {str(path)!r}")
    if path.suffix.lower() == ".mp4":
        check_extra(path)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """All in one row."""
    strip = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width
    return strip
