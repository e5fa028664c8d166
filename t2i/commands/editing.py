"""What draws from given pictures: variations, what lies between them, edits by captions."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL, speed_up_imports
from t2i.commands import flags as options
from t2i.errors import InputError

app = typer.Typer()

Pictures = Annotated[list[Path], Argument(help="Picture files.", show_default=False)]


@app.command()
def variations(
    pictures: Pictures,
    eta: Annotated[
        float | None,
        Option(
            help="Start from the picture's own noise and roam so far: 0 gives it back, 1 is far. New noise if left out."
        ),
    ] = None,
    prompt: Annotated[str | None, Option(help="What decoders read that read captions.")] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    count: options.Count = 1,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    steer_class: options.SteerClass = None,
    steer_text: options.SteerText = None,
    steer_picture: options.SteerPicture = None,
    steer_scale: options.SteerScale = None,
    classifier: options.Classifier = None,
    sampler: options.Sampler = None,
    noise_level: options.NoiseLevel = None,
    upsample: options.Upsample = None,
    upsampler: options.Upsampler = None,
    device: options.Device = "auto",
) -> None:
    """Draw pictures of what others show; prints their paths."""
    with speed_up_imports():
        from t2i.pipelines.jobs.generation import redraw_files
    from t2i.checks import check_range
    from t2i.pipelines.image_variation import ImageVariationPipeline
    from t2i.pipelines.inversion import INVERSION_DEFAULTS, build_inversion_options
    from t2i.pipelines.options import build_options

    settings = options.select_given_settings(
        num_inference_steps=steps, sampler=sampler, noise_level=noise_level, upsample=upsample
    )
    settings |= options.build_guidance_settings(guidance_scale, guidance)
    settings |= options.build_steering_settings(steer_class, steer_text, steer_picture, classifier, steer_scale)
    if eta is not None:
        check_range("eta", eta, 0, 1)
        settings = INVERSION_DEFAULTS | settings
    build_options(settings, uses_prior=False) if eta is None else build_inversion_options(settings, eta)
    settings |= options.select_given_settings(eta=eta, prompt=prompt)
    for path in redraw_files(
        ImageVariationPipeline,
        pictures,
        out,
        model,
        count,
        seed,
        device,
        settings,
        upsampler=upsampler,
        prior=prior,
        clip=clip,
    ):
        print(path)


@app.command()
def interpolate(
    anchors: Annotated[list[str], Argument(help="Pictures (their files) and texts.", show_default=False)],
    weights: Annotated[str | None, Option(help="Numbers with commas, one an anchor: one mix, not the way.")] = None,
    frames: Annotated[int, Option(help="Pictures from each anchor to the next, both included.")] = 8,
    strip: Annotated[bool, Option("--strip", help="One picture with all of them in a row.")] = False,
    video: Annotated[Path | None, Option(help="A moving picture of them too: .mp4, .webp, .png, .gif.")] = None,
    fps: Annotated[float, Option(help="Of the video, frames a second.")] = 12.0,
    inverted: Annotated[
        bool, Option("--inverted/--new-noise", help="Begin and end with the very pictures, or with variations.")
    ] = True,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    prior_steps: options.PriorSteps = None,
    prior_guidance_scale: options.PriorGuidanceScale = None,
    prior_guidance: options.GuidanceSettings = None,
    steer_class: options.SteerClass = None,
    steer_text: options.SteerText = None,
    steer_picture: options.SteerPicture = None,
    steer_scale: options.SteerScale = None,
    classifier: options.Classifier = None,
    candidates: options.Candidates = None,
    sampler: options.Sampler = None,
    prior_sampler: options.PriorSampler = None,
    eta: options.Eta = None,
    prior_temperature: options.PriorTemperature = None,
    upsample: options.Upsample = None,
    upsampler: options.Upsampler = None,
    device: options.Device = "auto",
) -> None:
    """Draw what lies between pictures and texts; prints the paths."""
    with speed_up_imports():
        from t2i.pipelines.jobs.frames import interpolate_files

    settings = options.select_given_settings(
        num_inference_steps=steps,
        prior_num_inference_steps=prior_steps,
        prior_candidates=candidates,
        sampler=sampler,
        prior_sampler=prior_sampler,
        eta=eta,
        prior_temperature=prior_temperature,
        upsample=upsample,
    )
    settings |= options.build_steering_settings(steer_class, steer_text, steer_picture, classifier, steer_scale)
    settings |= options.build_guidance_settings(guidance_scale, guidance, prior_guidance_scale, prior_guidance)
    numbers = None if weights is None else parse_anchor_weights(weights)
    for path in interpolate_files(
        anchors,
        out,
        model,
        numbers,
        frames,
        strip,
        video,
        fps,
        inverted,
        seed,
        device,
        settings,
        upsampler,
        prior,
        clip,
    ):
        print(path)


@app.command()
def edit(
    picture: Annotated[Path, Argument(help="A picture file.")],
    source: Annotated[str, Option("--from", help="What it shows.")],
    target: Annotated[str, Option("--to", help="What it is to show.")],
    theta: Annotated[float | None, Option(help="How far to go: 0 is nowhere, 1 is all the way.")] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    steer_class: options.SteerClass = None,
    steer_text: options.SteerText = None,
    steer_picture: options.SteerPicture = None,
    steer_scale: options.SteerScale = None,
    classifier: options.Classifier = None,
    upsample: options.Upsample = None,
    upsampler: options.Upsampler = None,
    device: options.Device = "auto",
) -> None:
    """Change a picture by the direction from one caption to another; prints its path."""
    with speed_up_imports():
        from t2i.pipelines.jobs.generation import redraw_files
    from t2i.checks import check_range
    from t2i.pipelines.inversion import INVERSION_DEFAULTS
    from t2i.pipelines.options import build_options
    from t2i.pipelines.text_diff import DEFAULT_THETA, TextDiffPipeline, check_caption_pair

    theta = DEFAULT_THETA if theta is None else theta
    check_range("theta", theta, 0, 1)
    check_caption_pair(source, target)
    settings = INVERSION_DEFAULTS | options.select_given_settings(num_inference_steps=steps, upsample=upsample)
    settings |= options.build_guidance_settings(guidance_scale, guidance)
    settings |= options.build_steering_settings(steer_class, steer_text, steer_picture, classifier, steer_scale)
    build_options(settings, uses_prior=False)
    settings |= {"source": source, "target": target, "theta": theta}
    for path in redraw_files(
        TextDiffPipeline, [picture], out, model, 1, 0, device, settings, upsampler=upsampler, prior=prior, clip=clip
    ):
        print(path)


def parse_anchor_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"weights must be numbers with commas between them, such as 1,2,1; got {text!r}") from error
