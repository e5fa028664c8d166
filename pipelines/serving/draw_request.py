"""A request as the server draws it, and the model that it is drawn by, both of which another process may have."""

import threading
from dataclasses import dataclass, field
from typing import Any, Self

from PIL import Image
from t2i.pipelines.calls.unknown_words import collect_texts
from t2i.pipelines.jobs.records import Record
from t2i.pipelines.memory_needed import count_fitting_pixels
from torch import Generator

from t2i.files.known_words import KnownWords

BYTES_PER_PIXEL = 4  # of decoded images, also of those in RGB
MARGINS = ("left", "right", "top", "bottom")
KEEPING_TASKS = ("inpaint", "outpaint", "upsample")  # whose images have the size of the given one, and margins


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that may be loaded in another process.

    Args:
        image_size: side of its images in pixels.
        size_multiple: that sides of other images are multiples of.
        upsampler_factor: by which a pass of its upsampler multiplies the sides; 1 without an upsampler.
        max_pixels: of images that fit into memory at once.
        reads_texts: whether it draws for texts.
        known_words: of the captions that it was trained on; None if they are not known. is_strict: it refuses others.
        defaults: of fields of the API.
        prior_has_steps: whether its prior takes steps with a sampler.
    """

    image_size: int
    upsampler_factor: int
    max_pixels: float
    size_multiple: int = 1
    reads_texts: bool = True
    known_words: KnownWords | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    is_strict: bool = False
    prior_has_steps: bool = False

    @classmethod
    def find(cls, pipeline: Any, processes: int) -> Self:
        """Return the facts of a pipeline. processes: those of this machine that load it, which share its memory."""
        prior, decoder = pipeline.resolve_options()
        reads_texts = pipeline.clip.reads_captions
        defaults = {"steps": decoder.num_inference_steps, "guidance_scale": decoder.guidance_scale.scale}
        if pipeline.prior is not None:
            defaults |= {
                "prior_steps": prior.prior_num_inference_steps,
                "prior_guidance_scale": prior.prior_guidance_scale.scale,
                "candidates": prior.prior_candidates,
            }
        return cls(
            pipeline.image_size,
            1 if pipeline.upsampler is None else pipeline.upsampler.config.factor,
            count_fitting_pixels(pipeline, processes),
            pipeline.autoencoder.factor * pipeline.decoder.latent_multiple,
            reads_texts,
            pipeline.clip.tokenizer.known_words if reads_texts else None,
            defaults,
            pipeline.refuses_unknown_words,
            pipeline.prior is not None and pipeline.prior.needs_scheduler,
        )

    def pack(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        words = None if self.known_words is None else [sorted(self.known_words.captions), self.known_words.keywords]
        return vars(self) | {"known_words": words}

    @classmethod
    def unpack(cls, values: dict[str, Any]) -> Self:
        """Return the facts that `pack` made JSON of."""
        words = values["known_words"]
        return cls(**values | {"known_words": None if words is None else KnownWords(frozenset(words[0]), words[1])})


@dataclass
class DrawRequest:
    """A request to draw `count` images of the same inputs, with the seeds `seed`, `seed` + 1, ...

    Args:
        task: a name of `TASKS`.
        settings: arguments and options of the pipeline, but for the inputs, under the names that records have.
        inputs: a prompt, an image, or the images and texts of a mix.
        names: of the inputs as records have them: names of files, and the texts themselves.
        mask: of the image's size, white where inpainting paints. mask_record: what records say of it.
        previews: how many estimates of the images are wanted while they are drawn.
        progress: whether every step is reported.
        strict: whether words that the model never saw are refused.
    """

    task: str
    settings: dict[str, Any]
    seed: int
    count: int = 1
    inputs: list[Image.Image | str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    mask: Image.Image | None = None
    mask_record: Record = field(default_factory=dict)
    previews: int = 0
    progress: bool = False
    strict: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False)  # for `StepEngine.cancel`

    def pack(self, with_pixels: bool = True) -> dict[str, Any]:
        """Return the fields for another process. with_pixels: False leaves out what images show, not their sizes."""
        fields = {name: value for name, value in vars(self).items() if name != "cancelled"}
        if not with_pixels:
            given = [Image.new("1", given.size) if isinstance(given, Image.Image) else given for given in self.inputs]
            fields |= {"inputs": given, "mask": None}
        return fields

    @property
    def image(self) -> Image.Image | None:
        """The first image among the inputs."""
        return next((given for given in self.inputs if isinstance(given, Image.Image)), None)

    @property
    def input_bytes(self) -> int:
        """Bytes of the given images and the mask, when they are decoded."""
        images = [given for given in (*self.inputs, self.mask) if isinstance(given, Image.Image)]
        return BYTES_PER_PIXEL * sum(image.width * image.height for image in images)

    @property
    def has_texts(self) -> bool:
        """True if there is a text among the inputs."""
        return any(isinstance(given, str) for given in self.inputs)

    def drop_inputs(self) -> None:
        """Let go of images and files, of a request that has ended: others may refer to it for a while."""
        self.inputs, self.mask = [], None

    def list_texts(self) -> list[str]:
        """Return the texts that the model reads, each once: those among the inputs, then those of settings."""
        return list(dict.fromkeys(collect_texts({"anchors": self.inputs}) + collect_texts(self.settings)))

    @property
    def seeds(self) -> list[int]:
        return [self.seed + number for number in range(self.count)]

    @property
    def generators(self) -> list[Generator]:
        return [Generator().manual_seed(seed) for seed in self.seeds]

    def count_pixels(self, facts: ModelFacts) -> int:
        """Return the pixels of all images, enlarged, by which their memory is counted."""
        return self.count_drawn_pixels(facts) * facts.upsampler_factor ** (2 * (self.settings.get("upsample") or 0))

    def count_drawn_pixels(self, facts: ModelFacts) -> int:
        """Return the pixels of all images as the decoder draws them, or as they are given to be enlarged."""
        width, height = self.find_size(facts)
        return self.count * width * height

    def count_enlarged_pixels(self, facts: ModelFacts) -> int:
        """Return the pixels of all images that the last pass of the upsampler enlarges; 0 without one."""
        return self.count_pixels(facts) // facts.upsampler_factor**2 if self.settings.get("upsample") else 0

    def find_size_setting(self) -> str:
        """Return the name of the setting by which images are large."""
        margins = [name for name in MARGINS if self.settings.get(name)]
        sizes = [name for name in ("width", "height") if self.settings.get(name)]
        keeps_size = self.task in KEEPING_TASKS and self.image is not None
        return next(iter(sizes or margins), "image" if keeps_size else "n")

    def find_size(self, facts: ModelFacts) -> tuple[int, int]:
        """Return the width and height of an image, with its margins, before it is enlarged."""
        # Images that are painted in or enlarged keep their size
        keeps_size = self.image is not None and self.task in KEEPING_TASKS
        given = self.image.size if self.image is not None and keeps_size else (facts.image_size,) * 2
        width, height = (self.settings.get(name) or side for name, side in zip(("width", "height"), given))
        margins = [self.settings.get(name) or 0 for name in MARGINS]
        return width + sum(margins[:2]), height + sum(margins[2:])
