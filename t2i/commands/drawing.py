"""What draws: `t2i generate` and its like."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL, speed_up_imports
from t2i.commands import flags as options
from t2i.errors import InputError

app = typer.Typer()


@app.command()
def generate(
    prompts: Annotated[list[str] | None, Argument(help="What to draw.", show_default=False)] = None,
    file: Annotated[
        Path | None, Option("--prompts", "--file", "-f", help="A file with a prompt a line; goes on where it stopped.")
    ] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    count: options.Count = 1,
    seed: options.Seed = None,
    negative_prompt: Annotated[str | None, Option(help="What the prior moves away from.")] = None,
    decoder_negative_prompt: Annotated[str | None, Option(help="What the decoder moves away from.")] = None,
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
    height: options.Height = None,
    width: options.Width = None,
    sampler: options.Sampler = None,
    prior_sampler: options.PriorSampler = None,
    eta: options.Eta = None,
    noise_level: options.NoiseLevel = None,
    prior_temperature: options.PriorTemperature = None,
    upsample: options.Upsample = None,
    upsampler: options.Upsampler = None,
    batch_size: Annotated[str | None, Option(help="Pictures at once; auto: 16, or fewer if they do not fit.")] = None,
    dtype: options.Dtype = None,
    compile: options.Compile = False,
    device: options.Device = "auto",
) -> None:
    """Draw pictures for prompts, or for none if they are steered; prints their paths.

    With a file the seed is 0 if left out, and what is in the folder already is not drawn again. Several processes
    share the pictures: torchrun or accelerate launch, with -m t2i generate ...
    """
    from t2i.runtime.launch import count_forgotten_processes, exec_torchrun

    if (processes := count_forgotten_processes()) > 1:
        exec_torchrun(["-m", "t2i", *sys.argv[1:]], processes)
    with speed_up_imports():
        from t2i.pipelines.jobs.dtypes import parse_dtypes
        from t2i.pipelines.jobs.generation import generate_files

    steering = options.build_steering_settings(steer_class, steer_text, steer_picture, classifier, steer_scale)
    texts = read_prompts(prompts, file, required=not steering)
    settings = steering | options.select_given_settings(
        negative_prompt=negative_prompt,
        decoder_negative_prompt=decoder_negative_prompt,
        num_inference_steps=steps,
        prior_num_inference_steps=prior_steps,
        prior_candidates=candidates,
        height=height,
        width=width,
        sampler=sampler,
        prior_sampler=prior_sampler,
        eta=eta,
        noise_level=noise_level,
        prior_temperature=prior_temperature,
        upsample=upsample,
    )
    settings |= options.build_guidance_settings(guidance_scale, guidance, prior_guidance_scale, prior_guidance)
    resume = file is not None
    seed = 0 if resume and seed is None else seed
    more = (upsampler, prior, batch_size, resume, parse_dtypes(dtype), clip, compile)
    for path in generate_files(texts, out, model, count, seed, device, settings, *more):
        # With its end in one: a launcher's processes are unbuffered, and two would write into one line.
        print(f"{path}\n", end="", flush=True)


@app.command()
def upsample(
    pictures: Annotated[list[Path], Argument(help="What to enlarge.", show_default=False)],
    out: options.Out = Path("out"),
    model: Annotated[str | None, Option(help="A model with an upsampler, if no --upsampler is named.")] = None,
    upsampler: options.Upsampler = None,
    times: Annotated[int, Option(help="That pictures pass through the upsampler.")] = 1,
    steps: Annotated[int | None, Option(help="Of the upsampler, each time.")] = None,
    level: Annotated[float | None, Option(help="Of noise put on first: more lets flaws be redrawn.")] = None,
    tile: Annotated[int | None, Option(help="Side of the windows of larger pictures, in pixels.")] = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
) -> None:
    """Enlarge pictures with the upsampler of a model, or models/emoji-upsampler; prints their paths."""
    with speed_up_imports():
        from t2i.pipelines.jobs.generation import upsample_files
    from t2i.checks import check_integer, check_range
    from t2i.sampling.upsampling import MAX_ENLARGEMENTS

    check_integer("times", times, 1, MAX_ENLARGEMENTS)
    check_range("level", level or 0, 0, 1)
    settings = options.select_given_settings(num_inference_steps=steps, level=level, tile=tile)
    named = upsampler or model or str(SHIPPED_MODEL.with_name("emoji-upsampler"))
    for path in upsample_files(pictures, out, named, times, seed, device, settings):
        print(path)


Pictures = Annotated[list[Path], Argument(help="Picture files.", show_default=False)]
Prompt = Annotated[str | None, Option(help="What the whole picture is to show; what it shows, if left out.")]


@app.command()
def image_to_image(
    pictures: Pictures,
    prompt: Prompt = None,
    strength: Annotated[float, Option(help="Share of the steps that are taken: 1 keeps nothing.")] = 0.6,
    negative_prompt: Annotated[str | None, Option(help="What the prior moves away from.")] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    count: options.Count = 1,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    device: options.Device = "auto",
) -> None:
    """Draw pictures that start from others; prints their paths."""
    with speed_up_imports():
        from t2i.pipelines.jobs.generation import redraw_files
    from t2i.pipelines.image_to_image import ImageToImagePipeline, check_strength

    check_strength(strength)
    settings = build_redraw_settings(prompt, negative_prompt, steps, guidance_scale, guidance) | {"strength": strength}
    for path in redraw_files(
        ImageToImagePipeline, pictures, out, model, count, seed, device, settings, prior=prior, clip=clip
    ):
        print(path)


@app.command()
def inpaint(
    picture: Annotated[Path, Argument(help="A picture file.")],
    mask: Annotated[Path, Argument(help="A picture of its size: what is white is painted anew.")],
    prompt: Prompt = None,
    strength: Annotated[float, Option(help="Share of the steps that are taken: less leaves something.")] = 1.0,
    negative_prompt: Annotated[str | None, Option(help="What the prior moves away from.")] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    count: options.Count = 1,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    device: options.Device = "auto",
) -> None:
    """Paint a part of a picture anew; the rest stays pixel for pixel."""
    with speed_up_imports():
        from PIL.Image import Image

        from t2i.pipelines.jobs.generation import redraw_files
    from t2i.pipelines.image_to_image import check_strength
    from t2i.pipelines.inpaint import InpaintPipeline
    from t2i.pipelines.inputs import read_masks

    check_strength(strength)
    settings = build_redraw_settings(prompt, negative_prompt, steps, guidance_scale, guidance)
    settings |= {"mask_image": str(mask), "strength": strength}

    def check(image: Image) -> None:
        read_masks(str(mask), 1, (image.height, image.width))

    for path in redraw_files(
        InpaintPipeline, [picture], out, model, count, seed, device, settings, check, prior=prior, clip=clip
    ):
        print(path)


@app.command()
def outpaint(
    picture: Annotated[Path, Argument(help="A picture file.")],
    left: Annotated[int, Option(help="Pixels to paint beside it.")] = 0,
    right: Annotated[int, Option(help="Pixels to paint beside it.")] = 0,
    top: Annotated[int, Option(help="Pixels to paint above it.")] = 0,
    bottom: Annotated[int, Option(help="Pixels to paint below it.")] = 0,
    prompt: Prompt = None,
    negative_prompt: Annotated[str | None, Option(help="What the prior moves away from.")] = None,
    out: options.Out = Path("out"),
    model: options.Model = str(SHIPPED_MODEL),
    prior: options.Prior = None,
    clip: options.Clip = None,
    count: options.Count = 1,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.GuidanceSettings = None,
    device: options.Device = "auto",
) -> None:
    """Paint around a picture; what was there stays pixel for pixel."""
    with speed_up_imports():
        from PIL.Image import Image

        from t2i.pipelines.jobs.generation import redraw_files
    from t2i.pipelines.inpaint import OutpaintPipeline, check_enlarged_size, check_margins

    margins = {"left": left, "right": right, "top": top, "bottom": bottom}
    check_margins(**margins)
    settings = build_redraw_settings(prompt, negative_prompt, steps, guidance_scale, guidance) | margins

    def check(image: Image) -> None:
        check_enlarged_size(image.width, image.height, **margins)

    for path in redraw_files(
        OutpaintPipeline, [picture], out, model, count, seed, device, settings, check, prior=prior, clip=clip
    ):
        print(path)


def build_redraw_settings(
    prompt: str | None,
    negative_prompt: str | None,
    steps: int | None,
    guidance_scale: float | None,
    guidance: list[str] | None,
) -> dict[str, Any]:
    """Those of a pipeline that starts from a picture. Raises InputError for texts that none takes."""
    from t2i.checks import check_texts

    check_texts("prompt", [] if prompt is None else [prompt], empty=False)
    check_texts("negative_prompt", [] if negative_prompt is None else [negative_prompt])
    settings = options.select_given_settings(prompt=prompt, negative_prompt=negative_prompt, num_inference_steps=steps)
    return settings | options.build_guidance_settings(guidance_scale, guidance)


def read_prompts(prompts: list[str] | None, file: Path | None, required: bool = True) -> list[str]:
    """The prompts of the command line and of a file, in this order."""
    found = list(prompts or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompts in {str(file)!r} ({error}); it is a text file") from error
        found += [line.strip() for line in lines if line.strip()]
    if not found and required:
        raise InputError("no prompts; give some, or a file with one a line (--prompts)")
    return found
