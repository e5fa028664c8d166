"""A cache: what frozen models say of every picture and caption, computed once and kept in safetensors shards.

`training/cache_data.py` makes one; priors and decoders train from it without the models. A folder with

    key.json                   what it is made from, and
    config.yaml                how: both written first
    train-00000.safetensors    a shard, and
    train-00000.json           its SHA-256 and sizes, written after it
    shared.safetensors         mean and std of the image embeddings, and the encoding of the empty caption
    cache.json                 all of that, written last: without it a cache is not finished

A shard holds n pictures with m different captions of T tokens in all:

    image_embeds   (n, D), float32                        keys           bytes, the names of the pictures end to end
    latents        (n, C, h, w)                           key_offsets    (n + 1,), int64
    text_embeds    (m, D), float32                        text_states    (T, W), captions end to end
    choice         (n, V), int64: the caption that        text_offsets   (m + 1,), int64
                   draw 0, ..., V - 1 of a picture gives  text_encoder_states, text_encoder_offsets: the same of a
                                                          decoder's own text encoder

Embeddings and latents are as the models say them: our own CLIPs' are of unit length and our own autoencoders' of unit
variance, public ones' are not.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from t2i.data.dataset import Batch, CaptionedPictures, SampleIndex
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256, create_file_atomically, write_json_file
from t2i.files.model_folder import load_or_explain

CACHE_FORMAT = 1


@dataclass(frozen=True)
class ClipFacts:
    """What models trained on the encodings of a CLIP need to know of it."""

    name: str  # as in the configuration
    identity: str
    embed_dim: int
    text_width: int
    context_length: int
    unit_length: bool = True  # of the embeddings; older caches are of such CLIPs


@dataclass(frozen=True)
class AutoencoderFacts:
    """What models trained on the latents of an autoencoder need to know of it."""

    name: str  # as in the configuration
    identity: str
    channels: int
    factor: int  # pixels per latent, along a side


@dataclass(frozen=True)
class TextEncoderFacts:
    """What a decoder trained on the states of a text encoder needs to know of it."""

    identity: str
    width: int


class CachedPairs(Dataset):
    """The pictures and captions of one split of a cache, encoded. Indexed by (index, draw) as CaptionedPictures are.

    Shards are mapped into memory when they are first read. Raises InputError if the cache is not there, not finished,
    or not as its cache.json says; the content of a shard is compared by `t2i data cache` alone.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", latents: bool = True, text: bool = True, tokens: bool = False
    ):
        """`latents` and `text`: give them, where the cache holds them. `tokens`: as text, those of the text encoder."""
        self.folder, self.latents, self.text, self.tokens = Path(folder), latents, text, tokens
        self.captions: CaptionedPictures | None = None  # to give the captions themselves
        finished = read_finished_cache(self.folder)
        load_or_explain(lambda _: self.load_index(finished, split), self.folder / "cache.json")
        self.shard_tensors: dict[int, dict[str, Tensor]] = {}

    def load_index(self, finished: dict[str, Any], split: str) -> None:
        """Take over what cache.json says, and compare the files with it."""
        self.made_from: dict[str, Any] = finished["key"]
        self.clip = finished["clip"] and ClipFacts(**finished["clip"])
        self.autoencoder = finished["autoencoder"] and AutoencoderFacts(**finished["autoencoder"])
        self.shard_size, self.variations = int(self.made_from["shard_size"]), int(self.made_from["variations"])
        self.text_encoder = finished.get("text_encoder") and TextEncoderFacts(**finished["text_encoder"])
        self.latents = self.latents and self.autoencoder is not None
        self.tokens = self.tokens and self.text_encoder is not None
        self.text = self.text and self.made_from["text"] and not self.tokens
        self.splits = splits = finished["splits"]
        if split not in splits:
            raise InputError(f"the cache {str(self.folder)!r} has no split {split!r}; it has {', '.join(splits)}")
        self.rows: list[dict[str, Any]] = splits[split]
        self.paths = [build_shard_path(self.folder, split, number) for number in range(len(self.rows))]
        self.size = sum(int(row["pictures"]) for row in self.rows)
        for path, row in zip(self.paths, self.rows):
            check_file_size(path, row["bytes"])
        shared = self.folder / "shared.safetensors"
        check_file_size(shared, finished["shared"]["bytes"])
        if compute_file_sha256(shared) != finished["shared"]["sha256"]:
            raise InputError(f"{str(shared)!r} does not match its SHA-256; {format_remedy(self.folder)}")
        self.shared = open_tensors(shared)

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: list[SampleIndex]) -> Batch:
        """The batch of these records, in float32; what a DataLoader calls."""
        order = sorted(range(len(keys)), key=lambda position: keys[position][0] // self.shard_size)
        parts = []
        for number, positions in groupby(order, key=lambda position: keys[position][0] // self.shard_size):
            chosen = [keys[position] for position in positions]
            row = torch.tensor([index % self.shard_size for index, _ in chosen])
            draw = torch.tensor([draw % self.variations for _, draw in chosen])
            parts.append(gather_rows(self.open_shard(number), row, draw))
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        text = pad_texts(batch["text_embeds"], batch["states"], batch["lengths"]) if self.text else None
        tokens = pad_tokens(batch["states"], batch["lengths"]) if self.tokens else None
        embeds, latents = batch.get("image_embeds"), batch.get("latents")
        if len(parts) > 1:  # back from the order of the shards
            back = torch.tensor(order).argsort()
            embeds, latents = (None if one is None else one[back] for one in (embeds, latents))
            text = text and text.map_tensors(lambda tensor: tensor[back])
            tokens = tokens and tokens.map_tensors(lambda tensor: tensor[back])
        captions = [] if self.captions is None else [self.captions.get_caption(*key) for key in keys]
        index = torch.tensor([index for index, _ in keys])
        return Batch(index, captions, image_embeds=embeds, latents=latents, text=text, tokens=tokens)

    def open_shard(self, number: int) -> dict[str, Tensor]:
        if number not in self.shard_tensors:
            tensors, row = open_tensors(self.paths[number]), self.rows[number]
            needed = {"keys": None, "key_offsets": row["pictures"] + 1}
            needed |= {"image_embeds": row["pictures"]} if self.clip else {}
            needed |= {"latents": row["pictures"]} if self.latents else {}
            if self.text:
                needed |= {"text_embeds": row["captions"], "text_offsets": row["captions"] + 1}
                needed |= {"text_states": None, "choice": row["pictures"]}
            if self.tokens:
                needed |= {"text_encoder_states": None, "text_encoder_offsets": row["captions"] + 1}
                needed |= {"choice": row["pictures"]}
            for name, count in needed.items():
                if name not in tensors or count not in (None, len(tensors[name])):
                    raise InputError(f"{str(self.paths[number])!r} is no shard of this cache: it lacks {name}")
            self.shard_tensors[number] = {name: tensors[name] for name in needed}
        return self.shard_tensors[number]

    def sample_key(self, index: int) -> str:
        """The name of a record, for people."""
        shard, row = self.open_shard(index // self.shard_size), index % self.shard_size
        start, end = shard["key_offsets"][row : row + 2].tolist()
        return bytes(shard["keys"][start:end].tolist()).decode()

    def compute_digest(self) -> str:
        """16 hexadecimal digits for the content of all shards."""
        hashes = [row["sha256"] for row in self.rows]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]

    @property
    def null(self) -> TextEncoding:
        """The encoding of the empty caption."""
        states = self.shared["null_states"]
        return TextEncoding(self.shared["null_embedding"], states, torch.ones(states.shape[:2], dtype=torch.bool))


def gather_rows(shard: dict[str, Tensor], row: Tensor, draw: Tensor) -> dict[str, Tensor]:
    """Rows of a shard; of the captions, the tokens end to end and how many each has."""
    found: dict[str, Tensor] = {name: shard[name][row].float() for name in ("image_embeds", "latents") if name in shard}
    if "choice" in shard:
        caption = shard["choice"][row, draw]
        if "text_embeds" in shard:
            found["text_embeds"] = shard["text_embeds"][caption]
        of = "text" if "text_embeds" in shard else "text_encoder"
        start = shard[f"{of}_offsets"][caption]
        length = shard[f"{of}_offsets"][caption + 1] - start
        before = length.cumsum(0) - length
        token = torch.arange(int(length.sum())) + (start - before).repeat_interleave(length)
        found |= {"states": shard[f"{of}_states"][token].float(), "lengths": length}
    return found


def pad_texts(embeds: Tensor, states: Tensor, lengths: Tensor) -> TextEncoding:
    """Captions whose tokens lie end to end, (T, W), as a batch padded to the longest."""
    tokens = pad_tokens(states, lengths)
    return TextEncoding(embeds, tokens.states, tokens.mask)


def pad_tokens(states: Tensor, lengths: Tensor) -> TokenStates:
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    padded = states.new_zeros(*mask.shape, states.shape[1])
    padded[mask] = states
    return TokenStates(padded, mask)


def strip_padding(text: TextEncoding | TokenStates) -> tuple[Tensor, Tensor]:
    """The reverse: tokens end to end, (T, W), and how many each caption has, (B,)."""
    lengths = text.mask.sum(dim=1)
    positions = torch.arange(text.mask.shape[1], device=lengths.device)
    assert torch.equal(text.mask, positions < lengths[:, None]), "tokens come before the padding"
    return text.states[text.mask], lengths


def compute_offsets(lengths: Iterable[int]) -> Tensor:
    """(N + 1,), int64: where each of N things that lie end to end begins, and the end."""
    return torch.tensor([0, *lengths]).cumsum(0)


def compute_statistics(embeds: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (D,), float64, of embeddings, (n, D) at a time."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in embeds:
        part = part.double()
        count, total, squares = count + len(part), total + part.sum(dim=0), squares + part.square().sum(dim=0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def build_shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.safetensors"


def check_shard_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse a shard with NaN or infinity, by the name of its first picture with one."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (finite := tensor.isfinite().flatten(1).all(dim=1)).all():
            continue
        row = (~finite).nonzero()[:, 0]
        if name.endswith("_states"):  # a row is a token
            row = torch.searchsorted(tensors[name.replace("states", "offsets")], row, right=True) - 1
        if name.startswith("text_"):  # a row is a caption
            row = torch.isin(tensors["choice"], row).any(dim=1).nonzero()[:, 0]
        start, end = tensors["key_offsets"][int(row[0]) : int(row[0]) + 2].tolist()
        key = bytes(tensors["keys"][start:end].tolist()).decode()
        raise InputError(
            f"{path.name} would hold NaN or infinity in {name}, first of {key!r}; dtype=float32 and "
            "mixed_precision=no hold larger values"
        )


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard and, after it, the file that says it is whole. Raises InputError for values that are not finite."""
    check_shard_values(path, tensors)
    with create_file_atomically(path) as unfinished:
        save_file(tensors, unfinished)
        row = {"sha256": compute_file_sha256(unfinished), "bytes": unfinished.stat().st_size}
    captions = tensors.get("text_offsets", tensors.get("text_encoder_offsets", [0]))
    row |= {"pictures": len(tensors["key_offsets"]) - 1, "captions": len(captions) - 1}
    write_json_file(path.with_suffix(".json"), row)


def find_shard_damage(path: Path) -> str | None:
    """What is wrong with a shard that was written, or None."""
    try:
        if compute_file_sha256(path) != json.loads(path.with_suffix(".json").read_text())["sha256"]:
            return f"{path} does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is not whole ({error})"
    return None


def finish_cache(
    folder: Path, key: dict[str, Any], facts: dict[str, Any], shared: dict[str, Tensor], counts: dict
) -> None:
    """Write what stands beside the shards, of which each split has `counts[split]`; cache.json is the last."""
    with create_file_atomically(folder / "shared.safetensors") as unfinished:
        save_file(shared, unfinished)
        row = {"sha256": compute_file_sha256(unfinished), "bytes": unfinished.stat().st_size}
    splits = {
        split: [
            json.loads(build_shard_path(folder, split, number).with_suffix(".json").read_text())
            for number in range(count)
        ]
        for split, count in counts.items()
    }
    write_json_file(
        folder / "cache.json", {"format": CACHE_FORMAT, "key": key, **facts, "shared": row, "splits": splits}
    )
    for leftover in folder.glob(".*.unfinished"):
        leftover.unlink(missing_ok=True)


def read_finished_cache(folder: Path) -> dict[str, Any]:
    """cache.json of a finished cache."""
    if not (folder / "key.json").is_file():
        raise InputError(f"no cache {str(folder)!r}; `t2i data cache FILE.yaml output={folder}` makes one")
    if not (folder / "cache.json").is_file():
        raise InputError(f"the cache {str(folder)!r} is not finished; {format_remedy(folder)}")
    finished = read_json(folder / "cache.json")
    missing = {"format", "key", "clip", "autoencoder", "shared", "splits"} - finished.keys()
    if missing or finished["format"] != CACHE_FORMAT:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"is of format {finished['format']}"
        raise InputError(f"{str(folder / 'cache.json')!r} {what}; this version reads format {CACHE_FORMAT}")
    return finished


def format_remedy(folder: Path) -> str:
    """The command that finishes or mends a cache, wherever it was moved."""
    command = ["t2i", "data", "cache", str(folder / "config.yaml"), f"output={folder}"]
    return f"`{shlex.join(command)}` finishes it"


def check_file_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found} bytes, not {size}"
        raise InputError(f"{str(path)!r} {what}; {format_remedy(path.parent)}")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file, mapped into memory."""
    return load_or_explain(load_file, path)


def check_cache_key(folder: Path, key: dict[str, Any]) -> None:
    """Refuse to write a cache with `key` into a folder that holds a cache made from anything else, or other files."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output is {str(folder)!r}, which is a file; give a folder")
    if not (folder / "key.json").is_file():
        if folder.exists() and any(not path.name.endswith((".unfinished", ".lock")) for path in folder.iterdir()):
            raise InputError(f"output is {str(folder)!r}, which holds other things than a cache; give a new folder")
        return
    before = read_json(folder / "key.json")
    for name, value in key.items():
        if before.get(name) != value:
            raise InputError(
                f"the cache {str(folder)!r} was made with another {name}: {before.get(name)}, now {value}; "
                "give another output or delete it"
            )


def read_json(path: Path) -> dict[str, Any]:
    def read_object(path: Path) -> dict[str, Any]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

    return load_or_explain(read_object, path)
