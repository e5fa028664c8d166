"""A cache: the encodings of all images and captions by frozen models, in safetensors shards.

`training/cache_data.py` writes a cache; priors and decoders train from it without the models. It is a folder with

    key.json                   models, data and settings that it is made from, and
    config.yaml                its configuration: both written first
    train-00000.safetensors    a shard, and
    train-00000.json           its SHA-256 and sizes, written after it
    shared.safetensors         mean and std of the image embeddings, and the encoding of the empty caption
    cache.json                 the contents of all JSON files, written last: without it a cache is not finished

A shard contains n images with m different captions of T tokens in all:

    image_embeds   (n, D), float32                        keys           bytes, the names of the images end to end
    latents        (n, C, h, w)                           key_offsets    (n + 1,), int64
    text_embeds    (m, D), float32                        text_states    (T, W), captions end to end
    choice         (n, V), int64: the caption of each     text_offsets   (m + 1,), int64
                   image for draw 0, ..., V - 1         text_encoder_states, text_encoder_offsets: likewise, of a
                                                          decoder's own text encoder

With buckets the latents of each shape are a tensor of their own, `latents_HxW`, in the order of their images, and
`latent_shapes` is (n, 2); shared.safetensors has `latent_shapes_SPLIT` of all. Encodings of mirrored images have the
same names after `mirrored_`.

Embeddings and latents are stored as the models return them: embeddings of our own CLIPs have unit length and latents of
our own autoencoders unit variance, those of public models do not.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i.data.buckets import LatentShapes
from t2i.data.dataset import Batch, CaptionedPictures, SampleDataset, SampleIndex
from t2i.data.framing import is_flipped
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256, create_file_atomically, write_json_file
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import read_json

CACHE_FORMAT = 1
MIRRORED = "mirrored_"  # before the names of tensors of mirrored images
MAX_CACHE_JSON_BYTES = 1_000_000_000  # of cache.json, which has some 200 bytes for each shard


@dataclass(frozen=True)
class ClipFacts:
    """Facts about a CLIP that the models trained on its encodings need."""

    name: str  # as in the configuration
    identity: str  # fingerprint of weights and preprocessing
    embed_dim: int
    text_width: int
    context_length: int
    unit_length: bool = True  # of the embeddings; older caches do not have this key


@dataclass(frozen=True)
class AutoencoderFacts:
    """Facts about an autoencoder that the models trained on its latents need."""

    name: str  # as in the configuration
    identity: str
    channels: int
    factor: int  # pixels of a side per latent


@dataclass(frozen=True)
class TextEncoderFacts:
    """Facts about a text encoder that the decoders trained on its states need."""

    identity: str
    width: int


class CachedPairs(SampleDataset):
    """The encoded images and captions of one split of a cache. Indexed by (index, draw) like CaptionedPictures.

    Shards are mapped into memory when they are first read. Raises InputError if the cache does not exist, is not
    finished, or differs from its cache.json in the sizes of files. Only `t2i data cache` compares SHA-256s of shards.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", latents: bool = True, text: bool = True, tokens: bool = False
    ):
        """`latents`, `text`: put these into batches, if stored. `tokens`: the text encoder's states instead of text."""
        self.folder, self.latents, self.text, self.tokens = Path(folder), latents, text, tokens
        self.captions: CaptionedPictures | None = None  # if set, batches contain the captions themselves
        finished = read_finished_cache(self.folder)
        load_or_explain(lambda _: self.load_index(finished, split), self.folder / "cache.json")
        self.shard_tensors: dict[int, dict[str, Tensor]] = {}

    def load_index(self, finished: dict[str, Any], split: str) -> None:
        """Store the content of cache.json, and compare the sizes of the files with it."""
        # Facts about the cache, and the encodings that batches take from it
        self.made_from: dict[str, Any] = finished["key"]
        self.clip_facts = finished["clip"] and ClipFacts(**finished["clip"])
        self.autoencoder_facts = finished["autoencoder"] and AutoencoderFacts(**finished["autoencoder"])
        self.shard_size, self.variations = int(self.made_from["shard_size"]), int(self.made_from["variations"])
        self.cut_captions: dict[str, str | None] = dict(finished.get("cut_captions") or {})  # lines by encodings
        # Lines about crops and images that are left out, of when the cache was made
        self.crop_lines: list[str] = (finished.get("crop_lines") or {}).get(split, [])
        self.text_encoder_facts = finished.get("text_encoder") and TextEncoderFacts(**finished["text_encoder"])
        self.latents = self.latents and self.autoencoder_facts is not None
        self.tokens = self.tokens and self.text_encoder_facts is not None
        self.text = self.text and self.made_from["text"] and not self.tokens
        self.is_mirrored = bool(self.made_from.get("flip")) and split == "train"

        # The shards of the split
        self.splits = splits = finished["splits"]
        if split not in splits:
            raise InputError(f"the cache {str(self.folder)!r} has no split {split!r}; it has {', '.join(splits)}")
        self.rows: list[dict[str, Any]] = splits[split]
        self.paths = [build_shard_path(self.folder, split, number) for number in range(len(self.rows))]
        self.size = sum(int(row["pictures"]) for row in self.rows)
        for path, row in zip(self.paths, self.rows):
            check_file_size(path, row["bytes"])

        # The tensors that all splits share: small enough to compare their SHA-256 each time
        shared = self.folder / "shared.safetensors"
        check_file_size(shared, finished["shared"]["bytes"])
        if compute_file_sha256(shared) != finished["shared"]["sha256"]:
            raise InputError(f"{str(shared)!r} does not match its SHA-256; {format_remedy(self.folder)}")
        self.shared = open_tensors(shared)
        shapes = self.shared.get(f"latent_shapes_{split}") if self.latents else None
        self.latent_shapes = None if shapes is None else LatentShapes(shapes, self.shard_size)

    @property
    def buckets(self) -> np.ndarray | None:
        return None if self.latent_shapes is None else self.latent_shapes.numbers

    def format_shape_lines(self, step_size: int = 0) -> list[str]:
        if self.latent_shapes is None or self.autoencoder_facts is None:
            return self.crop_lines
        return [self.latent_shapes.format_line(self.autoencoder_facts.factor, step_size), *self.crop_lines]

    def format_left_out_lines(self) -> list[str]:
        return self.crop_lines

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """Return the batch of these samples, in float32; a DataLoader calls this."""
        # Group the keys by shard, for one indexing of its tensors
        order = sorted(range(len(keys)), key=lambda position: keys[position][0] // self.shard_size)
        parts = []
        for number, positions in groupby(order, key=lambda position: keys[position][0] // self.shard_size):
            chosen = [keys[position] for position in positions]
            row = torch.tensor([index % self.shard_size for index, _ in chosen])
            draw = torch.tensor([draw % self.variations for _, draw in chosen])
            parts.append(gather_captions(self.open_shard(number), row, draw) | self.gather_images(number, chosen))
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        # Make the batch, and bring it from the order of the shards to that of the keys
        captions = [] if self.captions is None else [self.captions.get_caption(sample, draw) for sample, draw in keys]
        index = torch.tensor([index for index, _ in keys])
        batch = Batch(index, captions, image_embeds=rows.get("image_embeds"), latents=rows.get("latents"))
        if self.text or self.tokens:
            tokens = pad_tokens(rows["states"], rows["lengths"])
            batch.text = TextEncoding(rows["text_embeds"], tokens.states, tokens.mask) if self.text else None
            batch.tokens = tokens if self.tokens else None
        inverse = torch.tensor(order).argsort()
        return batch if len(parts) == 1 else batch.map_tensors(lambda tensor: tensor[inverse])

    def gather_images(self, number: int, keys: list[SampleIndex]) -> dict[str, Tensor]:
        """Return the encodings of images in a shard, (B, ...), those of mirrored ones where a draw mirrors them."""
        shard, indices = self.open_shard(number), [index for index, _ in keys]
        row = torch.tensor(indices) % self.shard_size
        stored = {"image_embeds": ("image_embeds", row)} if self.clip_facts else {}
        if self.latents:
            stored["latents"] = (
                ("latents", row) if self.latent_shapes is None else self.latent_shapes.find_rows(indices)
            )
        rows = {key: shard[name][row].float() for key, (name, row) in stored.items()}
        if self.is_mirrored and (flipped := [place for place, (_, draw) in enumerate(keys) if is_flipped(draw)]):
            for key, (name, row) in stored.items():
                rows[key][flipped] = shard[MIRRORED + name][row[flipped]].float()
        return rows

    def open_shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a shard that batches need, mapped into memory. Raises InputError if one is missing."""
        if number not in self.shard_tensors:
            tensors, row = open_tensors(self.paths[number]), self.rows[number]
            images, texts = row["pictures"], row["captions"]
            needed = {"keys": None, "key_offsets": images + 1}  # rows of each tensor; None: any number
            encodings = {"image_embeds": images} if self.clip_facts else {}
            if self.latents:
                shapes = self.latent_shapes
                encodings |= {"latents": images} if shapes is None else shapes.count_rows(number)
            needed |= encodings
            needed |= {MIRRORED + name: count for name, count in encodings.items()} if self.is_mirrored else {}
            if self.text:
                needed |= {"text_embeds": texts, "text_offsets": texts + 1, "text_states": None, "choice": images}
            if self.tokens:
                needed |= {"text_encoder_states": None, "text_encoder_offsets": texts + 1, "choice": images}
            for name, count in needed.items():
                if name not in tensors or count not in (None, len(tensors[name])):
                    fault = f"{name} is missing or has another length"
                    raise InputError(f"{str(self.paths[number])!r} is not a shard of this cache: {fault}")
            self.shard_tensors[number] = {name: tensors[name] for name in needed}
        return self.shard_tensors[number]

    def get_sample_key(self, index: int) -> str:
        shard, row = self.open_shard(index // self.shard_size), index % self.shard_size
        return decode_sample_key(shard, row)

    def compute_digest(self) -> str:
        """Return 16 hexadecimal digits of the content of all shards."""
        hashes = [row["sha256"] for row in self.rows]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]

    @property
    def null(self) -> TextEncoding:
        """Return the encoding of the empty caption, for one image."""
        states = self.shared["null_states"]
        return TextEncoding(self.shared["null_embedding"], states, torch.ones(states.shape[:2], dtype=torch.bool))


def decode_sample_key(shard: dict[str, Tensor], row: int) -> str:
    start, end = shard["key_offsets"][row : row + 2].tolist()
    return bytes(shard["keys"][start:end].tolist()).decode()


def gather_captions(shard: dict[str, Tensor], row: Tensor, draw: Tensor) -> dict[str, Tensor]:
    """Return rows of a shard for its captions: z_t (B, D), states of all tokens (T, W), and lengths (B,)."""
    rows: dict[str, Tensor] = {}
    if "choice" in shard:
        caption = shard["choice"][row, draw]
        if "text_embeds" in shard:
            rows["text_embeds"] = shard["text_embeds"][caption]
        kind = "text" if "text_embeds" in shard else "text_encoder"
        start = shard[f"{kind}_offsets"][caption]
        length = shard[f"{kind}_offsets"][caption + 1] - start
        # Indices of all tokens: within a caption they count up from its start in the shard.
        start_in_batch = length.cumsum(0) - length
        token = torch.arange(int(length.sum())) + (start - start_in_batch).repeat_interleave(length)
        rows |= {"states": shard[f"{kind}_states"][token].float(), "lengths": length}
    return rows


def pad_tokens(states: Tensor, lengths: Tensor) -> TokenStates:
    """Pad texts whose tokens lie end to end, (T, W), to the longest: (B, L, W) and a mask (B, L)."""
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    padded = states.new_zeros(*mask.shape, states.shape[1])
    padded[mask] = states
    return TokenStates(padded, mask)


def strip_padding(text: TextEncoding | TokenStates) -> tuple[Tensor, Tensor]:
    """Return the states of all tokens end to end, (T, W), and the number of tokens of each text, (B,)."""
    lengths = text.mask.sum(dim=1)
    positions = torch.arange(text.mask.shape[1], device=lengths.device)
    assert torch.equal(text.mask, positions < lengths[:, None]), "tokens come before the padding"
    return text.states[text.mask], lengths


def compute_offsets(lengths: Iterable[int]) -> Tensor:
    """Return where each of N parts begins that lie end to end, and the end of the last: (N + 1,), int64."""
    return torch.tensor([0, *lengths]).cumsum(0)


def compute_statistics(embeds: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (D,), float64, of embeddings that come (n, D) at a time."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in embeds:
        # In double precision, for the variance is a small difference of large sums
        part = part.double()
        count, total, squares = count + len(part), total + part.sum(dim=0), squares + part.square().sum(dim=0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def build_shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.safetensors"


def check_shard_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a shard with NaN or infinity. Raises InputError with the name of the first image that has one."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (finite := tensor.isfinite().flatten(1).all(dim=1)).all():
            continue
        row = (~finite).nonzero()[:, 0]
        if "latents_" in name:  # a row is an image of this shape
            shape = torch.tensor([int(side) for side in name.rpartition("_")[2].split("x")])
            row = (tensors["latent_shapes"] == shape).all(dim=1).nonzero()[row, 0]
        if name.endswith("_states"):  # a row is a token
            row = torch.searchsorted(tensors[name.replace("states", "offsets")], row, right=True) - 1
        if name.startswith("text_"):  # a row is a caption
            row = torch.isin(tensors["choice"], row).any(dim=1).nonzero()[:, 0]
        fault = f"would contain NaN or infinity in {name}, first for {decode_sample_key(tensors, int(row[0]))!r}"
        raise InputError(f"{path.name} {fault}; dtype=float32 and mixed_precision=no allow larger values")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard, then the JSON with its SHA-256. Raises InputError for values that are not finite."""
    check_shard_values(path, tensors)
    row = save_with_digest(path, tensors)
    captions = tensors.get("text_offsets", tensors.get("text_encoder_offsets", [0]))
    row |= {"pictures": len(tensors["key_offsets"]) - 1, "captions": len(captions) - 1}
    write_json_file(path.with_suffix(".json"), row)


def save_with_digest(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, complete or not at all, and return its SHA-256 and its size."""
    with create_file_atomically(path) as unfinished:
        save_file(tensors, unfinished)
        return {"sha256": compute_file_sha256(unfinished), "bytes": unfinished.stat().st_size}


def find_shard_damage(path: Path) -> str | None:
    """Return a line with what is wrong with a shard, or None."""
    try:
        if compute_file_sha256(path) != json.loads(path.with_suffix(".json").read_text())["sha256"]:
            return f"{path} does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is not complete ({error})"
    return None


def finish_cache(
    folder: Path, key: dict[str, Any], facts: dict[str, Any], shared: dict[str, Tensor], counts: dict
) -> None:
    """Write shared.safetensors and cache.json, which finish a cache. `counts`: number of shards of each split."""
    row = save_with_digest(folder / "shared.safetensors", shared)
    splits = {}
    for split, count in counts.items():
        paths = [build_shard_path(folder, split, number) for number in range(count)]
        splits[split] = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    content = {"format": CACHE_FORMAT, "key": key, **facts, "shared": row, "splits": splits}
    write_json_file(folder / "cache.json", content)
    for leftover in folder.glob(".*.unfinished"):
        leftover.unlink(missing_ok=True)


def read_finished_cache(folder: Path) -> dict[str, Any]:
    """Return the content of cache.json. Raises InputError if the folder is not a finished cache of this format."""
    if not (folder / "key.json").is_file():
        raise InputError(
            f"no cache {str(folder)!r}; `t2i data cache FILE.yaml output={shlex.quote(str(folder))}` makes one"
        )
    if not (folder / "cache.json").is_file():
        raise InputError(f"the cache {str(folder)!r} is not finished; {format_remedy(folder)}")
    finished = read_json(folder / "cache.json", MAX_CACHE_JSON_BYTES)
    missing = {"format", "key", "clip", "autoencoder", "shared", "splits"} - finished.keys()
    if missing or finished["format"] != CACHE_FORMAT:
        fault = f"lacks {', '.join(sorted(missing))}" if missing else f"has format {finished['format']}"
        raise InputError(f"{str(folder / 'cache.json')!r} {fault}; this version reads format {CACHE_FORMAT}")
    return finished


def format_remedy(folder: Path) -> str:
    """Return the command that finishes or repairs a cache, also one that was moved."""
    command = ["t2i", "data", "cache", str(folder / "config.yaml"), f"output={folder}"]
    return f"`{shlex.join(command)}` finishes it"


def check_file_size(path: Path, size: int) -> None:
    current = path.stat().st_size if path.is_file() else None
    if current != size:
        fault = "is missing" if current is None else f"has {current} bytes instead of {size}"
        raise InputError(f"{str(path)!r} {fault}; {format_remedy(path.parent)}")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped into memory."""
    return load_or_explain(load_file, path)


def check_cache_key(folder: Path, key: dict[str, Any]) -> None:
    """Refuse to write a cache into a folder with other files, or with a cache that was made from another key."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output is {str(folder)!r}, which is a file; give a folder")
    if not (folder / "key.json").is_file():
        if folder.exists() and any(not path.name.endswith((".unfinished", ".lock")) for path in folder.iterdir()):
            raise InputError(f"output is {str(folder)!r}, which contains other files than a cache; give a new folder")
        return
    # The folder has a cache: continue it if it was begun with the same key
    before = read_json(folder / "key.json")
    for name, value in {**dict.fromkeys(before), **key}.items():
        if before.get(name) != value:
            values = f"{before.get(name)}, now {value}; give another output or delete it"
            raise InputError(f"the cache {str(folder)!r} was made with another {name}: {values}")
