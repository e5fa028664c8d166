"""What a drawing job checks and loads before it starts: the model, the place of the images, their seeds."""

import os
import secrets
from dataclasses import dataclass, replace
from inspect import signature, unwrap
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from t2i.pipelines.folder import COMPONENT_CLASSES, PipelineFolder
from t2i.pipelines.jobs.dtypes import check_dtype_parts, convert_to_torch_dtypes
from t2i.pipelines.options import OPTION_NAMES
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.upsample import UpsamplePipeline

from t2i.checks import check_folder_name
from t2i.errors import InputError
from t2i.files.untrusted import is_folder
from t2i.interop.stored import has_bf16, resolve_part_dtype
from t2i.progress import show_loading
from t2i.runtime.devices import check_bf16_support, resolve_device_name
from t2i.runtime.rank import SINGLE_PROCESS, Rank
from t2i.shipped import find_shipped_folder

MAX_SEED = 2**63 - 1
MAX_IMAGES_PER_INPUT = 1024

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


@dataclass(frozen=True)
class ModelSource:
    """The model of a job, and how it is loaded; see `from_pretrained`."""

    model: str  # a folder, or a repository on the hub, as prior and clip
    prior: str | None = None
    clip: str | None = None
    variant: str | None = None  # of the weight files, such as "fp16"
    upsampler: str | None = None  # a folder whose upsampler replaces the model's own
    dtype: str | dict[str, str] | None = None  # a name of `jobs.dtypes.DTYPES`, or names by part
    compile: bool = False
    device: str = "auto"
    strict: bool = False  # refuse prompts with unknown words


@dataclass(frozen=True)
class Output:
    """Destination of a job's images, their number for each input, and the seed of the first one."""

    path: Path  # a folder, or a PNG file for one image
    count: int = 1
    seed: int | None = None

    def choose_first_seed(self, inputs: int) -> int:
        """Return the given seed, or a random one. Raises InputError for a count or a seed out of range."""
        if not 1 <= self.count <= MAX_IMAGES_PER_INPUT:
            raise InputError(f"count must be an integer from 1 to {MAX_IMAGES_PER_INPUT}, got {self.count}")
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        # The last image's seed must still fit into 63 bits
        largest = MAX_SEED - inputs * self.count
        if not 0 <= seed <= largest:
            raise InputError(f"seed must be an integer from 0 to {largest}, got {seed}")
        return seed

    def check_path(self, files: int, rank: Rank = SINGLE_PROCESS) -> None:
        """Raise InputError if so many files cannot be written to the path."""
        path = self.path
        if path.suffix.lower() == ".png":
            if files != 1:
                raise InputError(f"out is one file, {str(path)!r}, but there are {files} images to draw; give a folder")
            # Only the first process draws one image. Others may start after it has written the file.
            if rank.rank == 0 and path.exists():
                raise InputError(f"{str(path)!r} exists and is not overwritten; give another name")
        elif path.exists() and not path.is_dir():
            raise InputError(f"out is {str(path)!r}, which is a file; give a folder, or a name that ends in .png")
        else:
            check_folder_name("out", path, "images are written as .png; give a folder, or a name that ends in .png")
        # The folder may not exist yet: the nearest one above must be writable
        folder = path.absolute().parent if path.suffix.lower() == ".png" else path.absolute()
        parent = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"out is {str(path)!r}, which is not writable; give a folder that you may write to")


def load_pipeline(source: ModelSource, kind: type[Pipeline] = Text2ImagePipeline) -> Pipeline:
    """Load a pipeline onto its device, without bars of its own. Raises InputError for a bad device or dtype."""
    # Check device and dtype before the model loads
    device = resolve_device_name(source.device)
    options: dict[str, Any] = {"prior": source.prior, "clip": source.clip, "compile": source.compile or None}
    options["variant"] = source.variant
    options["dtype"] = convert_to_torch_dtypes(source.dtype)
    if has_bf16(options["dtype"]):
        check_bf16_support(device)

    # Load the model, then the upsampler that replaces its own
    arguments = {name: value for name, value in options.items() if value is not None}
    with show_loading(source.model):
        pipeline = kind.from_pretrained(source.model, **arguments).to(device, silence_dtype_warnings=True)
        if source.upsampler is not None:
            pipeline = replace_upsampler(pipeline, source.upsampler, source.dtype)
    check_dtype_parts(pipeline, source.dtype)
    pipeline.refuses_unknown_words = source.strict
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_model_files(source: ModelSource) -> None:
    """Raise InputError for a model that cannot be loaded, by the heads of its files; fetch one that is on the hub."""
    resolve_device_name(source.device)
    path = Path(source.model)
    folder = PipelineFolder(path if is_folder(path) else Path(Text2ImagePipeline.download(str(path))), source.variant)
    if folder.is_own:
        folder.check(list(COMPONENT_CLASSES))
    else:
        folder.require_layout()
    if source.upsampler is not None and not is_folder(Path(source.upsampler)):
        Text2ImagePipeline.download(source.upsampler)


def add_shipped_upsampler(source: ModelSource) -> ModelSource:
    """Return the source of the shipped model with the shipped upsampler, unless it has another; others as they are."""
    model = find_shipped_folder("models") / "emoji"
    upsampler = model.with_name("emoji-upsampler")
    if source.upsampler is not None or Path(source.model).resolve() != model.resolve() or not upsampler.is_dir():
        return source
    has_own = not PipelineFolder(model).lacks_component("upsampler")
    return source if has_own else replace(source, upsampler=str(upsampler))


def replace_upsampler(pipeline: Any, folder: str, dtype: str | dict[str, str] | None) -> Any:
    """Return the pipeline with the upsampler of a folder, on the same device."""
    upsampling = UpsamplePipeline.from_pretrained(folder)
    upsampler_dtype = resolve_part_dtype(convert_to_torch_dtypes(dtype), "upsampler")
    upsampling = upsampling.to(pipeline.device, dtype=upsampler_dtype, silence_dtype_warnings=True)
    parts = {"upsampler": upsampling.upsampler, "upsampler_scheduler": upsampling.upsampler_scheduler}
    return type(pipeline).from_pipe(pipeline, **parts)


def split_settings(kind: type[DiffusionPipeline], settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split settings into arguments of the pipeline's `__call__`, and options of the prior and decoder.

    A name may be in both: variations take `eta` as an argument, which decides their options.
    """
    # The signature of the call also shows its options; the function behind it has its own arguments alone
    parameters = signature(unwrap(kind.__call__)).parameters
    arguments = {name: value for name, value in settings.items() if name in parameters}
    options = {name: value for name, value in settings.items() if name in OPTION_NAMES or name not in parameters}
    return arguments, options
