"""Progress of long commands on standard error: a status line on a terminal, plain lines elsewhere.

A command opens a `Progress`. What it calls reports to the open one by `follow_batch` and `follow_steps`; in a program
that has opened none, both do nothing.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import NamedTuple, Self, TypeVar

from t2i.terminal import count_columns, escape_text, format_duration, is_quiet, print_line, show_status

STATUS_INTERVAL = 0.1  # seconds from one status line to the next
LINE_INTERVALS = (10, 60)  # least and most seconds from one line of a log to the next, a tenth of the whole between
BAR_COLUMNS = (5, 20)  # least and most columns of a bar
# Stages that others follow in a batch, so that the time which they take tells nothing of the batch's
FIRST_STAGES = frozenset({"inversion", "prior", "bound", "ODE"})

Item = TypeVar("Item")


class Stage(NamedTuple):
    """A stage of a batch, such as the decoder: its present step, from 1 to `steps`, and when it started."""

    name: str
    step: int
    steps: int
    started: float

    def estimate_seconds_left(self, now: float) -> float | None:
        """Return how long the present step and those after it take; None in the first step."""
        done = self.step - 1
        return None if done == 0 else (now - self.started) / done * (self.steps - done)


class Progress:
    """Progress of a command over items that come in batches, each of which may take stages of many steps.

    Shows what is done, how far it is, and how long it takes still: on a terminal in a line that is replaced in place;
    elsewhere in a line every 10 to 60 s. Shows nothing with `--quiet`, and in all but the first of several processes.

    Args:
        what: name of the job, such as "drawing".
        total: number of items; None if it is not known.
        unit: name of the items in the plural.
        done: number of items that were done before.
        is_shown: False shows nothing.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "images", done: int = 0, is_shown: bool = True):
        self.what, self.total, self.unit, self.done, self.first = escape_text(what), total, unit, done, done
        self.note, self.batch_size = "", 1
        self.stage: Stage | None = None
        self.given_seconds_left: float | None = None
        self.is_shown = is_shown and not is_quiet() and os.environ.get("RANK", "0") == "0"
        self.is_on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.started = self.batch_started = monotonic()
        # A log gets no line about what is over in a moment
        self.next_time = self.started + (0 if self.is_on_terminal else LINE_INTERVALS[0])
        self.outer: Progress | None = None

    def __enter__(self) -> Self:
        global current
        # A job within another shows its own progress, then the other's again
        self.outer, current = current, self
        self.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        global current
        current = self.outer
        self.close()

    def close(self) -> None:
        """Remove the status line. After a job that took longer than a glance, print what was done, and how long."""
        if self.is_shown and self.is_on_terminal:
            show_status("")
        seconds = monotonic() - self.started
        if self.is_shown and seconds >= LINE_INTERVALS[0]:
            counted = f"{self.format_count(' of ')} in " if self.done else ""
            print_line(f"{self.what}: {counted}{format_duration(seconds)}", sys.stderr)
        self.is_shown = False

    def update(self, count: int = 1, note: str | None = None, seconds_left: float | None = None) -> None:
        """Count items that are done. note: more to show. seconds_left: replaces the estimate."""
        self.done += count
        self.stage, self.batch_size, self.batch_started = None, 1, monotonic()
        self.note = self.note if note is None else note
        self.given_seconds_left = seconds_left if note is not None else self.given_seconds_left
        self.refresh()

    def leave_out(self, count: int) -> None:
        """Count items that will not be done."""
        if self.total is not None:
            self.total -= count

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items, and count each when it is done."""
        for item in items:
            yield item
            self.update()

    @contextmanager
    def follow_batch(self, count: int) -> Iterator[None]:
        """Count items that are done together, at the end of the block."""
        self.batch_size, self.batch_started = count, monotonic()
        self.refresh()
        yield
        self.update(count)

    def follow_steps(self, stage: str, steps: Iterable[Item]) -> Iterator[Item]:
        """Yield the steps of a stage, and show the present one."""
        count, started = len(steps) if isinstance(steps, Sized) else 0, monotonic()
        try:
            for number, step in enumerate(steps, 1):
                self.stage = Stage(stage.replace("_", "-"), number, count, started)
                self.refresh()
                yield step
        finally:
            self.stage = None

    def refresh(self) -> None:
        """Show the progress, if it is time to."""
        now = monotonic()
        if not self.is_shown or now < self.next_time:
            return
        left = self.estimate_seconds_left(now)
        if self.is_on_terminal:
            self.next_time = now + STATUS_INTERVAL
            parts = self.format_parts("/", left)
            columns = find_terminal_columns()
            show_status(format_status(self.what, self.estimate_fraction(now), parts, columns, can_show_blocks()))
        else:
            low, high = LINE_INTERVALS
            self.next_time = now + min(max(low, (now - self.started + (left or 0)) / 10), high)
            text = ", ".join(self.format_parts(" of ", left))
            print_line(f"{self.what}: {text}" if text else self.what, sys.stderr)

    def format_parts(self, of: str, left: float | None) -> list[str]:
        """Return the count first, the stage, the note, and the time that is left."""
        parts = [self.format_count(of)] if self.done or self.total else []
        if self.stage is not None and self.stage.steps:
            parts.append(f"{self.stage.name} step {self.stage.step}{of}{self.stage.steps}")
        if self.note:
            parts.append(self.note)
        if left is not None:
            parts.append(f"{format_duration(left)} left")
        return parts

    def format_count(self, of: str) -> str:
        is_known = self.total is not None and self.done <= self.total  # a total may be about right
        return f"{self.done:,}{f'{of}{self.total:,}' if is_known else ''} {self.unit}".rstrip()

    def estimate_batch_seconds_left(self, now: float) -> float | None:
        """Return how long the present batch takes still, by the batches before it, or by its present stage."""
        if self.total is not None and self.done >= self.total:
            return None
        stage = None if self.stage is None else self.stage.estimate_seconds_left(now)
        finished = self.done - self.first
        if finished:
            # By the batches before, but no less than the present stage still takes
            usual = (self.batch_started - self.started) / finished * self.batch_size
            return max(usual - (now - self.batch_started), stage or 0.0)
        # In the first batch only a stage that ends with the batch tells its time
        return None if self.stage is None or self.stage.name in FIRST_STAGES else stage

    def estimate_seconds_left(self, now: float) -> float | None:
        """Return how long all takes still; None before that can be known."""
        if self.given_seconds_left is not None:
            return self.given_seconds_left
        batch = self.estimate_batch_seconds_left(now)
        if batch is None or self.total is None:
            return None
        finished, elapsed = self.done - self.first, now - self.batch_started
        each = (elapsed + batch) / self.batch_size
        if finished:
            each = (self.batch_started - self.started) / finished
        # And the batches after the present one
        return batch + each * max(0, self.total - self.done - self.batch_size)

    def estimate_fraction(self, now: float) -> float | None:
        """Return the part of the whole that is done, from 0 to 1, with a part of the present batch; None if unknown."""
        if not self.total:
            return None
        batch, elapsed = self.estimate_batch_seconds_left(now), now - self.batch_started
        part = 0.0 if not batch else self.batch_size * elapsed / (elapsed + batch)
        return min(1.0, (self.done + part) / self.total)


current: Progress | None = None  # the one that is open


def follow_batch(count: int) -> AbstractContextManager[None]:
    """Return a block at whose end items are counted in the open progress, if there is one."""
    return nullcontext() if current is None else current.follow_batch(count)


def follow_steps(stage: str, steps: Iterable[Item]) -> Iterable[Item]:
    """Return the steps of a stage, which the open progress shows, if there is one."""
    return steps if current is None else current.follow_steps(stage, steps)


@contextmanager
def show_loading(name: str, what: str = "loading") -> Iterator[None]:
    """Show that a model is loaded, in a line that is removed, in place of the bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    was_enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    # Its own switch would also turn off the bars of downloads. The first releases of version 5 have no hook.
    set_hook = getattr(transformers_logging, "set_tqdm_hook", lambda hook: None)
    hook = set_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    try:
        with Progress(f"{what} {Path(name).name or name}"):
            yield
    finally:
        set_hook(hook)
        if was_enabled:
            diffusers_logging.enable_progress_bar()


def format_status(what: str, fraction: float | None, parts: list[str], columns: int, has_blocks: bool = False) -> str:
    """Return a line for a terminal of this width: a bar, if there is room, and the parts.

    Where room is short, those between the first and the last part go first. has_blocks: the terminal can show them.
    """
    room = columns - 1  # some terminals wrap a line that fills the last column
    parts = list(parts)
    while count_columns(text := ", ".join(parts)) + count_columns(what) + 2 > room and len(parts) > 2:
        del parts[-2]
    low, high = BAR_COLUMNS
    # Beside the bar there are two brackets and two spaces
    side = min(high, room - count_columns(what) - count_columns(text) - 4)
    if fraction is None or side < low:
        return (f"{what}: {text}" if parts else what)[:room]
    done, rest = ("█", "░") if has_blocks else ("#", ".")
    filled = int(fraction * side)
    return f"{what} [{done * filled}{rest * (side - filled)}] {text}"


def find_terminal_columns() -> int:
    """Return the width of the terminal on standard error."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def can_show_blocks() -> bool:
    """Return True if the encoding of standard error has the characters of a bar."""
    try:
        "█░".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
