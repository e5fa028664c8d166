"""Commands that draw: `t2i generate`, `upsample`, `image-to-image`, `inpaint` and `outpaint`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2i.commands import SHIPPED_MODEL, flags
from t2i.commands.flags import argument, drop_missing, option
from t2i.commands.records import Likeness
from t2i.errors import InputError
from t2i.texts import read_lines

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer()

PROMPT_FILE_HELP = "Text file, one prompt per line; - is standard input. Images already in --out are skipped."
PromptFile = Annotated[Path | None, option(PROMPT_FILE_HELP, None, "--prompts", "--file", "-f")]
Like = Annotated[
    Path | None, option("PNG file that this command drew: draw with its settings, where no option is given.")
]
Dtypes = Annotated[
    list[str] | None,
    option(
        "Dtype of the weights, fp32, bf16 or fp16, or of a part: decoder=bf16. Repeatable.",
        metavar="DTYPE",
        choices=("fp32", "bf16", "fp16"),
    ),
]


@app.command()
@flags.print_paths
def generate(
    output: flags.OutputFlags,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    size: flags.SizeFlags,
    prior_flags: flags.PriorFlags,
    samplers: flags.SamplerFlags,
    steering: flags.SteeringFlags,
    upsampling: flags.UpsamplerFlags,
    prompts: Annotated[list[str] | None, argument("Prompts to draw.")] = None,
    file: PromptFile = None,
    like: Like = None,
    negative_prompt: flags.NegativePrompt = None,
    decoder_negative_prompt: Annotated[str | None, option("A text that the decoder is guided away from.")] = None,
    noise_level: flags.NoiseLevel = None,
    batch_size: Annotated[
        str | None, option("Images at once; auto is 16, or fewer if memory is short.", "auto")
    ] = None,
    dtype: Dtypes = None,
    compile: Annotated[
        bool, option("Compile the decoder first, for many images of one size.", None, "--compile")
    ] = False,
) -> Iterator[Path]:
    """Draw images for prompts and print their paths.

    Without prompts, steering alone decides what is drawn.

    With --like, give the model too unless it is the shipped one: the PNG file has the model's name, but not its folder.

    With --prompts the default seed is 0. The same command, run again, draws what is missing.

    Several processes share the images: start them with torchrun or accelerate launch, as `-m t2i generate ...`.
    """
    # Complain before there are several processes, so that a message is printed once
    likeness = Likeness() if like is None else Likeness.read_file(like)
    named = {"model": source.model, "prior": source.prior, "clip": source.clip, "upsampler": upsampling.upsampler}
    likeness.check_named_files(**named, control_image=decoder.control_image)
    start_forgotten_processes(file)
    from t2i.pipelines.jobs.dtypes import parse_dtypes
    from t2i.pipelines.jobs.generation import generate_files

    # Collect the settings
    settings = likeness.fill_steering(steering).build_settings()
    texts = read_prompts(prompts, file, required=not (settings or likeness.prompts)) or likeness.prompts
    settings |= drop_missing(negative_prompt=negative_prompt, decoder_negative_prompt=decoder_negative_prompt)
    settings |= decoder.build_settings() | prior_flags.build_settings() | size.build_settings()
    settings |= samplers.build_settings() | drop_missing(noise_level=noise_level, upsample=upsampling.upsample)
    settings = likeness.merge_settings(settings)
    if output.seed is None:
        output.seed = likeness.record.get("seed", None if file is None else 0)

    # Draw
    dtypes = parse_dtypes(dtype or likeness.list_dtypes())
    model = source.build(upsampler=upsampling.upsampler, dtype=dtypes, compile=compile)
    resume, is_chosen = file is not None, source.model is not None
    return generate_files(texts, model, output.build(), settings, batch_size, resume, likeness.record, is_chosen)


@app.command()
@flags.print_paths
def upsample(
    images: flags.ImageFiles,
    out: flags.Out = Path("out"),
    model: Annotated[str | None, option("Model that has an upsampler.", "models/emoji-upsampler")] = None,
    upsampler: Annotated[str | None, option("Folder that `t2i train upsampler` wrote, instead of --model.")] = None,
    times: Annotated[int, option("Number of passes through the upsampler.")] = 1,
    steps: Annotated[int | None, option("Denoising steps of each pass.", "4")] = None,
    level: Annotated[float | None, option("Noise added first, 0 to 1. More redraws more of an image.", "0")] = None,
    tile: Annotated[int | None, option("Side in pixels of the windows for larger images.", "512")] = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
) -> Iterator[Path]:
    """Upsample images and print the paths of the results."""
    from t2i.checks import check_integer, check_range
    from t2i.pipelines.jobs.generation import upsample_files
    from t2i.pipelines.jobs.planning import ModelSource, Output
    from t2i.sampling.upsampling import MAX_ENLARGEMENTS

    if model is not None and upsampler is not None:
        raise InputError(f"give --model or --upsampler, not both: {model!r}, {upsampler!r}")
    # The pipeline checks these too, but only after the model has loaded
    check_integer("times", times, 1, MAX_ENLARGEMENTS)
    check_range("level", level or 0, 0, 1)
    settings = drop_missing(num_inference_steps=steps, level=level, tile=tile)
    source = ModelSource(upsampler or model or str(SHIPPED_MODEL.with_name("emoji-upsampler")), device=device)
    return upsample_files(images, source, Output(out, seed=seed), times, settings)


@app.command()
@flags.print_paths
def image_to_image(
    images: flags.ImageFiles,
    prompts: flags.PromptFlags,
    output: flags.OutputFlags,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    size: flags.SizeFlags,
    strength: Annotated[float, option("Fraction of the steps to take. 1 keeps nothing of the image.")] = 0.6,
) -> Iterator[Path]:
    """Redraw images from their noised latents, and print their paths."""
    from t2i.pipelines.image_to_image import ImageToImagePipeline, check_strength
    from t2i.pipelines.jobs.generation import redraw_files

    check_strength(strength)
    settings = prompts.build_settings() | decoder.build_settings() | size.build_settings() | {"strength": strength}
    return redraw_files(ImageToImagePipeline, images, source.build(), output.build(), settings)


@app.command()
@flags.print_paths
def inpaint(
    image: flags.ImageFile,
    mask: Annotated[Path, argument("Image file of the same size. White parts are painted anew.")],
    prompts: flags.PromptFlags,
    output: flags.OutputFlags,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    strength: Annotated[float, option("Fraction of the steps to take. Below 1, some of the masked part stays.")] = 1.0,
    mask_channel: Annotated[
        str, option("luminance, or alpha: transparent parts are painted.", choices=("luminance", "alpha"))
    ] = "luminance",
) -> Iterator[Path]:
    """Paint the masked part of an image anew, and print the paths of the results.

    All other pixels stay exactly as they are.
    """
    from t2i.pipelines.image_to_image import check_strength
    from t2i.pipelines.inpaint import InpaintPipeline
    from t2i.pipelines.inputs import read_masks
    from t2i.pipelines.jobs.generation import redraw_files

    # The image is opened later, once, before the model loads
    def check_mask(image: "Image") -> None:
        read_masks(str(mask), 1, (image.height, image.width), channel=mask_channel)

    check_strength(strength)
    settings = prompts.build_settings() | decoder.build_settings() | {"strength": strength}
    settings |= {"mask_image": str(mask)} | ({} if mask_channel == "luminance" else {"mask_channel": mask_channel})
    return redraw_files(InpaintPipeline, [image], source.build(), output.build(), settings, check_mask)


@app.command()
@flags.print_paths
def outpaint(
    image: flags.ImageFile,
    prompts: flags.PromptFlags,
    output: flags.OutputFlags,
    source: flags.ModelFlags,
    decoder: flags.DecoderFlags,
    left: Annotated[int, option("Pixels to paint at the left.")] = 0,
    right: Annotated[int, option("Pixels to paint at the right.")] = 0,
    top: Annotated[int, option("Pixels to paint at the top.")] = 0,
    bottom: Annotated[int, option("Pixels to paint at the bottom.")] = 0,
) -> Iterator[Path]:
    """Paint around an image, and print the paths of the results.

    The pixels of the image stay exactly as they are.
    """
    from t2i.pipelines.inpaint import OutpaintPipeline, check_enlarged_size, collect_margins
    from t2i.pipelines.jobs.generation import redraw_files

    margins = collect_margins(left, right, top, bottom)

    # The image is opened later, once, before the model loads
    def check_size(image: "Image") -> None:
        check_enlarged_size(image.width, image.height, margins)

    settings = prompts.build_settings() | decoder.build_settings()
    settings |= {"left": left, "right": right, "top": top, "bottom": bottom}
    return redraw_files(OutpaintPipeline, [image], source.build(), output.build(), settings, check_size)


def start_forgotten_processes(file: Path | None) -> None:
    """Run this command in several processes instead, where `accelerate launch --cpu` was to start them and did not.

    Raises InputError if several processes would share standard input, which only one of them could read.
    """
    from t2i.runtime.launch import count_forgotten_processes, exec_torchrun

    processes = count_forgotten_processes()
    if str(file) == "-" and (processes > 1 or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise InputError("--prompts - cannot be read by several processes; give a file")
    if processes > 1:
        exec_torchrun(["-m", "t2i", *sys.argv[1:]], processes)


def read_prompts(prompts: list[str] | None, file: Path | None, required: bool = True) -> list[str]:
    """Return the prompts of the command line, then those of the file. Raises InputError if there is none."""
    texts = list(prompts or []) + (read_lines(file, "prompts") if file is not None else [])
    if not texts and required:
        raise InputError("no prompts; give at least one, or a text file with one per line (--prompts)")
    return texts
