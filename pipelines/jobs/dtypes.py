"""What `--dtype` says: dtypes by name, of a whole pipeline or of its parts."""

from typing import Any

import torch

from t2i.checks import check_choice
from t2i.errors import InputError
from t2i.interop.stored import DTYPE_PARTS, Dtypes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_dtypes(texts: list[str] | None) -> str | dict[str, str] | None:
    """What `--dtype` says: a name of `DTYPES`, or a short one, for all, or PART=NAME again and again.

    Raises InputError for anything else, and for a part, or all, that is named twice.
    """
    if not texts:
        return None
    found: dict[str, str] = {}
    for text in texts:
        part, equals, name = text.rpartition("=")
        if name not in DTYPES:
            check_choice("dtype", name, tuple(SHORT_DTYPES))
        if equals:
            check_choice("dtype's part", part, DTYPE_PARTS)
        part = part or "default"
        if part in found:
            what = "all parts" if part == "default" else part
            raise InputError(
                f"dtype is given twice for {what}: {found[part]} and {SHORT_DTYPES.get(name, name)}; give one"
            )
        found[part] = SHORT_DTYPES.get(name, name)
    return found["default"] if list(found) == ["default"] else found


def convert_to_torch_dtypes(dtype: str | dict[str, str] | None) -> Dtypes:
    """The dtypes of these names."""
    if isinstance(dtype, dict):
        return {part: DTYPES[name] for part, name in dtype.items()}
    return None if dtype is None else DTYPES[dtype]


def check_dtype_parts(pipeline: Any, dtype: str | dict[str, str] | None) -> None:
    """Refuse a dtype of a part that the pipeline lacks, which would do nothing. Raises InputError."""
    has = [part for part in DTYPE_PARTS if getattr(pipeline, part, None) is not None]
    for part in dtype if isinstance(dtype, dict) else ():
        if part != "default" and part not in has:
            raise InputError(f"dtype names the part {part!r}, which this model lacks; it has {', '.join(has)}")
