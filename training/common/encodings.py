"""Where a prior or a decoder gets encoded pictures and captions from: a cache, or frozen models in every step.

Both ways fill the same fields of a batch, so that a loss does not know which it is.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.cache import (
    AutoencoderFacts,
    CachedPairs,
    ClipFacts,
    TextEncoderFacts,
    compute_statistics,
    read_json,
)
from t2i.data.dataset import Batch, CaptionedPictures, SampleIndex, open_datasets
from t2i.data.manifest import SPLITS, find_manifest
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.files.fingerprints import compute_files_fingerprint, compute_stored_fingerprint, compute_weights_fingerprint
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer/*")  # files of a CLIP folder that are its tokenizer
PUBLIC_MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
)  # a folder as others write it: weights, settings, tokenizer
OWN_CLASSES = {
    "CLIP": ("CLIP", "TransformersCLIP"),
    "Autoencoder": ("Autoencoder", "MoVQ", "SuperResolution"),
}  # that we save
PIPELINE_PARTS = {  # folders of public pipelines
    "CLIP": ("*text_encoder", "*tokenizer", "*image_encoder", "*image_processor", "feature_extractor"),
    "Autoencoder": ("movq", "vae", "super_res_*"),
}
LoadTextEncoder = Callable[[], TextEncoder]
MAX_MEASURED_IMAGES = 4096  # pictures that set mean and std of the embeddings without a cache, at most
MAX_COMPONENT_EMBEDS = 16_384  # of a cache, that set the principal components


class EncodingSource(Protocol):
    dataset: CaptionedPictures | CachedPairs  # the training split
    validation: CaptionedPictures | CachedPairs | None  # what is held out
    clip: ClipFacts
    autoencoder: AutoencoderFacts | None
    text_encoder: TextEncoderFacts | None  # of a decoder that reads its captions through one
    made_from: dict[str, str]

    def to(self, device: torch.device) -> None: ...

    def encode(self, batch: Batch) -> Batch:
        """Fill image_embeds, latents and text, as far as the stage needs them: float32, on the batch's device."""

    def null(self) -> TextEncoding:
        """The encoding of the empty caption."""

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the image embeddings, (D,), float64."""

    def collect_embeds(self) -> Tensor:
        """Image embeddings from all over the training split, (n, D), fp32, on the CPU."""

    def encode_records(self, keys: list[SampleIndex]) -> Batch:
        """Of what is held out, or of the training split if nothing is: encodings, captions, and pictures if at hand."""

    def load_clip(self) -> CLIP: ...
    def load_autoencoder(self) -> Autoencoder: ...
    def load_text_encoder(self) -> TextEncoder: ...


class FrozenModels:
    """Encodes what the data set reads, in the step."""

    def __init__(
        self,
        data: DataConfig,
        clip: str,
        autoencoder: str | None,
        reads_captions: bool,
        load_text_encoder: LoadTextEncoder | None = None,
    ):
        datasets = open_datasets(data)
        self.dataset, self.validation = datasets["train"], datasets.get("held_out")
        self.encoder = load_clip(clip).eval().requires_grad_(False)
        self.reads_captions = reads_captions
        self.clip = build_clip_facts(clip, self.encoder)
        self.coder, self.autoencoder = None, None
        if autoencoder is not None:
            self.coder = load_autoencoder(autoencoder).eval().requires_grad_(False)
            self.autoencoder = build_autoencoder_facts(autoencoder, self.coder)
        self.reader = None if load_text_encoder is None else load_text_encoder()
        self.text_encoder = None if self.reader is None else build_text_encoder_facts(self.reader)
        self.made_from = collect_identities(
            self.dataset.compute_digest(), self.clip, self.autoencoder, self.text_encoder
        )

    def to(self, device: torch.device) -> None:
        for model in (self.encoder, self.coder, self.reader):
            if model is not None:
                model.to(device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        assert batch.image is not None
        with torch.autocast(batch.image.device.type, enabled=False):  # as exact as a cache
            filled = replace(batch, image_embeds=self.encoder.encode_image(batch.image).float())
            if self.coder is not None:
                latents = self.coder.encode(batch.image).float()
                filled.latents = latents.contiguous()  # the layout decides which element gets which noise
            if self.reader is not None:
                filled.tokens = encode_tokens(self.reader, batch.captions).to(batch.image.device, torch.float32)
            elif self.reads_captions:
                filled.text = self.encoder.encode_text(batch.captions).to(batch.image.device, torch.float32)
        return filled

    @torch.no_grad()
    def null(self) -> TextEncoding:
        return self.encoder.encode_text([""])

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        return compute_statistics(self.iterate_embeds())

    def collect_embeds(self) -> Tensor:
        return torch.cat(list(self.iterate_embeds()))

    @torch.no_grad()
    def iterate_embeds(self) -> Iterator[Tensor]:
        for image in self.dataset.iterate_images(MAX_MEASURED_IMAGES, batch_size=64):
            yield self.encoder.encode_image(image.to(self.encoder.device)).float().cpu()

    @torch.no_grad()
    def encode_records(self, keys: list[SampleIndex]) -> Batch:
        batch = (self.validation or self.dataset).__getitems__(keys).to(self.encoder.device)
        return replace(self.encode(batch), text=encode_captions(self.encoder, self.reader, batch.captions))

    def load_clip(self) -> CLIP:
        return self.encoder

    def load_autoencoder(self) -> Autoencoder:
        assert self.coder is not None
        return self.coder

    def load_text_encoder(self) -> TextEncoder:
        assert self.reader is not None
        return self.reader


class CachedEncodings:
    """Nothing is left to do: the data set reads encodings. But for captions that are to be read by a text encoder whose
    states the cache does not hold: these are encoded in the step."""

    def __init__(
        self,
        dataset: CachedPairs,
        validation: CachedPairs | None,
        data: DataConfig,
        names: tuple[str, str | None],
        load_text_encoder: LoadTextEncoder | None = None,
    ):
        """`names`: of the CLIP and of the autoencoder, which are loaded for sample pictures alone."""
        assert dataset.clip is not None
        self.dataset, self.validation, self.data, self.names = dataset, validation, data, names
        self.clip = clip = dataset.clip
        self.autoencoder = autoencoder = None if names[1] is None else dataset.autoencoder
        self.open_text_encoder, self.text_encoder, self.reader = load_text_encoder, None, None
        if load_text_encoder is not None:
            reader = load_text_encoder()
            self.text_encoder = build_text_encoder_facts(reader)
            self.reader = None if dataset.tokens else reader
            self.attach_captions()
        self.made_from = collect_identities(dataset.made_from["data"]["train"], clip, autoencoder, self.text_encoder)
        self.made_from["cache"] = dataset.compute_digest()

    def attach_captions(self) -> None:
        """Let the data sets say the captions that are encoded in the step, or refuse states of another encoder."""
        folder, ours, held = str(self.dataset.folder), self.text_encoder, self.dataset.text_encoder
        if self.reader is None:
            if ours != held:
                raise InputError(f"the cache {folder!r} is stale: it was made with another text encoder; make another")
        elif not has_manifest(self.data):
            raise InputError(
                f"the cache {folder!r} holds no states of a text encoder, and data.path={self.data.path!r} no captions "
                "to encode in the step; make the cache with text_encoder, or give the data"
            )
        else:
            for pairs, split in ((self.dataset, "train"), (self.validation, "held_out")):
                if pairs is not None:
                    pairs.captions = CaptionedPictures(self.data, split)

    def to(self, device: torch.device) -> None:
        if self.reader is not None:
            self.reader.to(device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        if self.reader is None:
            return batch
        device = batch.index.device if batch.latents is None else batch.latents.device
        with torch.autocast(device.type, enabled=False):  # as exact as a cache
            return replace(batch, tokens=encode_tokens(self.reader, batch.captions).to(device, torch.float32))

    def null(self) -> TextEncoding:
        return self.dataset.null

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        return self.dataset.shared["mean"], self.dataset.shared["std"]

    def collect_embeds(self) -> Tensor:
        size = self.dataset.shard_size
        chosen = range(0, len(self.dataset), -(-len(self.dataset) // MAX_COMPONENT_EMBEDS))
        return torch.stack([self.dataset.open_shard(i // size)["image_embeds"][i % size] for i in chosen]).float()

    @torch.no_grad()
    def encode_records(self, keys: list[SampleIndex]) -> Batch:
        split = "train" if self.validation is None else "held_out"
        cached = CachedPairs(self.dataset.folder, split, latents=False)
        batch = cached.__getitems__(keys)
        if has_manifest(self.data):
            pictures = CaptionedPictures(self.data, split)
            for index, _ in keys:
                if cached.sample_key(index) != pictures.sample_key(index):
                    raise InputError(
                        f"the cache {str(cached.folder)!r} is stale: its picture {index} of {split} is "
                        f"{cached.sample_key(index)!r}, in the data {pictures.sample_key(index)!r}; make another"
                    )
            seen = pictures.__getitems__(keys)
            batch.captions, batch.image = seen.captions, seen.image
        else:
            batch.captions = [cached.sample_key(index) for index, _ in keys]
        if batch.text is None:
            batch.text = self.load_clip().encode_text(batch.captions)
        if self.text_encoder is not None:
            held = CachedPairs(cached.folder, split, latents=False, tokens=True).__getitems__(keys).tokens
            tokens = held if self.reader is None else self.reader.encode(batch.captions)
            batch.text = replace(batch.text, decoder_tokens=tokens)
        return batch

    def load_clip(self) -> CLIP:
        return load_clip(self.names[0]).eval()

    def load_autoencoder(self) -> Autoencoder:
        assert self.names[1] is not None
        return load_autoencoder(self.names[1]).eval()

    def load_text_encoder(self) -> TextEncoder:
        assert self.open_text_encoder is not None
        return self.reader or self.open_text_encoder()


def open_source(
    cache: str | None,
    data: DataConfig,
    clip: str,
    autoencoder: str | None = None,
    reads_captions: bool = True,
    load_text_encoder: LoadTextEncoder | None = None,
) -> EncodingSource:
    """The training split, encoded by `clip`, by `autoencoder` if one is named, and with its captions if they are read:
    by the text encoder, if one is given, else by `clip`.

    Raises InputError for a cache that lacks something of this, or was made from anything else.
    """
    if cache is None:
        return FrozenModels(data, clip, autoencoder, reads_captions, load_text_encoder)
    tokens, reads_captions = load_text_encoder is not None, reads_captions and load_text_encoder is None
    dataset = CachedPairs(cache, "train", autoencoder is not None, reads_captions, tokens)
    held = {"clip": dataset.clip, "autoencoder": dataset.autoencoder, "text": dataset.made_from["text"]}
    needed = {"clip": True, "autoencoder": autoencoder is not None, "text": reads_captions}
    if missing := [name for name in needed if needed[name] and not held[name]]:
        raise InputError(f"the cache {cache!r} was made without {' and '.join(missing)}; make one with it")
    check_cache_freshness(dataset, data, clip, autoencoder)
    validation = None
    if "held_out" in dataset.splits:
        validation = CachedPairs(cache, "held_out", autoencoder is not None, reads_captions, tokens)
    return CachedEncodings(dataset, validation, data, (clip, autoencoder), load_text_encoder)


def encode_tokens(reader: TextEncoder, captions: list[str]) -> TokenStates:
    """What the text encoder says of captions; the log tells of the first that does not fit."""
    if not reader.has_warned and (cut := next(filter(None, map(reader.find_truncated_text, captions)), "")):
        longest = reader.config.context_length
        logger.warning(
            "a caption has more than the text encoder's %d tokens; this was cut, and so on: %r", longest, cut
        )
        reader.has_warned = True
    return reader.encode(captions)


def encode_captions(clip: CLIP, reader: TextEncoder | None, captions: list[str]) -> TextEncoding:
    """What CLIP says of captions, and a decoder's own text encoder, if there is one."""
    text = clip.encode_text(captions)
    return text if reader is None else replace(text, decoder_tokens=reader.encode(captions))


def check_cache_freshness(cache: CachedPairs, data: DataConfig, clip: str, autoencoder: str | None) -> None:
    """Refuse a cache that was made from anything else than what is named here.

    Models and data that are folders of this machine are compared by their content, other models by their names.
    """
    pairs: dict[str, tuple[Any, Any]] = {"data.image_size": (cache.made_from["image_size"], data.image_size)}
    files = cache.made_from.get("stored", {})
    pairs["clip"] = compare_model(clip, "CLIP", cache.clip, read_stored_fingerprint, files.get("clip"))
    if find_local_folder(clip) is not None:
        pairs["tokenizer"] = (files.get("tokenizer"), digest_tokenizer_files(clip))
    if autoencoder is not None:
        pairs["autoencoder"] = compare_model(
            autoencoder, "Autoencoder", cache.autoencoder, compute_stored_fingerprint, files.get("autoencoder")
        )
    if has_manifest(data):
        now, before = compute_split_digests(data), cache.made_from["data"]
        pairs |= {what: (before.get(split), now.get(split)) for what, split in zip(("data", "held-out data"), SPLITS)}
    elif os.environ.get("RANK", "0") == "0":
        print(f"no manifest in data.path={data.path!r}: the cache {str(cache.folder)!r} is not compared with its data")
    for name, (before, now) in pairs.items():
        if before != now:
            raise InputError(
                f"the cache {str(cache.folder)!r} is stale: it was made with another {name}, {before}, now {now}; "
                "make another, or give what it was made with"
            )


def has_manifest(data: DataConfig) -> bool:
    """Whether the pictures are at hand; a cache does without."""
    try:
        find_manifest(Path(data.path))
    except InputError:
        return False
    return True


def compute_split_digests(data: DataConfig) -> dict[str, str]:
    """Return the digest of each split that has pictures."""
    return {split: dataset.compute_digest() for split, dataset in open_datasets(data).items()}


def compare_model(
    name: str,
    wanted: str,
    facts: ClipFacts | AutoencoderFacts | None,
    identify: Callable[[Path], str],
    stored: str | None,
) -> tuple[str | None, str | None]:
    """What a cache was made with, and what the configuration names now; `digest_stored_files` as in the cache's key."""
    assert facts is not None
    folder = find_local_folder(name)
    if folder is None:
        return facts.name, name
    if read_model_class(folder) in OWN_CLASSES[wanted]:
        return facts.identity, identify(folder)
    return stored, digest_model_files(name, wanted)


def find_local_folder(name: str) -> Path | None:
    """The folder of this machine that holds a model, None if the name is a public one's."""
    path = Path(name if is_folder(name) else name.removeprefix("local-dir:"))
    return next((folder for folder in (path / "model", path / "model.replaced", path) if is_folder(folder)), None)


def digest_model_files(name: str, wanted: str) -> str | None:
    """Of a model of others in a folder: of all its files; of a public pipeline's, those of the parts in question. Our
    own, of the classes that `wanted` is of, have an identity."""
    folder = find_local_folder(name)
    if folder is None or read_model_class(folder) in OWN_CLASSES[wanted]:
        return None
    places = PIPELINE_PARTS[wanted] if (folder / "model_index.json").is_file() else ()
    return compute_files_fingerprint(
        folder, (*PUBLIC_MODEL_FILES, *(f"{place}/{pattern}" for place in places for pattern in PUBLIC_MODEL_FILES))
    )


def digest_tokenizer_files(name: str) -> str | None:
    """Of the tokenizer in a CLIP's folder, None for a public CLIP."""
    folder = find_local_folder(name)
    return None if folder is None else compute_files_fingerprint(folder, TOKENIZER_FILES)


def digest_stored_files(clip: str | None, autoencoder: str | None) -> dict[str, str | None]:
    """What a cache's key says of the files in folders of this machine, beside the identities of our own models."""
    return {
        "clip": clip and digest_model_files(clip, "CLIP"),
        "tokenizer": clip and digest_tokenizer_files(clip),
        "autoencoder": autoencoder and digest_model_files(autoencoder, "Autoencoder"),
    }


def read_stored_fingerprint(folder: Path) -> str:
    """Of a CLIP in a folder, without loading it."""
    return read_json(folder / "config.json").get("fingerprint", "none")


def collect_identities(
    data: str, clip: ClipFacts, autoencoder: AutoencoderFacts | None, text_encoder: TextEncoderFacts | None = None
) -> dict[str, str]:
    found = {"data": data, "clip": clip.identity}
    others = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    return found | {name: facts.identity for name, facts in others.items() if facts is not None}


def build_clip_facts(name: str, clip: CLIP) -> ClipFacts:
    """Raises InputError, before any work, for a public CLIP that lacks a tower."""
    if isinstance(clip, TransformersCLIP):
        clip.check_image_encoder()
    return ClipFacts(name, clip.identity, clip.embed_dim, clip.text_width, clip.context_length, clip.unit_length)


def build_autoencoder_facts(name: str, autoencoder: Autoencoder) -> AutoencoderFacts:
    return AutoencoderFacts(name, compute_weights_fingerprint(autoencoder), autoencoder.channels, autoencoder.factor)


def build_text_encoder_facts(encoder: TextEncoder) -> TextEncoderFacts:
    return TextEncoderFacts(encoder.identity, encoder.width)
