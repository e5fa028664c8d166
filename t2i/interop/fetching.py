"""What is fetched of a repository on the hub: its configurations first, and then the weights that they ask for.

A repository holds more than a pipeline reads: other variants, pickles, checkpoints of other programs beside the parts.
"""

import logging
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

from t2i.errors import InputError
from t2i.files.component import read_model_index
from t2i.files.hub import explain_hub_errors, query_hub_repository
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import check_file_name, find_weight_files, is_folder
from t2i.interop.layouts import LAYOUTS_BY_CLASS, PART_CLASSES, TRANSFORMERS_PARTS
from t2i.interop.stored import WEIGHT_STEMS, parse_variant_names

logger = logging.getLogger(__name__)

TEXT_PATTERNS = ["*.json", "*.txt"]  # of text, the pairs of a CLIP's vocabulary
DEFAULT_PATTERNS = [*TEXT_PATTERNS, "*.safetensors"]  # of a repository of which nothing is known
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")  # what `t2i convert` reads


def fetch_model_folder(
    name: str | Path,
    parts: Collection[str] | None = None,
    variant: str | None = None,
    otherwise: list[str] = DEFAULT_PATTERNS,
    **options: Any,
) -> Path:
    """The folder of this name; or, if there is none, what is read of the hub's repository of that name.

    Args:
        parts: of a public layout, such as "unet", whose weights are fetched; those of the whole model, if None.
        variant: of the weights, such as "fp16"; a part that has none of it comes with its plain ones.
        otherwise: patterns of the files, where the hub does not say which there are, such as offline.
        options: of `snapshot_download`.

    Raises InputError, in one line, if there is neither; and before any weights are fetched, for a part whose weights
    are pickles, or of another variant, alone.
    """
    if is_folder(name):
        return Path(name)
    if variant is not None:
        check_file_name("variant", variant)
    name = str(name)
    with explain_hub_errors(name):
        files = None
        if not options.get("local_files_only"):
            reached, files = query_hub_repository(name, options.get("revision"), options.get("token"))
            options = {**reached, **options}
        path = Path(snapshot_download(name, allow_patterns=otherwise if files is None else TEXT_PATTERNS, **options))
        if files is None:
            return path
        places = find_weight_folders(path, parts)
        if places is None:
            weights = otherwise
        else:
            weights = [
                file
                for place, stem in places.items()
                for file in find_part_weights(name, path, PurePosixPath(place), stem, files, variant)
            ]
            if variant is not None and weights and not any(variant in parse_variant_names([file]) for file in weights):
                known = ", ".join(sorted(parse_variant_names(files))) or "none"
                logger.warning("%s has no variant %.80r (it has: %s): plain files are fetched", name, variant, known)
        return Path(snapshot_download(name, allow_patterns=[*TEXT_PATTERNS, *weights], **options)) if weights else path


def find_weight_folders(path: Path, parts: Collection[str] | None) -> dict[str, str] | None:
    """The folders whose weights are wanted, with the stem of their names; None for all that there are."""
    index = read_model_index(path)
    kind = str(index.get("_class_name")) if index else read_model_class(path)
    if kind in LAYOUTS_BY_CLASS:
        wanted = {
            part: place for part, place in LAYOUTS_BY_CLASS[kind].part_folders.items() if parts is None or part in parts
        }
        return {place: WEIGHT_STEMS[part in TRANSFORMERS_PARTS] for part, place in wanted.items()}
    if parts is not None:
        alone = any(kind in PART_CLASSES[part] for part in parts if part not in TRANSFORMERS_PARTS)
        return {".": WEIGHT_STEMS[0]} if alone else {}
    own = {name: WEIGHT_STEMS[0] for name, entry in index.items() if isinstance(entry, list) and is_own_entry(entry)}
    return own if index else None


def is_own_entry(entry: list[Any]) -> bool:
    """Whether an entry of an index is of this project; others are refused by who loads the folder."""
    return len(entry) == 2 and str(entry[0]).startswith("t2i.")


def find_part_weights(
    name: str, path: Path, place: PurePosixPath, stem: str, files: Collection[str], variant: str | None
) -> list[str]:
    """The files of a part's weights; none for parts without any. Raises InputError if there are only others."""
    found = find_weight_files(path / place, variant, stem, lambda file: (place / file.name).as_posix() in files)
    wanted = [(place / file.name).as_posix() for file in found]
    if all(file in files for file in wanted):
        return wanted
    beside = sorted(file for file in files if PurePosixPath(file).parent == place)
    if known := sorted(parse_variant_names(beside)):
        raise InputError(f"{name!r} on the hub has no {wanted[0]!r}, but the variant {' and '.join(known)} of it")
    pickles = [file for file in beside if file.endswith(".bin.index.json")]
    pickles += [file for file in beside if file.endswith(PICKLE_SUFFIXES)]
    if pickles:
        how = f"`hf download {name} --local-dir FOLDER` and `t2i convert FOLDER/{pickles[0]}` make that of it"
        raise InputError(f"{name!r} on the hub has {pickles[0]!r}, but only .safetensors is loaded; {how}")
    return []
