"""The `t2i` command. Each command imports what it needs when it runs, so that `t2i --help` is quick."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from t2i import EXTRA_STAGES, STAGES, __version__
from t2i.commands import conversion, drawing, editing, evaluation, records, seeing, serving
from t2i.commands.flags import argument, check_needed, option
from t2i.commands.imports import speed_up_imports
from t2i.errors import InputError, report_errors
from t2i.limits import find_max_pixels, set_max_megapixels
from t2i.progress import Progress
from t2i.terminal import be_quiet, print_line, print_note

if TYPE_CHECKING:
    from t2i.training.all_stages import Trainer

# Commands that read images, and so take --max-megapixels
READING_COMMANDS = {"check", "init", "generate", "upsample", "image-to-image", "inpaint", "outpaint", "variations"}
READING_COMMANDS |= {"interpolate", "edit", "classify", "search", "similarity", "quality"}
TRAINED_STAGES = (*STAGES, *EXTRA_STAGES)


class SharingGroup(TyperGroup):
    """A group of commands that take options of its own too, before or after their names.

    All take `--quiet`, and those that read images `--max-megapixels`.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        # Typer lets commands inherit no options: each gets the group's own parameter
        shared = {parameter.name: parameter for parameter in self.params}
        for command in list_commands_below(self):
            command.params.append(shared["quiet"])
            if command.name in READING_COMMANDS:
                command.params.append(shared["max_megapixels"])


def list_commands_below(group: Any) -> Iterator[Any]:
    """Yield the commands and groups in a group, and those in them."""
    for command in getattr(group, "commands", {}).values():
        yield command
        yield from list_commands_below(command)


app = typer.Typer(
    cls=SharingGroup,
    help="Text-to-image models in the way of DALL-E 2 (unCLIP): draw with them, train them, evaluate them.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Prepare and check training data.")
app.add_typer(drawing.app)
app.add_typer(editing.app)
app.add_typer(records.app)
app.add_typer(seeing.app)
app.add_typer(conversion.app)
app.add_typer(serving.app)
app.add_typer(data, name="data")
app.add_typer(evaluation.app, name="eval")


def print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"t2i {__version__}")
        raise typer.Exit


def take_quiet(quiet: bool) -> None:
    if quiet:
        be_quiet()


@app.callback()
def take_common_options(
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", callback=take_quiet, expose_value=False, help="Print results and errors only."),
    ] = False,
    max_megapixels: Annotated[
        float | None,
        typer.Option(
            callback=set_max_megapixels,
            expose_value=False,
            show_default=False,
            help="Largest image to read, in millions of pixels. [default: 40]",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Bad input is reported in one line, with exit status 2."""
    status = 0
    with report_errors():
        try:
            # Outside of its standalone mode typer raises errors, instead of printing them over several lines
            status = app(sys.argv[1:] or ["--help"], prog_name="t2i", standalone_mode=False)
        except typer.TyperException as error:
            raise InputError(error.format_message() + format_option_value(error)) from error
        except typer.Abort:
            # Ctrl-C, which shells report as 128 + SIGINT
            status = 130
    sys.exit(status)


def format_option_value(error: typer.TyperException) -> str:
    """Return ", got VALUE" for an error about an option; typer's own message leaves the value out."""
    for name in getattr(getattr(error, "param", None), "opts", []):
        if name in sys.argv[:-1]:
            return f", got {sys.argv[sys.argv.index(name) + 1]!r}"
    return ""


@app.command()
def init(
    run: Annotated[Path, argument("New folder for the configurations and everything trained with them.")],
    source: Annotated[str, option("Captioned images, as for `t2i data check`.", None, "--data")],
    clip: Annotated[str | None, option("Trained or public CLIP to use.", "train one")] = None,
    autoencoder: Annotated[str | None, option("Trained or public autoencoder to use.", "train one")] = None,
    device: Annotated[str, option("Device to train on: auto, cpu or cuda.")] = "auto",
    image_size: Annotated[int | None, option("Side of the images in pixels.", "chosen from the data")] = None,
    held_out: Annotated[float | None, option("Fraction to hold out, if the data has no splits.", "0.05")] = None,
) -> None:
    """Write a configuration for each training stage, with sizes that suit the data and the device."""
    from t2i.training.recipe.recipe import check_run_folder, compose_recipe, find_device, read_data_facts

    check_run_folder(run, source)
    machine = find_device(device)
    ensure_fresh_manifest(source, held_out)
    recipe = compose_recipe(run, read_data_facts(source, clip), machine, clip, autoencoder, image_size)
    recipe.write_folder(run)
    for line in recipe.lines:
        print_note(line)
    folder = shlex.quote(str(run))
    print_note(f"next: t2i train all {folder} --dry-run   estimates the costs")
    print_note(f"      t2i train all {folder}")


def ensure_fresh_manifest(source: str, held_out: float | None) -> None:
    """Check the data now if it has no manifest. Raises InputError if it has changed since it was checked."""
    from t2i.data.freshness import find_changes
    from t2i.data.manifest import find_manifest

    # Without a manifest, check the data; otherwise compare the two
    try:
        manifest = find_manifest(Path(source))
    except InputError:
        check(source, held_out=0.05 if held_out is None else held_out)
        return
    if held_out is not None:
        raise InputError(
            f"held-out is {held_out}, but {str(manifest)!r} has splits already; `t2i data check` makes new ones"
        )
    if changes := find_changes(source):
        raise InputError(
            f"{source!r} has changed since it was checked: {changes}; run `t2i data check {shlex.quote(source)}` again"
        )


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    stage: Annotated[
        str, argument(f"Stage to train: {', '.join(TRAINED_STAGES)}, or all.", choices=(*TRAINED_STAGES, "all"))
    ],
    arguments: Annotated[
        list[str] | None,
        argument("FILE.yaml and overrides key=value; for `all`, a folder of configurations, as `t2i init` writes it."),
    ] = None,
    out: Annotated[Path | None, option("For `all`: folder of the results.", "the folder of the configurations")] = None,
    dry_run: Annotated[bool, option("Print what the run would cost, and write nothing.", None, "--dry-run")] = False,
    num_processes: Annotated[int, option("Processes on this machine, which share its GPUs or CPU cores.")] = 1,
    max_restarts: Annotated[int, option("Number of restarts after a process died, with several processes.")] = 0,
) -> None:
    """Train a stage, or all stages of a folder of configurations, and assemble the pipeline.

    A run that was stopped continues from its last checkpoint. To train on several machines, use accelerate launch.
    """
    from t2i.checks import check_choice, check_range

    # Check the arguments before torch is imported
    check_choice("stage", stage, (*TRAINED_STAGES, "all"))
    check_range("num-processes", num_processes, 1, 1024)
    check_range("max-restarts", max_restarts, 0, 1000)
    check_needed("--max-restarts", max_restarts or None, "--num-processes of 2 or more", num_processes > 1)
    check_needed("--out", out, "the stage all", stage == "all")
    from importlib import import_module

    from t2i.config import load_config
    from t2i.runtime.launch import exec_torchrun
    from t2i.training.common.entry import start_training

    if stage == "all":
        trainer = open_run(arguments or [], out, num_processes, max_restarts)
        raise typer.Exit(trainer.estimate_costs() if dry_run else trainer.train())

    # Check the configuration here, then train in this process, or become torchrun and several processes
    overrides = [*(arguments or []), *(["train.dry_run=true"] if dry_run else [])]
    with speed_up_imports(without=(), needs_compiler=True):
        script = import_module(f"t2i.training.train_{stage}")
    config = load_config(script.Config, stage, overrides)
    if num_processes > 1:
        exec_torchrun([str(script.__file__), *overrides], num_processes, max_restarts)
    start_training(script.main, config)


def open_run(arguments: list[str], out: Path | None, num_processes: int, max_restarts: int) -> "Trainer":
    """Return the trainer of all stages that a folder configures. Raises InputError."""
    from t2i.training.all_stages import Run, Trainer

    if len(arguments) != 1:
        problem = f"{arguments[1]!r} belongs in its configuration files" if arguments[1:] else "none is given"
        raise InputError(f"train all takes one folder of configurations; {problem}")
    return Trainer(Run.read_folder(Path(arguments[0]), out), num_processes, max_restarts)


@data.command()
def check(
    source: Annotated[str, argument("Folder, .tar or .parquet file, or hub:ORGANISATION/NAME.")],
    out: Annotated[Path | None, option("Folder for the manifest and the report.", "SOURCE/t2i")] = None,
    image_column: Annotated[str | None, option("Column of the images or of their file names.", "found by type")] = None,
    caption_column: Annotated[str | None, option("Caption column.", "text or caption")] = None,
    label_column: Annotated[
        list[str] | None,
        option("Column with one label per image, for classifiers; further ones to sample by. May be repeated.", "none"),
    ] = None,
    held_out: Annotated[float, option("Fraction of images to hold out, if the source has no splits.")] = 0.01,
    min_size: Annotated[int, option("Smallest short side in pixels. Smaller images are rejected.")] = 8,
    drop_duplicates: Annotated[bool, option("Reject further copies of an image.", None, "--drop-duplicates")] = False,
) -> None:
    """Read every image and caption once, write the manifest that training needs, and print what was rejected."""
    from t2i.checks import check_range
    from t2i.data.manifest import write_manifest
    from t2i.data.pictures import Reading
    from t2i.data.sources.samples import Columns

    check_range("held-out", held_out, 0, 0.5)
    check_range("min-size", min_size, 1, 4096)
    columns = Columns(image_column, caption_column, tuple(label_column or ()))
    reading = Reading(max_pixels=find_max_pixels())
    report = write_manifest(source, out, columns, held_out, min_size, drop_duplicates, reading=reading)
    for line in report.format_lines():
        print_line(line)
    # The manifest and the report are kept: they list the reasons
    if complaint := report.format_complaint():
        raise InputError(complaint)


@data.command()
def emoji(
    folder: Annotated[Path, argument("New folder.")],
    size: Annotated[int, option("Side of the images in pixels.")] = 128,
    keywords: Annotated[
        str | None,
        option("Further keyword lists: emojilib, gemoji, emoji-mart, emojibase, with commas; or all.", "CLDR's only"),
    ] = None,
    styles: Annotated[
        str | None,
        option("Further styles: 3D, flat, outline, blob, twemoji, with commas; or all. Captions name them.", "none"),
    ] = None,
    packages: Annotated[
        Path | None,
        option("Folder with the packages of keywords and styles, .tgz files of `npm pack`.", "npm downloads them"),
    ] = None,
) -> None:
    """Draw every emoji of the Noto Color Emoji font, with its name and keywords as captions."""
    is_given = keywords is not None or styles is not None
    check_needed("--packages", packages, "--keywords or --styles", is_given)
    from t2i.data.emoji.keywords import choose_keyword_lists
    from t2i.data.emoji.rendering import render_emoji
    from t2i.data.emoji.styles import choose_styles

    lists = choose_keyword_lists(keywords) if keywords is not None else []
    chosen = choose_styles(styles) if styles is not None else []
    drawn = render_emoji(folder, size, lists=lists, styles=chosen, packages=packages)
    held_out = sum(image.split == "held_out" for image in drawn)
    print_line(
        f"{folder}: {len(drawn)} images of {size} x {size}: {len(drawn) - held_out} to train on, {held_out} held out"
    )


@data.command(context_settings={"ignore_unknown_options": True})
def cache(
    arguments: Annotated[list[str] | None, argument("FILE.yaml and overrides key=value.")] = None,
) -> None:
    """Encode every image and caption once, so that priors and decoders train without the encoders.

    A command that was stopped continues where it stopped. To use several processes, run
    `accelerate launch training/cache_data.py` with the same arguments.
    """
    from t2i.config import load_config
    from t2i.training import cache_data
    from t2i.training.common.entry import start_training

    start_training(cache_data.main, load_config(cache_data.Config, "cache", arguments or []))


@app.command()
def assemble(
    runs: Annotated[Path, argument("Folder of the trained stages, such as runs/emoji.")],
    folder: Annotated[Path, argument("New folder for the pipeline.")],
    clip: Annotated[str | None, option("CLIP's folder, or a public NAME:TAG of open_clip.", "RUNS/clip")] = None,
    autoencoder: Annotated[str | None, option("Autoencoder's folder, or a public VAE.", "RUNS/autoencoder")] = None,
    prior: Annotated[str | None, option("Prior's folder; none leaves the prior out.", "RUNS/prior")] = None,
    decoder: Annotated[str | None, option("Decoder's folder.", "RUNS/decoder")] = None,
    upsampler: Annotated[str | None, option("Folder of a trained upsampler.", "no upsampler")] = None,
    fp16: Annotated[bool, option("Write half-precision weights, which halves the size.", None, "--fp16")] = False,
    license: Annotated[str, option("For the model card: the hub's name of a licence, such as apache-2.0.")] = "unknown",
    dataset: Annotated[list[str] | None, option("For the model card: data set on the hub. Repeatable.", "none")] = None,
) -> None:
    """Assemble trained stages into one pipeline folder with a model card, and print its path."""
    from t2i.pipelines.jobs.assemble import assemble_pipeline_folder
    from t2i.pipelines.jobs.model_card import CardFacts

    parts = {"clip": clip, "autoencoder": autoencoder, "prior": prior, "decoder": decoder, "upsampler": upsampler}
    with Progress("assembling"):
        path = assemble_pipeline_folder(runs, folder, fp16, CardFacts(license, tuple(dataset or ())), **parts)
    print_line(path)


@app.command()
def doctor() -> None:
    """Print versions and devices, and report what is missing."""
    from t2i.commands.doctor import collect_doctor_report

    lines, problems = collect_doctor_report()
    print("\n".join(lines))
    if problems:
        print("\n".join(f"problem: {problem}" for problem in problems))
        raise typer.Exit(1)
    print("ready")
