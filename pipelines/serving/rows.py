"""Rows of the calls of a network: how many, and which conditions can be joined in one call."""

from typing import Any

from t2i.diffusion.condition import Condition

# Row counts of a call. Others are rounded up by repeating a row, for oneDNN and compilers build code for each count.
ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def round_up_rows(rows: int) -> int:
    """Return the next number of `ROW_COUNTS`; beyond them the number itself."""
    return next((count for count in ROW_COUNTS if count >= rows), rows)


def list_parts(condition: Condition) -> list[Any]:
    """Return the names of a condition's parts, those of nested ones after theirs, and the shapes of unindexed ones."""
    parts: list[Any] = [type(condition)]
    for name, part in sorted(condition.parts.items()):
        parts.append(name)
        if isinstance(part, Condition):
            parts += list_parts(part)
        elif name in condition.unindexed:
            parts.append(tuple(part.shape[1:]))
    return parts
