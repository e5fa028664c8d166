"""The command `t2i eval quality`, which compares drawn images with real ones."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i.commands import SHIPPED_MODEL, flags
from t2i.commands.flags import argument, option
from t2i.errors import InputError
from t2i.terminal import print_line, print_note

if TYPE_CHECKING:
    from t2i.evaluation.metrics import MetricSettings

app = typer.Typer()


@dataclass
class Comparison:
    """Drawn images, and the reference to compare them with."""

    reference: Annotated[Path, argument("Real images: a folder, a checked source, or a file of their statistics.")]
    model: Annotated[str | None, option("Model that draws the captions of the reference.", "models/emoji")] = None
    images: Annotated[
        Path | None, option("Folder of drawn images, instead of --model.", None, "--images", "--pictures")
    ] = None
    features: Annotated[str, option("Feature extractor: inception, or clip:FOLDER_OR_NAME.")] = "inception"
    inception: Annotated[Path | None, option("Weights of Inception: .safetensors, or torch-fidelity's .pth.")] = None
    clip_score: Annotated[
        str | None, option("CLIP that scores images with their captions; not the one that drew them.")
    ] = None
    split: Annotated[
        str | None, option("Split of a checked source: train or held_out.", "all", choices=("train", "held_out"))
    ] = None
    count: Annotated[int | None, option("Images to draw.", "one for each caption")] = None
    seed: Annotated[int, option("Seed of the first image, of the captions' order and of the subsets.")] = 0
    image_size: Annotated[int | None, option("Side in pixels to resize all images to.", "that of drawn ones")] = None
    statistics: Annotated[Path | None, option("File for the reference's statistics.", "in its folder")] = None


@dataclass
class DrawingFlags(flags.Settings):
    """Options of the model that draws."""

    steps: flags.Steps = None
    guidance_scale: flags.GuidanceScale = None
    prior_steps: flags.PriorSteps = None
    prior_guidance_scale: flags.PriorGuidanceScale = None
    candidates: flags.Candidates = None
    sampler: flags.Sampler = None
    eta: flags.Eta = None


@app.command(name="quality")
@flags.share_options
def evaluate_quality(
    comparison: Comparison,
    drawing: DrawingFlags,
    metrics: Annotated[str, option("Comma-separated metrics: fd, kid, prc.")] = "fd,kid,prc",
    kid_subset_size: Annotated[
        int | None, option("Images in each of the 100 subsets of the kernel distance.", "1000")
    ] = None,
    neighbours: Annotated[int | None, option("Nearest neighbours for precision and recall.", "3")] = None,
    out: Annotated[Path, option("JSON file for the results. An older one is replaced.")] = Path("out/quality.json"),
    num_processes: Annotated[int, option("Processes on this machine, which share its GPUs or CPU cores.")] = 1,
    device: flags.Device = "auto",
) -> None:
    """Compare drawn images with real ones.

    The metrics are Frechet distance (FID), kernel distance (KID), precision and recall, and the CLIP score.

    Several processes share the images: use --num-processes, or torchrun -m t2i eval quality ...
    """
    from t2i.checks import check_range
    from t2i.evaluation.metrics import MetricSettings
    from t2i.evaluation.results import check_result_file
    from t2i.runtime.rank import ignore_leftover_ranks

    # Check the options
    names = tuple(dict.fromkeys(name.strip() for name in metrics.split(",") if name.strip()))
    flags.check_needed("--kid-subset-size", kid_subset_size, "the metric kid", "kid" in names)
    flags.check_needed("--neighbours", neighbours, "the metric prc", "prc" in names)
    flags.check_needed("--inception", comparison.inception, "--features inception", comparison.features == "inception")
    sizes = flags.drop_missing(kid_subset_size=kid_subset_size, neighbours=neighbours)
    settings = MetricSettings(names, **sizes, seed=comparison.seed)
    check_range("num-processes", num_processes, 1, 1024)
    check_comparison(comparison, drawing.build_settings())
    check_result_file(out)

    # Measure, in several processes if asked to: torchrun starts this same command in each, and sets RANK there
    ignore_leftover_ranks()
    if num_processes > 1 and "RANK" not in os.environ:
        from t2i.runtime.launch import exec_torchrun

        exec_torchrun(["-m", "t2i", *sys.argv[1:]], num_processes)
    measure_and_report(comparison, drawing.build_settings(), settings, out, device)


def check_comparison(comparison: Comparison, drawing: dict[str, Any]) -> None:
    """Raise InputError for values that are not allowed, and for options of a model together with --images."""
    from t2i.checks import check_choice, check_integer, check_range
    from t2i.pipelines.options import build_options

    # Options of a model do not go with images that are drawn already
    images, count = comparison.images, comparison.count
    if comparison.model is not None and images is not None:
        raise InputError(f"give --model or --images, not both: {comparison.model!r}, {str(images)!r}")
    if images is not None and (drawing or count is not None):
        name = next(iter(drawing), "count")
        raise InputError(f"{name} needs a model that draws; --images {str(images)!r} are drawn already")
    # Ranges and names
    if count is not None:
        check_integer("count", count, 1, 10_000_000)
    build_options(drawing)
    if comparison.split is not None:
        check_choice("split", comparison.split, ("train", "held_out"))
    if comparison.image_size is not None:
        check_range("image-size", comparison.image_size, 8, 4096)


def check_statistics_suffice(comparison: Comparison) -> None:
    """Raise InputError for options that need a reference of images, where it is a file of their statistics."""
    if comparison.images is None:
        raise InputError(f"{str(comparison.reference)!r} contains statistics, but no captions to draw; give --images")
    for name, value in {"--split": comparison.split, "--statistics": comparison.statistics}.items():
        flags.check_needed(name, value, "images as the reference, not their statistics", False)


def measure_and_report(
    comparison: Comparison, drawing: dict[str, Any], settings: "MetricSettings", out: Path, device: str
) -> None:
    """Measure the quality in all processes; the main process writes and prints the results."""
    from accelerate import PartialState

    from t2i.evaluation.features import load_feature_extractor
    from t2i.evaluation.picture_sets import DrawnPictures, FolderPictures, open_reference_set
    from t2i.evaluation.quality import measure_quality, measure_reference_statistics, read_reference_statistics
    from t2i.evaluation.results import write_result_file
    from t2i.interop.by_name import load_clip
    from t2i.pipelines.calls.effects import warn_of_idle_arguments
    from t2i.progress import show_loading
    from t2i.runtime.devices import resolve_device_name
    from t2i.runtime.launch import check_environment, end_process_group

    reference, folder, clip_score = comparison.reference, comparison.images, comparison.clip_score
    is_statistics_file = reference.suffix == ".safetensors" and reference.is_file()
    if is_statistics_file:
        check_statistics_suffice(comparison)

    # Load the models onto the device of this process
    check_environment()
    state = PartialState(cpu=device == "cpu")
    own_device = "cpu" if state.device.type == "cpu" else str(state.device)
    device = resolve_device_name(device) if state.num_processes == 1 else own_device
    with show_loading(comparison.features):
        extractor = load_feature_extractor(comparison.features, comparison.inception, device)
        scorer = None if clip_score is None else load_clip(clip_score).to(device).eval()
    pipeline: Any = None if folder is not None else load_drawing_pipeline(comparison, device)
    drawn: Any = None if folder is None else FolderPictures(folder, comparison.image_size)
    size = drawn.size if pipeline is None else pipeline.image_size

    # Measure the reference, or read what was measured before
    if is_statistics_file:
        real = read_reference_statistics(reference, {"extractor": extractor.identity, "image_size": size})
    else:
        images = open_reference_set(reference, size, comparison.split)
        if pipeline is not None:
            if state.is_main_process:
                warn_of_idle_arguments(pipeline, drawing | {"prompt": ["each caption"]})
            drawn = DrawnPictures(pipeline, images.captions, comparison.count, comparison.seed, **drawing)
        settings.check_image_counts({"drawn": len(drawn), "reference": len(images)}, extractor.dim)
        real = measure_reference_statistics(images, extractor, size, comparison.statistics, state)

    # Measure the drawn images. A CLIP score flatters a model that draws with the same CLIP.
    conditioning = None if pipeline is None else pipeline.clip.identity
    result = measure_quality(drawn, real, extractor, settings, state, scorer, conditioning)
    if state.is_main_process:
        write_result_file(result, out)
        for line in [*format_quality_lines(result, clip_score), f"results: {out}"]:
            print_line(line)
        if conditioning is not None and scorer is not None and scorer.identity == conditioning:
            print_note("warning: the CLIP score is by the CLIP that the model draws with; this flatters it", sys.stderr)
    end_process_group()
    if left_out := {kind: n for kind in ("drawn", "reference") if (n := result[kind].get("left_out"))}:
        counts = " and ".join(f"{n} {kind}" for kind, n in left_out.items())
        raise InputError(f"{counts} images cannot be read and were left out, all others measured")


def load_drawing_pipeline(comparison: Comparison, device: str) -> Any:
    from t2i.pipelines.jobs.planning import ModelSource, load_pipeline

    pipeline: Any = load_pipeline(ModelSource(comparison.model or str(SHIPPED_MODEL), device=device))
    size = pipeline.image_size
    if comparison.image_size not in (None, size):
        raise InputError(f"image-size must be {size}, which the model draws, got {comparison.image_size}")
    return pipeline


def format_quality_lines(result: dict[str, Any], clip_score: str | None) -> list[str]:
    """Return lines for the terminal: the counts, then each metric that was computed."""
    metrics, drawn, real = result["metrics"], result["drawn"]["count"], result["reference"]["count"]
    lines = [f"{drawn:,} drawn and {real:,} real images, features of {result['extractor']}"]
    is_inception = result["extractor"].startswith("inception")
    if "frechet_distance" in metrics:
        lines.append(f"{'FID' if is_inception else 'Frechet distance'}: {metrics['frechet_distance']:.4f}")
    if "kernel_distance" in metrics:
        deviation = f"(+- {metrics['kernel_distance_std']:.6f} over the subsets)"
        lines.append(f"{'KID' if is_inception else 'kernel distance'}: {metrics['kernel_distance']:.6f} {deviation}")
    if "precision" in metrics:
        lines.append(f"precision: {metrics['precision']:.4f}, recall: {metrics['recall']:.4f}")
    if "clip_score" in metrics:
        relations = {True: "the one drawn with", False: "another than the one drawn with", None: "drawn with: unknown"}
        scorer = f"{clip_score}, {relations[metrics['clip_score_by']['is_conditioning_clip']]}"
        lines.append(f"CLIP score: {metrics['clip_score']:.4f} (mean cosine with the captions, by {scorer})")
    return lines
