"""The `t2i` command. Imports what a command needs when it runs, so that `t2i --help` is quick."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from t2i import EXTRA_STAGES, STAGES
from t2i.commands import conversion, drawing, editing, evaluation, seeing, speed_up_imports
from t2i.errors import InputError, report_errors

app = typer.Typer(
    help="Text to image in the way of DALL-E 2 (unCLIP): draw, train, evaluate.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make and look at data.")
app.add_typer(drawing.app)
app.add_typer(editing.app)
app.add_typer(seeing.app)
app.add_typer(conversion.app)
app.add_typer(data, name="data")
app.add_typer(evaluation.app, name="eval")


def main() -> None:
    """Entry point: bad input of any kind becomes one line and exit status 2."""
    status = 0
    with report_errors():
        try:
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        except typer.TyperException as error:
            raise InputError(error.format_message() + format_option_value(error)) from error
        except typer.Abort:
            status = 130
    sys.exit(status)


def format_option_value(error: typer.TyperException) -> str:
    """The value that a message about an option leaves out."""
    for name in getattr(getattr(error, "param", None), "opts", []):
        if name in sys.argv[:-1]:
            return f", got {sys.argv[sys.argv.index(name) + 1]!r}"
    return ""


@app.command()
def init(
    run: Annotated[Path, Argument(help="A new folder for the configurations and all that is trained with them.")],
    source: Annotated[str, Option("--data", help="The pictures, as for `t2i data check`.")],
    clip: Annotated[str | None, Option(help="Trained or public, instead of one of your own.")] = None,
    autoencoder: Annotated[str | None, Option(help="Trained or public, instead of one of your own.")] = None,
    device: Annotated[str, Option(help="To train on: auto, cpu, cuda.")] = "auto",
    image_size: Annotated[int | None, Option(help="Side of the pictures, in pixels; chosen if left out.")] = None,
    held_out: Annotated[float | None, Option(help="Share to hold out, where the source names no split.")] = None,
) -> None:
    """Write a configuration for every stage, with sizes chosen from the pictures and the device."""
    from t2i.training.recipe.recipe import check_run_folder, compose_recipe, find_device, read_data_facts

    check_run_folder(run, source)
    machine = find_device(device)
    ensure_fresh_manifest(source, held_out)
    recipe = compose_recipe(run, read_data_facts(source), machine, clip, autoencoder, image_size)
    recipe.write_folder(run)
    print("\n".join(recipe.lines))
    folder = shlex.quote(str(run))
    print(f"next: t2i train all {folder} --dry-run   tells what it will cost\n      t2i train all {folder}")


def ensure_fresh_manifest(source: str, held_out: float | None) -> None:
    """Make sure that a source has a manifest, and that nothing has changed since."""
    from t2i.data.freshness import find_changes
    from t2i.data.manifest import find_manifest

    try:
        manifest = find_manifest(Path(source))
    except InputError:
        check(source, held_out=0.05 if held_out is None else held_out)
        return
    if held_out is not None:
        raise InputError(f"held-out is {held_out}, but {str(manifest)!r} has decided it; `t2i data check` decides anew")
    if found := find_changes(source):
        raise InputError(f"{source!r} is not what was checked: {found}; `t2i data check {source}` reads it again")


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    stage: Annotated[str, Argument(help=f"One of {', '.join((*STAGES, *EXTRA_STAGES))}, or all.")],
    arguments: Annotated[
        list[str] | None, Argument(help="[FILE.yaml] [key=value ...]; of all, the folder.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what the run would cost, and write nothing.")] = False,
    num_processes: Annotated[int, Option(help="On this machine: GPUs, or shares of the CPU.")] = 1,
    max_restarts: Annotated[int, Option(help="How often processes that died are started again, if several.")] = 0,
) -> None:
    """Train a stage, or all stages of what `t2i init` wrote. Stopped, it goes on from where it was.

    On several machines use accelerate launch.
    """
    stages = (*STAGES, *EXTRA_STAGES)
    if stage not in (*stages, "all"):
        raise InputError(f"stage must be one of {', '.join(stages)}, all; got {stage!r}")
    from importlib import import_module

    from t2i.checks import check_range
    from t2i.config import load_config
    from t2i.runtime.launch import exec_torchrun
    from t2i.training.common.entry import start_training

    check_range("num-processes", num_processes, 1, 1024)
    check_range("max-restarts", max_restarts, 0, 1000)
    if stage == "all":
        raise typer.Exit(train_all_stages(arguments or [], num_processes, max_restarts, dry_run))
    given = [*(arguments or []), *(["train.dry_run=true"] if dry_run else [])]
    with speed_up_imports(without=()):
        script = import_module(f"t2i.training.train_{stage}")
    config = load_config(script.Config, stage, given)
    if num_processes > 1:
        exec_torchrun([str(script.__file__), *given], num_processes, max_restarts)
    start_training(script.main, config)


def train_all_stages(arguments: list[str], num_processes: int, max_restarts: int, dry_run: bool) -> int:
    """The exit status."""
    from t2i.training.all_stages import Run, Trainer

    if len(arguments) != 1:
        what = f"{arguments[1]!r} belongs into its configurations" if arguments[1:] else "none is given"
        raise InputError(f"train all takes one folder that `t2i init` wrote; {what}")
    trainer = Trainer(Run.read_folder(Path(arguments[0])), num_processes, max_restarts)
    return trainer.estimate_costs() if dry_run else trainer.train()


@data.command()
def check(
    source: Annotated[str, Argument(help="A folder, a .tar or .parquet file, or hub:ORGANISATION/NAME.")],
    out: Annotated[Path | None, Option(help="Folder for the manifest and the report; SOURCE/t2i if left out.")] = None,
    image_column: Annotated[str | None, Option(help="Of parquet files and the hub; else found by its type.")] = None,
    caption_column: Annotated[str | None, Option(help="Found by its name: text or caption.")] = None,
    label_column: Annotated[str | None, Option(help="Of one label a picture, for classifiers.")] = None,
    held_out: Annotated[float, Option(help="Share to hold out where the source names no split.")] = 0.01,
    min_size: Annotated[int, Option(help="Pixels; a picture with a smaller short side is rejected.")] = 8,
    drop_duplicates: Annotated[bool, Option("--drop-duplicates", help="Reject further copies of a picture.")] = False,
) -> None:
    """Read every picture and caption once; write the manifest that training reads, and say what was left out."""
    from t2i.checks import check_range
    from t2i.data.manifest import write_manifest
    from t2i.data.sources.samples import Columns

    check_range("held-out", held_out, 0, 0.5)
    check_range("min-size", min_size, 1, 4096)
    columns = Columns(image_column, caption_column, label_column)
    report = write_manifest(source, out, columns, held_out, min_size, drop_duplicates)
    print("\n".join(report.format_lines()))
    if complaint := report.format_complaint():
        raise InputError(complaint)


@data.command()
def emoji(
    folder: Annotated[Path, Argument(help="A new folder.")],
    size: Annotated[int, Option(help="Side of the pictures, in pixels.")] = 128,
) -> None:
    """Draw every emoji from the Noto Color Emoji font, with its name and keywords."""
    from t2i.data.emoji import render_emoji

    drawn = render_emoji(folder, size)
    held_out = sum(one.split == "held_out" for one in drawn)
    print(
        f"{folder}: {len(drawn)} pictures of {size} x {size}, {len(drawn) - held_out} to train on, {held_out} held out"
    )


@data.command(context_settings={"ignore_unknown_options": True})
def cache(
    arguments: Annotated[list[str] | None, Argument(help="[FILE.yaml] [key=value ...]", show_default=False)] = None,
) -> None:
    """Encode every picture and caption once, for priors and decoders to train from, in this process.

    For several: accelerate launch training/cache_data.py with the same arguments. Goes on where it stopped.
    """
    from t2i.config import load_config
    from t2i.training import cache_data

    cache_data.main(load_config(cache_data.Config, "cache", arguments or []))


@app.command()
def assemble(
    runs: Annotated[Path, Argument(help="The folder of the trained stages, such as runs/emoji.")],
    folder: Annotated[Path, Argument(help="A new folder for the pipeline.")],
    clip: Annotated[str | None, Option(help="Instead of RUNS/clip: a folder, or a public NAME:TAG.")] = None,
    autoencoder: Annotated[str | None, Option(help="Instead of RUNS/autoencoder: a folder, or a public VAE.")] = None,
    prior: Annotated[str | None, Option(help="Instead of RUNS/prior; none leaves it out.")] = None,
    decoder: Annotated[str | None, Option(help="Instead of RUNS/decoder.")] = None,
    upsampler: Annotated[str | None, Option(help="A trained upsampler's folder; left out, there is none.")] = None,
    fp16: Annotated[bool, Option("--fp16", help="Half-precision weights: half the size.")] = False,
) -> None:
    """Put trained stages together into one pipeline folder."""
    from t2i.pipelines.jobs.assemble import assemble_pipeline_folder

    parts = {"clip": clip, "autoencoder": autoencoder, "prior": prior, "decoder": decoder, "upsampler": upsampler}
    print(assemble_pipeline_folder(runs, folder, fp16, **parts))


@app.command()
def doctor() -> None:
    """Versions, devices, and what is missing."""
    from t2i.commands.doctor import collect_doctor_report

    lines, problems = collect_doctor_report()
    print("\n".join(lines))
    if problems:
        print("\n".join(f"problem: {problem}" for problem in problems))
        raise typer.Exit(1)
    print("ready")
