"""Encode every image and caption once, by CLIP and the autoencoder, for priors and decoders to train from.

accelerate launch training/cache_data.py configs/emoji/cache.yaml data.path=data/emoji

It can be stopped: the same command keeps the whole shards and makes the others.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from t2i.training.common.cache_freshness import (
    build_autoencoder_facts,
    build_clip_facts,
    build_text_encoder_facts,
    digest_stored_files,
)
from t2i.training.common.captions import find_cut_captions, print_cut_captions
from t2i.training.common.effects import CACHE_CASES, IdleCases
from t2i.training.common.encodings import encode_tokens
from t2i.training.common.entry import run
from t2i.training.common.loop import build_accelerator
from t2i.training.common.state import lock_folder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2i.checks import check_choice
from t2i.config import DataConfig, TrainConfig, check_fields
from t2i.data import CaptionedPictures, open_datasets
from t2i.data.buckets import name_latents
from t2i.data.cache import (
    MIRRORED,
    build_shard_path,
    check_cache_key,
    compute_offsets,
    compute_statistics,
    find_shard_damage,
    finish_cache,
    open_tensors,
    strip_padding,
    write_shard,
)
from t2i.data.dataset import iterate_equal_parts, stack_views
from t2i.data.framing import View, flip_view
from t2i.data.loading import shorten_worker_errors
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.files.atomic import check_writable_folder, create_file_atomically, write_json_file
from t2i.interop.by_name import load_autoencoder, load_clip, load_text_encoder
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.text_encoder import DTYPES as TEXT_DTYPES
from t2i.networks.text_encoder import MAX_TOKENS, TextEncoder
from t2i.progress import Progress, follow_batch
from t2i.terminal import print_line, print_note

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass
class Config:
    output: str = "???"  # folder of the cache
    clip: str | None = None  # folder of a trained CLIP, or a public one; null caches latents alone
    autoencoder: str | None = None  # folder of a trained autoencoder, or a diffusers VAE; null caches no latents
    text: bool = True  # encode captions too, for priors and for decoders that read captions
    # A text encoder to encode captions too, for decoders that read them through it; as in their configuration
    text_encoder: str | None = None
    text_encoder_tokens: int = 128
    text_encoder_dtype: str = "float32"
    variations: int = 1  # captions of an image, from the first draws
    batch_size: int = 64  # images or captions at a time, per process
    shard_size: int = 4096  # images in a file
    dtype: str = "float16"  # of latents and token states; or float32, which embeddings always are
    mixed_precision: str = "no"  # or as in training: fp16, bf16 or auto
    data: DataConfig = field(default_factory=DataConfig)
    idle: ClassVar[IdleCases] = CACHE_CASES

    def __post_init__(self) -> None:
        if self.mixed_precision == "False":  # YAML 1.1 reads a bare `no` as false
            self.mixed_precision = "no"
        check_choice("mixed_precision", self.mixed_precision, ("auto", "no", "fp16", "bf16"))
        check_choice("dtype", self.dtype, tuple(CACHE_DTYPES))
        check_choice("text_encoder_dtype", self.text_encoder_dtype, tuple(TEXT_DTYPES))
        check_fields(self, text_encoder_tokens=(3, MAX_TOKENS), variations=(1, 1024))
        check_fields(self, batch_size=(1, 65_536), shard_size=(1, 1_000_000))
        if self.clip is None and self.autoencoder is None:
            raise InputError("clip and autoencoder are both null; give at least one of them")
        self.text = self.text and self.clip is not None
        self.data.check_center_crops()


@dataclass(frozen=True)
class CacheShard:
    """A file of the cache: the images from `first` to `end` (exclusive) of a split."""

    split: str
    number: int
    first: int
    end: int

    def build_path(self, folder: Path) -> Path:
        return build_shard_path(folder, self.split, self.number)


@torch.no_grad()
def main(config: Config) -> None:
    """Encode all images and captions of a data folder, and write or finish their cache."""
    folder = Path(config.output)
    check_writable_folder(folder)
    datasets = open_datasets(config.data)
    encoder = CacheEncoder(config)
    key = build_cache_key(config, encoder.facts, datasets) | encoder.frame_pictures(datasets)
    check_cache_key(folder, key)
    # What is cached is written down first, so that an unfinished cache can be continued
    accelerator = build_accelerator(TrainConfig(output=config.output, mixed_precision=config.mixed_precision))
    with lock_folder(accelerator, folder, "output"):
        if accelerator.is_main_process:
            with create_file_atomically(folder / "config.yaml") as unfinished:
                unfinished.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
            write_json_file(folder / "key.json", key)
            crops = {split: dataset.format_left_out_lines() for split, dataset in datasets.items()}
            for line in datasets["train"].format_shape_lines() + crops.get("held_out", []):
                print_line(line)
            crops["train"] = datasets["train"].format_crop_lines()
            most = max(count_max_captions(dataset) for dataset in datasets.values())
            if (config.text or config.text_encoder) and most > config.variations:
                count = config.variations
                print_note(f"caching {count} of up to {most} captions of an image; `variations` sets how many")
            cut = {name: find_cut_captions(datasets["train"], one) for name, one in encoder.list_tokenizers().items()}
            for cut_line in cut.values():
                print_cut_captions(cut_line)
        encoder.prepare(accelerator)
        # Each process makes a part of the shards
        shards = []
        for split, dataset in datasets.items():
            for number, first in enumerate(range(0, len(dataset), config.shard_size)):
                shards.append(CacheShard(split, number, first, min(first + config.shard_size, len(dataset))))
        write_missing_shards(folder, datasets, shards, encoder, accelerator)
        # The index, which finishes the cache
        if accelerator.is_main_process:
            counts = {split: sum(shard.split == split for shard in shards) for split in datasets}
            models = {name: None if facts is None else asdict(facts) for name, facts in encoder.facts.items()}
            training = [shard.build_path(folder) for shard in shards if shard.split == "train"]
            found = {**models, "cut_captions": cut, "crop_lines": crops}
            finish_cache(folder, key, found, encoder.compute_shared_tensors(datasets, training), counts)
            pictures = ", ".join(f"{len(dataset)} images of {split}" for split, dataset in datasets.items())
            print_line(f"{folder}: {pictures}; {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def build_cache_key(config: Config, facts: dict[str, Any], datasets: dict[str, CaptionedPictures]) -> dict[str, Any]:
    """Return everything that the content of the shards depends on."""
    models = {name: None if fact is None else fact.identity for name, fact in facts.items()}
    settings = ("text", "variations", "shard_size", "dtype", "mixed_precision")
    data = config.data
    # Absent where they are off, as in the keys of caches that are older than the options
    options = {
        "keyword_alone": data.keyword_alone,
        "sentences": datasets["train"].mix.sentences_digest,
        "flip": data.flip,
        "buckets": config.autoencoder and data.bucket_limits,
    }
    return {
        **models,
        "data": {split: dataset.compute_digest() for split, dataset in datasets.items()},
        "stored": digest_stored_files(config.clip, config.autoencoder),
        "image_size": data.image_size,
        **{name: getattr(config, name) for name in settings},
        **{name: value for name, value in options.items() if value},
    }


def count_max_captions(dataset: CaptionedPictures) -> int:
    """Return the largest number of captions and keywords that an image has."""
    rows = dataset.manifest.iterate_rows("captions", "keywords")
    return max(len(row["captions"]) + len(row["keywords"]) for row in rows)


def write_missing_shards(
    folder: Path,
    datasets: dict[str, CaptionedPictures],
    shards: list[CacheShard],
    encoder: "CacheEncoder",
    accelerator: Accelerator,
) -> None:
    """Make the shards that are missing or damaged; each process makes a part of them."""
    # Each process checks its part, for a shard is read whole to compute its SHA-256.
    rank, world = accelerator.process_index, accelerator.num_processes
    missing = [shard for shard in shards[rank::world] if not is_shard_intact(shard.build_path(folder))]
    missing = sorted(gather_object(missing), key=shards.index)
    # Without cache.json, the cache counts as unfinished.
    if missing and accelerator.is_main_process:
        (folder / "cache.json").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    # Divided anew: the missing ones may all lie in one part.
    assigned = missing[rank::world]
    images = iterate_image_batches(datasets, assigned, encoder.config)
    total = sum(shard.end - shard.first for shard in assigned)
    with Progress("encoding", total):
        for shard in assigned:
            tensors = encoder.encode(datasets[shard.split], shard, images)
            write_shard(shard.build_path(folder), tensors)
    accelerator.wait_for_everyone()


def is_shard_intact(path: Path) -> bool:
    """Return whether a shard is there and undamaged; print what is wrong with a damaged one."""
    if not path.exists() and not path.with_suffix(".json").exists():
        return False
    problem = find_shard_damage(path)
    if problem is not None:
        print_note(f"made again: {problem}")
    return problem is None


class ImageBatches(Dataset):
    """Images, (B, 3, H, W), and what CLIP sees of them where that differs, by (split, indices)."""

    def __init__(self, datasets: dict[str, CaptionedPictures]):
        self.datasets = datasets

    def __getitem__(self, batch: tuple[str, list[int]]) -> tuple[Tensor, Tensor | None]:
        split, indices = batch
        return stack_views([self.datasets[split].load_view(index) for index in indices])


def plan_batches(dataset: CaptionedPictures, shard: CacheShard, size: int) -> list[list[int]]:
    """Return the images of a shard in batches of one shape."""
    numbers = np.zeros(len(dataset)) if dataset.buckets is None else dataset.buckets
    parts = iterate_equal_parts(numbers[shard.first : shard.end], size)
    return [(shard.first + part).tolist() for part in parts]


def iterate_image_batches(
    datasets: dict[str, CaptionedPictures], shards: list[CacheShard], config: Config
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the images of these shards as `plan_batches` divides them."""
    order = [
        (shard.split, batch)
        for shard in shards
        for batch in plan_batches(datasets[shard.split], shard, config.batch_size)
    ]
    workers = config.data.num_workers
    with shorten_worker_errors():
        yield from DataLoader(ImageBatches(datasets), sampler=order, batch_size=None, num_workers=workers)  # type: ignore


class CacheEncoder:
    """The frozen models, facts about them, and the dtypes of their encodings."""

    def __init__(self, config: Config):
        self.config, self.dtype = config, CACHE_DTYPES[config.dtype]
        self.clip: CLIP | None = None
        self.autoencoder: Autoencoder | None = None
        self.text_encoder: TextEncoder | None = None
        self.facts: dict[str, Any] = {"clip": None, "autoencoder": None}
        if config.clip is not None:
            self.clip = load_clip(config.clip).eval()
            self.facts["clip"] = build_clip_facts(config.clip, self.clip)
        if config.autoencoder is not None:
            self.autoencoder = load_autoencoder(config.autoencoder).eval()
            self.facts["autoencoder"] = build_autoencoder_facts(config.autoencoder, self.autoencoder)
            config.data.check_sides(self.autoencoder.factor)
        if config.text_encoder is not None:
            dtype = TEXT_DTYPES[config.text_encoder_dtype]
            self.text_encoder = load_text_encoder(config.text_encoder, config.text_encoder_tokens, dtype)
            if isinstance(self.text_encoder, MultilingualCLIP):
                raise InputError(
                    f"text_encoder={config.text_encoder!r} makes a vector for each caption beside its token states, "
                    "which a cache cannot store; leave it out, and the decoder's training encodes captions in the step"
                )
            self.facts["text_encoder"] = build_text_encoder_facts(self.text_encoder)

    def frame_pictures(self, datasets: dict[str, CaptionedPictures]) -> dict[str, str]:
        """Frame images for the models. Returns what a key contains about what CLIP sees."""
        if self.clip is None:
            return {}
        # The same for every split, because all have one CLIP
        return [dataset.add_clip_view(self.clip, alone=self.autoencoder is None) for dataset in datasets.values()][0]

    def list_tokenizers(self) -> dict[str, Any]:
        """Return the tokenizers of what encodes captions, by the name of its encodings."""
        readers = {"text": self.clip if self.config.text else None, "text_encoder": self.text_encoder}
        return {name: model.tokenizer for name, model in readers.items() if model is not None}

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the models to the accelerator's device."""
        self.accelerator = accelerator
        for model in (self.clip, self.autoencoder, self.text_encoder):
            if model is not None:
                model.to(accelerator.device)

    def encode(
        self, dataset: CaptionedPictures, shard: CacheShard, images: Iterator[tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """Return the tensors of a shard. The next items of `images` are the shard's images."""
        pictures = range(shard.first, shard.end)
        plan, parts = plan_batches(dataset, shard, self.config.batch_size), dict[str, list[Tensor]]()
        for batch, (image, seen) in zip(plan, images):
            views = {"": View(image, seen)}
            if dataset.framing.flip:
                views[MIRRORED] = flip_view(views[""])
            with follow_batch(len(batch)), self.accelerator.autocast():
                for prefix, view in views.items():
                    for name, encoded in self.encode_view(view, has_buckets=dataset.buckets is not None).items():
                        parts.setdefault(prefix + name, []).append(encoded)
        tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
        if dataset.buckets is not None:
            # Those of one shape are in order, and z_i of all images are brought into theirs
            inverse = torch.tensor([index for batch in plan for index in batch]).argsort()
            tensors |= {name: part[inverse] for name, part in tensors.items() if name.endswith("image_embeds")}
            tensors["latent_shapes"] = self.compute_latent_shapes(dataset)[shard.first : shard.end]
        # Names of any length, end to end, with the offset of each
        names = [dataset.get_sample_key(index).encode() for index in pictures]
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        tensors["key_offsets"] = compute_offsets(map(len, names))
        if self.config.text or self.text_encoder is not None:
            tensors |= self.encode_captions(dataset, pictures)
        return tensors

    def encode_view(self, view: View, has_buckets: bool) -> dict[str, Tensor]:
        """Return the encodings of images, on the CPU, by their names in a shard."""
        encoded = {}
        device = self.accelerator.device
        if self.clip is not None:
            seen = view.image if view.seen is None else view.seen
            encoded["image_embeds"] = self.clip.encode_image(seen.to(device)).float().cpu()
        if self.autoencoder is not None:
            latents = self.autoencoder.encode(view.image.to(device)).to("cpu", self.dtype)
            encoded[name_latents(*latents.shape[-2:]) if has_buckets else "latents"] = latents
        return encoded

    def encode_captions(self, dataset: CaptionedPictures, pictures: range) -> dict[str, Tensor]:
        """Encode the captions of a shard's images, equal captions once; see `t2i.data.cache` for the format."""
        numbers: dict[str, int] = {}  # by caption
        choice = []
        for index in pictures:
            captions = [dataset.get_caption(index, draw) for draw in range(self.config.variations)]
            choice.append([numbers.setdefault(caption, len(numbers)) for caption in captions])
        different, size = list(numbers), self.config.batch_size
        batches = [different[first : first + size] for first in range(0, len(different), size)]
        tensors = {"choice": torch.tensor(choice)}
        # One batch at a time, for the states of all captions may not fit on the device
        if self.clip is not None and self.config.text:
            with self.accelerator.autocast():
                tensors |= self.concatenate_states("text", map(self.clip.encode_text, batches))
        if self.text_encoder is not None:
            with torch.autocast(self.accelerator.device.type, enabled=False):
                tokens = (encode_tokens(self.text_encoder, batch) for batch in batches)
                tensors |= self.concatenate_states("text_encoder", tokens)
        return tensors

    def concatenate_states(self, name: str, texts: Iterable[TextEncoding | TokenStates]) -> dict[str, Tensor]:
        """Return the token states of captions end to end, without padding, the offsets of the captions, and any z_t."""
        states, lengths, embeds = [], [], []
        for text in texts:
            tokens, counts = strip_padding(text)
            states.append(tokens.to("cpu", self.dtype))
            lengths += counts.tolist()
            if isinstance(text, TextEncoding):
                embeds.append(text.embedding.float().cpu())
        tensors = {f"{name}_states": torch.cat(states), f"{name}_offsets": compute_offsets(lengths)}
        return tensors | ({f"{name}_embeds": torch.cat(embeds)} if embeds else {})

    def compute_latent_shapes(self, dataset: CaptionedPictures) -> Tensor:
        """Return the height and width of each image's latents, (N, 2)."""
        return torch.tensor(dataset.shapes)[torch.from_numpy(dataset.shape_numbers)] // self.facts["autoencoder"].factor

    def compute_shared_tensors(self, datasets: dict[str, CaptionedPictures], shards: list[Path]) -> dict[str, Tensor]:
        """Return the statistics of z_i, the empty caption, and the shapes of all latents.

        shards: of the training split. Shapes are left out where all are the same.
        """
        shapes = {
            f"latent_shapes_{split}": self.compute_latent_shapes(dataset)
            for split, dataset in datasets.items()
            if dataset.buckets is not None
        }
        if self.clip is None:
            return shapes
        mean, std = compute_statistics(open_tensors(path)["image_embeds"] for path in shards)
        empty = self.clip.encode_text([""])
        null = {"null_embedding": empty.embedding.float().cpu(), "null_states": empty.states.float().cpu()}
        return {"mean": mean, "std": std, **null, **shapes}


if __name__ == "__main__":
    run(main, Config, "cache", sys.argv[1:])
