"""The variants and dtypes that weights are stored in, and those that a caller requests."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from t2i.errors import InputError
from t2i.files.untrusted import check_file_name, is_folder
from t2i.interop.layouts import WEIGHT_STEMS

WEIGHT_FILE_NAME = re.compile(rf"(?:{'|'.join(WEIGHT_STEMS)})\.(?:safetensors\.index\.(.+)\.json|([^.]+)\.safetensors)")
SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
AUTO_DTYPE = "auto"
# The keys of a dict of dtypes
DTYPE_PARTS = ("clip", "text_encoder", "prior", "decoder", "autoencoder", "upsampler", "default")

Dtypes: TypeAlias = torch.dtype | dict[str, torch.dtype] | None  # of all components, or by their names


def find_weight_variants(folder: Path) -> set[str]:
    """Return the variants, such as "fp16", of the weights in a model's folder or in the folders of a pipeline."""
    parts = [folder, *(path for path in folder.iterdir() if is_folder(path))]
    return parse_variant_names(path.name for part in parts for path in part.iterdir())


def parse_variant_names(names: Iterable[str]) -> set[str]:
    """Return the variants of the weights among these files, which may be in folders."""
    matches = (WEIGHT_FILE_NAME.fullmatch(name.rpartition("/")[2]) for name in names)
    return {SHARD_SUFFIX.sub("", match[1] or match[2]) for match in matches if match}


def check_variant(variant: Any, *folders: Path) -> None:
    """Raise InputError for a variant that is no plain name, or that no component in any of the folders has."""
    if variant is None:
        return
    check_file_name("variant", variant)
    known = sorted(set().union(*map(find_weight_variants, folders)))
    if variant not in known:
        places = " and ".join(repr(str(folder)) for folder in folders)
        there = f"the variants are {', '.join(known)}" if known else "there is none but the plain files"
        raise InputError(f"no part in {places} has the variant {variant!r}; {there}")


def check_dtype(dtype: Any) -> Any:
    """Return a dtype as it is. Raises InputError for what is none.

    Allowed are a torch.dtype, a dict of them by component, "auto" for those of the files, and None.
    """
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    if unknown := [name for name in dtypes if name not in DTYPE_PARTS]:
        raise InputError(f"dtype names the part {unknown[0]!r:.80}; the parts are {', '.join(DTYPE_PARTS)}")
    for value in dtypes.values():
        if not isinstance(value, torch.dtype) and (isinstance(dtype, dict) or value not in (None, AUTO_DTYPE)):
            raise InputError(f"dtype must be a torch.dtype, a dict of them, or {AUTO_DTYPE!r}, got {value!r:.80}")
    return dtype


def resolve_part_dtype(dtype: Dtypes, part: str) -> torch.dtype | None:
    """Return the dtype of one component, None if it has none."""
    return dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype


def has_bf16(dtype: Any) -> bool:
    return torch.bfloat16 in (dtype.values() if isinstance(dtype, dict) else [dtype])
