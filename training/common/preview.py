"""Previews of a run: the same samples, prompts and seeds drawn again and again, by the pipeline's own stages.

Previews do not change the global random state, so a run with previews equals the run without them.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL.Image import Image
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.options import DECODER_OPTION_NAMES, PRIOR_OPTION_NAMES
from t2i.pipelines.stages import run_decoder_stage, run_prior_stage
from t2i.training.common.encodings import EncodingSource, encode_captions
from torch import Generator, Tensor, nn

from t2i.checks import check_integer, check_range, check_texts
from t2i.data import Batch, CaptionedPictures
from t2i.data.dataset import SampleIndex
from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.diffusion.guidance import MAX_GUIDANCE_SCALE
from t2i.diffusion.sampling_loop import MAX_STEPS
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import build_labelled_rows, build_similarity_matrix, to_pil_images
from t2i.files.model_folder import load_model
from t2i.interop.by_name import load_autoencoder, load_text_encoder
from t2i.interop.trainable import PUBLIC_DECODERS
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.decoder import Decoder
from t2i.networks.text_encoder import TextEncoder
from t2i.networks.unet_decoder import UNetDecoder
from t2i.sampling.embeddings import MAX_CANDIDATES, PRIOR_CLASSES, AnyPrior
from t2i.sampling.sample import split_generators

logger = logging.getLogger(__name__)

COLUMNS_PER_BATCH = 16  # columns drawn at once, which takes less memory than a training step
MAX_PROMPTS = 64

Result = TypeVar("Result")


@dataclass
class SampleConfig:
    count: int = 8  # samples of the data, a column each
    prompts: list[str] = field(default_factory=list)  # further columns, without a true image
    seed: int = 0  # of the first column; the next column has the next seed
    prior: str | None = None  # folder of a trained prior, for images in the previews of a decoder
    decoder: str | None = None  # folder of a trained decoder, for images in the previews of a prior, ...
    autoencoder: str | None = None  # ... and the folder of its autoencoder, or the name of a diffusers VAE
    prior_num_inference_steps: int = 25
    prior_guidance_scale: float | None = None  # null is the prior's default
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

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """The options that a pipeline's stages take. A scale of None is the prior's default there too."""
        known = PRIOR_OPTION_NAMES | DECODER_OPTION_NAMES
        return {name: value for name, value in vars(self).items() if name in known}


class PreviewPipeline(UnCLIPPipeline):
    """A pipeline of only those stages that a preview draws with.

    Its input is encoded before, so CLIP and text encoder are missing: a run from a cache does not load them.
    """

    _optional_components = ["prior", "prior_scheduler", "decoder", "decoder_scheduler", "autoencoder"]
    default_decoder_options: dict[str, Any] = {}  # type: ignore[assignment]  # `pipeline_options` has them all

    def __init__(
        self,
        prior: AnyPrior | None = None,
        prior_scheduler: SchedulerMixin | None = None,
        decoder: Any = None,
        decoder_scheduler: SchedulerMixin | None = None,
        autoencoder: Any = None,
    ):
        DiffusionPipeline.__init__(self)  # UnCLIPPipeline's requires all stages
        # Copies, because setting the steps of a scheduler would change that of the training
        schedulers = {"prior_scheduler": prior_scheduler, "decoder_scheduler": decoder_scheduler}
        parts = {"prior": prior, "decoder": decoder, "autoencoder": autoencoder, **copy.deepcopy(schedulers)}
        DiffusionPipeline.register_modules(self, **parts)  # nor are they checked: they are those of the training
        self.set_progress_bar_config(disable=True)


def read_fixed_records(dataset: CaptionedPictures, count: int) -> Batch | None:
    """Read at most `count` samples, evenly spread over a data set; None for no samples."""
    keys = choose_fixed_keys(len(dataset), count)
    if not keys:
        return None
    # Squares, whatever shapes are trained on, so that the images are one tensor. The previews of a decoder have the
    # shapes of its samples; those of a prior are squares too, for its samples are what CLIP sees
    side = dataset.config.image_size
    batch, views = dataset.read_views(keys, (side, side))
    return replace(batch, image=torch.stack([view.image for view in views]))


def choose_fixed_keys(size: int, count: int) -> list[SampleIndex]:
    count = min(count, size)
    return [(i * size // count, 0) for i in range(count)]


@dataclass
class PreviewInput:
    """Input of a preview: N captions, of which the first K have true images. Floating-point tensors are fp32."""

    captions: list[str]
    text: TextEncoding  # of the N captions
    z_i: Tensor  # (K, D), unit length
    pictures: Sequence[Tensor] | None  # (3, H, W) each, in [-1, 1]; None where only their embeddings are known

    def build_size_options(self, column: int) -> dict[str, Any]:
        """Return the options of a pipeline that draw a column in the shape of its image.

        There are none without an image, and for a square, which every decoder draws in its own size.
        """
        if self.pictures is None or column >= len(self.pictures):
            return {}
        height, width = self.pictures[column].shape[-2:]
        return {} if height == width else {"height": height, "width": width}


@torch.no_grad()
def encode_preview_input(source: EncodingSource, config: SampleConfig) -> PreviewInput | None:
    """Encode the samples and prompts for the previews of a prior or a decoder, on the CPU; None if there are neither.

    Samples come from the held-out split, or from the training split if there is none.
    """
    texts: list[TextEncoding] = []
    captions, z_i = list(config.prompts), torch.zeros(0, source.clip_facts.embed_dim)
    pictures: list[Tensor] | None = None
    if keys := choose_fixed_keys(len(source.validation or source.dataset), config.count):
        records, pictures = source.encode_records(keys)
        assert records.text is not None and records.image_embeds is not None, "that is what previews draw from"
        captions, z_i = [*records.captions, *captions], records.image_embeds.float().cpu()
        texts.append(records.text)
    # Prompts, which no cache contains
    if config.prompts:
        text_encoder = None if source.text_encoder_facts is None else source.load_text_encoder()
        texts.append(encode_captions(source.load_clip(), text_encoder, config.prompts))
    if not texts:
        return None
    text = reduce(TextEncoding.cat, [text.to(torch.device("cpu"), torch.float32) for text in texts])
    return PreviewInput(captions, text, z_i, pictures)


@torch.no_grad()
def draw_autoencoder_preview(autoencoder: Autoencoder, pictures: Tensor) -> Image:
    """Draw images, (K, 3, H, W) in [-1, 1], their reconstructions, and the PSNR of those in dB."""
    pictures = pictures.to(autoencoder.device)
    decoded = apply_in_batches(lambda part: autoencoder.decode(autoencoder.encode(part)).float(), pictures)
    psnr = 10 * torch.log10(4 / (decoded.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3)))  # images span 2
    rows = {"image": to_pil_images(pictures), "reconstruction": to_pil_images(decoded)}
    return build_labelled_rows(rows, [f"{value:.1f} dB" for value in psnr.tolist()])


@torch.no_grad()
def draw_clip_preview(clip: CLIP, pictures: Tensor, captions: list[str]) -> Image:
    """Draw the cosines of every caption with every image, (K, 3, H, W); `clip` has its tokenizer."""
    z_i = apply_in_batches(clip.encode_image, pictures.to(clip.device))
    z_t = clip.encode_text(captions).embedding
    return build_similarity_matrix(z_t @ z_i.T, to_pil_images(pictures), captions, "cosine of caption and image")


@torch.no_grad()
def sample_column_embeds(columns: PreviewInput, config: SampleConfig, pipeline: UnCLIPPipeline) -> Tensor:
    """Sample the prior's z_i for every column, (N, D), unit length, fp32, on the CPU."""
    prior, decoder = pipeline.resolve_options(**config.pipeline_options)
    batches = [
        run_prior_stage(pipeline, text, None, prior, generators, decoder).cpu()
        for _, text, generators, _ in iterate_columns(columns, config, len(columns.captions))
    ]
    return torch.cat(batches)


@torch.no_grad()
def draw_column_images(
    columns: PreviewInput, z_i: Tensor, config: SampleConfig, pipeline: UnCLIPPipeline
) -> list[Tensor]:
    """Draw the decoder's images of z_i, (M, D), for the first M columns: (3, H, W) each, fp32, on the CPU.

    An image has the size of its column's image. A column's noise is the same for any z_i.
    """
    images: list[Tensor] = []
    for part, text, _, generators in iterate_columns(columns, config, len(z_i)):
        _, decoder = pipeline.resolve_options(**config.pipeline_options, **columns.build_size_options(part.start))
        images += pipeline.decode_images(run_decoder_stage(pipeline, z_i[part], text, decoder, generators)).cpu()
    return images


def iterate_columns(
    columns: PreviewInput, config: SampleConfig, count: int
) -> Iterator[tuple[slice, TextEncoding, list[Generator], list[Generator]]]:
    """Yield the first `count` columns in batches of one size: their positions, captions, and generators of both stages.

    The generators are those of the prior, then those of the decoder.
    """
    for part in slice_columns(count, columns.build_size_options):
        numbers = range(count)[part]
        # As in a pipeline that is called with the column's seed
        seeded = [Generator().manual_seed(config.seed + number) for number in numbers]
        of_prior, of_decoder = split_generators(seeded, len(numbers))
        yield part, columns.text.take_rows(torch.tensor(numbers)), of_prior, of_decoder


def draw_decoder_preview(
    columns: PreviewInput, config: SampleConfig, pipeline: UnCLIPPipeline, prior_z_i: Tensor | None = None
) -> Image | None:
    """Draw the true images, the decoder's images of the true z_i, and those of the prior's z_i, (N, D), if given.

    The first bad row of the last two shows which stage is bad. None if there is nothing to draw from: prompts without
    a prior.
    """
    # A row for each input at hand; rows of samples are shorter than those that prompts have too
    rows: dict[str, list] = {}
    if columns.pictures is not None:
        rows["image"] = to_pil_images(columns.pictures)
    embeddings = {"decoder from the true image embedding": columns.z_i, "decoder from the prior": prior_z_i}
    for label, z_i in embeddings.items():
        if z_i is not None and len(z_i):
            rows[label] = to_pil_images(draw_column_images(columns, z_i, config, pipeline))
    if not rows:
        return None
    shown = max(map(len, rows.values()))
    return build_labelled_rows(rows, columns.captions[:shown])


def draw_prior_preview(columns: PreviewInput, prior_z_i: Tensor) -> Image | None:
    """Draw the cosines of the prior's z_i of every caption, (N, D), with the true z_i; None without true ones."""
    count = len(columns.z_i)
    if not count:
        return None
    cosines = F.cosine_similarity(prior_z_i[:count, None], columns.z_i[None], dim=-1)
    images = [] if columns.pictures is None else to_pil_images(columns.pictures)
    label = "cosine of the prior's and the true image embedding"
    return build_similarity_matrix(cosines, images, columns.captions[:count], label)


class TrainingPreviews:
    """Previews of a prior or a decoder in training, with the other stages from their folders, where those are given.

    The other stages are loaded once at the start, to refuse early those that do not fit, and again for each preview;
    in between they take no memory. A stage that does not load, or is not there yet, is left out with a warning.

    Args:
        columns: the input; None draws nothing.
        fingerprint: identity of the CLIP that encoded the columns.
    """

    def __init__(self, config: SampleConfig, columns: PreviewInput | None, fingerprint: str):
        self.config, self.columns, self.fingerprint = config, columns, fingerprint
        # A model is built with random weights before it is loaded, which must not change the run's random numbers.
        with torch.random.fork_rng(devices=[]):
            if config.prior is not None and Path(config.prior).exists():
                self.load_trained_prior()
            if config.decoder is not None and Path(config.decoder).exists():
                self.load_trained_decoder()

    def preview_decoder(
        self, decoder: Any, scheduler: SchedulerMixin, load_autoencoder: Callable[[], Autoencoder]
    ) -> dict[str, Image]:
        """Return images by name, perhaps none."""
        columns, config, device = self.columns, self.config, decoder.device
        if columns is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            autoencoder = skip_failure(load_autoencoder)
            if autoencoder is None:
                return {}
            # The prior is gone again before the decoder draws.
            z_i = None
            if config.prior is not None:
                z_i = skip_failure(lambda: sample_column_embeds(columns, config, self.load_trained_prior().to(device)))
            pipeline = PreviewPipeline(decoder=decoder, decoder_scheduler=scheduler, autoencoder=autoencoder.to(device))
            image = skip_failure(lambda: draw_decoder_preview(columns, config, pipeline, z_i))
        return {} if image is None else {"pictures": image}

    def preview_prior(self, prior: AnyPrior, scheduler: SchedulerMixin | None) -> dict[str, Image]:
        """Return images by name, perhaps none."""
        columns, config = self.columns, self.config
        if columns is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            pipeline = PreviewPipeline(prior, scheduler)
            z_i = skip_failure(lambda: sample_column_embeds(columns, config, pipeline))
            if z_i is None:
                return {}
            images = {"embeddings": draw_prior_preview(columns, z_i)}
            if config.decoder is not None:
                images["pictures"] = skip_failure(lambda: self.draw_with_trained_decoder(columns, z_i, prior.device))
        return {name: image for name, image in images.items() if image is not None}

    @torch.no_grad()
    def draw_with_trained_decoder(self, columns: PreviewInput, z_i: Tensor, device: torch.device) -> Image | None:
        pipeline, text_encoder = self.load_trained_decoder()
        # A decoder with its own text encoder reads its tokens instead of CLIP's
        if text_encoder is not None:
            text_encoder.to(device)
            batches = [text_encoder.encode(columns.captions[part]) for part in slice_columns(len(columns.captions))]
            tokens = reduce(TokenStates.cat, [batch.to(torch.device("cpu"), torch.float32) for batch in batches])
            columns = replace(columns, text=replace(columns.text, decoder_tokens=tokens))
        return draw_decoder_preview(columns, self.config, pipeline.to(device), z_i)

    def load_trained_prior(self) -> PreviewPipeline:
        prior, scheduler = self.load_trained_stage("prior", PRIOR_CLASSES)
        return PreviewPipeline(prior, scheduler)

    def load_trained_decoder(self) -> tuple[PreviewPipeline, TextEncoder | None]:
        """Load the trained decoder with its autoencoder, and its text encoder if it has one. Raises InputError."""
        name, autoencoder_name = str(self.config.decoder), str(self.config.autoencoder)
        decoder, scheduler = self.load_trained_stage("decoder", (Decoder, UNetDecoder, *PUBLIC_DECODERS))
        autoencoder = load_autoencoder(autoencoder_name).eval()
        if decoder.config.latent_channels != autoencoder.channels:
            raise InputError(
                f"sample.autoencoder is {autoencoder_name!r}, of {autoencoder.channels} channels; those of "
                f"sample.decoder's latents are {decoder.config.latent_channels}, they were not trained together"
            )
        # The text encoder lies beside the decoder
        text_encoder = None
        expected = decoder.config.text_encoder_fingerprint
        if expected is not None:
            text_encoder = load_text_encoder(name)
            if text_encoder.identity != expected:
                raise InputError(f"sample.decoder is {name!r}, which lacks its text encoder {expected}")
        pipeline = PreviewPipeline(decoder=decoder, decoder_scheduler=scheduler, autoencoder=autoencoder)
        return pipeline, text_encoder

    def load_trained_stage(self, stage: str, classes: tuple[type[nn.Module], ...]) -> tuple[Any, SchedulerMixin | None]:
        """Load a stage and its scheduler, if it has one. Raises InputError if it was trained with another CLIP."""
        folder = str(getattr(self.config, stage))
        model, scheduler = load_model(classes, folder).eval(), None
        if model.needs_scheduler:
            scheduler = load_scheduler(Path(folder) / "scheduler")
        stored = model.config.clip_fingerprint
        if stored is not None and stored != self.fingerprint:
            raise InputError(
                f"sample.{stage} is {folder!r}, trained with the CLIP {stored}; this run has {self.fingerprint}"
            )
        return model, scheduler


def skip_failure(function: Callable[[], Result]) -> Result | None:
    """Return `function()`; None, with a warning, if a stage does not load or its values are not finite."""
    try:
        return function()
    except ValueError as error:  # InputError is one
        logger.warning("sample images lack a stage: %s", error)
        return None


def slice_columns(count: int, get_key: Callable[[int], object] = lambda column: None) -> list[slice]:
    """Divide columns into batches of neighbours with the same key."""
    parts: list[slice] = []
    for column in range(count):
        if parts and column - parts[-1].start < COLUMNS_PER_BATCH and get_key(column) == get_key(parts[-1].start):
            parts[-1] = slice(parts[-1].start, column + 1)
        else:
            parts.append(slice(column, column + 1))
    return parts


def apply_in_batches(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return torch.cat([function(values[part]) for part in slice_columns(len(values))])
