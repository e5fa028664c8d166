"""Drawing for requests: the images and the records are those of the commands."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

from PIL import Image
from t2i.pipelines.calls.progress import Preview
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.jobs.generation import DRAWING_COMPONENTS, build_records
from t2i.pipelines.jobs.planning import ModelSource, load_pipeline, split_settings
from t2i.pipelines.jobs.records import Record, build_settings_record
from t2i.pipelines.memory_needed import count_fitting_pixels
from t2i.pipelines.serving.engine import EngineCounts, StepEngine
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.text_diff import TextDiffPipeline
from torch import Generator

from t2i.files.fingerprints import compute_brief_fingerprint, format_scheduler_configs

TASKS: dict[str, type] = {
    "text": Text2ImagePipeline,
    "variation": ImageVariationPipeline,
    "inpaint": InpaintPipeline,
    "outpaint": OutpaintPipeline,
    "image_to_image": ImageToImagePipeline,
    "text_diff": TextDiffPipeline,
}
KEEPS_SIZE = ("inpaint", "outpaint", "image_to_image")


@dataclass(frozen=True)
class ModelFacts:
    """What the server knows of a model that may be loaded in another process.

    image_size: side of its images in pixels. upsampler_factor: by which a pass of its upsampler multiplies it.
    max_pixels: of images that fit into memory at once.
    """

    image_size: int
    upsampler_factor: int
    max_pixels: float


@dataclass
class DrawRequest:
    """A request to draw `count` images of one input, with the seeds `seed`, `seed` + 1, ...

    Args:
        task: a name of `TASKS`.
        settings: arguments and options of the pipeline, but for the input, under the names that records have.
        image: the input of every task but "text", whose input is `settings["prompt"]`.
        mask: of the same size, white where inpainting paints. Names of image and mask for records are in `names`.
        previews: how many estimates of the images are wanted while they are drawn.
        progress: whether every step is reported.
    """

    task: str
    settings: dict[str, Any]
    seed: int
    count: int = 1
    image: Image.Image | None = None
    mask: Image.Image | None = None
    previews: int = 0
    progress: bool = False
    names: dict[str, str] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False)  # for `StepEngine.cancel`

    def count_pixels(self, facts: ModelFacts) -> int:
        """Return the pixels of all images, by which their memory is counted."""
        # Images that are painted in or redrawn keep their size
        given = self.image.size if self.image is not None and self.task in KEEPS_SIZE else (facts.image_size,) * 2
        width, height = (self.settings.get(name) or side for name, side in zip(("width", "height"), given))
        margins = [self.settings.get(name) or 0 for name in ("left", "right", "top", "bottom")]
        growth = facts.upsampler_factor ** (2 * (self.settings.get("upsample") or 0))
        return self.count * growth * (width + sum(margins[:2])) * (height + sum(margins[2:]))


@dataclass(frozen=True)
class DrawnImage:
    """An image, and the record for its file."""

    image: Image.Image
    record: Record
    seed: int


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
        pipeline = engine.pipeline
        factor = 1 if pipeline.upsampler is None else pipeline.upsampler.config.factor
        self.facts = ModelFacts(pipeline.image_size, factor, count_fitting_pixels(pipeline, processes))
        weights = {name: getattr(engine.pipeline, name) for name in DRAWING_COMPONENTS}
        self.weights = compute_brief_fingerprint(weights, format_scheduler_configs(engine.pipeline.components))

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

    def draw(self, request: DrawRequest, watch: Watch | None = None) -> list[DrawnImage]:
        """Return the images of a request. Raises InputError for settings that are not allowed, and Cancelled."""
        kind = TASKS[request.task]
        with self.engine.join(kind, request.cancelled) as drawing:
            # Without an image, the prompt is the input and no setting
            settings = {name: value for name, value in request.settings.items() if name != "prompt" or request.image}
            arguments, options = split_settings(kind, settings)
            if watch is not None and (request.previews or request.progress):
                options |= {"on_preview": self.build_preview_callback(request, watch), "preview_every": 1}
            resolved = drawing.pipeline.resolve_options(**options)
            records = self.build_request_records(request, settings, resolved)
            images = self.call_pipeline(drawing.pipeline, request, arguments, resolved)
        return [DrawnImage(image, record, record["seed"]) for image, record in zip(images, records)]

    def call_pipeline(
        self, pipeline: Any, request: DrawRequest, arguments: dict[str, Any], resolved: Any
    ) -> list[Image.Image]:
        """Return the images, drawn in one call, or one after the other by pipelines that draw one at a time."""
        generators = [Generator().manual_seed(request.seed + number) for number in range(request.count)]
        given = {"resolved": resolved, **arguments} | ({} if request.mask is None else {"mask_image": request.mask})
        if request.image is None:
            return pipeline([request.settings["prompt"]] * request.count, generator=generators, **given).images
        if request.count == 1 or "num_images_per_prompt" in signature(type(pipeline).__call__).parameters:
            several = {} if request.count == 1 else {"num_images_per_prompt": request.count}
            return pipeline(request.image, generator=generators, **several, **given).images
        return [pipeline(request.image, generator=[one], **given).images[0] for one in generators]

    def build_request_records(self, request: DrawRequest, settings: dict[str, Any], resolved: Any) -> list[Record]:
        """Return the record of each image, as the command of the task writes it."""
        pipeline = self.engine.pipeline
        if request.image is None:
            used = build_settings_record(self.source, settings, resolved, pipeline.prior is not None)
            used["weights"] = self.weights
            inputs = [request.settings["prompt"]] * request.count
            return build_records("prompt", inputs, request.seed, self.source.model, used)
        # Inverted images have their own z_i, so that the prior takes no part
        inverts = request.task in ("variation", "text_diff")
        uses_prior = settings.get("prompt") is not None and not inverts and pipeline.prior is not None
        used = build_settings_record(self.source, settings, resolved, uses_prior)
        if request.mask is not None:
            used["mask_image"] = request.names["mask"]
        inputs = [request.names["image"]] * request.count
        return build_records("image", inputs, request.seed, self.source.model, used)

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
                with self.engine.step_aside():
                    watch.show_preview(shown, preview.images())
                shown += 1

        return report


def load_drawer(source: ModelSource, max_batch: int, processes: int = 1) -> Drawer:
    """Load a model and return its drawer, warmed up. Raises InputError; see `load_pipeline`.

    max_batch: images that are drawn at the same time. processes: see `Drawer`.
    """
    engine = StepEngine(load_pipeline(source, Text2ImagePipeline), max_rows=4 * max_batch)
    # Rows of one image without and with guidance, and of a full batch with guidance
    engine.warm_up(counts=(1, 2, 2 * max_batch))
    return Drawer(engine, source, processes)
