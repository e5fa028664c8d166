"""What measures: `t2i eval`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED
from t2i.errors import InputError

app = typer.Typer(help="Measure a model.")


@app.command(name="emoji")
def evaluate_emoji(
    folder: Annotated[Path, Argument(help="What `t2i data emoji` drew.")],
    model: Annotated[str, Option(help="A model folder, or a repository on the hub.")] = str(SHIPPED),
    out: Annotated[Path, Option(help="Folder for the figures and contact sheets.")] = Path("out/eval"),
    true_embeddings: Annotated[bool, Option("--true-embeddings", help="Draw each emoji's own embedding.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Draw an emoji for its caption: is the nearest of all real emoji the right one?"""
    from pipelines.generation import load_pipeline
    from t2i.evaluation.emoji import choose, evaluate, read_emoji

    choose(read_emoji(folder)[1])  # complain before the model loads
    if out.exists() and not out.is_dir():
        raise InputError(f"out is {str(out)!r}, which is a file; give a folder")
    scores = evaluate(load_pipeline(model, device), folder, out, true_embeddings)
    for split in ("train", "held_out"):
        score = scores[split]
        print(
            f"{split}: of {score['captions']} captions, nearest is the very emoji {score['exact']:.1%}, "
            f"the same name up to the modifier {score['same_name']:.1%}"
        )
    print(f"figures and pictures are in {out}")
