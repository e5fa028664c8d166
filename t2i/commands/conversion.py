"""Between this project's files and those of others: `t2i convert`, `t2i parity`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i.commands import flags as options
from t2i.errors import InputError

app = typer.Typer()


@app.command()
def convert(
    source: Annotated[
        str, Argument(help="A model folder, a repository on the hub, or a file of weights (.bin, .ckpt).")
    ],
    out: Annotated[
        Path | None, Argument(help="A new folder; of weights a new .safetensors, beside the file if left out.")
    ] = None,
    to: Annotated[str, Option(help="The layout: t2i, which is this project's, or a public one such as karlo.")] = "t2i",
    prior: options.Prior = None,
    clip: Annotated[
        str | None, Option(help="Of a public prior alone, that becomes a run's: the folder of its CLIP, or of a model.")
    ] = None,
    variant: Annotated[str | None, Option(help="Of a public model's files, such as fp16.")] = None,
    fp16: Annotated[bool, Option("--fp16", help="Half-precision weights: half the size.")] = False,
    config: Annotated[
        Path | None, Option(help="Of a prior or decoder of DALLE2-pytorch (.pth): the JSON it was trained by.")
    ] = None,
    release: Annotated[str | None, Option(help="Of DALLE2-pytorch that trained it, such as 1.1.0, if asked.")] = None,
) -> None:
    """Write a model in another layout, or weights from a pickle as safetensors, without running what is in it."""
    from t2i.files.untrusted import PICKLE_FILE_TYPES
    from t2i.interop.pickles import INDEX_SUFFIX, convert_weights

    if config is not None or release is not None or (Path(source).suffix == ".pth" and out and not out.suffix):
        from t2i.interop.dalle2_convert import convert_dalle2

        if out is None:
            raise InputError("the new folder is missing; t2i convert FILE.pth --config FILE.json NEW_FOLDER")
        print(convert_dalle2(Path(source), config, out, release, fp16))
        return
    if Path(source).suffix in PICKLE_FILE_TYPES or source.endswith(INDEX_SUFFIX):
        print(convert_weights(Path(source), out))
        return
    if out is None:
        raise InputError("the new folder is missing; t2i convert FOLDER NEW_FOLDER")
    from t2i.pipelines.jobs.convert import convert_folder

    print(convert_folder(source, out, to, prior, variant, fp16, clip))


@app.command()
def parity(
    folder: Annotated[str, Argument(help="A public model: its folder, or a repository on the hub.")],
    prior: options.Prior = None,
    clip: options.Clip = None,
    prompt: Annotated[list[str] | None, Option(help="Again and again for a batch.")] = None,
    steps: Annotated[int, Option(help="Of every stage.")] = 4,
    guidance_scale: Annotated[float, Option(help="Of every stage; 1 is off.")] = 4.0,
    variant: Annotated[str | None, Option(help="Of the files, such as fp16; computed in fp32 all the same.")] = None,
    seed: Annotated[int, Option(help="Of the noise.")] = 0,
    tolerance: Annotated[float, Option(help="The largest difference that is none.")] = 1e-4,
) -> None:
    """Draw with this project and with diffusers from the same noise; print the largest difference of each stage.

    Of a decoder that inpaints, half of a picture is given. Karlo's projection of the condition, which no library has,
    and the steps of the prior's and Karlo's loops are this project's on both sides.

    Exit status 1 if one is beyond the tolerance. Holds the model twice, in fp32, on the CPU.
    """
    from t2i.pipelines.jobs.parity import compare_public_stages

    apart = 0.0
    prompts = prompt or ["a red cat", "a photograph of a lighthouse on a cliff in the evening"]
    for stage, difference in compare_public_stages(folder, prior, prompts, steps, guidance_scale, variant, seed, clip):
        print(f"{stage:18} {difference:.2e}", flush=True)
        apart = max(apart, difference)
    if not apart <= tolerance:  # nor NaN
        print(f"beyond the tolerance of {tolerance:g}")
        raise typer.Exit(1)
