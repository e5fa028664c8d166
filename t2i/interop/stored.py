"""How the weights of a folder are stored: the variants of its files, and the dtype of each part."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from t2i.errors import InputError
from t2i.files.component import read_model_index
from t2i.files.untrusted import check_file_name, find_weight_files, is_folder, read_safetensors_header

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names of weights
WEIGHT_FILE_NAME = re.compile(rf"(?:{'|'.join(WEIGHT_STEMS)})\.(?:safetensors\.index\.(.+)\.json|([^.]+)\.safetensors)")
SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
AUTO_DTYPE = "auto"
DTYPE_PARTS = (
    "clip",
    "text_encoder",
    "prior",
    "decoder",
    "autoencoder",
    "upsampler",
    "default",
)  # what a dict may name

Dtypes: TypeAlias = torch.dtype | dict[str, torch.dtype] | None  # of all parts, or of those that are named


def find_weight_variants(folder: Path) -> set[str]:
    """The variants, such as "fp16", that a model's folder, or a part of a pipeline's, has weights of."""
    parts = [folder, *(path for path in folder.iterdir() if is_folder(path))]
    return parse_variant_names(path.name for part in parts for path in part.iterdir())


def parse_variant_names(names: Iterable[str]) -> set[str]:
    """The variants that there are weights of in files of these names, which may be in folders."""
    found = (WEIGHT_FILE_NAME.fullmatch(name.rpartition("/")[2]) for name in names)
    return {SHARD_SUFFIX.sub("", one[1] or one[2]) for one in found if one}


def check_variant(variant: Any, *folders: Path) -> None:
    """Refuse a variant that is no plain name, or that no part in any of the folders has, naming those that there are.

    A part without it is read from its plain files, if another one has it.
    """
    if variant is None:
        return
    check_file_name("variant", variant)
    known = sorted(set().union(*map(find_weight_variants, folders)))
    if variant not in known:
        places = " and ".join(repr(str(folder)) for folder in folders)
        there = f"the variants are {', '.join(known)}" if known else "there is none but the plain files"
        raise InputError(f"no part in {places} has the variant {variant!r}; {there}")


def check_dtype(dtype: Any) -> Any:
    """A torch.dtype, a dict of them by parts, "auto", which is that of the files, or None.

    Raises InputError for anything else.
    """
    each = dtype if isinstance(dtype, dict) else {"default": dtype}
    if unknown := [name for name in each if name not in DTYPE_PARTS]:
        raise InputError(f"dtype names the part {unknown[0]!r:.80}; the parts are {', '.join(DTYPE_PARTS)}")
    for one in each.values():
        if not isinstance(one, torch.dtype) and (isinstance(dtype, dict) or one not in (None, AUTO_DTYPE)):
            raise InputError(f"dtype must be a torch.dtype, a dict of them, or {AUTO_DTYPE!r}, got {one!r:.80}")
    return dtype


def resolve_part_dtype(dtype: Dtypes, part: str) -> torch.dtype | None:
    """Of a part; None where nothing is said of it."""
    return dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype


def has_bf16(dtype: Any) -> bool:
    return torch.bfloat16 in (dtype.values() if isinstance(dtype, dict) else [dtype])


def has_public_parts(path: Path) -> bool:
    """Whether a folder of this project's own layout holds parts of public models."""
    homes = [str(entry[0]) for entry in read_model_index(path).values() if isinstance(entry, list) and len(entry) == 2]
    return any(home.startswith(("t2i.networks.public.", "t2i.networks.dalle2.")) for home in homes)


def read_stored_dtypes(path: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """Of each part of a folder of this project's own layout, the dtype that most of its numbers are stored in."""
    found = {}
    for part in (path / name for name in read_model_index(path) if is_folder(path / name)):
        files = find_weight_files(part, variant)
        if not (part / "config.json").is_file() or not all(file.is_file() for file in files):
            continue  # a scheduler, or what is refused later, with its reason
        sizes: Counter[str] = Counter()
        for file in files:
            for one in read_safetensors_header(file).values():
                sizes[one.dtype] += math.prod(one.shape)
        floats = {TORCH_DTYPES[kind]: size for kind, size in sizes.items() if kind in TORCH_DTYPES}
        if floats:
            found[part.name] = max(floats, key=lambda dtype: floats[dtype])
    return found
