"""Download what a model is loaded from: a repository's configurations, then the weights of the parts that they name."""

import logging
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

from t2i.errors import InputError
from t2i.files.hub import explain_hub_errors, query_hub_repository
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import DIFFUSERS_STEM, check_file_name, find_weight_files, is_folder
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import LAYOUTS_BY_CLASS, PART_CLASSES, TRANSFORMERS_PARTS, get_weight_stem
from t2i.interop.stored import parse_variant_names

logger = logging.getLogger(__name__)

TEXT_PATTERNS = ["*.json", "*.txt"]  # configurations, and the merges of a CLIP's tokenizer
DEFAULT_PATTERNS = [*TEXT_PATTERNS, "*.safetensors"]
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")  # those that `t2i convert` reads


def fetch_model_folder(
    name: str | Path,
    parts: Collection[str] | None = None,
    variant: str | None = None,
    otherwise: list[str] = DEFAULT_PATTERNS,
    **options: Any,
) -> Path:
    """Return the folder of this name; without one, download the hub's repository of this name and return its folder.

    parts: names in a public layout, such as "unet", whose weights are downloaded; None for those of the whole model.
    variant: of the weights, such as "fp16"; a part without files of it comes with its plain ones. otherwise: patterns
    of the files to download if the hub does not list them, as when offline. options: arguments of `snapshot_download`.

    Raises InputError if there is neither; and, before any weights are downloaded, for a part whose weights are only
    pickles or of another variant.
    """
    if is_folder(name):
        return Path(name)
    if variant is not None:
        check_file_name("variant", variant)
    name = str(name)
    with explain_hub_errors(name):
        # Configurations first
        files = None
        if not options.get("local_files_only"):
            reached, files = query_hub_repository(name, options.get("revision"), options.get("token"))
            options = {**reached, **options}
        path = Path(snapshot_download(name, allow_patterns=otherwise if files is None else TEXT_PATTERNS, **options))
        # Without a list of files, as offline, all of `otherwise` was downloaded at once.
        if files is None:
            return path
        # Then the weights of the parts that they name
        stems = find_weight_stems(path, parts)
        if stems is None:
            weights = otherwise
        else:
            weights = [
                file
                for place, stem in stems.items()
                for file in find_part_weights(name, path, PurePosixPath(place), stem, files, variant)
            ]
            if variant is not None and weights and not any(variant in parse_variant_names([file]) for file in weights):
                known = ", ".join(sorted(parse_variant_names(files))) or "none"
                logger.warning("%s has no variant %.80r (it has: %s): plain files are fetched", name, variant, known)
        return Path(snapshot_download(name, allow_patterns=[*TEXT_PATTERNS, *weights], **options)) if weights else path


def find_weight_stems(path: Path, parts: Collection[str] | None) -> dict[str, str] | None:
    """Return the folders whose weights are needed, with the stem of their file names; None for all files."""
    index = SourceFolder(path).index
    class_name = str(index.get("_class_name")) if index else read_model_class(path)
    if class_name in LAYOUTS_BY_CLASS:
        folders = LAYOUTS_BY_CLASS[class_name].part_folders
        return {place: get_weight_stem(part) for part, place in folders.items() if parts is None or part in parts}
    if parts is not None:
        alone = any(class_name in PART_CLASSES[part] for part in parts if part not in TRANSFORMERS_PARTS)
        return {".": DIFFUSERS_STEM} if alone else {}
    if not index:
        return None
    # A pipeline of this project. Components of other libraries are refused by the caller.
    modules = {name: str(entry[0]) for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: DIFFUSERS_STEM for name, module in modules.items() if module.startswith("t2i.")}


def find_part_weights(
    name: str, path: Path, place: PurePosixPath, stem: str, files: Collection[str], variant: str | None
) -> list[str]:
    """Return the weight files of a part, none for a tokenizer or scheduler. Raises InputError if it has only others."""
    beside = sorted(file for file in files if PurePosixPath(file).parent == place)
    paths = find_weight_files(path / place, variant, stem, [PurePosixPath(file).name for file in beside])
    names = [(place / file.name).as_posix() for file in paths]
    if all(file in files for file in names):
        return names
    pickles = [file for file in beside if file.endswith(".bin.index.json")]
    pickles += [file for file in beside if file.endswith(PICKLE_SUFFIXES)]
    if pickles:
        commands = f"`hf download {name} --local-dir FOLDER` and `t2i convert FOLDER` make that of it"
        raise InputError(f"{name!r} on the hub has {pickles[0]!r}, but only .safetensors is loaded; {commands}")
    return []
