"""Drawing for requests: the images and the records are those of the commands."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from t2i.pipelines.calls.effects import list_idle_arguments
from t2i.pipelines.calls.progress import Preview
from t2i.pipelines.jobs.generation import DRAWING_COMPONENTS
from t2i.pipelines.jobs.planning import ModelSource, add_shipped_upsampler, load_pipeline
from t2i.pipelines.jobs.records import Record
from t2i.pipelines.serving.draw_request import DrawRequest, ModelFacts
from t2i.pipelines.serving.engine import EngineCounts, StepEngine
from t2i.pipelines.serving.tasks import TASKS, ServedModel, Task
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.errors import InputError
from t2i.files.fingerprints import compute_brief_fingerprint, format_scheduler_configs
from t2i.files.known_words import UnknownWord
from t2i.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawnImage:
    """An image, and the record for its file."""

    image: Image.Image
    record: Record
    seed: int


@dataclass(frozen=True)
class CheckedRequest:
    """Facts about a request that is allowed.

    notes: lines about settings that have no effect, which begin with their names, and about texts that are cut.
    stages: the steps of its stages. unknown_words: of its texts, which the service finds.
    """

    notes: list[str]
    stages: dict[str, int]
    unknown_words: list[UnknownWord] = field(default_factory=list)


class EngineLost(RuntimeError):
    """End of a request because there is no engine to draw it: its process died, or hangs. It may be sent again."""


class Watch(Protocol):
    """Listener to a request while it is drawn, called in the thread that draws it."""

    def report_step(self, stage: str, step: int, steps: int) -> None: ...
    def show_preview(self, number: int, images: list[Image.Image]) -> None: ...


class Drawer:
    """Draws requests with the engine of one model. `draw` may be called from any number of threads.

    processes: those of this machine that load the model, which share its memory.
    """

    def __init__(self, engine: StepEngine, source: ModelSource, processes: int = 1):
        self.engine, self.source = engine, source
        self.facts = ModelFacts.find(engine.pipeline, processes)
        # What records say of the model, for images that are upsampled and for others
        self.identities = dict.fromkeys((True, False), (source, compute_weights_digest(engine.pipeline)))
        if source.upsampler is not None:
            # Commands load an upsampler beside the model only for images that it enlarges
            plain = replace(source, upsampler=None)
            self.identities[False] = plain, compute_weights_digest(engine.pipeline, without="upsampler")

    @property
    def is_alive(self) -> bool:
        """True while the engine takes steps, or waits for some."""
        return self.engine.is_alive

    @property
    def counts(self) -> EngineCounts:
        return self.engine.counts

    def wait_until_ready(self) -> None:
        """Return: the model is loaded."""

    def watch_room(self, report: Callable[[float | None], object]) -> None:
        """Report the pixels that fit into memory at once, which do not change."""
        report(self.facts.max_pixels)

    def cancel(self, request: DrawRequest) -> None:
        """End a request that draws, or will draw, before its next step; from any thread."""
        self.engine.cancel(request.cancelled)

    def close(self) -> None:
        self.engine.close()

    def check(self, request: DrawRequest) -> CheckedRequest:
        """Check a request before it waits for its turn. Raises InputError for settings that are not allowed."""
        if request.task == "upsample" and self.engine.pipeline.upsampler is None:
            raise InputError("upsample needs a model with an upsampler; this one has none")
        pipeline = self.engine.get_pipeline(TASKS[request.task].kind)
        task = self.plan(pipeline, request)
        task.check()
        notes, _ = list_idle_arguments(pipeline, task.inputs | request.settings, task.resolved)
        texts = request.list_texts()
        notes += pipeline.list_cut_texts(texts) if texts and pipeline.clip.reads_captions else []
        return CheckedRequest(notes, task.list_stages())

    def draw(self, request: DrawRequest, watch: Watch | None = None) -> list[DrawnImage]:
        """Return the images of a request. Raises InputError for settings that are not allowed, and Cancelled."""
        watched = {}
        if watch is not None and (request.previews or request.progress):
            watched = {"on_preview": self.build_preview_callback(request, watch), "preview_every": 1}
        with self.engine.join(TASKS[request.task].kind, request.cancelled) as drawing:
            task = self.plan(drawing.pipeline, request, **watched)
            records = task.build_records()
            images = task.draw()
        return [DrawnImage(image, record, record["seed"]) for image, record in zip(images, records, strict=True)]

    def plan(self, pipeline: Any, request: DrawRequest, **watch: Any) -> Task:
        """Return the task of a request for a pipeline."""
        # Texts are the clients', who are told in the response what else would be logged
        pipeline.reports_texts = False
        upsamples = request.task == "upsample" or bool(request.settings.get("upsample"))
        return TASKS[request.task](ServedModel(pipeline, *self.identities[upsamples]), request, **watch)

    def build_preview_callback(self, request: DrawRequest, watch: Watch) -> Callable[[Preview], None]:
        """Return a callback that reports steps, and shows `request.previews` estimates, spread over the decoder."""
        shown = 0

        def report(preview: Preview) -> None:
            nonlocal shown
            if request.progress:
                watch.report_step(preview.stage, preview.step, preview.steps)
            # Due after the first step that reaches the next of `previews` equal parts; the last image is no preview
            due = shown < request.previews and preview.step * (request.previews + 1) >= (shown + 1) * preview.steps
            if preview.stage == "decoder" and due and preview.step < preview.steps:
                # A preview for which memory is short is left out: the images themselves may well fit
                with self.engine.step_aside(), ignore_short_memory():
                    watch.show_preview(shown, preview.images())
                shown += 1

        return report


def compute_weights_digest(pipeline: Text2ImagePipeline, without: str | None = None) -> str:
    """Return what records have as a model's `weights`, of all components or of those without one."""
    left_out = (without, f"{without}_scheduler")
    parts = {name: part for name, part in pipeline.components.items() if name not in left_out}
    weights = {name: parts.get(name) for name in DRAWING_COMPONENTS}
    return compute_brief_fingerprint(weights, format_scheduler_configs(parts))


@contextmanager
def ignore_short_memory() -> Iterator[None]:
    """Log an error about memory that is short, instead of raising it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("a preview does not fit into memory: %s", error)


def load_drawer(source: ModelSource, max_batch: int, processes: int = 1) -> Drawer:
    """Load a model and return its drawer, warmed up. Raises InputError; see `load_pipeline`.

    The shipped model has the shipped upsampler. max_batch: images that are drawn at the same time. processes: see
    `Drawer`. The networks get the calling thread's cores but one.
    """
    source = add_shipped_upsampler(source)
    # One is left to what requests do beside the steps, or each product would wait for the core that does it
    cores = max(1, torch.get_num_threads() - 1)
    # A second pool of threads that compute would slow the engine's down: its threads sleep between two products
    torch.set_num_threads(1)
    engine = StepEngine(load_pipeline(source, Text2ImagePipeline), 4 * max_batch, cores)
    # Rows of one image without and with guidance, and of a full batch with guidance. Others take 5 to 20 ms more at
    # first (models/emoji, a core of an AMD EPYC, 2026-12-03); to warm all would take a large model minutes.
    engine.warm_up(counts=(1, 2, 2 * max_batch))
    return Drawer(engine, source, processes)
