"""Bad samples and steps: they are counted and named, and end a run only if they are too many."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from t2i.training.common.log import append_rows
from torch import Tensor

from t2i.data import Batch
from t2i.errors import RunError
from t2i.terminal import print_note

MAX_SKIPPED_STEPS = 10  # steps in a row without a finite loss and gradient
MAX_REJECTED_FRACTION = 0.01  # of the samples read, or of MIN_SAMPLES_READ if that is more
MIN_SAMPLES_READ = 1_000
MAX_SHOWN_KEYS = 5  # keys in a message


class HealthMonitor:
    """Finds samples that cannot be read, and steps whose loss or gradient is not finite, on all processes.

    All processes reach the same verdict, from one exchange of five numbers a step.
    """

    def __init__(self, accelerator: Accelerator, dataset: Any, output: str):
        self.accelerator, self.dataset, self.output = accelerator, dataset, Path(output)
        self.seen = self.rejected = 0
        self.reasons: Counter[str] = Counter()  # of this process
        self.new_rejections: list[tuple[str, str]] = []
        self.read_indices: list[Tensor] = []  # of each micro-batch of the step
        self.losses: list[Tensor] = []
        self.loss_was_finite = True  # in the last verdict
        self.last_skipped = ""  # description of the last skipped step

    def add_micro_batch(self, batch: Batch, loss: Tensor) -> None:
        """Record a micro-batch of the step, and its loss."""
        self.read_indices.append(batch.index)
        self.record_rejected_samples(batch)
        self.losses.append(loss.detach())

    def record_rejected_samples(self, batch: Batch) -> None:
        """Record the samples of a batch that could not be read, and were replaced by others."""
        self.new_rejections += dict(batch.rejected).items()  # each once, even if several samples fell back past it
        self.reasons.update(dict(batch.rejected).values())

    def judge_step(self, step: int, norm: Tensor | None, signal: int) -> tuple[bool, int]:
        """Return whether the step is finite on all processes, and the signal that any of them got to stop, or 0."""
        # Exchange the numbers. Only here a step waits for the device.
        finite = torch.isfinite(torch.stack(self.losses))
        norm_finite = torch.ones_like(finite[0]) if norm is None else torch.isfinite(norm)
        read = sum(map(len, self.read_indices))
        counts = torch.tensor([signal, read, len(self.new_rejections)], device=finite.device)
        verdict = torch.cat([torch.stack([~finite.all(), ~norm_finite]), counts]).float()
        verdicts = self.accelerator.gather(verdict[None]).tolist()
        bad_loss, bad_norm, signals, seen, rejected = zip(*verdicts)
        # Judge: one bad process makes the step bad for all
        self.seen += int(sum(seen))
        self.rejected += int(sum(rejected))
        if any(rejected):
            self.report_rejected_samples(step)
        self.loss_was_finite = not any(bad_loss)
        healthy = self.loss_was_finite and not any(bad_norm)
        if not healthy:
            self.report_skipped_steps(step, finite.tolist(), norm)
        self.read_indices, self.losses, self.new_rejections = [], [], []
        return healthy, int(max(signals))

    def report_rejected_samples(self, step: int) -> None:
        """Write the names of unreadable samples to a file; raise RunError if they are too many."""
        rows = [{"step": step, "key": key, "reason": reason} for key, reason in self.new_rejections]
        self.write_rows("rejected.jsonl", gather_object(rows))
        if self.rejected <= MAX_REJECTED_FRACTION * max(self.seen, MIN_SAMPLES_READ):
            return
        total: Counter[str] = sum(gather_object([self.reasons]), Counter())
        reasons = ", ".join(f"{count} x {reason}" for reason, count in total.most_common())
        raise RunError(
            f"{self.rejected} of the {self.seen} samples read so far are bad, more than "
            f"{MAX_REJECTED_FRACTION:.0%}: {reasons}; "
            f"{self.output / 'rejected.jsonl'} lists them. `t2i data check` checks all samples"
        )

    def report_skipped_steps(self, step: int, finite: list[bool], norm: Tensor | None) -> None:
        """Write down the samples of micro-batches whose loss is not finite; all of them if only the gradient is not."""
        suspects = [indices for indices, good in zip(self.read_indices, finite) if self.loss_was_finite or not good]
        keys = gather_object([self.dataset.get_sample_key(index) for indices in suspects for index in indices.tolist()])
        value = math.nan if norm is None else float(norm)
        what = "gradient" if self.loss_was_finite else "loss"
        row = {"step": step, "not_finite": what, "gradient_norm": str(value), "keys": keys}
        self.write_rows("skipped.jsonl", [row])
        shown = ", ".join(keys[:MAX_SHOWN_KEYS])
        if len(keys) > MAX_SHOWN_KEYS:
            shown += f" and {len(keys) - MAX_SHOWN_KEYS} more"
        self.last_skipped = f"the {what} of step {step} was not finite, with the samples {shown}"
        print_note(f"skipped: {self.last_skipped}", is_shown=self.accelerator.is_local_main_process)

    def check_skipped_steps(self, in_a_row: int) -> None:
        if in_a_row >= MAX_SKIPPED_STEPS:
            raise RunError(
                f"{in_a_row} steps in a row were not finite and were skipped. The last: {self.last_skipped}. "
                f"{self.output / 'skipped.jsonl'} lists all. Lower train.learning_rate, or look at these samples"
            )

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            append_rows(self.output / name, rows)
