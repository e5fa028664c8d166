"""The table that `t2i init` chooses from: three sizes of every model, from when on, and how long they are trained.

MEDIUM is `configs/emoji`, which was tried to the end: 3,529 pictures, two CPU cores, about two hours. SMALL costs a
fraction of it. LARGE is for GPUs, in proportions of its own between MEDIUM and `configs/base`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from t2i.checks import check_choice

IMAGE_SIZES = (32, 64, 96, 128, 192, 256, 384, 512)
CONTEXT_LENGTHS = (32, 64, 128, 256)  # tokens
VOCABULARY_SIZES = {10_000: 2_048, 100_000: 8_192, math.inf: 16_384}  # up to this many captions: entries at most

ExplainedValue = tuple[Any, str]  # a value and, in plain words, why it is this


@dataclass(frozen=True)
class DataFacts:
    """What the recipe depends on in the data."""

    path: str  # as it was given
    pictures: int  # to train on
    held_out: int
    side: int  # the median short side, in pixels
    caption_tokens: int  # 95 of 100 captions have at most so many
    captions: int  # in all
    variations: int  # captions of a picture that training can draw


@dataclass(frozen=True)
class Device:
    kind: str  # cpu or cuda
    cores: int
    memory: float  # 10^9 bytes: of a GPU, or of the machine
    count: int = 1  # GPUs

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"a CPU with {self.cores} core{'s' * (self.cores > 1)} and {self.memory:.0f} GB"
        return f"{'a GPU' if self.count == 1 else f'{self.count} GPUs'} with {self.memory:.0f} GB"


@dataclass(frozen=True)
class StageSchedule:
    """How long a stage is trained."""

    batch: int  # at most
    passes: int  # times that each picture is seen, ...
    least: int  # ... but no fewer steps than this
    most: int  # ... and no more
    rate: float


@dataclass(frozen=True)
class RecipeSize:
    """A row of the table: from when on it is chosen, its models and how long they are trained."""

    image_size: int
    cpu_pictures: float  # to train on, on a CPU
    gpu_pictures: float
    memory: float  # GB
    models: dict[str, dict[str, Any]] = field(repr=False)
    schedules: dict[str, StageSchedule] = field(repr=False)


def repeat_block_type(kind: str, count: int) -> list[str]:
    return [kind] * count


def build_vae_config(channels: list[int], latents: int, layers: int) -> dict[str, Any]:
    down, up = (
        repeat_block_type("DownEncoderBlock2D", len(channels)),
        repeat_block_type("UpDecoderBlock2D", len(channels)),
    )
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return {"latent_channels": latents, **blocks, "layers_per_block": layers, "norm_num_groups": 16}


def build_unet_config(channels: list[int], layers: int, heads: int) -> dict[str, Any]:
    down, up = (
        repeat_block_type("CrossAttnDownBlock2D", len(channels)),
        repeat_block_type("CrossAttnUpBlock2D", len(channels)),
    )
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return {**blocks, "layers_per_block": layers, "attention_head_dim": heads, "norm_num_groups": 16}


SMALL = RecipeSize(
    64,
    cpu_pictures=0,
    gpu_pictures=0,
    memory=0,
    models={
        "clip": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
            "text_cfg": {"width": 128, "layers": 3, "heads": 4},
        },
        "autoencoder": {"patch_size": 4, "vae": build_vae_config([64, 128], latents=8, layers=1)},
        "prior": {"width": 128, "depth": 4, "heads": 4},
        "decoder": {"context_width": 96, "image_tokens": 4, "unet": build_unet_config([96, 160], layers=1, heads=4)},
    },
    schedules={
        "clip": StageSchedule(128, passes=40, least=100, most=2_000, rate=1e-3),
        "autoencoder": StageSchedule(32, passes=24, least=1_000, most=6_000, rate=1e-3),
        "prior": StageSchedule(64, passes=87, least=1_000, most=6_000, rate=1e-3),
        "decoder": StageSchedule(64, passes=87, least=1_500, most=10_000, rate=1e-3),
    },
)
MEDIUM = RecipeSize(  # configs/emoji
    128,
    cpu_pictures=2_000,
    gpu_pictures=0,
    memory=6,
    models={
        "clip": {
            "embed_dim": 192,
            "vision_cfg": {"image_size": 128, "patch_size": 32, "width": 192, "layers": 5, "head_width": 32},
            "text_cfg": {"width": 192, "layers": 3, "heads": 6},
        },
        "autoencoder": {"patch_size": 4, "vae": build_vae_config([64, 96, 160], latents=16, layers=1)},
        "prior": {"width": 192, "depth": 5, "heads": 6},
        "decoder": {"context_width": 128, "image_tokens": 4, "unet": build_unet_config([128, 192], layers=1, heads=4)},
    },
    schedules={
        "clip": StageSchedule(256, passes=40, least=200, most=2_200, rate=1e-3),
        "autoencoder": StageSchedule(32, passes=24, least=1_500, most=10_000, rate=1e-3),
        "prior": StageSchedule(128, passes=87, least=1_500, most=10_000, rate=1e-3),
        "decoder": StageSchedule(64, passes=87, least=2_500, most=20_000, rate=1e-3),
    },
)
LARGE = RecipeSize(
    256,
    cpu_pictures=math.inf,
    gpu_pictures=20_000,
    memory=16,
    models={
        "clip": {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 256, "patch_size": 32, "width": 512, "layers": 8, "head_width": 64},
            "text_cfg": {"width": 384, "layers": 6, "heads": 6},
        },
        "autoencoder": {"patch_size": 4, "vae": build_vae_config([128, 192, 320], latents=16, layers=2)},
        "prior": {"width": 512, "depth": 12, "heads": 8},
        "decoder": {
            "context_width": 256,
            "image_tokens": 8,
            "unet": build_unet_config([192, 384, 512], layers=2, heads=8),
        },
    },
    schedules={
        "clip": StageSchedule(512, passes=30, least=2_000, most=50_000, rate=5e-4),
        "autoencoder": StageSchedule(32, passes=10, least=10_000, most=100_000, rate=2e-4),
        "prior": StageSchedule(512, passes=100, least=5_000, most=100_000, rate=3e-4),
        "decoder": StageSchedule(128, passes=100, least=20_000, most=200_000, rate=2e-4),
    },
)
SIZES = (SMALL, MEDIUM, LARGE)
PUBLIC_PRIOR = {"width": 512, "depth": 6, "heads": 8}  # for the embeddings of a public CLIP, which are as wide or wider


def choose_vocabulary_size(captions: int) -> int:
    return next(size for limit, size in VOCABULARY_SIZES.items() if captions <= limit)


def choose_recipe_size(facts: DataFacts, device: Device, image_size: int | None) -> tuple[RecipeSize, int, str]:
    """The row of the table, the side of the pictures, and why."""
    if image_size is not None:
        check_choice("image-size", image_size, IMAGE_SIZES)
        fitting = [size for size in SIZES if size.image_size <= max(image_size, SMALL.image_size)]
        return fitting[-1], image_size, "as you asked"
    size, why = SMALL, ""
    for larger in SIZES[1:]:
        if why := find_obstacle(larger, facts, device):
            break
        size = larger
    return size, size.image_size, why or "the largest of these recipes"


def find_obstacle(size: RecipeSize, facts: DataFacts, device: Device) -> str:
    """Why a row of the table is not for this data on this device; empty if it is."""
    wanted = size.cpu_pictures if device.kind == "cpu" else size.gpu_pictures
    pixels, on = f"{size.image_size} x {size.image_size}", "a CPU" if device.kind == "cpu" else "a GPU"
    if wanted == math.inf:
        return f"{pixels} takes a GPU"
    if facts.pictures < wanted:
        return f"{pixels} takes {wanted:,.0f} pictures on {on}, these are {facts.pictures:,}"
    if facts.side < size.image_size:
        return f"half of the pictures are smaller than {pixels}"
    if device.memory < size.memory or device.kind == "cpu" and device.cores < 2:
        needed = "two cores and" if device.kind == "cpu" else "a GPU with"
        return f"{pixels} takes {needed} {size.memory:g} GB, this is {device}"
    return ""


def choose_context_length(facts: DataFacts) -> int:
    return next((tokens for tokens in CONTEXT_LENGTHS if tokens >= facts.caption_tokens), CONTEXT_LENGTHS[-1])


def choose_batch_size(schedule: StageSchedule, facts: DataFacts, contrastive: bool) -> ExplainedValue:
    """A power of two, never more than there are pictures."""
    limit = facts.pictures // 2 if contrastive else facts.pictures
    batch = min(schedule.batch, 2 ** int(math.log2(limit)))
    if contrastive:
        what = "pictures of a step, told apart by their captions"
        return batch, what + ("" if batch == schedule.batch else f"; at most half of the {facts.pictures:,}")
    return batch, "pictures a step" + ("" if batch == schedule.batch else f"; not more than the {facts.pictures:,}")


def choose_steps(schedule: StageSchedule, facts: DataFacts, batch: int) -> ExplainedValue:
    wanted = schedule.passes * facts.pictures / batch
    steps = min(max(round_to_two_digits(wanted), schedule.least), schedule.most)
    times = steps * batch / facts.pictures
    seen = f"each of {facts.pictures:,} pictures is seen {times:,.{0 if times > 10 else 1}f} times"
    if wanted < schedule.least:
        return steps, f"the least; {seen}"
    return steps, seen if wanted <= schedule.most else f"{seen}; more steps will make it better"


def round_to_two_digits(value: float) -> int:
    unit = 10 ** max(0, int(math.log10(value)) - 1)
    return max(1, round(value / unit)) * unit
