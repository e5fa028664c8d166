"""Dtypes of a pipeline's weights by name, as `t2i generate --dtype` takes them."""

from typing import Any

import torch

from t2i.checks import check_choice
from t2i.errors import InputError
from t2i.interop.stored import DTYPE_PARTS, Dtypes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_dtypes(texts: list[str] | None) -> str | dict[str, str] | None:
    """Return the dtype for all parts, or dtypes by part, from texts such as "bf16" or "decoder=bf16".

    Raises InputError for an unknown dtype or part, and for a part that is given twice.
    """
    if not texts:
        return None
    dtypes: dict[str, str] = {}
    for text in texts:
        # Without a part, rpartition leaves the first two empty
        part, equals, name = text.rpartition("=")
        if name not in DTYPES:
            check_choice("dtype", name, tuple(SHORT_DTYPES))
        if equals:
            check_choice("dtype's part", part, DTYPE_PARTS)
        part = part or "default"
        name = SHORT_DTYPES.get(name, name)
        if part in dtypes:
            parts = "all parts" if part == "default" else part
            raise InputError(f"dtype is given twice for {parts}: {dtypes[part]} and {name}; give one")
        dtypes[part] = name
    return dtypes["default"] if list(dtypes) == ["default"] else dtypes


def convert_to_torch_dtypes(dtype: str | dict[str, str] | None) -> Dtypes:
    """Return torch's dtypes of the names."""
    if isinstance(dtype, dict):
        return {part: DTYPES[name] for part, name in dtype.items()}
    return None if dtype is None else DTYPES[dtype]


def check_dtype_parts(pipeline: Any, dtype: str | dict[str, str] | None) -> None:
    """Raise InputError for the dtype of a part that the pipeline lacks."""
    parts = [part for part in DTYPE_PARTS if getattr(pipeline, part, None) is not None]
    for part in dtype if isinstance(dtype, dict) else ():
        if part not in ("default", *parts):
            raise InputError(f"dtype names the part {part!r}, which this model lacks; it has {', '.join(parts)}")
