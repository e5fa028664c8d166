"""Commands between this project's files and those of others: `t2i convert`, `t2i parity` and `t2i push`."""

from pathlib import Path
from typing import Annotated

import typer

from t2i.commands import flags
from t2i.commands.flags import argument, option
from t2i.errors import InputError
from t2i.progress import Progress, show_loading
from t2i.terminal import print_line

app = typer.Typer()

PARITY_PROMPTS = ["a red cat", "a photograph of a lighthouse on a cliff in the evening"]


@app.command()
def convert(
    source: Annotated[str, argument("Model folder, repository on the hub, or weights (.bin, .ckpt, .pth).")],
    out: Annotated[Path | None, argument("New folder, or new .safetensors file for weights.", "beside weights")] = None,
    to: Annotated[
        str, option("Layout to write: t2i, which is this project's own, or a public one, such as karlo.")
    ] = "t2i",
    prior: flags.Prior = None,
    clip: Annotated[str | None, option("For a public prior alone: folder of its CLIP, or of a model with it.")] = None,
    variant: Annotated[str | None, option("Variant of a public model's files, such as fp16.")] = None,
    fp16: Annotated[bool, option("Write half-precision weights, which halves the size.", None, "--fp16")] = False,
    config: Annotated[Path | None, option("For DALLE2-pytorch weights: their training configuration (JSON).")] = None,
    release: Annotated[str | None, option("For some of these: the release that trained them, such as 1.1.0.")] = None,
) -> None:
    """Convert a model to another layout, or pickled weights to safetensors, and print the new path.

    Without a new folder, all pickled weights of a model folder are converted, beside themselves. Code inside pickled
    weights is never run.
    """
    from t2i.files.untrusted import PICKLE_FILE_TYPES, is_folder
    from t2i.interop.pickles import INDEX_SUFFIX, convert_folder_weights, convert_weights

    # A checkpoint of DALLE2-pytorch
    suffix = Path(source).suffix
    if config is not None or release is not None or (suffix == ".pth" and out is not None and not out.suffix):
        from t2i.interop.dalle2_convert import convert_dalle2

        if out is None:
            raise InputError("the new folder is missing; t2i convert FILE.pth --config FILE.json NEW_FOLDER")
        with Progress("converting"):
            path = convert_dalle2(Path(source), config, out, release, fp16)
        print_line(path)
        return

    # Other pickled weights
    is_file = suffix in PICKLE_FILE_TYPES or source.endswith(INDEX_SUFFIX)
    if is_file or (out is None and is_folder(source)):
        settings = {"--to": to if to != "t2i" else None, "--prior": prior, "--clip": clip, "--variant": variant}
        for name, value in {**settings, "--fp16": fp16}.items():
            flags.check_needed(name, value, "a model folder and a new folder", False)
        with Progress("converting"):
            for path in [convert_weights(Path(source), out)] if is_file else convert_folder_weights(Path(source)):
                print_line(path)
        return

    # A model folder
    if out is None:
        raise InputError("the new folder is missing; t2i convert FOLDER NEW_FOLDER")
    from t2i.pipelines.jobs.convert import convert_folder

    with show_loading(source, "converting"):
        folder = convert_folder(source, out, to, prior, variant, fp16, clip)
    print_line(folder)


@app.command()
def push(
    folder: Annotated[Path, argument("Folder of the model, with its card README.md.")],
    repository: Annotated[str, argument("Name on the hub: ORGANISATION/NAME, or USER/NAME.")],
    public: Annotated[
        bool, option("Let everyone see it. A new repository is private otherwise.", None, "--public")
    ] = False,
    dry_run: Annotated[bool, option("Print what would be sent, and send nothing.", None, "--dry-run")] = False,
) -> None:
    """Publish a model folder on the hub of Hugging Face, and print its address.

    The token is that of `hf auth login`, or of the variable HF_TOKEN. The front matter of the card must have license,
    library_name, pipeline_tag and tags. Pickles, code, states of optimizers, links out of the folder and texts with
    passwords are refused before anything is sent. Hidden files are left out.
    """
    from t2i.pipelines.jobs.push import plan_upload, push_folder

    upload = plan_upload(folder, repository)
    sizes = upload.list_sizes()
    if dry_run:
        for name, size in sizes.items():
            print_line(f"{size:>15,}  {name}")
        for path in upload.hidden:
            print_line(f"{'left out':>15}  {path.relative_to(folder).as_posix()}")
    what = f"{len(sizes)} files, {sum(sizes.values()):,} bytes, to {repository}, {'public' if public else 'private'}"
    if dry_run:
        print_line(f"{what}; nothing was sent")
        return
    with Progress(f"sending {what}"):
        address = push_folder(upload, public)
    print_line(address)


@app.command()
def parity(
    folder: Annotated[str, argument("Public model: its folder, or a repository on the hub.")],
    prior: flags.Prior = None,
    clip: flags.Clip = None,
    prompt: Annotated[list[str] | None, option("Prompt to draw. Repeatable.", "two prompts", metavar="PROMPT")] = None,
    steps: Annotated[int, option("Denoising steps of each stage.")] = 4,
    guidance_scale: Annotated[float, option("Guidance scale of each stage. 1 turns guidance off.")] = 4.0,
    variant: Annotated[str | None, option("Variant of the files, such as fp16. Computed in fp32 anyway.")] = None,
    seed: Annotated[int, option("Seed of the noise.")] = 0,
    tolerance: Annotated[float, option("Largest difference that passes.")] = 1e-4,
) -> None:
    """Draw here and with the networks of diffusers from the same noise, and print the largest difference per stage.

    A decoder that inpaints gets half of an image. Where diffusers has no fitting pipeline, the reference's loop is this
    project's: for priors, Karlo and Kandinsky's inpainting. Karlo's projection of the condition is not compared.

    The exit status is 1 if a difference is beyond the tolerance. The model is held twice, in fp32, on the CPU.
    """
    from t2i.pipelines.jobs.parity import compare_public_stages

    prompts = prompt or PARITY_PROMPTS
    # Print each stage when it is done, for a stage takes minutes
    largest = 0.0
    stages = compare_public_stages(folder, prior, prompts, steps, guidance_scale, variant, seed, clip)
    with Progress("comparing", unit="stages") as progress:
        for stage, difference in progress.iterate(stages):
            print_line(f"{stage:18} {difference:.2e}")
            largest = max(largest, difference)
    if not largest <= tolerance:  # also true for NaN
        print(f"beyond the tolerance of {tolerance:g}")
        raise typer.Exit(1)
