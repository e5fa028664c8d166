"""The choices of `t2i init`: which row of sizes.yaml fits data and device, batch sizes, and numbers of steps."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from t2i.checks import check_choice
from t2i.config import DataConfig
from t2i.data.buckets import list_bucket_shapes

IMAGE_SIZES = (32, 64, 96, 128, 192, 256, 384, 512)
MIN_CROPPED = 0.05  # fraction of the images that squares take, from which shapes are kept
CONTEXT_LENGTHS = (32, 64, 128, 256)  # tokens
VOCABULARY_SIZES = {10_000: 2_048, 100_000: 8_192, math.inf: 16_384}  # largest number of captions: largest vocabulary

ExplainedValue = tuple[Any, str]  # a value and, in plain words, the reason for it


@dataclass(frozen=True)
class DataFacts:
    """Properties of the data that the recipe depends on."""

    path: str  # as the user gave it
    pictures: int  # in the training split
    held_out: int
    side: int  # median short side, in pixels
    caption_tokens: int  # 95 of 100 captions have at most this many
    captions: int  # in all
    variations: int  # captions that training can draw for an image
    cropped: float = 0.0  # mean fraction of an image that a crop to a square takes
    caption_lengths: tuple[int, ...] = ()  # tokens of measured captions, by the tokenizer of CLIP if that is known


@dataclass(frozen=True)
class Device:
    kind: str  # cpu or cuda
    cores: int
    memory: float  # GB of a GPU, or of the machine
    count: int = 1  # GPUs

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"a CPU with {self.cores} {'core' if self.cores == 1 else 'cores'} and {self.memory:.0f} GB"
        return f"{'a GPU' if self.count == 1 else f'{self.count} GPUs'} with {self.memory:.0f} GB"


@dataclass(frozen=True)
class StageSchedule:
    """Length and learning rate of a stage's training."""

    batch: int  # at most
    passes: int  # times that each image is seen
    least: int  # steps
    most: int  # steps
    rate: float


@dataclass(frozen=True)
class RecipeSize:
    """A row of sizes.yaml: the conditions for its choice, its models, and their schedules."""

    image_size: int
    cpu_pictures: float  # in the training split, for a CPU
    gpu_pictures: float
    memory: float  # GB
    models: dict[str, dict[str, Any]] = field(repr=False)
    schedules: dict[str, StageSchedule] = field(repr=False)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        schedules = {stage: StageSchedule(**schedule) for stage, schedule in row["schedules"].items()}
        return cls(**{**row, "schedules": schedules})


SIZES = [RecipeSize.from_dict(row) for row in yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text("utf-8"))]
SMALL, MEDIUM, LARGE = SIZES
PUBLIC_PRIOR = {"width": 512, "depth": 6, "heads": 8}  # for the embeddings of a public CLIP, which are at least as wide


def choose_vocabulary_size(captions: int) -> int:
    return next(size for limit, size in VOCABULARY_SIZES.items() if captions <= limit)


def choose_recipe_size(facts: DataFacts, device: Device, image_size: int | None) -> tuple[RecipeSize, int, str]:
    """Return the row of the table, the side of the images in pixels, and the reason for this side."""
    if image_size is not None:
        check_choice("image-size", image_size, IMAGE_SIZES)
        # The largest models that were made for at most this side
        fitting = [size for size in SIZES if size.image_size <= max(image_size, SMALL.image_size)]
        return fitting[-1], image_size, "as you asked"
    size, why = SMALL, ""
    # The largest row before the first that does not fit
    for larger in SIZES[1:]:
        why = find_obstacle(larger, facts, device)
        if why:
            break
        size = larger
    return size, size.image_size, why or "the largest of these recipes"


def find_obstacle(size: RecipeSize, facts: DataFacts, device: Device) -> str:
    """Return the reason why a row does not fit this data and device; empty if it fits."""
    on_cpu = device.kind == "cpu"
    least_pictures = size.cpu_pictures if on_cpu else size.gpu_pictures
    pixels = f"{size.image_size} x {size.image_size}"
    # Infinity marks a row that no CPU trains
    if least_pictures == math.inf:
        return f"{pixels} takes a GPU"
    if facts.pictures < least_pictures:
        place = "a CPU" if on_cpu else "a GPU"
        return f"{pixels} takes {least_pictures:,.0f} images on {place}, these are {facts.pictures:,}"
    if facts.side < size.image_size:
        return f"half of the images are smaller than {pixels}"
    if device.memory < size.memory or (on_cpu and device.cores < 2):
        needed = "two cores and" if on_cpu else "a GPU with"
        return f"{pixels} takes {needed} {size.memory:g} GB, this is {device}"
    return ""


def choose_buckets(facts: DataFacts, side: int, step: int) -> ExplainedValue:
    """Choose whether images keep their shapes, in buckets with sides of multiples of `step`."""
    taken = f"{facts.cropped:.0%} of the images"
    if facts.cropped < MIN_CROPPED:
        return False, f"squares take {taken}"
    if len(list_bucket_shapes(side, step, DataConfig.max_ratio)) == 1:
        return False, f"squares take {taken}; there is no other shape at this size"
    return True, f"squares would take {taken}"


def choose_context_length(facts: DataFacts) -> int:
    return next((tokens for tokens in CONTEXT_LENGTHS if tokens >= facts.caption_tokens), CONTEXT_LENGTHS[-1])


def choose_batch_size(schedule: StageSchedule, facts: DataFacts, contrastive: bool) -> ExplainedValue:
    """Choose a power of two that is at most the number of images; half of it for a contrastive loss."""
    limit = facts.pictures // 2 if contrastive else facts.pictures
    batch = min(schedule.batch, 2 ** int(math.log2(limit)))
    if contrastive:
        why, bound = "images of a step, told apart by their captions", f"at most half of the {facts.pictures:,}"
    else:
        why, bound = "images a step", f"not more than the {facts.pictures:,}"
    return batch, why if batch == schedule.batch else f"{why}; {bound}"


def choose_steps(schedule: StageSchedule, facts: DataFacts, batch: int) -> ExplainedValue:
    """Choose the steps for the schedule's passes over the data, within its bounds."""
    # Two digits are enough for a number of steps that people read
    ideal = schedule.passes * facts.pictures / batch
    steps = min(max(round_to_two_digits(ideal), schedule.least), schedule.most)
    times = steps * batch / facts.pictures
    seen = f"each of {facts.pictures:,} images is seen {times:,.{0 if times > 10 else 1}f} times"
    if ideal < schedule.least:
        return steps, f"the least; {seen}"
    return steps, seen if ideal <= schedule.most else f"{seen}; more steps will make it better"


def round_to_two_digits(value: float) -> int:
    unit = 10 ** max(0, int(math.log10(value)) - 1)
    return max(1, round(value / unit)) * unit
