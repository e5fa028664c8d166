"""The log of a run: `metrics.jsonl`, trackers, preview images and progress."""

import json
import math
import secrets
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image
from torch import Tensor

from t2i.config import TrainConfig
from t2i.errors import InputError
from t2i.files.atomic import write_bytes_atomically
from t2i.progress import Progress
from t2i.terminal import print_note

TRACKER_PROJECT = "t2i"  # project of the runs in W&B and trackio
RECENT_ROWS = 10  # the time left is computed from the speed over these rows


class MetricsLog:
    """Means of metrics between two rows of `metrics.jsonl`, which trackers and the progress show too.

    Every process adds metrics; only the main process writes. A run that resumes at `step` deletes the rows after it,
    which it writes again.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int, samples_per_step: int):
        self.accelerator, self.config, self.samples_per_step = accelerator, config, samples_per_step
        self.folder = Path(config.output)
        self.sums: dict[str, Tensor] = {}
        self.count, self.memory = 0, 0.0
        self.start = step
        self.trackers: list[GeneralTracker] = []
        self.progress = Progress(
            f"training {self.folder.name}", config.steps, "steps", step, is_shown=accelerator.is_main_process
        )
        self.rows = deque([(step, time.perf_counter())], maxlen=RECENT_ROWS)  # (step, time)

    def open(self) -> None:
        """Start the trackers, on the main process. Raises InputError if one does not start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "skipped.jsonl", "rejected.jsonl"):
            drop_rows(self.folder / name, self.start)
        self.trackers = [open_tracker(name, self.config, self.start) for name in self.config.trackers]

    def add_micro_batch(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of a micro-batch, ()-shaped. Sums stay on the device, so that no step waits for it."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def step(self, step: int, rate: float, norm: Tensor | None, more: dict[str, float] | None = None) -> None:
        """Write a row if one is due: every `log_every` steps, after the last step, and with `more`.

        more: metrics of this step alone, such as a loss on held-out data; given on all processes or on none.
        """
        self.progress.update()
        if step % self.config.log_every and step != self.config.steps and more is None:
            return
        row = self.reduce_metric_means()
        row["learning_rate"] = rate
        if norm is not None:
            row["gradient_norm"] = float(norm)
        self.memory = max(self.memory, measure_peak_memory(self.accelerator))
        # Speed since the last row; time left from the speed over the recent rows, which is steadier
        (last_step, last_time), (first_step, first_time), now = self.rows[-1], self.rows[0], time.perf_counter()
        row["samples_per_second"] = (step - last_step) * self.samples_per_step / (now - last_time)
        row["memory_gb"] = self.memory
        row["seconds_left"] = (self.config.steps - step) * (now - first_time) / (step - first_step)
        self.rows.append((step, now))
        if self.accelerator.is_main_process:
            self.write_metrics_row(step, row | (more or {}))

    def reduce_metric_means(self) -> dict[str, float]:
        """Return the means over all processes of the metrics added since the last row."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]) / self.count, "mean")
        self.sums, self.count = {}, 0
        return dict(zip(names, means.tolist()))

    def write_metrics_row(self, step: int, row: dict[str, float]) -> None:
        rounded = {name: round_for_json(value) for name, value in row.items()}
        append_rows(self.folder / "metrics.jsonl", [{"step": step} | rounded])
        for tracker in self.trackers:
            tracker.log(row, step=step)
        # These are shown with their units, as the time that is left, or not at all
        apart = ("learning_rate", "samples_per_second", "memory_gb", "seconds_left")
        shown = [f"{name}={value:.4g}" for name, value in row.items() if name not in apart]
        shown += [f"{row['samples_per_second']:.4g} samples/s", f"{row['memory_gb']:.1f} GB"]
        self.progress.update(0, ", ".join(shown), row["seconds_left"])

    def save_images(self, step: int, images: dict[str, Image.Image]) -> None:
        """Write preview images by name as `samples/NAME-STEP.png`, and into every tracker."""
        if not self.accelerator.is_main_process:
            return
        for name, image in images.items():
            png = BytesIO()
            image.save(png, "PNG")
            write_bytes_atomically(self.folder / "samples" / f"{name}-{step:08}.png", png.getvalue())
            for tracker in self.trackers:
                track_image(tracker, name, image, step)

    def close(self) -> None:
        self.progress.close()
        for tracker in self.trackers:
            tracker.finish()


def measure_peak_memory(accelerator: Accelerator) -> float:
    """Return GB: the peak of tensors on a CUDA device, or what the process takes now elsewhere."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed; accelerate would leave them out without a message."""
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            package = name if name == "tensorboard" else f"'t2i[{name}]'"
            raise InputError(f"train.trackers has {name!r}, which is not installed; pip install {package}") from error


def open_tracker(name: str, config: TrainConfig, step: int) -> GeneralTracker:
    """Start one of accelerate's trackers on this process, with the run's settings.

    A resumed run continues its log: TensorBoard drops the rows after `step`; W&B and trackio cannot, and continue the
    run of the same name.
    """
    folder, settings = Path(config.output), asdict(config)
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        tracker.start()
        # As text, because add_hparams, which store_init_configuration calls, lists every start as a new run.
        lines = json.dumps(settings, indent=1).splitlines()
        tracker.log({"configuration": "\n".join(f"    {line}" for line in lines)}, step=step)
        return tracker
    # The others find a run by its code, for two folders may have the same name.
    title, code = "-".join(folder.absolute().parts[-2:]), resolve_run_code(folder, step)
    if name == "wandb":
        tracker = WandBTracker(TRACKER_PROJECT, name=title, id=code, resume="allow", dir=str(folder))
    else:
        tracker = TrackioTracker(TRACKER_PROJECT, name=f"{title}-{code}", resume="allow")
    try:
        tracker.start()
    except Exception as error:  # a tracker raises errors of its own: no login, no network
        raise InputError(f"train.trackers has {name!r}, which does not start: {error}") from error
    tracker.store_init_configuration(settings)
    return tracker


def resolve_run_code(folder: Path, step: int) -> str:
    """Return 8 hexadecimal digits that name a run; a resumed run keeps them."""
    path = folder / "run_code"
    if step == 0 or not path.is_file():
        write_bytes_atomically(path, secrets.token_hex(4).encode())
    return path.read_text()


def track_image(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    match tracker.name:
        case "tensorboard":
            tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")
        case "wandb":
            tracker.log_images({name: [image]}, step=step)
        case "trackio":  # its tracker has no log_images
            import trackio

            tracker.log({name: trackio.Image(image)}, step=step)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append lines of JSON. A full disk only gives a warning, for later checkpoints may fit."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        print_note(f"warning: {path} lacks {len(rows)} rows ({error})")


def drop_rows(path: Path, step: int) -> None:
    """Delete the rows after `step`, and a last line that was cut short."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and parse_row_step(line) <= step]
    if kept != lines:
        write_bytes_atomically(path, b"".join(kept))


def parse_row_step(line: bytes) -> float:
    """Return the step of a row; infinity for a line that is not one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def round_for_json(value: float) -> float | None:
    """Round to six digits; return None for infinity and NaN, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
