"""Draw images and write them as PNG files: the jobs of `t2i generate`, `t2i upsample` and the editing commands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.calls.effects import warn_of_idle_arguments
from t2i.pipelines.calls.unknown_words import collect_texts, report_unknown_words
from t2i.pipelines.inversion import InvertingPipeline
from t2i.pipelines.jobs.batches import BatchPlan, parse_batch_size, write_images, write_new_image
from t2i.pipelines.jobs.planning import ModelSource, Output, load_pipeline, split_settings
from t2i.pipelines.jobs.records import Record, build_settings_record, compare_weights, format_model_name
from t2i.pipelines.memory_needed import check_batch_fits, find_fitting_count
from t2i.pipelines.options import ResolvedOptions
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.upsample import UpsamplePipeline
from torch import Generator

from t2i.bulk import BulkJob
from t2i.checks import check_texts
from t2i.data.pictures import open_image
from t2i.errors import InputError
from t2i.files.fingerprints import compute_brief_fingerprint, format_scheduler_configs
from t2i.progress import Progress, follow_batch
from t2i.runtime.memory import MEMORY_MARGIN, measure_available_memory
from t2i.runtime.rank import find_process_rank
from t2i.sampling.upsampling import check_upsampled_size
from t2i.texts import wrap_text

# Components whose weights decide what is drawn. Their fingerprint is recorded, so that `resume` distinguishes models.
DRAWING_COMPONENTS = ("prior", "decoder", "autoencoder", "clip", "text_encoder", "upsampler")


def generate_files(
    prompts: str | list[str],
    source: ModelSource,
    output: Output,
    settings: dict[str, Any],
    batch_size: str | int | None = None,
    resume: bool = False,
    like: Record | None = None,
    is_chosen: bool = True,
) -> Iterator[Path]:
    """Draw `output.count` images for each prompt, write each batch as soon as it is drawn, and yield the paths.

    Without prompts the decoder gets a zero embedding, and steering decides what is drawn. Processes share the batches.

    Args:
        settings: arguments and options of `Text2ImagePipeline`.
        batch_size: images drawn at once; "auto" and None are 16, or fewer if they do not fit into memory.
        resume: skip images that the folder contains already.
        like: record of the image whose settings these are; other weights than its own are logged.
        is_chosen: False for a default model, which must have the weights of `like` if it has its name.

    Raises:
        InputError: for a value that is not allowed, before the model loads where that is possible.
    """
    # Check everything that needs no model
    prompts = wrap_text(prompts)
    plan = BatchPlan(parse_batch_size(batch_size), rank=find_process_rank(), resume=resume)
    if output.seed is None and plan.rank.world_size > 1:
        raise InputError(f"seed is missing; {plan.rank.world_size} processes share the images and need the same seed")
    inputs = prompts or [""]
    first_seed = output.choose_first_seed(len(inputs))
    check_texts("prompt", prompts, empty=False)
    arguments, options = split_settings(Text2ImagePipeline, settings)
    for name in ("negative_prompt", "decoder_negative_prompt"):
        check_texts(name, [arguments[name]] if name in arguments else [])
    if not prompts:
        # Without a condition there is nothing to guide towards
        options = {"guidance_scale": 1.0, **options}
    Text2ImagePipeline.build_options(options)
    output.check_path(len(inputs) * output.count, plan.rank)

    # Load the model
    pipeline = load_pipeline(replace(source, device=plan.rank.choose_device(source.device)), Text2ImagePipeline)
    resolved = pipeline.resolve_options(**options)
    warn_of_idle_arguments(pipeline, settings | {"prompt": prompts}, resolved)
    report_unknown_words(pipeline, collect_texts({"prompt": prompts} | arguments))  # of all batches, before the first

    # Record how the images are drawn
    used = build_settings_record(source, settings, resolved, bool(prompts) and pipeline.prior is not None)
    weights = {name: getattr(pipeline, name) for name in DRAWING_COMPONENTS}
    used["weights"] = compute_brief_fingerprint(weights, format_scheduler_configs(pipeline.components))
    texts = [prompt for prompt in inputs for _ in range(output.count)]
    records = build_records("prompt", texts, first_seed, source.model, used)
    compare_weights(like or {}, records[0], is_chosen)

    # Draw
    drawer = PromptDrawer(pipeline, records, arguments, resolved, bool(prompts), plan.rank.local_world_size)
    plan = replace(plan, device=pipeline.device, find_fitting_size=drawer.find_fitting_size)
    with Progress("drawing", len(records)) as progress:
        yield from write_images(drawer.draw, records, output.path, plan, progress)


@dataclass
class PromptDrawer:
    """Batches of a text-to-image pipeline, drawn with options that were resolved once.

    has_prompts: False draws from the null embedding. processes: number of those that draw on this machine.
    """

    pipeline: Text2ImagePipeline
    records: list[Record]
    arguments: dict[str, Any]
    resolved: ResolvedOptions
    has_prompts: bool
    processes: int

    def draw(self, indices: list[int]) -> list[Image.Image]:
        """Return the images of these records."""
        # Other processes draw their first batch at the same time, so it must fit beside theirs. Later, their memory is
        # already in use.
        processes, self.processes = self.processes, 1
        prior, decoder = self.resolved
        if processes > 1:
            check_batch_fits(self.pipeline, prior if self.has_prompts else None, decoder, len(indices), processes)
        records = [self.records[i] for i in indices]
        inputs: dict[str, Any] = {"prompt": [record["prompt"] for record in records]}
        if not self.has_prompts:
            inputs = {"image_embeds": torch.zeros(len(records), self.pipeline.clip.embed_dim)}
        generators = [Generator().manual_seed(record["seed"]) for record in records]
        result: Any = self.pipeline(**inputs, generator=generators, resolved=self.resolved, **self.arguments)
        return result.images

    def find_fitting_size(self, size: int) -> int:
        """Return the size, halved until a batch fits, with a margin, into this process's part of the free memory."""
        prior, decoder = self.resolved
        free = measure_available_memory(self.pipeline.device).divide_by_processes(self.processes).free / MEMORY_MARGIN
        return max(1, find_fitting_count(self.pipeline, prior if self.has_prompts else None, decoder, size, free))


def redraw_files(
    kind: type[UnCLIPPipeline],
    paths: list[Path],
    source: ModelSource,
    output: Output,
    settings: dict[str, Any],
    check_image: Callable[[Image.Image], object] | None = None,
) -> Iterator[Path]:
    """Draw `output.count` images from each image file with a pipeline that takes an `image`, and yield the new paths.

    Of several files, those that cannot be used are named and left out; an InputError at the end has their number.

    settings: other arguments and options of the pipeline. check_image: raises InputError for an image that does not go
    with them. Raises InputError for a value that is not allowed, before the model loads where that is possible.
    """
    # Check everything that needs no model
    arguments, options = split_settings(kind, settings)
    kind.build_options(options)
    first_seed = output.choose_first_seed(len(paths))
    output.check_path(len(paths) * output.count)
    job = BulkJob(len(paths))
    images = open_usable_images(paths, job, check_image)

    # Load the model
    pipeline = load_pipeline(source, kind)
    resolved = pipeline.resolve_options(**options)
    warn_of_idle_arguments(pipeline, settings, resolved)
    report_unknown_words(pipeline, collect_texts(arguments))  # before an image is read

    # Record how the images are drawn. Pipelines that invert images pass a prompt to the decoder alone.
    has_prompt = arguments.get("prompt") is not None and not issubclass(kind, InvertingPipeline)
    uses_prior = (has_prompt or arguments.get("direction") == "prior") and pipeline.prior is not None
    used = build_settings_record(source, settings, resolved, uses_prior)
    names = [path.name for path in paths for _ in range(output.count)]
    records = build_records("image", names, first_seed, source.model, used)

    # Draw each image alone, for they may differ in size. Its seeds do not depend on images that are left out.
    def draw(first: int, indices: list[int]) -> list[Image.Image]:
        drawn = []
        for i in indices:
            stream = [Generator().manual_seed(first_seed + first + i)]
            drawn += pipeline(images[first // output.count], generator=stream, resolved=resolved, **arguments).images
        return drawn

    plan = BatchPlan(size=1, device=pipeline.device)
    with Progress("drawing", len(images) * output.count) as progress:
        for number in images:
            first = number * output.count
            own = records[first : first + output.count]
            with job.skip_bad_input(paths[number]):
                yield from write_images(partial(draw, first), own, output.path, plan, progress)
    job.finish()


def open_usable_images(
    paths: list[Path], job: BulkJob, check_image: Callable[[Image.Image], object] | None = None
) -> dict[int, Image.Image]:
    """Return the images of files by their number; see `BulkJob` for the others. Raises InputError if none is left."""
    images = {}
    for number, path in enumerate(paths):
        with job.skip_bad_input(path, OSError):
            image = open_image(path)
            if check_image is not None:
                check_image(image)
            images[number] = image
    job.check_any_left()
    return images


def upsample_files(
    paths: list[Path], source: ModelSource, output: Output, times: int, settings: dict[str, Any]
) -> Iterator[Path]:
    """Upsample each image file `times` times, write each as soon as it is done, and yield the paths.

    settings: other arguments of `UpsamplePipeline`. Raises InputError likewise.
    """
    output.check_path(len(paths))
    first_seed = output.choose_first_seed(len(paths))
    # Complain about an image before the model loads
    job = BulkJob(len(paths))
    images = open_usable_images(paths, job)
    pipeline = load_pipeline(source, UpsamplePipeline)
    with Progress("upsampling", len(images)):
        for i, image in images.items():
            with job.skip_bad_input(path := paths[i]):
                check_upsampled_size(pipeline.upsampler, image.width, image.height, times)
                generator = Generator().manual_seed(first_seed + i)
                with follow_batch(1):
                    result: Any = pipeline(image, times, generator=generator, **settings)
                record = build_upsampling_record(path.name, first_seed + i, source.model, times, settings)
                yield write_new_image(output.path, path.stem, result.images[0], record)
    job.finish()


def build_upsampling_record(name: str, seed: int, model: str, times: int, settings: dict[str, Any]) -> Record:
    """Return what an upsampled image records: the name of the given one, its seed, the model and the settings."""
    # With the defaults too, which another version may change
    parameters = signature(UpsamplePipeline.__call__).parameters
    used = {key: settings.get(key, parameters[key].default) for key in ("num_inference_steps", "level")}
    return {"picture": name, "seed": seed, "model": format_model_name(model), "upsample": times, **used}


def build_records(key: str, inputs: list[str], first_seed: int, model: str, used: Record) -> list[Record]:
    """Return a record for each image: its input under `key`, its seed, the model and what was used."""
    name = format_model_name(model)
    return [{key: text, "seed": first_seed + i, "model": name, **used} for i, text in enumerate(inputs)]
