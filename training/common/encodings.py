"""Encoded pictures and captions for priors and decoders: from a cache, or by frozen models in every step.

Both sources fill the same fields of a batch, so that a loss is the same for both.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from t2i.training.common.cache_freshness import (
    build_autoencoder_facts,
    build_clip_facts,
    build_text_encoder_facts,
    check_cache_freshness,
    collect_identities,
    has_manifest,
)
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.cache import AutoencoderFacts, CachedPairs, ClipFacts, TextEncoderFacts, compute_statistics
from t2i.data.dataset import Batch, CaptionedPictures, SampleIndex, open_datasets
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

LoadTextEncoder = Callable[[], TextEncoder]
MAX_MEASURED_IMAGES = 4096  # pictures encoded for the mean and std of z_i, without a cache
MAX_COMPONENT_EMBEDS = 16_384  # z_i of a cache from which principal components are computed


class EncodingSource(Protocol):
    """The data of a prior or a decoder, encoded."""

    dataset: CaptionedPictures | CachedPairs  # the training split
    validation: CaptionedPictures | CachedPairs | None  # the held-out split
    clip: ClipFacts
    autoencoder: AutoencoderFacts | None
    text_encoder: TextEncoderFacts | None  # a decoder's own, for its captions
    made_from: dict[str, str]

    def to(self, device: torch.device) -> None: ...

    def encode(self, batch: Batch) -> Batch:
        """Fill image_embeds, latents and text, as far as the stage needs them: float32, on the batch's device."""

    def null(self) -> TextEncoding:
        """Return the encoding of the empty caption."""

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the image embeddings, (D,), float64."""

    def collect_embeds(self) -> Tensor:
        """Return image embeddings, evenly spread over the training split, (n, D), fp32, on the CPU."""

    def encode_records(self, keys: list[SampleIndex]) -> Batch:
        """Encode samples for previews, with captions, and with pictures if they are there.

        The samples are of the held-out split, or of the training split if there is none.
        """

    def load_clip(self) -> CLIP: ...
    def load_autoencoder(self) -> Autoencoder: ...
    def load_text_encoder(self) -> TextEncoder: ...


class FrozenModels:
    """Encodes the batches of a data set in the step."""

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
        self.reads_captions = reads_captions
        self.encoder = load_clip(clip).eval().requires_grad_(False)
        self.clip = build_clip_facts(clip, self.encoder)
        self.coder, self.autoencoder = None, None
        if autoencoder is not None:
            self.coder = load_autoencoder(autoencoder).eval().requires_grad_(False)
            self.autoencoder = build_autoencoder_facts(autoencoder, self.coder)
        self.reader, self.text_encoder = None, None
        if load_text_encoder is not None:
            self.reader = load_text_encoder()
            self.text_encoder = build_text_encoder_facts(self.reader)
        digest = self.dataset.compute_digest()
        self.made_from = collect_identities(digest, self.clip, self.autoencoder, self.text_encoder)

    def to(self, device: torch.device) -> None:
        for model in (self.encoder, self.coder, self.reader):
            if model is not None:
                model.to(device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        assert batch.image is not None
        device = batch.image.device
        with torch.autocast(device.type, enabled=False):  # as exact as a cache
            encoded = replace(batch, image_embeds=self.encoder.encode_image(batch.image).float())
            if self.coder is not None:
                latents = self.coder.encode(batch.image).float()
                encoded.latents = latents.contiguous()  # random noise depends on the memory layout
            if self.reader is not None:
                encoded.tokens = encode_tokens(self.reader, batch.captions).to(device, torch.float32)
            elif self.reads_captions:
                encoded.text = self.encoder.encode_text(batch.captions).to(device, torch.float32)
        return encoded

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
    """Reads encodings from a cache, and loads CLIP and autoencoder only for previews.

    Captions for a text encoder whose states are not in the cache are encoded in the step.
    """

    def __init__(
        self,
        dataset: CachedPairs,
        validation: CachedPairs | None,
        data: DataConfig,
        clip: str,
        autoencoder: str | None,
        load_text_encoder: LoadTextEncoder | None = None,
    ):
        assert dataset.clip is not None
        self.dataset, self.validation, self.data = dataset, validation, data
        self.clip_name, self.autoencoder_name, self.open_text_encoder = clip, autoencoder, load_text_encoder
        self.clip = dataset.clip
        self.autoencoder = None if autoencoder is None else dataset.autoencoder
        self.text_encoder, self.reader = None, None
        if load_text_encoder is not None:
            reader = load_text_encoder()
            self.text_encoder = build_text_encoder_facts(reader)
            self.reader = None if dataset.tokens else reader
            self.attach_captions()
        digest = dataset.made_from["data"]["train"]
        self.made_from = collect_identities(digest, self.clip, self.autoencoder, self.text_encoder)
        self.made_from["cache"] = dataset.compute_digest()

    def attach_captions(self) -> None:
        """Let the data sets return captions, if those are encoded in the step; refuse states of another encoder."""
        folder = str(self.dataset.folder)
        if self.reader is None:
            if self.text_encoder != self.dataset.text_encoder:
                raise InputError(
                    f"the cache {folder!r} is stale: it was made with another text encoder; make a new one"
                )
            return
        if not has_manifest(self.data):
            raise InputError(
                f"the cache {folder!r} has no states of a text encoder, and data.path={self.data.path!r} no captions "
                "to encode in the step; make the cache with text_encoder, or give the data"
            )
        datasets = open_datasets(self.data)
        self.dataset.captions = datasets["train"]
        if self.validation is not None:
            self.validation.captions = datasets["held_out"]

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
        indices = range(0, len(self.dataset), -(-len(self.dataset) // MAX_COMPONENT_EMBEDS))
        return torch.stack([self.dataset.open_shard(i // size)["image_embeds"][i % size] for i in indices]).float()

    @torch.no_grad()
    def encode_records(self, keys: list[SampleIndex]) -> Batch:
        split = "train" if self.validation is None else "held_out"
        cached = CachedPairs(self.dataset.folder, split, latents=False)
        batch = cached.__getitems__(keys)
        # Captions and pictures, from the data if they are there
        if has_manifest(self.data):
            pictures = CaptionedPictures(self.data, split)
            for index, _ in keys:
                if cached.sample_key(index) != pictures.sample_key(index):
                    raise InputError(
                        f"the cache {str(cached.folder)!r} is stale: its picture {index} of {split} is "
                        f"{cached.sample_key(index)!r}, in the data {pictures.sample_key(index)!r}; make a new one"
                    )
            records = pictures.__getitems__(keys)
            batch.captions, batch.image = records.captions, records.image
        else:
            batch.captions = [cached.sample_key(index) for index, _ in keys]
        # What the cache lacks of the captions' encodings
        if batch.text is None:
            batch.text = self.load_clip().encode_text(batch.captions)
        if self.text_encoder is not None:
            if self.reader is None:
                tokens = CachedPairs(cached.folder, split, latents=False, tokens=True).__getitems__(keys).tokens
            else:
                tokens = self.reader.encode(batch.captions)
            batch.text = replace(batch.text, decoder_tokens=tokens)
        return batch

    def load_clip(self) -> CLIP:
        return load_clip(self.clip_name).eval()

    def load_autoencoder(self) -> Autoencoder:
        assert self.autoencoder_name is not None
        return load_autoencoder(self.autoencoder_name).eval()

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
    """Open the data of a prior or a decoder.

    Pictures are encoded by `clip`, and by `autoencoder` if it is given. Captions are encoded if `reads_captions`: by
    the text encoder if there is one, else by `clip`.

    Raises InputError for a cache that lacks some of these encodings, or was made from other models or data.
    """
    if cache is None:
        return FrozenModels(data, clip, autoencoder, reads_captions, load_text_encoder)
    with_latents, with_tokens = autoencoder is not None, load_text_encoder is not None
    with_text = reads_captions and not with_tokens
    dataset = CachedPairs(cache, "train", with_latents, with_text, with_tokens)
    present = {"clip": dataset.clip, "autoencoder": dataset.autoencoder, "text": dataset.made_from["text"]}
    needed = {"clip": True, "autoencoder": with_latents, "text": with_text}
    if missing := [name for name in needed if needed[name] and not present[name]]:
        raise InputError(f"the cache {cache!r} was made without {' and '.join(missing)}; make a new one with it")
    check_cache_freshness(dataset, data, clip, autoencoder)
    validation = None
    if "held_out" in dataset.splits:
        validation = CachedPairs(cache, "held_out", with_latents, with_text, with_tokens)
    return CachedEncodings(dataset, validation, data, clip, autoencoder, load_text_encoder)


def encode_tokens(reader: TextEncoder, captions: list[str]) -> TokenStates:
    """Encode captions by a decoder's own text encoder; log the first that is too long for it."""
    if not reader.has_warned and (cut := next(filter(None, map(reader.find_truncated_text, captions)), "")):
        longest = reader.config.context_length
        logger.warning("a caption has more than the text encoder's %d tokens; such ends are cut: %r", longest, cut)
        reader.has_warned = True
    return reader.encode(captions)


def encode_captions(clip: CLIP, reader: TextEncoder | None, captions: list[str]) -> TextEncoding:
    """Encode captions by CLIP, and by a decoder's own text encoder if there is one."""
    text = clip.encode_text(captions)
    return text if reader is None else replace(text, decoder_tokens=reader.encode(captions))
