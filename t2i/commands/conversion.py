"""Between this project's files and those of others: `t2i convert`, `t2i parity`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i.commands import options
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
    variant: Annotated[str | None, Option(help="Of a public model's files, such as fp16.")] = None,
    fp16: Annotated[bool, Option("--fp16", help="Half-precision weights: half the size.")] = False,
) -> None:
    """Write a model in another layout, or weights from a pickle as safetensors, without running what is in it."""
    from t2i.interop.pickles import INDEX, convert_weights
    from t2i.untrusted import PICKLES

    if Path(source).suffix in PICKLES or source.endswith(INDEX):
        print(convert_weights(Path(source), out))
        return
    if out is None:
        raise InputError("the new folder is missing; t2i convert FOLDER NEW_FOLDER")
    from pipelines.convert import convert_folder

    print(convert_folder(source, out, to, prior, variant, fp16))
