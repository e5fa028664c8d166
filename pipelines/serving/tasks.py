"""Tasks of requests: how each is checked and drawn by its pipeline, and recorded as its command records it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import signature
from math import ceil
from typing import Any, ClassVar

import torch
from PIL import Image
from t2i.pipelines.argument_checks import check_stage_inputs, check_stage_options, check_step_count
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline, check_enlarged_size
from t2i.pipelines.interpolation import InterpolationPipeline, build_mixing_weights, list_anchors
from t2i.pipelines.inversion import InvertingPipeline
from t2i.pipelines.jobs.frames import build_mix_record
from t2i.pipelines.jobs.generation import build_records, build_upsampling_record
from t2i.pipelines.jobs.planning import ModelSource, split_settings
from t2i.pipelines.jobs.records import Record, build_settings_record
from t2i.pipelines.serving.draw_request import DrawRequest
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.text_diff import TextDiffPipeline, check_caption_pair, check_direction, list_thetas
from t2i.pipelines.upsample import UpsamplePipeline
from torch import Generator

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.sampling.upsampling import MAX_ENLARGEMENTS, check_upsampled_size

MARGINS = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class ServedModel:
    """A model as a request draws with it: its pipeline for the task, where it comes from, the digest of its weights."""

    pipeline: Any
    source: ModelSource
    weights: str


class Task(ABC):
    """A request with its settings checked, ready to be drawn. Raises InputError for settings that are not allowed.

    watch: further options of the pipeline, such as `on_preview`.
    """

    kind: ClassVar[type[Any]]  # of the pipeline
    defaults: ClassVar[dict[str, Any]] = {}  # settings that the command of the task always records

    def __init__(self, model: ServedModel, request: DrawRequest, **watch: Any):
        self.model, self.pipeline, self.request, self.settings = model, model.pipeline, request, request.settings
        self.resolve(watch)

    @classmethod
    def list_settings(cls) -> frozenset[str]:
        """Return the names of the settings that the pipeline takes."""
        return frozenset(signature(cls.kind.__call__).parameters)

    def resolve(self, watch: dict[str, Any]) -> None:
        """Set the arguments of the pipeline's call, and its checked options."""
        self.arguments, options = split_settings(self.kind, self.settings)
        self.resolved: Any = self.pipeline.resolve_options(**options, **watch)

    def list_stages(self) -> dict[str, int]:
        """Return the stages of the drawing, in their order, and about how many steps each has."""
        prior, decoder = self.resolved
        # Strength skips the first steps of the decoder
        stages = {"inversion": decoder.num_inference_steps} if self.inverts else {}
        if self.uses_prior and self.pipeline.prior.needs_scheduler:
            stages["prior"] = prior.prior_num_inference_steps
        stages["decoder"] = ceil(decoder.num_inference_steps * self.settings.get("strength", 1))
        return stages | ({"upsampler": decoder.upsample_steps * decoder.upsample} if decoder.upsample else {})

    @property
    def uses_prior(self) -> bool:
        """True if the prior draws for texts."""
        return self.request.has_texts and self.pipeline.prior is not None

    @property
    def inverts(self) -> bool:
        """True if the drawing starts from the noise of given images."""
        return False

    @abstractmethod
    def check(self) -> None:
        """Refuse what the pipeline would refuse, before the request waits for its turn. Raises InputError."""

    @abstractmethod
    def draw(self) -> list[Image.Image]:
        """Return the images."""

    @abstractmethod
    def build_records(self) -> list[Record]:
        """Return the record of each image."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs as the pipeline's call names them."""
        return {"image": self.request.image}


class TextTask(Task):
    """Images of a prompt."""

    kind = Text2ImagePipeline

    @property
    def inputs(self) -> dict[str, Any]:
        return {"prompt": self.request.inputs * self.request.count}

    def check(self) -> None:
        check_stage_inputs(self.pipeline, self.resolved.prior, self.resolved.decoder, self.request.count)

    def draw(self) -> list[Image.Image]:
        call = self.inputs | {"generator": self.request.generators, "resolved": self.resolved}
        return self.pipeline(**call, **self.arguments).images

    def build_records(self) -> list[Record]:
        request, source = self.request, self.model.source
        used = build_settings_record(source, self.settings, self.resolved, self.uses_prior)
        used["weights"] = self.model.weights
        return build_records("prompt", request.names * request.count, request.seed, source.model, used)


class ImageTask(Task):
    """Images that are drawn from one image, all in one call."""

    def check(self) -> None:
        prior, decoder = self.resolved
        count, canvas = self.request.count, self.measure_canvas()
        check_stage_inputs(self.pipeline, prior if self.uses_prior else None, decoder, count, canvas, count)

    def measure_canvas(self) -> tuple[int, int] | None:
        """Return the height and width of what is painted in; None for tasks that do not paint in an image."""
        return None

    def draw(self) -> list[Image.Image]:
        request = self.request
        masks = {} if request.mask is None else {"mask_image": request.mask}
        several = {} if request.count == 1 else {"num_images_per_prompt": request.count}
        call = self.inputs | masks | several | {"generator": request.generators, "resolved": self.resolved}
        return self.pipeline(**call, **self.arguments).images

    def build_records(self) -> list[Record]:
        request, source = self.request, self.model.source
        used = build_settings_record(source, self.settings, self.resolved, self.uses_prior) | request.mask_record
        return build_records("image", request.names[:1] * request.count, request.seed, source.model, used)

    @property
    def uses_prior(self) -> bool:
        """True for a prompt, but for pipelines that pass it to the decoder alone."""
        inverts = issubclass(self.kind, InvertingPipeline)
        return self.settings.get("prompt") is not None and not inverts and self.pipeline.prior is not None


class VariationTask(ImageTask):
    """Images that show what the given one shows."""

    kind = ImageVariationPipeline

    @property
    def inverts(self) -> bool:
        return self.settings.get("eta") is not None

    def check(self) -> None:
        if self.settings.get("negative_prompt") is not None and self.settings.get("eta") is not None:
            raise InputError("negative_prompt is for variations from new noise; leave out eta")
        super().check()


class ImageToImageTask(ImageTask):
    """Images like the given one."""

    kind = ImageToImagePipeline
    defaults = {"strength": signature(ImageToImagePipeline.__call__).parameters["strength"].default}


class InpaintTask(ImageTask):
    """An image, painted anew where the mask is white."""

    kind = InpaintPipeline
    defaults = {"strength": signature(InpaintPipeline.__call__).parameters["strength"].default}

    def measure_canvas(self) -> tuple[int, int]:
        assert self.request.image is not None
        margins = (left, right, top, bottom) = tuple(self.settings.get(name, 0) for name in MARGINS)
        width, height = self.request.image.size
        check_enlarged_size(width, height, margins)
        # Without values: its sides are checked and padded as those of the image will be
        # Meta tensors cost no memory, whatever the client asks for
        canvas = torch.empty(1, 1, height + top + bottom, width + left + right, device="meta")
        self.pipeline.check_canvas_size(canvas)
        height, width = self.pipeline.pad_to_latent_cells(canvas).shape[-2:]
        return height, width


class OutpaintTask(InpaintTask):
    """An image, painted around."""

    kind = OutpaintPipeline
    defaults = dict.fromkeys(MARGINS, 0)


class TextDiffTask(ImageTask):
    """An image that is changed by the direction between two captions, once for each theta."""

    kind = TextDiffPipeline
    defaults = {"direction": "text"}

    @property
    def inverts(self) -> bool:
        return True

    @property
    def uses_prior(self) -> bool:
        return self.settings["direction"] == "prior"

    def check(self) -> None:
        check_direction(self.settings["direction"], self.pipeline.prior)
        check_caption_pair(self.settings["source"], self.settings["target"])
        super().check()

    def draw(self) -> list[Image.Image]:
        # One seed for all, so that each is the image that its theta alone draws
        generators = [Generator().manual_seed(self.request.seed) for _ in range(self.request.count)]
        call = self.inputs | self.arguments | {"generator": generators, "resolved": self.resolved}
        return self.pipeline(**call).images

    def build_records(self) -> list[Record]:
        thetas = list_thetas(self.settings.get("theta"), self.settings["direction"])
        records = super().build_records()
        return [record | {"theta": value, "seed": self.request.seed} for record, value in zip(records, thetas)]


class MixTask(Task):
    """Mixes of images and texts: one mix for each seed; or a strip, which has a row of weights for each image."""

    kind = InterpolationPipeline
    defaults = {"inverted": True}

    def resolve(self, watch: dict[str, Any]) -> None:
        self.arguments, options = split_settings(self.kind, self.settings)
        self.resolved = self.pipeline.resolve_options(**options, **watch, inverted=self.inverts)

    @property
    def inverts(self) -> bool:
        return self.settings["inverted"] and self.request.image is not None

    @property
    def inputs(self) -> dict[str, Any]:
        return {"anchors": self.request.inputs}

    @property
    def is_strip(self) -> bool:
        return isinstance(self.settings["weights"][0], list)

    def check(self) -> None:
        list_anchors(self.request.inputs)
        build_mixing_weights(len(self.request.inputs), self.settings["weights"], frames=2)
        prior, decoder = self.resolved
        check_stage_options(self.pipeline, prior if self.request.has_texts else None, decoder)
        check_stage_inputs(self.pipeline, None, decoder, self.request.count)

    def draw(self) -> list[Image.Image]:
        # A strip has one seed; other mixes are one for each seed
        generators = self.request.generators[:1] if self.is_strip else self.request.generators
        call = self.inputs | self.arguments | {"resolved": self.resolved}
        return self.pipeline(**call, generator=generators).images

    def build_records(self) -> list[Record]:
        request, source, weights = self.request, self.model.source, self.settings["weights"]
        settings = {name: value for name, value in self.settings.items() if name not in self.arguments}
        used = build_settings_record(source, settings, self.resolved, self.uses_prior)
        # Each image of a strip is the mix of its own weights, with the same seed
        rows = weights if self.is_strip else [weights] * request.count
        seeds = [request.seed] * request.count if self.is_strip else request.seeds
        inverted = self.settings["inverted"]
        return [build_mix_record(request.names, row, seed, source, inverted) | used for row, seed in zip(rows, seeds)]


class UpsampleTask(Task):
    """An image, enlarged."""

    kind = UpsamplePipeline
    defaults = {"upsample": 1}

    @classmethod
    def list_settings(cls) -> frozenset[str]:
        return super().list_settings() | {"upsample"}

    def list_stages(self) -> dict[str, int]:
        return {"upsampler": self.settings.get("num_inference_steps", 4) * self.settings["upsample"]}

    def resolve(self, watch: dict[str, Any]) -> None:
        self.arguments = {name: value for name, value in self.settings.items() if name != "upsample"} | watch
        self.resolved = None

    def check(self) -> None:
        assert self.request.image is not None
        check_integer("upsample", self.settings["upsample"], 1, MAX_ENLARGEMENTS)
        check_range("level", self.settings.get("level", 0), 0, self.pipeline.upsampler.config.max_level)
        check_step_count("steps", self.settings.get("num_inference_steps", 1), self.pipeline.upsampler_scheduler)
        check_upsampled_size(self.pipeline.upsampler, *self.request.image.size, self.settings["upsample"])

    def draw(self) -> list[Image.Image]:
        call = self.inputs | {"times": self.settings["upsample"], "generator": self.request.generators}
        return self.pipeline(**call, **self.arguments).images

    def build_records(self) -> list[Record]:
        request, source, times = self.request, self.model.source, self.settings["upsample"]
        model = source.upsampler or source.model
        return [build_upsampling_record(request.names[0], request.seed, model, times, self.settings)]


TASKS: dict[str, type[Task]] = {
    "text": TextTask,
    "variation": VariationTask,
    "image_to_image": ImageToImageTask,
    "inpaint": InpaintTask,
    "outpaint": OutpaintTask,
    "text_diff": TextDiffTask,
    "mix": MixTask,
    "upsample": UpsampleTask,
}
