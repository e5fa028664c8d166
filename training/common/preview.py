"""Whether a run learns, seen: the same records, prompts and seeds drawn again and again, each time as one picture.

Nothing here touches the global random state, so that a run with previews is the run without them. Models are in eval
mode.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SchedulerMixin
from PIL.Image import Image
from t2i.training.common.encodings import EncodingSource, encode_captions
from torch import Generator, Tensor

from t2i.checks import check_integer, check_range, check_texts
from t2i.data import Batch, CaptionedPictures
from t2i.data.dataset import SampleIndex
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.guidance import MAX_GUIDANCE_SCALE
from t2i.diffusion.samplers import resolve_sampler
from t2i.diffusion.sampling_loop import MAX_STEPS, Sampling
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import build_labelled_rows, build_similarity_matrix, to_pil_images
from t2i.files.model_folder import load_model, load_or_explain
from t2i.interop.by_name import load_autoencoder, load_text_encoder
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.decoder import Decoder
from t2i.networks.text_encoder import TextEncoder
from t2i.networks.unet_decoder import UNetDecoder
from t2i.sampling.embeddings import MAX_CANDIDATES, PRIOR_CLASSES, AnyPrior
from t2i.sampling.embeddings import sample_image_embeds as draw_any
from t2i.sampling.sample import build_decoder_condition, sample_decoder, split_generators

logger = logging.getLogger(__name__)

COLUMNS_PER_BATCH = 16  # columns at a time: less memory than a step of training takes
MAX_PROMPTS = 64


@dataclass
class SampleConfig:
    count: int = 8  # records of the data, a column each
    prompts: list[str] = field(default_factory=list)  # further columns, which have no true picture
    seed: int = 0  # of the first column; the next has the next
    prior: str | None = None  # folder of a trained prior, for pictures of a decoder in training
    decoder: str | None = None  # folder of a trained decoder, for pictures of a prior in training ...
    autoencoder: str | None = None  # ... and of its autoencoder, or a diffusers VAE
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float | None = None  # what is usual for the prior
    prior_candidates: int = 2
    num_inference_steps: int = 25
    guidance_scale: float = 1.5

    def __post_init__(self) -> None:
        check_integer("sample.count", self.count, 0, 64)
        check_texts("sample.prompts", self.prompts, empty=False)
        if len(self.prompts) > MAX_PROMPTS:
            raise InputError(f"sample.prompts has {len(self.prompts)} texts; at most {MAX_PROMPTS}")
        check_integer("sample.prior_candidates", self.prior_candidates, 1, MAX_CANDIDATES)
        check_integer("sample.seed", self.seed, 0, 2**62)
        for name in ("prior_num_inference_steps", "num_inference_steps"):
            check_integer(f"sample.{name}", getattr(self, name), 1, MAX_STEPS)
        for name in ("prior_guidance_scale", "guidance_scale"):
            if (scale := getattr(self, name)) is not None:
                check_range(f"sample.{name}", scale, 0, MAX_GUIDANCE_SCALE)
        if (self.decoder is None) != (self.autoencoder is None):
            raise InputError("sample.decoder and sample.autoencoder go together; give both or none")


def read_fixed_records(dataset: CaptionedPictures, count: int) -> Batch | None:
    """At most `count` records from all over a data set, the same ones every time; None for no records."""
    keys = choose_fixed_keys(len(dataset), count)
    return dataset.__getitems__(keys) if keys else None


def choose_fixed_keys(size: int, count: int) -> list[SampleIndex]:
    count = min(count, size)
    return [(i * size // count, 0) for i in range(count)]


@dataclass
class Columns:
    """What is drawn: N captions, of which the first K have true pictures. Floating-point tensors are fp32."""

    captions: list[str]
    text: TextEncoding  # of the N captions
    z_i: Tensor  # (K, D), unit length
    pictures: Tensor | None  # (K, 3, H, W) in [-1, 1]; None where only their embeddings are known

    def to(self, device: torch.device) -> "Columns":
        pictures = None if self.pictures is None else self.pictures.to(device)
        return Columns(self.captions, self.text.to(device, torch.float32), self.z_i.to(device), pictures)


@torch.no_grad()
def encode_columns(
    records: Batch | None, prompts: list[str], clip: CLIP | None, reader: TextEncoder | None = None
) -> Columns | None:
    """Columns of records and further prompts, on the CPU; CLIP encodes what the batch does not hold already, if any,
    and `reader`, the decoder's text encoder if it has its own.

    None if there are neither.
    """
    captions = [] if records is None else records.captions
    if not captions and not prompts:
        return None
    if records is not None and records.text is not None:
        text = records.text.to(torch.device("cpu"), torch.float32)
        if prompts:
            assert clip is not None, "somebody has to encode the prompts"
            text = text.cat(encode_captions(clip, reader, prompts).to(torch.device("cpu"), torch.float32))
    else:
        assert clip is not None, "somebody has to encode the captions"
        text = encode_captions(clip, reader, [*captions, *prompts])
    if records is None:
        z_i, pictures = torch.zeros(0, text.embedding.shape[1]), None
    else:
        z_i, pictures = records.image_embeds, records.image
        if z_i is None:
            assert clip is not None and pictures is not None, "a batch holds pictures or their embeddings"
            z_i = clip.encode_image(pictures.to(clip.device, clip.dtype))
    return Columns([*captions, *prompts], text, z_i.float(), pictures).to(torch.device("cpu"))


def choose_columns(source: EncodingSource, config: SampleConfig) -> Columns | None:
    """The columns of a prior's or a decoder's run, encoded by where it gets its batches from."""
    dataset = source.validation or source.dataset
    keys = choose_fixed_keys(len(dataset), config.count)
    clip = source.load_clip() if config.prompts else None
    reader = source.load_text_encoder() if config.prompts and source.text_encoder is not None else None
    return encode_columns(source.encode_records(keys) if keys else None, config.prompts, clip, reader)


@torch.no_grad()
def add_decoder_tokens(text_encoder: TextEncoder | None, columns: Columns) -> Columns:
    """The columns with what a decoder's own text encoder says of their captions."""
    if text_encoder is None:
        return columns
    tokens = [text_encoder.encode(columns.captions[part]) for part in slice_columns(len(columns.captions))]
    tokens = [one.to(torch.device("cpu"), torch.float32) for one in tokens]
    found = reduce(lambda one, other: one.cat(other), tokens)
    return replace(columns, text=replace(columns.text, decoder_tokens=found))


@torch.no_grad()
def draw_autoencoder_preview(autoencoder: Autoencoder, pictures: Tensor) -> Image:
    """Pictures, (K, 3, H, W) in [-1, 1], over what is left of them as latents; below, how near, in dB."""
    pictures = pictures.to(autoencoder.device)
    again = apply_in_batches(lambda part: autoencoder.decode(autoencoder.encode(part)).float(), pictures)
    psnr = 10 * torch.log10(4 / (again.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3)))  # pictures span 2
    rows = {"picture": to_pil_images(pictures), "reconstruction": to_pil_images(again)}
    return build_labelled_rows(rows, [f"{value:.1f} dB" for value in psnr.tolist()])


@torch.no_grad()
def draw_clip_preview(clip: CLIP, pictures: Tensor, captions: list[str]) -> Image:
    """The cosines of every caption with every picture, (K, 3, H, W); `clip` has its tokenizer."""
    z_i = apply_in_batches(clip.encode_image, pictures.to(clip.device))
    z_t = clip.encode_text(captions).embedding
    return build_similarity_matrix(z_t @ z_i.T, to_pil_images(pictures), captions, "cosine of caption and picture")


def sample_column_embeds(
    columns: Columns, config: SampleConfig, prior: AnyPrior, scheduler: SchedulerMixin | None
) -> Tensor:
    """The prior's z_i for every column, (N, D), unit length, fp32, on the CPU."""
    scheduler, device = copy.deepcopy(scheduler), prior.device  # setting its steps would change the trainer's
    scheduler = None if scheduler is None else resolve_sampler(None, scheduler, prior)  # as the pipeline draws
    steps, scale, candidates = config.prior_num_inference_steps, config.prior_guidance_scale, config.prior_candidates
    generators, _ = build_generators(columns, config)

    def draw(part: slice) -> Tensor:
        text = columns.text.map_tensors(lambda tensor: tensor[part].to(device))
        return draw_any(prior, scheduler, text, None, Sampling(steps, generators[part], scale), candidates).cpu()

    return torch.cat([draw(part) for part in slice_columns(len(columns.captions))])


@torch.no_grad()
def draw_column_images(
    columns: Columns,
    z_i: Tensor,
    config: SampleConfig,
    decoder: Decoder | UNetDecoder,
    scheduler: SchedulerMixin,
    autoencoder: Autoencoder,
) -> Tensor:
    """The decoder's pictures of z_i, (M, D), of the first M columns: (M, 3, H, W), fp32, on the CPU.

    A column's noise is the same for any z_i, and that of the pipeline with the column's seed.
    """
    scheduler, device = resolve_sampler(None, copy.deepcopy(scheduler), decoder), decoder.device
    steps, scale = config.num_inference_steps, config.guidance_scale
    count = len(z_i)
    generators, texts = (
        build_generators(columns, config)[1][:count],
        columns.text.map_tensors(lambda tensor: tensor[:count]),
    )

    def draw(part: slice) -> Tensor:
        text = texts.map_tensors(lambda tensor: tensor[part].to(device))
        condition = build_decoder_condition(decoder, z_i[part].to(device), text)
        latents = sample_decoder(decoder, scheduler, condition, Sampling(steps, generators[part], scale))
        return autoencoder.decode(latents.to(autoencoder.device, autoencoder.dtype)).float().cpu()

    return torch.cat([draw(part) for part in slice_columns(count)])


def draw_decoder_preview(
    columns: Columns,
    config: SampleConfig,
    decoder: Decoder | UNetDecoder,
    scheduler: SchedulerMixin,
    autoencoder: Autoencoder,
    prior_z_i: Tensor | None = None,
) -> Image | None:
    """True pictures over those that the decoder draws of the true z_i and, if given, of the prior's, (N, D).

    The first row of the two that is bad tells which stage is. None if there is nothing to draw from: prompts without a
    prior.
    """
    rows: dict[str, list] = {}
    if columns.pictures is not None:
        rows["picture"] = to_pil_images(columns.pictures)
    for label, z_i in {"true": columns.z_i, "prior": prior_z_i}.items():
        if z_i is not None and len(z_i):
            name = "decoder from the true image embedding" if label == "true" else "decoder from the prior"
            rows[name] = to_pil_images(draw_column_images(columns, z_i, config, decoder, scheduler, autoencoder))
    if not rows:
        return None
    shown = max(map(len, rows.values()))
    return build_labelled_rows(rows, columns.captions[:shown])


def draw_prior_preview(columns: Columns, prior_z_i: Tensor) -> Image | None:
    """The cosines of the prior's z_i of every caption, (N, D), with the true z_i; None without true ones."""
    count = len(columns.z_i)
    if not count:
        return None
    cosines = F.cosine_similarity(prior_z_i[:count, None], columns.z_i[None], dim=-1)
    images = [] if columns.pictures is None else to_pil_images(columns.pictures)
    label = "cosine of the prior's and the true image embedding"
    return build_similarity_matrix(cosines, images, columns.captions[:count], label)


class Preview:
    """Previews of a prior or a decoder in training, with the other stages from their folders where those are given.

    Loads the other stages that are there once at the start, to refuse in time what does not fit, and again whenever it
    draws; between two drawings they take no memory. One that does not load then, or is not there yet, is left out,
    which the log says.

    Args:
        columns: what to draw; None draws nothing.
        fingerprint: of the CLIP that encoded them.
    """

    def __init__(self, config: SampleConfig, columns: Columns | None, fingerprint: str):
        self.config, self.columns, self.fingerprint = config, columns, fingerprint
        if is_existing_path(config.prior):
            self.load_trained_prior()
        if is_existing_path(config.decoder):
            self.load_trained_decoder()

    def preview_decoder(
        self, decoder: Decoder | UNetDecoder, scheduler: SchedulerMixin, load_autoencoder: Callable[[], Autoencoder]
    ) -> dict[str, Image]:
        """Pictures by name, perhaps none."""
        if self.columns is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            found = load_or_skip(lambda: (load_autoencoder(),), decoder.device)
        if found is None:
            return {}
        [autoencoder] = found
        z_i = self.sample_trained_prior(decoder.device)
        image = draw_decoder_preview(self.columns, self.config, decoder, scheduler, autoencoder, z_i)
        return {} if image is None else {"pictures": image}

    def preview_prior(self, prior: AnyPrior, scheduler: SchedulerMixin | None) -> dict[str, Image]:
        """Pictures by name, perhaps none."""
        if self.columns is None:
            return {}
        z_i = sample_column_embeds(self.columns, self.config, prior, scheduler)
        images = {"embeddings": draw_prior_preview(self.columns, z_i)}
        if trained := load_or_skip(self.load_trained_decoder, prior.device):
            decoder, decoder_scheduler, autoencoder, text_encoder = trained
            columns = add_decoder_tokens(text_encoder, self.columns)
            images["pictures"] = draw_decoder_preview(
                columns, self.config, decoder, decoder_scheduler, autoencoder, z_i
            )
        return {name: image for name, image in images.items() if image is not None}

    def sample_trained_prior(self, device: torch.device) -> Tensor | None:
        """The trained prior's z_i; when this returns, the prior takes no memory any more."""
        assert self.columns is not None, "there is something to draw"
        trained = load_or_skip(self.load_trained_prior, device)
        return None if trained is None else sample_column_embeds(self.columns, self.config, *trained)

    def load_trained_prior(self) -> tuple[AnyPrior, SchedulerMixin | None] | None:
        return None if self.config.prior is None else self.load_trained_stage("prior", self.config.prior, PRIOR_CLASSES)

    def load_trained_decoder(
        self,
    ) -> tuple[Decoder | UNetDecoder, SchedulerMixin, Autoencoder, TextEncoder | None] | None:
        if self.config.decoder is None or self.config.autoencoder is None:
            return None
        from t2i.interop.trainable import PUBLIC_DECODERS

        decoder, scheduler = self.load_trained_stage(
            "decoder", self.config.decoder, (Decoder, UNetDecoder, *PUBLIC_DECODERS)
        )
        with torch.random.fork_rng(devices=[]):
            autoencoder = load_autoencoder(self.config.autoencoder).eval()
        if decoder.config.latent_channels != autoencoder.channels:
            raise InputError(
                f"sample.autoencoder is {self.config.autoencoder!r}, of {autoencoder.channels} channels; those of "
                f"sample.decoder's latents are {decoder.config.latent_channels}, they were not trained together"
            )
        text_encoder = None
        if (wanted := decoder.config.text_encoder_fingerprint) is not None:
            with torch.random.fork_rng(devices=[]):
                text_encoder = load_text_encoder(self.config.decoder)
            if text_encoder.identity != wanted:
                raise InputError(f"sample.decoder is {self.config.decoder!r}, which lacks its text encoder {wanted}")
        return decoder, scheduler, autoencoder, text_encoder

    def load_trained_stage(self, name: str, folder: str, classes: Any) -> tuple[Any, SchedulerMixin | None]:
        """A trained stage and its scheduler, if it has one. Raises InputError if it was trained with another CLIP."""
        with torch.random.fork_rng(devices=[]):  # a model is built at random before it is filled
            model = load_model(classes, folder).eval()
        scheduler = None
        if model.needs_scheduler:
            scheduler = load_or_explain(DDIMScheduler.from_pretrained, Path(folder) / "scheduler")
        theirs = model.config.clip_fingerprint
        if theirs is not None and theirs != self.fingerprint:
            raise InputError(
                f"sample.{name} is {folder!r}, trained with the CLIP {theirs}; this run has {self.fingerprint}"
            )
        return model, scheduler


def is_existing_path(name: str | None) -> bool:
    return name is not None and Path(name).exists()


def load_or_skip(load: Callable[[], tuple | None], device: torch.device) -> tuple | None:
    """What `load` returns, on a device; None if it no longer loads, which is no reason to stop a run."""
    try:
        found = load()
    except InputError as error:
        logger.warning("sample pictures lack a stage: %s", error)
        return None
    return found and tuple(part.to(device) if isinstance(part, torch.nn.Module) else part for part in found)


def build_generators(columns: Columns, config: SampleConfig) -> tuple[list[Generator], ...]:
    """Each column's generators, for the prior and for the decoder, as the pipeline makes them of the column's seed."""
    seeds = [Generator().manual_seed(config.seed + i) for i in range(len(columns.captions))]
    return split_generators(seeds, len(seeds))


def slice_columns(count: int) -> list[slice]:
    return [slice(start, start + COLUMNS_PER_BATCH) for start in range(0, count, COLUMNS_PER_BATCH)]


def apply_in_batches(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return torch.cat([function(values[part]) for part in slice_columns(len(values))])
