"""Records: how an image was drawn, as JSON in its PNG file. Reading them back finds images that are drawn already."""

import json
import logging
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from t2i.pipelines.jobs.planning import ModelSource
from t2i.pipelines.options import PRIOR_OPTION_NAMES, ResolvedOptions

from t2i import __version__
from t2i.diffusion.guidance import Guidance
from t2i.errors import InputError
from t2i.files.image_records import DAMAGED_FILE_ERRORS, open_png, read_record
from t2i.sampling.steering import Steering

logger = logging.getLogger(__name__)

Record: TypeAlias = dict[str, Any]  # the input first, then its seed, the model and all options that matter

# Options in every record. Others are recorded if the user sets them.
RECORDED_OPTIONS = ("num_inference_steps", "guidance_scale")
RECORDED_PRIOR_OPTIONS = ("prior_num_inference_steps", "prior_guidance_scale", "prior_candidates")
MAX_EXIF_BYTES = 65_000  # of a JPEG's, beside a few for its tags
PARAMETER_LABELS = {  # the names that other programs use
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Prior steps": "prior_num_inference_steps",
    "Prior CFG scale": "prior_guidance_scale",
    "Seed": "seed",
    "Model": "model",
}


def build_settings_record(
    source: ModelSource, settings: dict[str, Any], resolved: ResolvedOptions, uses_prior: bool
) -> Record:
    """Return what images record of the model and the settings, in values that JSON can hold.

    settings: those that the user set. uses_prior: False leaves the options of the prior out.
    """
    prior, decoder = resolved
    record = {name: getattr(decoder, name) for name in RECORDED_OPTIONS}
    if uses_prior:
        record |= {name: getattr(prior, name) for name in RECORDED_PRIOR_OPTIONS}
    # What the user set is recorded even if it equals a default, unless nothing reads it
    unused = frozenset() if uses_prior else PRIOR_OPTION_NAMES
    record |= {name: value for name, value in settings.items() if name not in record and name not in unused}
    for name in ("upsampler", "prior", "clip"):
        if (folder := getattr(source, name)) is not None:
            record[name] = format_model_name(folder)
    if source.dtype is not None:
        record["dtype"] = source.dtype
    return {name: convert_to_json_value(value) for name, value in record.items()}


def compare_weights(like: Record, record: Record, is_chosen: bool) -> None:
    """Log a warning if a record names the same model as the one that it is to be like, but has other weights.

    is_chosen: the user chose the model. Else it has the name alone in common, and other weights raise InputError.
    """
    sources = ("model", "prior", "clip", "upsampler", "dtype")
    if "weights" not in like or any(like.get(name) != record.get(name) for name in sources):
        return
    if like["weights"] != record["weights"] and not is_chosen:
        raise InputError(
            f"the image was drawn with another model {record['model']!r} than the default one: its weights are "
            f"{like['weights']!r:.80}, not {record['weights']!r}; give --model"
        )
    if like["weights"] != record["weights"]:
        changed = "the model %r has changed since the image was drawn: its weights were %r and are %r; this one differs"
        logger.warning(changed, record["model"], like["weights"], record["weights"])


def format_model_name(model: str) -> str:
    """Return the name of a model's folder, also for ".", or the last part of a repository's name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.name


def convert_to_json_value(value: Any) -> Any:
    """Return a value as JSON can hold it. Guidance that is a scale alone becomes a number."""
    if isinstance(value, Steering):
        return value.build_metadata()
    if isinstance(value, Guidance):
        return value.scale if value == Guidance(value.scale) else asdict(value)
    return str(value) if isinstance(value, Path) else value


def encode_png_image(image: Image.Image, record: Record) -> bytes:
    """Return a PNG file with its record: JSON under "t2i", and under "parameters" the text that other programs read."""
    info = PngInfo()
    info.add_itxt("parameters", format_parameters(image, record))
    info.add_itxt("t2i", format_record(record))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def build_exif(image: Image.Image, record: Record) -> Image.Exif:
    """Return a record as files without texts of their own hold it: the texts of `encode_png_image`, in EXIF.

    The JSON is the description of the image, and the text for other programs the comment, where they look for it. What
    does not fit into EXIF is left out.
    """
    exif = Image.Exif()
    description, comment = format_record(record).encode(), format_parameters(image, record).encode("utf-16-be")
    if len(description) < MAX_EXIF_BYTES:
        exif[ExifTags.Base.ImageDescription] = description
    if len(description) + len(comment) < MAX_EXIF_BYTES:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
    return exif


def format_record(record: Record) -> str:
    """Return a record as JSON, with this version."""
    return replace_surrogates(json.dumps({"version": __version__, **record}, ensure_ascii=False))


def format_parameters(image: Image.Image, record: Record) -> str:
    """Return the text that other programs read: the prompt, the negative prompt, and a line of parameters."""
    lines = [record.get("prompt", "")]
    if "negative_prompt" in record:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    parameters = {label: record[name] for label, name in PARAMETER_LABELS.items() if name in record}
    parameters = {label: value["scale"] if isinstance(value, dict) else value for label, value in parameters.items()}
    parameters |= {"Size": f"{image.width}x{image.height}", "Version": f"t2i {__version__}"}
    lines.append(", ".join(f"{label}: {quote_parameter(value)}" for label, value in parameters.items()))
    return replace_surrogates("\n".join(lines))


def quote_parameter(value: Any) -> str:
    """Return a value of the line of parameters. One that contains its separators is quoted, as other programs do."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def replace_surrogates(text: str) -> str:
    """Return text that UTF-8 can encode. JSON reads back alike what replaces bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def find_drawn_files(folder: Path, records: list[Record]) -> dict[int, Path]:
    """Return the complete PNG files of a folder that have one of these records, by the record's index.

    The first of several files with the same record counts. Files that cannot be read to their end are skipped.
    """
    indices = {format_record_key(record): index for index, record in enumerate(records)}
    drawn: dict[int, Path] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        # A damaged file, such as one that a crash left, counts as not drawn
        try:
            index = find_record_index(path, indices)
        except DAMAGED_FILE_ERRORS:
            continue
        if index is not None:
            drawn.setdefault(index, path)
    return drawn


def find_record_index(path: Path, indices: dict[str, int]) -> int | None:
    """Return the index of a PNG file's record; None for another record. Raises Pillow's errors for damaged files."""
    if not path.is_file():  # opening a pipe would block
        return None
    with open_png(path) as image:
        record = read_record(image)
        index = None if record is None else indices.get(format_record_key(record))
        if index is not None:
            # The text stands before the pixels, which a crash may have cut off.
            image.verify()
        return index


def format_record_key(record: Record) -> str:
    """Return the record as JSON without the version, which does not decide what is drawn."""
    return json.dumps({key: value for key, value in record.items() if key != "version"}, sort_keys=True)
