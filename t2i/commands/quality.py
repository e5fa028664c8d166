"""`t2i eval quality`: drawn pictures beside real ones."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL
from t2i.commands import flags as options
from t2i.errors import InputError

if TYPE_CHECKING:
    from t2i.evaluation.metrics import MetricSettings
    from t2i.evaluation.picture_sets import PictureSet
    from t2i.evaluation.quality import ReferenceStatistics

app = typer.Typer()


@app.command(name="quality")
def evaluate_quality(
    reference: Annotated[Path, Argument(help="Real pictures: a folder, a checked source, or statistics of them.")],
    model: Annotated[str | None, Option(help="What draws the reference's captions; if left out, the emoji's.")] = None,
    pictures: Annotated[Path | None, Option(help="A folder of drawn pictures, instead of a model.")] = None,
    features: Annotated[str, Option(help="inception, or clip:FOLDER_OR_NAME.")] = "inception",
    inception: Annotated[Path | None, Option(help="Its weights: .safetensors, or torch-fidelity's .pth.")] = None,
    clip_score: Annotated[str | None, Option(help="A CLIP to score captions by: not the one drawn with.")] = None,
    metrics: Annotated[str, Option(help="Some of fd, kid, prc, with commas between them.")] = "fd,kid,prc",
    kid_subset_size: Annotated[int, Option(help="Pictures of each of the 100 draws of the kernel distance.")] = 1000,
    neighbours: Annotated[int, Option(help="Of precision and recall.")] = 3,
    split: Annotated[str | None, Option(help="train or held_out of a checked source; else all.")] = None,
    count: Annotated[int | None, Option(help="Pictures to build_drawn_set; one for each caption, if left out.")] = None,
    seed: Annotated[int, Option(help="Of the first picture, of the captions' order, and of the draws.")] = 0,
    image_size: Annotated[int | None, Option(help="Pixels to bring both sets to; if left out, what is drawn.")] = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    prior_steps: options.PriorSteps = None,
    prior_guidance_scale: options.PriorGuidanceScale = None,
    candidates: options.Candidates = None,
    sampler: options.Sampler = None,
    eta: options.Eta = None,
    statistics: Annotated[Path | None, Option(help="File of the reference's statistics, if not in its folder.")] = None,
    out: Annotated[Path, Option(help="File for the result, replaced.")] = Path("out/quality.json"),
    num_processes: Annotated[int, Option(help="On this machine: GPUs, or shares of the CPU.")] = 1,
    device: options.Device = "auto",
) -> None:
    """Frechet distance (FID), kernel distance (KID), precision and recall, CLIP score.

    Several processes share the pictures: --num-processes, or torchrun -m t2i eval quality ...
    """
    from t2i.checks import check_choice, check_range
    from t2i.evaluation.metrics import MetricSettings
    from t2i.evaluation.results import check_result_file

    drawing = options.select_given_settings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        prior_num_inference_steps=prior_steps,
        prior_guidance_scale=prior_guidance_scale,
        prior_candidates=candidates,
        sampler=sampler,
        eta=eta,
    )
    settings = MetricSettings(split_metric_names(metrics), kid_subset_size, neighbours=neighbours, seed=seed)
    check_range("num-processes", num_processes, 1, 1024)
    check_quality_input(model, pictures, count, drawing)
    if split is not None:
        check_choice("split", split, ("train", "held_out"))
    if image_size is not None:
        check_range("image-size", image_size, 8, 4096)
    check_result_file(out)
    if num_processes > 1:
        from t2i.runtime.launch import exec_torchrun

        exec_torchrun(["-m", "t2i", *remove_command_option(sys.argv[1:], "--num-processes")], num_processes)
    what = QualityArguments(
        reference, model, pictures, features, inception, clip_score, split, count, seed, image_size, drawing
    )
    measure_and_report(what, settings, statistics, out, device)


@dataclass(frozen=True)
class QualityArguments:
    """What is to be compared with what, by which features."""

    reference: Path
    model: str | None
    folder: Path | None
    features: str
    inception: Path | None
    clip_score: str | None
    split: str | None
    count: int | None
    seed: int
    image_size: int | None
    drawing: dict[str, Any]


def split_metric_names(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def check_quality_input(model: str | None, pictures: Path | None, count: int | None, drawing: dict[str, Any]) -> None:
    """What to measure is a model or pictures, and options of a model go with a model."""
    from t2i.checks import check_integer
    from t2i.pipelines.options import build_options

    if model is not None and pictures is not None:
        raise InputError(f"give --model or --pictures, not both: {model!r}, {str(pictures)!r}")
    if pictures is not None and (drawing or count is not None):
        name = next(iter({**drawing, **({} if count is None else {"count": count})}))
        raise InputError(f"{name} is for a model that draws; --pictures {str(pictures)!r} are drawn already")
    if count is not None:
        check_integer("count", count, 1, 10_000_000)
    build_options(drawing)


def remove_command_option(arguments: list[str], option: str) -> list[str]:
    """Arguments without an option and its value."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(option + "="):
            found.append(argument)
    return found


def measure_and_report(
    what: QualityArguments, settings: "MetricSettings", statistics: Path | None, out: Path, device: str
) -> None:
    from accelerate import PartialState

    from t2i.evaluation.features import load_feature_extractor
    from t2i.evaluation.picture_sets import FolderPictures, open_reference_set
    from t2i.evaluation.quality import measure_quality, measure_reference_statistics, read_reference_statistics
    from t2i.evaluation.results import write_result_file
    from t2i.interop.by_name import load_clip
    from t2i.runtime.devices import resolve_device_name
    from t2i.runtime.launch import end_process_group

    kept = what.reference.suffix == ".safetensors" and what.reference.is_file()
    if kept and what.folder is None:
        raise InputError(f"{str(what.reference)!r} holds statistics, which have no captions to draw; give --pictures")
    state = PartialState(cpu=device == "cpu")
    here = "cpu" if state.device.type == "cpu" else str(state.device)  # of this process among several
    device = resolve_device_name(device) if state.num_processes == 1 else here
    extractor = load_feature_extractor(what.features, what.inception, device)
    scorer = None if what.clip_score is None else load_clip(what.clip_score).to(device).eval()
    files = None if what.folder is None else FolderPictures(what.folder, what.image_size)
    pipeline: Any = None if files is not None else load_drawing_pipeline(what, device)
    size = pipeline.image_size if files is None else files.size
    real: ReferenceStatistics
    drawn: PictureSet
    if kept:
        assert files is not None
        real, drawn = (
            read_reference_statistics(what.reference, {"extractor": extractor.identity, "image_size": size}),
            files,
        )
    else:
        pictures = open_reference_set(what.reference, size, what.split)
        drawn = files or build_drawn_set(pipeline, pictures.captions, what)
        settings.check_image_counts({"drawn": len(drawn), "reference": len(pictures)}, extractor.dim)
        real = measure_reference_statistics(pictures, extractor, size, statistics, state)
    conditioning = None if pipeline is None else pipeline.clip.identity
    result = measure_quality(drawn, real, extractor, settings, state, scorer, conditioning)
    if state.is_main_process:
        write_result_file(result, out)
        print("\n".join([*format_quality_lines(result, what.clip_score), f"all of it is in {out}"]))
        if conditioning is not None and scorer is not None and scorer.identity == conditioning:
            print(
                "warning: this CLIP score is by the CLIP that the model draws with, which flatters it", file=sys.stderr
            )
    end_process_group()


def load_drawing_pipeline(what: QualityArguments, device: str) -> Any:
    from t2i.pipelines.jobs.generation import load_pipeline

    pipeline: Any = load_pipeline(what.model or str(SHIPPED_MODEL), device)
    if what.image_size not in (None, pipeline.image_size):
        raise InputError(f"image-size is {what.image_size}, the model draws {pipeline.image_size}; leave it out")
    return pipeline


def build_drawn_set(pipeline: Any, captions: list[str | None], what: QualityArguments) -> "PictureSet":
    from t2i.evaluation.picture_sets import DrawnPictures

    return DrawnPictures(pipeline, captions, what.count, what.seed, **what.drawing)


def format_quality_lines(result: dict[str, Any], clip_score: str | None) -> list[str]:
    """The figures, for people."""
    found, drawn, real = result["metrics"], result["drawn"]["count"], result["reference"]["count"]
    said = [f"{drawn:,} drawn and {real:,} real pictures, features of {result['extractor']}"]
    fid, kid = (
        ("FID", "KID") if result["extractor"].startswith("inception") else ("Frechet distance", "kernel distance")
    )
    if "frechet_distance" in found:
        said.append(f"{fid}: {found['frechet_distance']:.4f}")
    if "kernel_distance" in found:
        said.append(f"{kid}: {found['kernel_distance']:.6f} (+- {found['kernel_distance_std']:.6f} over the draws)")
    if "precision" in found:
        said.append(f"precision: {found['precision']:.4f}, recall: {found['recall']:.4f}")
    if "clip_score" in found:
        whose = {True: "the one drawn with", False: "another than the one drawn with", None: "drawn with: unknown"}
        by = f"{clip_score}, {whose[found['clip_score_by']['is_conditioning_clip']]}"
        said.append(f"CLIP score: {found['clip_score']:.4f} (mean cosine with the captions, by {by})")
    return said
