"""From prompts to PNG files: what `t2i generate` does."""

import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict
from inspect import signature
from io import BytesIO
from itertools import chain, islice, repeat
from itertools import count as counting
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.inversion import InvertingPipeline
from t2i.pipelines.jobs.batches import (
    AUTO_BATCH_SIZE,
    Record,
    check_batch_size,
    draw_fitting_batches,
    find_drawn_files,
    iterate_in_order,
    split_batches,
)
from t2i.pipelines.jobs.dtypes import check_dtype_parts, convert_to_torch_dtypes
from t2i.pipelines.memory_needed import check_batch_fits, find_fitting_count
from t2i.pipelines.options import PriorOptions, build_options
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.upsample import UpsamplePipeline
from torch import Generator

from t2i import __version__
from t2i.checks import check_texts
from t2i.data.pictures import open_image
from t2i.diffusion.guidance import Guidance
from t2i.errors import InputError
from t2i.files.atomic import write_new_file
from t2i.files.fingerprints import compute_brief_fingerprint, format_scheduler_configs
from t2i.interop.stored import has_bf16, resolve_part_dtype
from t2i.runtime.devices import check_bf16_support, resolve_device_name
from t2i.runtime.memory import MEMORY_MARGIN, measure_available_memory
from t2i.runtime.rank import SINGLE_PROCESS, Rank, find_process_rank
from t2i.sampling.embeddings import AnyPrior, default_guidance_scale
from t2i.sampling.steering import Steering
from t2i.sampling.upsampling import check_upsampled_size

logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1
MAX_IMAGES_PER_PROMPT = 1024

RECORDED_OPTIONS = ("num_inference_steps", "guidance_scale")  # of a pipeline's options, in every picture
RECORDED_PRIOR_OPTIONS = ("prior_num_inference_steps", "prior_guidance_scale", "prior_candidates")  # where a prior ran
DRAWING_COMPONENTS = ("prior", "decoder", "autoencoder", "clip", "text_encoder", "upsampler")  # their weights decide
PARAMETER_LABELS = {  # as other tools call them
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Prior steps": "prior_num_inference_steps",
    "Prior CFG scale": "prior_guidance_scale",
    "Seed": "seed",
    "Model": "model",
}


Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
Drawing = TypeVar("Drawing", bound=UnCLIPPipeline)


def load_pipeline(
    model: str,
    device: str = "auto",
    kind: type[Pipeline] = Text2ImagePipeline,
    prior: str | None = None,
    dtype: str | dict[str, str] | None = None,
    clip: str | None = None,
    compile: bool = False,
) -> Pipeline:
    """A pipeline on a device; auto takes a GPU if there is one.

    prior, clip: where those of a public model are. dtype: a name of `t2i.pipelines.jobs.dtypes`, or names by parts;
    what it and
    compile mean, `from_pretrained` says.
    """
    device = resolve_device_name(device)  # complain before the model loads
    options: dict[str, Any] = {name: one for name, one in {"prior": prior, "clip": clip}.items() if one is not None}
    if dtype is not None:
        options["dtype"] = convert_to_torch_dtypes(dtype)
        if has_bf16(options["dtype"]):
            check_bf16_support(device)
    if compile:
        options["compile"] = True
    return kind.from_pretrained(model, **options).to(device, silence_dtype_warnings=True)  # fp16 draws on CPUs too


def replace_upsampler(pipeline: Drawing, folder: str | None, dtype: str | dict[str, str] | None = None) -> Drawing:
    """The pipeline with the upsampler of a folder, if one is named."""
    if folder is None:
        return pipeline
    loaded = UpsamplePipeline.from_pretrained(folder)
    wanted = resolve_part_dtype(convert_to_torch_dtypes(dtype), "upsampler")
    parts = loaded.to(pipeline.device, dtype=wanted, silence_dtype_warnings=True).components
    names = ("upsampler", "upsampler_scheduler")
    return type(pipeline).from_pipe(pipeline, **{name: parts[name] for name in names})


def generate_files(
    prompts: list[str],
    out: Path,
    model: str,
    count: int,
    seed: int | None,
    device: str,
    settings: dict[str, Any],
    upsampler: str | None = None,
    prior: str | None = None,
    batch_size: str | int | None = None,
    resume: bool = False,
    dtype: str | dict[str, str] | None = None,
    clip: str | None = None,
    compile: bool = False,
) -> Iterator[Path]:
    """Draw `count` pictures for each prompt and write each as soon as its batch is done. Nothing is overwritten.

    Picture i has seed `seed + i`; prompt, seed and settings are written into the PNG. Without prompts the decoder is
    told nothing, and `settings["steering"]` decides what is drawn. `upsampler`: a folder, in place of the model's own;
    `prior` and `clip` likewise. batch_size: pictures at once, or "auto": 16, or fewer if they do not fit. resume:
    what is in `out` already is not drawn again. Of several processes each draws its share (`t2i.runtime.rank`).
    """
    size = check_batch_size(batch_size)
    share = find_process_rank()
    if seed is None and share.world_size > 1:
        raise InputError(f"seed is missing; {share.world_size} processes share the pictures and need the same")
    total = max(1, len(prompts)) * count
    seed = check_first_seed(seed, count, total)
    check_texts("prompt", prompts, empty=False)
    for name in ("negative_prompt", "decoder_negative_prompt"):
        check_texts(name, [settings[name]] if name in settings else [])
    build_options({name: value for name, value in settings.items() if not name.endswith("negative_prompt")})
    check_output_path(out, total, share)
    pipeline: Text2ImagePipeline = load_pipeline(
        model, share.device(device), Text2ImagePipeline, prior, dtype, clip, compile
    )
    if not prompts:
        settings = {"guidance_scale": 1.0, **settings}  # there is nothing to be guided to
    pipeline = replace_upsampler(pipeline, upsampler, dtype)
    check_dtype_parts(pipeline, dtype)
    prior_options, decoder_options = pipeline.resolve_options(
        **{name: value for name, value in settings.items() if not name.endswith("negative_prompt")}
    )
    counted = (pipeline, prior_options if prompts else None, decoder_options)
    # The first batch must fit into this process's share; later the others hold theirs, and what is free is less.
    sharing = chain([share.local_world_size], repeat(1))

    def draw_batch(records: list[Record], generators: list[Generator]) -> list[Image.Image]:
        if (processes := next(sharing)) > 1:
            check_batch_fits(*counted, len(records), processes)
        if prompts:
            return pipeline([one["prompt"] for one in records], generator=generators, **settings).images
        nothing = torch.zeros(len(records), pipeline.clip.embed_dim)
        return pipeline(image_embeds=nothing, generator=generators, **settings).images

    pipeline.set_progress_bar_config(disable=True)
    records = [{"prompt": prompt} for prompt in prompts for _ in range(count)] or [{"prompt": ""}] * count
    used = build_image_record(
        settings, pipeline.default_decoder_options, pipeline.prior if prompts else None, upsampler, prior, clip
    )
    if dtype is not None:
        used["dtype"] = dtype
    weights = {name: getattr(pipeline, name) for name in DRAWING_COMPONENTS}
    used["weights"] = compute_brief_fingerprint(weights, format_scheduler_configs(pipeline.components))

    def find_fitting_size(size: int) -> int:
        free = measure_available_memory(pipeline.device).divide_by_processes(share.local_world_size).free
        return max(1, find_fitting_count(*counted, size, free / MEMORY_MARGIN))

    more = (size, resume, share, find_fitting_size, pipeline.device)
    yield from write_drawn_images(draw_batch, records, seed, out, model, used, *more)


def upsample_files(
    pictures: list[Path], out: Path, upsampler: str, times: int, seed: int | None, device: str, settings: dict[str, Any]
) -> Iterator[Path]:
    """Enlarge each picture and write it as soon as it is done. Nothing is overwritten.

    Picture i has seed `seed + i`. settings: of `UpsamplePipeline`.
    """
    check_output_path(out, len(pictures))
    seed = check_first_seed(seed, 1, len(pictures))
    read = [open_image(path) for path in pictures]  # complain before the model loads
    pipeline: UpsamplePipeline = load_pipeline(upsampler, device, UpsamplePipeline)
    pipeline.set_progress_bar_config(disable=True)
    for picture in read:
        check_upsampled_size(pipeline.upsampler, *picture.size, times)
    defaults = signature(UpsamplePipeline.__call__).parameters
    used = {name: settings.get(name, defaults[name].default) for name in ("num_inference_steps", "level")}
    for i, (path, picture) in enumerate(zip(pictures, read)):
        drawn = pipeline(picture, times, generator=Generator().manual_seed(seed + i), **settings).images[0]
        record = {
            "picture": path.name,
            "seed": seed + i,
            "model": format_model_name(upsampler),
            "upsample": times,
            **used,
        }
        yield write_new_image(out, path.stem, seed + i, encode_png_image(drawn, record))


def write_drawn_images(
    draw: Callable[[list[Record], list[Generator]], list[Image.Image]],
    records: list[Record],
    seed: int,
    out: Path,
    model: str,
    used: dict[str, Any],
    batch_size: int | None = None,
    resume: bool = False,
    share: Rank = SINGLE_PROCESS,
    fitting: Callable[[int], int] = lambda size: size,
    device: torch.device | str = "cpu",
) -> Iterator[Path]:
    """Draw a picture for each record, in batches, and write each as soon as its batch is done; paths in order.

    Picture i has seed `seed + i`; its record (the prompt, the names of pictures), seed and what was `used`, see
    `build_image_record`, are written into the PNG, and its first value names the file. batch_size: None is up to 16.
    resume: not what `out` holds already. share: of the batches, with several processes. fitting: how many of a batch
    to begin with, where that is ours to choose. device: the one that draws.
    """
    written = [{**one, "seed": seed + i, "model": format_model_name(model), **used} for i, one in enumerate(records)]
    size = min(batch_size or AUTO_BATCH_SIZE, -(-len(records) // share.world_size))  # each has something to do
    # Batches are made before anything is left out, for all processes to make the same.
    batches = split_batches(list(range(len(records))), size, lambda i: len(str(records[i].get("prompt", ""))))
    mine = [i for batch in islice(batches, share.rank, None, share.world_size) for i in batch]
    there = find_drawn_files(out, written) if resume else {}
    left = [i for i in mine if i not in there]
    if len(left) < len(mine):
        logger.warning("%d of %d pictures are in %s already", len(mine) - len(left), len(mine), out)

    def draw_records(part: list[int]) -> list[Image.Image]:
        return draw([records[i] for i in part], [Generator().manual_seed(seed + i) for i in part])

    def write_batches() -> Iterator[tuple[int, Path]]:
        at_once = size if batch_size is not None or not left else fitting(size)
        for i, image in draw_fitting_batches(draw_records, left, at_once, batch_size is None, device):
            name = str(next(iter(records[i].values())))
            yield i, write_new_image(out, name, seed + i, encode_png_image(image, written[i]))

    yield from iterate_in_order(write_batches(), sorted(left))


def redraw_files(
    kind: type[UnCLIPPipeline],
    pictures: list[Path],
    out: Path,
    model: str,
    count: int,
    seed: int | None,
    device: str,
    settings: dict[str, Any],
    check: Callable[[Image.Image], object] | None = None,
    upsampler: str | None = None,
    prior: str | None = None,
    clip: str | None = None,
) -> Iterator[Path]:
    """Draw `count` pictures from each picture file by a pipeline whose `image` it is, and write them.

    `settings` are its other arguments. Raises InputError for them before the model loads where that can be; `check`
    does so for what must go with each picture. `upsampler`, `prior`, `clip`: a folder, in place of the model's own.
    """
    own = signature(kind.__call__).parameters
    build_options({name: value for name, value in settings.items() if name not in own})
    total = len(pictures) * count
    seed = check_first_seed(seed, count, total)
    check_output_path(out, total)
    read = [open_image(path) for path in pictures]
    if check is not None:
        for picture in read:
            check(picture)
    pipeline = replace_upsampler(load_pipeline(model, device, kind, prior, clip=clip), upsampler)
    pipeline.set_progress_bar_config(disable=True)

    pending = (picture for picture in read for _ in range(count))

    def draw_batch(records: list[Record], generators: list[Generator]) -> list[Image.Image]:
        # One at a time, for they may be of any sizes.
        return [pipeline(next(pending), generator=[one], **settings).images[0] for one in generators]

    records = [{"image": path.name} for path in pictures for _ in range(count)]
    by_prior = settings.get("prompt") is not None and not issubclass(kind, InvertingPipeline)
    used = build_image_record(
        settings, pipeline.default_decoder_options, pipeline.prior if by_prior else None, upsampler, prior, clip
    )
    yield from write_drawn_images(draw_batch, records, seed, out, model, used, batch_size=1, device=pipeline.device)


def check_first_seed(seed: int | None, count: int, total: int) -> int:
    """The first of `total` seeds, random for None; `count` is of pictures for each input."""
    if not 1 <= count <= MAX_IMAGES_PER_PROMPT:
        raise InputError(f"count must be an integer from 1 to {MAX_IMAGES_PER_PROMPT}, got {count}")
    seed = secrets.randbelow(2**32) if seed is None else seed
    if not 0 <= seed <= MAX_SEED - total:
        raise InputError(f"seed must be an integer from 0 to {MAX_SEED - total}, got {seed}")
    return seed


def build_image_record(
    settings: dict[str, Any],
    usual: dict[str, Any],
    prior: AnyPrior | None,
    upsampler: str | None,
    named: str | None = None,
    clip: str | None = None,
) -> dict[str, Any]:
    """What is written into a picture: all that was asked for, and the defaults of the rest.

    usual: options of the pipeline's decoder. prior: the one that ran; for None nothing is said of its options.
    upsampler: a folder, if it was named; `named`, `clip` those of the prior and the CLIP.
    """
    of_prior = asdict(PriorOptions()) | {"prior_guidance_scale": default_guidance_scale(prior)}
    defaults = {name: usual[name] for name in RECORDED_OPTIONS}
    if prior is None:
        settings = {name: value for name, value in settings.items() if name not in of_prior}
    else:
        defaults |= {name: of_prior[name] for name in RECORDED_PRIOR_OPTIONS}
    if upsampler is not None:
        settings = settings | {"upsampler": format_model_name(upsampler)}
    if named is not None:
        settings = settings | {"prior": format_model_name(named)}
    if clip is not None:
        settings = settings | {"clip": format_model_name(clip)}
    return {name: convert_to_json_value(value) for name, value in (defaults | settings).items()}


def format_model_name(model: str) -> str:
    """A model's name in a picture: of a folder, its own, also where it was named "."; of the hub's, the last part."""
    return (Path(model).resolve() if Path(model).is_dir() else Path(model)).name


def convert_to_json_value(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Steering):
        return value.build_metadata()
    return asdict(value) if isinstance(value, Guidance) else value


def check_output_path(out: Path, total: int, share: Rank = SINGLE_PROCESS) -> None:
    if out.suffix == ".png":
        if total != 1:
            raise InputError(f"out is one file, {str(out)!r}, but {total} pictures are asked for; give a folder")
        if share.rank == 0 and out.exists():  # the only one that draws: others may start when it has
            raise InputError(f"{str(out)!r} exists and is not overwritten; give another name")
    elif out.exists() and not out.is_dir():
        raise InputError(f"out is {str(out)!r}, which is a file; give a folder, or a name that ends in .png")
    folder = out.absolute().parent if out.suffix == ".png" else out.absolute()
    parent = next(one for one in (folder, *folder.parents) if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"out is {str(out)!r}, where nothing can be written; give a folder that is yours")


def encode_png_image(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """A PNG with the settings in it: as JSON under "t2i", and in the form that other tools read under "parameters"."""
    info = PngInfo()
    lines = [settings.get("prompt", "")]
    if "negative_prompt" in settings:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    known = {
        label: extract_guidance_scale(settings[name]) for label, name in PARAMETER_LABELS.items() if name in settings
    }
    known |= {"Size": f"{image.width}x{image.height}", "Version": f"t2i {__version__}"}
    lines.append(", ".join(f"{label}: {value}" for label, value in known.items()))
    info.add_itxt("parameters", "\n".join(lines))
    info.add_itxt("t2i", json.dumps({"version": __version__, **settings}, ensure_ascii=False))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def extract_guidance_scale(value: Any) -> Any:
    """Of guidance, the scale."""
    return value["scale"] if isinstance(value, dict) else value


def write_new_image(out: Path, prompt: str, seed: int, content: bytes) -> Path:
    """Write a file that did not exist before, whole or not at all; in a folder, under a free name."""
    if out.suffix == ".png":
        path = write_new_file(out.parent, [out.name], content)
    else:
        stem = f"{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:40] or 'picture'}-{seed}"
        path = write_new_file(out, (f"{stem}{'' if i == 1 else f'-{i}'}.png" for i in counting(1)), content)
    if path is None:
        raise InputError(f"{str(out)!r} exists and is not overwritten; give another name")
    return path
