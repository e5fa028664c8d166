"""What draws: `t2i generate` and its like."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED
from t2i.errors import InputError

app = typer.Typer()


@app.command()
def generate(
    prompts: Annotated[list[str] | None, Argument(help="What to draw.", show_default=False)] = None,
    file: Annotated[Path | None, Option("--file", "-f", help="A file with a prompt a line.")] = None,
    out: Annotated[Path, Option(help="Folder for the pictures, or a .png for one.")] = Path("out"),
    model: Annotated[str, Option(help="A model folder, or a repository on the hub.")] = str(SHIPPED),
    count: Annotated[int, Option("--count", "-n", help="Pictures per prompt.")] = 1,
    seed: Annotated[int | None, Option(help="Of the first picture; the next has the next. Random if left out.")] = None,
    negative_prompt: Annotated[str | None, Option(help="What to move away from.")] = None,
    steps: Annotated[int | None, Option(help="Steps of the decoder.")] = None,
    guidance_scale: Annotated[float | None, Option(help="Of the decoder; 1 is off.")] = None,
    prior_steps: Annotated[int | None, Option(help="Steps of the prior.")] = None,
    prior_guidance_scale: Annotated[float | None, Option(help="Of the prior; 1 is off.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Draw pictures for prompts; prints their paths."""
    from pipelines.generation import generate_files

    settings = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "prior_num_inference_steps": prior_steps,
        "prior_guidance_scale": prior_guidance_scale,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    for path in generate_files(read_prompts(prompts, file), out, model, count, seed, device, settings):
        print(path)


def read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line and of a file, in this order."""
    found = list(prompts or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompts in {str(file)!r} ({error}); it is a text file") from error
        found += [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError("no prompts; give some, or a --file with one a line")
    return found
