"""Commands that start from given images: `t2i variations`, `interpolate` and `edit`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from t2i.commands import flags
from t2i.commands.flags import argument, drop_missing, option
from t2i.errors import InputError

app = typer.Typer()

DIRECTIONS = ("text", "prior")  # those of the pipeline, which imports torch


@app.command()
@flags.print_paths
def variations(
    images: flags.ImageFiles,
    output: flags.OutputFlags,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    size: flags.SizeFlags,
    steering: flags.SteeringFlags,
    upsampling: flags.UpsamplerFlags,
    eta: Annotated[
        float | None,
        option(
            "Start from the noise of the inverted image, with this much new noise: 0 reproduces the image, 1 varies it "
            "most.",
            "new noise",
        ),
    ] = None,
    prompt: Annotated[str | None, option("Caption for decoders that read captions.")] = None,
    sampler: flags.Sampler = None,
    noise_level: flags.NoiseLevel = None,
) -> Iterator[Path]:
    """Draw images that show what the given ones show, and print their paths."""
    from t2i.pipelines.image_variation import ImageVariationPipeline
    from t2i.pipelines.jobs.generation import redraw_files

    settings = decoder.build_settings() | size.build_settings()
    settings |= drop_missing(sampler=sampler, noise_level=noise_level, upsample=upsampling.upsample)
    settings |= steering.build_settings() | drop_missing(eta=eta, prompt=prompt)
    model = source.build(upsampler=upsampling.upsampler)
    return redraw_files(ImageVariationPipeline, images, model, output.build(), settings)


@app.command()
@flags.print_paths
def interpolate(
    anchors: Annotated[list[str], argument("Image files and texts.")],
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    size: flags.SizeFlags,
    prior_flags: flags.PriorFlags,
    samplers: flags.SamplerFlags,
    steering: flags.SteeringFlags,
    upsampling: flags.UpsamplerFlags,
    weights: Annotated[str | None, option("Comma-separated numbers, one for each anchor: draw one mix of all.")] = None,
    frames: Annotated[int | None, option("Images from each anchor to the next, both included.", "8")] = None,
    strip: Annotated[bool, option("Write a single image with all frames side by side.", None, "--strip")] = False,
    video: Annotated[Path | None, option("Also write the frames to this file, a .mp4, .webp, .png or .gif.")] = None,
    fps: Annotated[float | None, option("Frames per second of the video.", "12")] = None,
    inverted: Annotated[
        bool, option("Start and end with the given images, or with variations.", None, "--inverted/--new-noise")
    ] = True,
    out: flags.Out = Path("out"),
    seed: Annotated[int | None, option("Seed of all frames.", "random")] = None,
) -> Iterator[Path]:
    """Draw the images between the anchors, which are images and texts, and print their paths."""
    from t2i.pipelines.jobs.frames import FrameSettings, interpolate_files
    from t2i.pipelines.jobs.planning import Output

    # Collect the settings
    flags.check_needed("--fps", fps, "--video", video is not None)
    if weights is not None and frames is not None:
        raise InputError(f"--frames {frames} does not apply to --weights, which draw one mix")
    settings = decoder.build_settings() | prior_flags.build_settings() | samplers.build_settings()
    settings |= size.build_settings() | drop_missing(upsample=upsampling.upsample) | steering.build_settings()
    numbers = None if weights is None else parse_anchor_weights(weights)
    shape = FrameSettings(numbers, inverted=inverted, strip=strip, video=video, **drop_missing(frames=frames, fps=fps))

    # Draw
    model = source.build(upsampler=upsampling.upsampler)
    return interpolate_files(anchors, model, Output(out, seed=seed), shape, settings)


@dataclass
class ChangePriorFlags(flags.PriorFlags):
    candidates: Annotated[
        int | None, option("Noises to try; the one that gives --from an embedding most like the image's is used.", "16")
    ] = None


@app.command()
@flags.print_paths
def edit(
    image: flags.ImageFile,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    size: flags.SizeFlags,
    prior_flags: ChangePriorFlags,
    steering: flags.SteeringFlags,
    upsampling: flags.UpsamplerFlags,
    before: Annotated[str, option("Caption of what the image shows.", None, "--from")],
    after: Annotated[str, option("Caption of what it should show.", None, "--to")],
    direction: Annotated[
        str,
        option("text: from caption to caption. prior: between images that the prior imagines.", choices=DIRECTIONS),
    ] = "text",
    theta: Annotated[
        float | None,
        option("How far to go: 0 changes nothing, 1 goes all the way.", "0.35, with --direction prior 1"),
    ] = None,
    out: flags.Out = Path("out"),
    seed: Annotated[int, option("Seed of the prior's noise.")] = 0,
) -> Iterator[Path]:
    """Change an image along the direction from one caption to another, and print the path of the result."""
    from t2i.pipelines.jobs.generation import redraw_files
    from t2i.pipelines.jobs.planning import Output
    from t2i.pipelines.text_diff import TextDiffPipeline, check_caption_pair, list_thetas

    # The pipeline checks these too, but only after the model has loaded
    [theta] = list_thetas(theta, direction)
    check_caption_pair(before, after)
    for name, value in vars(prior_flags).items():
        flags.check_needed(f"--{name.replace('_', '-')}", value, "--direction prior", direction == "prior")
    settings = decoder.build_settings() | prior_flags.build_settings() | size.build_settings()
    settings |= steering.build_settings() | drop_missing(upsample=upsampling.upsample)
    settings |= {"source": before, "target": after, "direction": direction, "theta": theta}
    model = source.build(upsampler=upsampling.upsampler)
    return redraw_files(TextDiffPipeline, [image], model, Output(out, seed=seed), settings)


def parse_anchor_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"weights must be comma-separated numbers, such as 1,2,1; got {text!r}") from error
