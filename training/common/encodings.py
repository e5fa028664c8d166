"""Encoded images and captions for priors and decoders: from a cache, or by frozen models in every step.

Both sources fill the same fields of a batch, so that a loss is the same for both.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from t2i.training.common.cache_freshness import (
    build_autoencoder_facts,
    build_clip_facts,
    build_text_encoder_facts,
    check_cache_freshness,
    collect_identities,
    open_data_if_present,
)
from t2i.training.common.captions import find_cut_captions
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.cache import CachedPairs, compute_statistics
from t2i.data.dataset import Batch, SampleIndex, open_datasets
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.errors import InputError
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.text_encoder import TextEncoder
from t2i.texts import wrap_text

logger = logging.getLogger(__name__)

LoadTextEncoder = Callable[[], TextEncoder]
MAX_MEASURED_IMAGES = 4096  # images encoded for the mean and std of z_i, without a cache
MAX_COMPONENT_EMBEDS = 16_384  # z_i of a cache from which principal components are computed


class FrozenModels:
    """The data of a prior or a decoder, encoded by frozen models in the step.

    clip_facts, autoencoder_facts, text_encoder_facts: identities and sizes of the models; the text encoder is a
    decoder's own.
    """

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
        self.clip_model = load_clip(clip).eval().requires_grad_(False)
        # A decoder that reads captions by its own text encoder needs none of CLIP's (Stable unCLIP's has none)
        self.clip_facts = build_clip_facts(clip, self.clip_model, needs_text=load_text_encoder is None)
        self.autoencoder_model, self.autoencoder_facts = None, None
        if autoencoder is not None:
            self.autoencoder_model = load_autoencoder(autoencoder).eval().requires_grad_(False)
            self.autoencoder_facts = build_autoencoder_facts(autoencoder, self.autoencoder_model)
        self.text_model, self.text_encoder_facts = None, None
        if load_text_encoder is not None:
            self.text_model = load_text_encoder()
            self.text_encoder_facts = build_text_encoder_facts(self.text_model)
        # A resumed run must see the same data and models.
        digest = self.dataset.compute_digest()
        self.made_from = collect_identities(digest, self.clip_facts, self.autoencoder_facts, self.text_encoder_facts)
        seen = [dataset.add_clip_view(self.clip_model, alone=autoencoder is None) for dataset in datasets.values()]
        self.made_from |= seen[0]

    def find_cut_captions(self) -> str | None:
        """Return a line about the captions that the model which encodes them cuts; see `common.captions`."""
        if self.text_model is not None:
            return find_cut_captions(self.dataset, self.text_model.tokenizer)
        return find_cut_captions(self.dataset, self.clip_model.tokenizer) if self.reads_captions else None

    def to(self, device: torch.device) -> None:
        for model in (self.clip_model, self.autoencoder_model, self.text_model):
            if model is not None:
                model.to(device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """Fill image_embeds, latents and text, as far as the stage needs them: float32, on the batch's device."""
        assert batch.image is not None
        device = batch.image.device
        # Without autocast, so that the encodings are as exact as those of a cache
        with torch.autocast(device.type, enabled=False):
            seen = batch.image if batch.seen is None else batch.seen
            encoded = replace(batch, image_embeds=self.clip_model.encode_image(seen).float())
            if self.autoencoder_model is not None:
                # Contiguous, because random noise depends on the memory layout
                encoded.latents = self.autoencoder_model.encode(batch.image).float().contiguous()
            if self.text_model is not None:
                encoded.tokens = encode_tokens(self.text_model, batch.captions).to(device, torch.float32)
            elif self.reads_captions:
                encoded.text = self.clip_model.encode_text(batch.captions).to(device, torch.float32)
        return encoded

    @torch.no_grad()
    def null(self) -> TextEncoding:
        """Return the encoding of the empty caption."""
        return self.clip_model.encode_text([""])

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the image embeddings, (D,), float64."""
        return compute_statistics(self.iterate_embeds())

    def collect_embeds(self) -> Tensor:
        """Return image embeddings, evenly spread over the training split, (n, D), fp32, on the CPU."""
        return torch.cat(list(self.iterate_embeds()))

    @torch.no_grad()
    def iterate_embeds(self) -> Iterator[Tensor]:
        for image, seen in self.dataset.iterate_views(MAX_MEASURED_IMAGES, batch_size=64):
            shown = image if seen is None else seen
            yield self.clip_model.encode_image(shown.to(self.clip_model.device)).float().cpu()

    @torch.no_grad()
    def encode_records(self, keys: list[SampleIndex]) -> tuple[Batch, list[Tensor] | None]:
        """Encode samples for previews: image_embeds and text, with captions; return the images too, (3, H, W) each.

        The samples are of the held-out split, or of the training split if there is none.
        """
        batch, views = (self.validation or self.dataset).read_views(keys)
        seen = torch.stack([view.image if view.seen is None else view.seen for view in views])
        z_i = self.clip_model.encode_image(seen.to(self.clip_model.device)).float()
        # A stage may read no captions; previews need them for the prior.
        text = encode_captions(self.clip_model, self.text_model, batch.captions)
        return replace(batch, image_embeds=z_i, text=text), [view.image for view in views]

    def load_clip(self) -> CLIP:
        return self.clip_model

    def load_autoencoder(self) -> Autoencoder:
        assert self.autoencoder_model is not None
        return self.autoencoder_model

    def load_text_encoder(self) -> TextEncoder:
        assert self.text_model is not None
        return self.text_model


class CachedEncodings:
    """The data of a prior or a decoder, encoded in a cache. Attributes and methods are those of `FrozenModels`.

    CLIP and autoencoder are loaded only for previews. Captions for a text encoder whose states are not in the cache are
    encoded in the step.
    """

    def __init__(
        self,
        cache: str,
        data: DataConfig,
        clip: str,
        autoencoder: str | None,
        reads_captions: bool,
        load_text_encoder: LoadTextEncoder | None = None,
    ):
        # The cache
        with_latents, with_tokens = autoencoder is not None, load_text_encoder is not None
        with_text = reads_captions and not with_tokens
        self.dataset = CachedPairs(cache, "train", with_latents, with_text, with_tokens)
        made_from, facts = self.dataset.made_from, self.dataset.clip_facts
        present = {"clip": facts, "autoencoder": self.dataset.autoencoder_facts, "text": made_from["text"]}
        needed = {"clip": True, "autoencoder": with_latents, "text": with_text}
        if missing := [name for name in needed if needed[name] and not present[name]]:
            raise InputError(f"the cache {cache!r} was made without {' and '.join(missing)}; make a new one with it")
        assert facts is not None
        data.check_center_crops()
        pictures = open_data_if_present(data)
        check_cache_freshness(self.dataset, data, pictures, clip, autoencoder)
        self.validation = None
        if "held_out" in self.dataset.splits:
            self.validation = CachedPairs(cache, "held_out", with_latents, with_text, with_tokens)
        # Previews show one split. The other is closed, for the manifest of a large one takes much memory.
        self.preview_split = "train" if self.validation is None else "held_out"
        self.preview_pictures = pictures.get(self.preview_split)
        # The models
        self.clip_facts, self.autoencoder_facts = facts, self.dataset.autoencoder_facts if with_latents else None
        self.clip_name, self.autoencoder_name, self.open_text_encoder = clip, autoencoder, load_text_encoder
        self.text_encoder_facts, self.text_model = None, None
        if load_text_encoder is not None:
            text_model = load_text_encoder()
            self.text_encoder_facts = build_text_encoder_facts(text_model)
            if self.dataset.tokens and self.text_encoder_facts != self.dataset.text_encoder_facts:
                raise InputError(f"the cache {cache!r} is stale: it was made with another text encoder; make a new one")
            if not self.dataset.tokens:
                if not pictures:
                    raise InputError(
                        f"the cache {cache!r} has no states of a text encoder, and data.path={data.path!r} no captions "
                        "to encode in the step; make the cache with text_encoder, or give the data"
                    )
                self.text_model, self.dataset.captions = text_model, pictures["train"]
                if self.validation is not None:
                    self.validation.captions = pictures["held_out"]
        digest = made_from["data"]["train"]
        self.made_from = collect_identities(digest, self.clip_facts, self.autoencoder_facts, self.text_encoder_facts)
        self.made_from["cache"] = self.dataset.compute_digest()

    def find_cut_captions(self) -> str | None:
        """Return that line; for captions that are encoded in the cache, what was found when it was made."""
        if self.text_model is not None and self.dataset.captions is not None:
            return find_cut_captions(self.dataset.captions, self.text_model.tokenizer)
        name = "text_encoder" if self.dataset.tokens else "text"
        return self.dataset.cut_captions.get(name) if self.dataset.tokens or self.dataset.text else None

    def to(self, device: torch.device) -> None:
        if self.text_model is not None:
            self.text_model.to(device)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        if self.text_model is None:
            return batch
        device = batch.index.device if batch.latents is None else batch.latents.device
        with torch.autocast(device.type, enabled=False):  # as exact as a cache
            return replace(batch, tokens=encode_tokens(self.text_model, batch.captions).to(device, torch.float32))

    def null(self) -> TextEncoding:
        return self.dataset.null

    def compute_statistics(self) -> tuple[Tensor, Tensor]:
        return self.dataset.shared["mean"], self.dataset.shared["std"]

    def collect_embeds(self) -> Tensor:
        size = self.dataset.shard_size
        indices = range(0, len(self.dataset), -(-len(self.dataset) // MAX_COMPONENT_EMBEDS))
        return torch.stack([self.dataset.open_shard(i // size)["image_embeds"][i % size] for i in indices]).float()

    @torch.no_grad()
    def encode_records(self, keys: list[SampleIndex]) -> tuple[Batch, list[Tensor] | None]:
        """Read the encodings of samples for previews, as `FrozenModels.encode_records` computes them."""
        # A data set of its own, because that of the training may lack CLIP's encoding of the captions
        cached = CachedPairs(self.dataset.folder, self.preview_split, latents=False)
        batch, pictures = cached.__getitems__(keys), None
        # Captions and images, from the data if they are there
        names = [cached.get_sample_key(index) for index, _ in keys]
        if self.preview_pictures is None:
            batch.captions = names
        else:
            for (index, _), name in zip(keys, names):
                if name != (current := self.preview_pictures.get_sample_key(index)):
                    raise InputError(
                        f"the cache {str(cached.folder)!r} is stale: its image {index} of {self.preview_split} is "
                        f"{name!r}, in the data {current!r}; make a new one"
                    )
            records, views = self.preview_pictures.read_views(keys)
            batch.captions, pictures = records.captions, [view.image for view in views]
        # What the cache lacks of the captions' encodings
        if batch.text is None:
            batch.text = self.load_clip().encode_text(batch.captions)
        if self.text_model is not None:
            batch.text = replace(batch.text, decoder_tokens=self.text_model.encode(batch.captions))
        elif self.text_encoder_facts is not None:
            stored = CachedPairs(cached.folder, self.preview_split, latents=False, tokens=True).__getitems__(keys)
            batch.text = replace(batch.text, decoder_tokens=stored.tokens)
        return batch, pictures

    def load_clip(self) -> CLIP:
        return load_clip(self.clip_name).eval()

    def load_autoencoder(self) -> Autoencoder:
        assert self.autoencoder_name is not None
        return load_autoencoder(self.autoencoder_name).eval()

    def load_text_encoder(self) -> TextEncoder:
        assert self.open_text_encoder is not None
        return self.text_model or self.open_text_encoder()


EncodingSource = FrozenModels | CachedEncodings


def open_encodings(
    cache: str | None,
    data: DataConfig,
    clip: str,
    autoencoder: str | None = None,
    reads_captions: bool = True,
    load_text_encoder: LoadTextEncoder | None = None,
) -> EncodingSource:
    """Open the data of a prior or a decoder.

    Images are encoded by `clip`, and by `autoencoder` if it is given. Captions are encoded if `reads_captions`: by
    the text encoder if there is one, else by `clip`.

    Raises InputError for a cache that lacks some of these encodings, or was made from other models or data.
    """
    if cache is None:
        return FrozenModels(data, clip, autoencoder, reads_captions, load_text_encoder)
    return CachedEncodings(cache, data, clip, autoencoder, reads_captions, load_text_encoder)


def encode_tokens(text_encoder: TextEncoder, captions: str | list[str]) -> TokenStates:
    """Encode captions by a decoder's own text encoder; log the first that is too long for it."""
    captions = wrap_text(captions)
    cut = "" if text_encoder.has_warned else next(filter(None, map(text_encoder.find_truncated_text, captions)), "")
    if cut:
        longest = text_encoder.config.context_length
        logger.warning("a caption has more than the text encoder's %d tokens; such ends are cut: %r", longest, cut)
        text_encoder.has_warned = True
    return text_encoder.encode(captions)


def encode_captions(clip: CLIP, text_encoder: TextEncoder | None, captions: str | list[str]) -> TextEncoding:
    """Encode captions by CLIP, and by a decoder's own text encoder if there is one.

    A CLIP without a text tower makes a z_t of zeros.
    """
    captions = wrap_text(captions)
    if text_encoder is not None and not clip.reads_captions:
        tokens = text_encoder.encode(captions)
        z_t = tokens.states.new_zeros(len(captions), clip.embed_dim)
        return TextEncoding(z_t, tokens.states, tokens.mask, tokens)
    text = clip.encode_text(captions)
    return text if text_encoder is None else replace(text, decoder_tokens=text_encoder.encode(captions))
