"""Rows of the calls of a network: how many, which conditions can be joined in one call, and counts of what was done."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from t2i.diffusion.condition import Condition

# Row counts of a call. Others are rounded up by repeating a row, for oneDNN and compilers build code for each count.
ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Seconds of a call, for their spread
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DENOISERS = ("prior", "decoder", "upsampler")


@dataclass
class EngineCounts:
    """Counts of the engine's work since it started, in JSON's types.

    rows_spread: calls of at most so many rows as `ROW_COUNTS` has, and of more than the one before; then of more than
    all. seconds_spread: the same of seconds of a call by `CALL_SECONDS`, for each network.
    """

    calls: int = 0  # of networks
    rows: int = 0  # that requests waited for
    added_rows: int = 0  # by rounding up
    wasted_rows: int = 0  # of requests that were cancelled while a step ran
    running_rows: int = 0  # of the call that runs now
    longest: float = 0.0  # seconds of a call
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DENOISERS, 0.0))
    rows_spread: list[int] = field(default_factory=lambda: [0] * (len(ROW_COUNTS) + 1))
    seconds_spread: dict[str, list[int]] = field(
        default_factory=lambda: {name: [0] * (len(CALL_SECONDS) + 1) for name in DENOISERS}
    )

    def add_call(self, denoiser: str, rows: int, seconds: float) -> None:
        """Count a call of a network that succeeded."""
        self.calls += 1
        self.rows += rows
        self.added_rows += round_up_rows(rows) - rows
        self.longest = max(self.longest, seconds)
        self.seconds[denoiser] += seconds
        self.rows_spread[bisect_left(ROW_COUNTS, rows)] += 1
        self.seconds_spread[denoiser][bisect_left(CALL_SECONDS, seconds)] += 1

    def add(self, other: "EngineCounts") -> "EngineCounts":
        """Return the counts of two engines together."""
        names = ("calls", "rows", "added_rows", "wasted_rows", "running_rows")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return EngineCounts(
            **sums,
            longest=max(self.longest, other.longest),
            seconds={name: self.seconds[name] + other.seconds[name] for name in DENOISERS},
            rows_spread=add_lists(self.rows_spread, other.rows_spread),
            seconds_spread={
                name: add_lists(self.seconds_spread[name], other.seconds_spread[name]) for name in DENOISERS
            },
        )


def add_lists(first: list[int], second: list[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]


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
