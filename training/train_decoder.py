"""Train a decoder: from an image embedding to latents.

accelerate launch training/train_decoder.py configs/emoji/decoder.yaml train.steps=1000
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from t2i.training.common.cache_freshness import read_stored_fingerprint
from t2i.training.common.captions import print_cut_captions
from t2i.training.common.effects import (
    CAPTION_SETTINGS,
    COMMON,
    WEIGHTED_LOSS,
    IdleCases,
    exclude_setting,
    list_preview_cases,
    require_setting,
)
from t2i.training.common.encodings import EncodingSource, open_encodings
from t2i.training.common.entry import run
from t2i.training.common.finetuning import prepare_init_model, resolve_init_scheduler
from t2i.training.common.loop import Stage, build_accelerator, fit
from t2i.training.common.lora import LoraConfig, add_adapters, check_lora_init, export_adapted_model
from t2i.training.common.preview import SampleConfig, TrainingPreviews, encode_preview_input
from torch import Tensor

from t2i.checks import check_choice
from t2i.config import DataConfig, TrainConfig, build_or_explain, check_fields
from t2i.data import Batch
from t2i.data.groups import open_groups
from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.inpainting import concat_masked_latents, generate_random_masks
from t2i.diffusion.loss import check_loss_settings, compute_diffusion_loss, drop_condition
from t2i.diffusion.process import build_noise_scheduler
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.model_folder import load_model, save_model_folder
from t2i.interop.by_name import find_text_encoder_folder, load_text_encoder
from t2i.interop.parts import PublicPart
from t2i.interop.trainable import DECODER_PARTS, PUBLIC_DECODERS, find_trainable_part, load_trainable_decoder
from t2i.networks.decoder import Decoder
from t2i.networks.text_encoder import DTYPES, MAX_TOKENS, TextEncoder
from t2i.networks.unet_decoder import UNetDecoder

ARCHITECTURES = {"transformer": Decoder, "unet": UNetDecoder}

PRIOR_PREVIEW_SETTINGS = ("prompts", "prior_num_inference_steps", "prior_guidance_scale", "prior_candidates")
NO_CAPTIONS = require_setting("reads_captions")


@dataclass
class Config:
    # Folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    clip: str = "???"
    # Folder of a trained autoencoder, or the folder or hub name of a diffusers VAE or of the public pipeline in `init`
    autoencoder: str = "???"
    cache: str | None = None  # folder that `t2i data cache` wrote; null encodes images in every step
    architecture: str = "unet"  # or transformer
    model: dict[str, Any] = field(default_factory=dict)  # arguments of the decoder's class, but for those below
    # Folder of a trained decoder to start from, instead of random weights; or the folder or hub name of a public
    # pipeline, Karlo's, Kandinsky's or Stable unCLIP's, whose architecture is kept.
    init: str | None = None
    lora: LoraConfig | None = None  # train adapters on `init` instead of its weights: rank, alpha, targets
    # Arguments of DDIMScheduler, the rest as in `init`; or `prediction_type: flow_prediction` and a `shift`
    scheduler: dict[str, Any] = field(default_factory=dict)
    reads_captions: bool = False  # caption tokens as a second condition
    text_encoder: str | None = None  # folder or hub name of the T5, BERT, ... that encodes them; null is CLIP
    text_encoder_tokens: int = 128  # of a caption at most, within the encoder's limit; longer captions are cut
    text_encoder_dtype: str = "float32"  # or bfloat16 or float16, which take half the memory
    embedding_dropout: float = 0.1
    # Noise on the z_i of training, as a part of their length: less bound to the very z_i of the training images
    embedding_noise: float = 0.0
    caption_dropout: float = 0.5
    reads_masks: bool = False  # for inpainting: the latents to keep are an input beside the noisy ones
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which gives timesteps of low noise less weight
    min_snr_gamma: float = 5.0
    logit_mean: float = 0.0  # of flow_prediction's timesteps, which are logit-normal; above 0, more noise
    logit_std: float = 1.0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # previews, every train.sample_every steps
    idle: ClassVar[IdleCases] = {
        **COMMON,
        **WEIGHTED_LOSS,
        **list_preview_cases(
            **dict.fromkeys(("count", "seed", "prior", "num_inference_steps", "guidance_scale"), ()),
            **dict.fromkeys(PRIOR_PREVIEW_SETTINGS, (require_setting("sample.prior"),)),
        ),
        **dict.fromkeys((*CAPTION_SETTINGS, "caption_dropout"), (NO_CAPTIONS,)),
        "architecture": (exclude_setting("init"),),
        "text_encoder_tokens": (require_setting("text_encoder"),),
        "text_encoder_dtype": (require_setting("text_encoder"),),
    }

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        check_fields(self, embedding_dropout=(0, 1), embedding_noise=(0, 10), caption_dropout=(0, 1))
        check_fields(self, timestep_shift=(0.01, 100), min_snr_gamma=(0.01, 1000), text_encoder_tokens=(3, MAX_TOKENS))
        check_fields(self, logit_mean=(-10, 10), logit_std=(0.01, 10))
        self.check_loss(build_noise_scheduler(self.scheduler))
        check_lora_init(self.lora, self.init)
        check_choice("text_encoder_dtype", self.text_encoder_dtype, tuple(DTYPES))
        if self.text_encoder is not None and not self.reads_captions:
            raise InputError(f"text_encoder={self.text_encoder!r} needs reads_captions=true")

    def check_loss(self, scheduler: SchedulerMixin) -> None:
        """Refuse settings of the loss that do not fit a noise schedule."""
        learned = bool(self.model.get("learned_variance"))
        check_loss_settings(scheduler, self.loss_weighting, (self.logit_mean, self.logit_std), learned)

    @property
    def load_text_encoder(self) -> Callable[[], TextEncoder] | None:
        """A function that loads the text encoder; None for captions from CLIP."""
        if self.text_encoder is None:
            return None
        return partial(load_text_encoder, self.text_encoder, self.text_encoder_tokens, DTYPES[self.text_encoder_dtype])


def main(config: Config) -> None:
    """Train a decoder, from new weights or from those of `init`."""
    public = find_trainable_part(config.init, "unet", DECODER_PARTS)
    source = open_encodings(
        cache=config.cache,
        data=config.data,
        clip=config.clip,
        autoencoder=config.autoencoder,
        reads_captions=config.reads_captions,
        load_text_encoder=config.load_text_encoder,
    )
    accelerator = build_accelerator(config.train)
    if accelerator.is_local_main_process:
        print_cut_captions(source.find_cut_captions())
    fit(accelerator, build_stage(config, source, accelerator.device, public), config.train)


def build_stage(
    config: Config, source: EncodingSource, device: torch.device, public: PublicPart | None = None
) -> Stage:
    """Build the stage. public: the part of a public model that `init` names."""
    source.to(device)
    assert source.autoencoder_facts is not None
    config.data.check_sides(source.autoencoder_facts.factor)
    output = Path(config.train.output)
    # The noise schedule
    public_scheduler = None if public is None else public.source.find_folder("decoder_scheduler")
    scheduler = resolve_init_scheduler(config.init, config.scheduler, public_scheduler)
    config.check_loss(scheduler)
    # The model
    made_from: dict[str, Any] = {"text_encoder": None, **source.made_from}
    if config.init is None:
        needed = collect_decoder_arguments(config, source)
        decoder = build_or_explain(ARCHITECTURES[config.architecture], "model", config.model, **needed)
    else:
        decoder = load_init_decoder(config, source, public)
        made_from["init"] = compute_weights_fingerprint(decoder)
    if config.data.buckets:
        config.data.check_sides(source.autoencoder_facts.factor * decoder.latent_multiple)
    if config.lora is not None:
        add_adapters(decoder, config.lora)
    decoder.to(device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        batch = source.encode(batch)
        latents = batch.latents
        assert latents is not None
        condition = build_training_condition(config, decoder, batch)
        shift, weighting, gamma = config.timestep_shift, config.loss_weighting, config.min_snr_gamma
        logit = (config.logit_mean, config.logit_std)
        return compute_diffusion_loss(model, scheduler, latents, condition, shift, weighting, gamma, logit)[0]

    def export(average: torch.nn.Module) -> None:
        export_adapted_model(average, output)
        save_model_folder(scheduler, output, "scheduler")
        export_text_encoder(source, output)

    preview = None
    if config.train.sample_every:
        previews = TrainingPreviews(
            config.sample, encode_preview_input(source, config.sample), source.clip_facts.identity
        )
        preview = partial(previews.preview_decoder, scheduler=scheduler, load_autoencoder=source.load_autoencoder)
    return Stage(
        model=decoder,
        loss=loss,
        dataset=source.dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, source.dataset),
        validation=source.validation,
        preview=preview,
    )


def build_training_condition(config: Config, decoder: Any, batch: Batch) -> ImageCondition:
    """Return the condition of a training step, with captions and z_i dropped independently for some samples."""
    assert batch.image_embeds is not None and batch.latents is not None, "a decoder is trained on z_i and latents"
    z_i, latents = batch.image_embeds, batch.latents
    if decoder.noise_levels is not None:  # Stable unCLIP: any level, as it is told of in sampling
        levels = torch.randint(decoder.noise_levels, (len(z_i),), device=z_i.device)
        z_i = decoder.noise_image_embeds(z_i, torch.randn_like(z_i), levels)
    if config.embedding_noise:
        noise = torch.randn_like(z_i) * z_i.norm(dim=-1, keepdim=True) / z_i.shape[-1] ** 0.5
        z_i = z_i + config.embedding_noise * noise
    # z_i and the captions are dropped apart, so that guidance can leave out either or both.
    null = decoder.null(len(latents)).expand()
    text: Any = ImageCondition(z_i, batch.text if batch.tokens is None else batch.tokens).text
    if text is not None:
        text = drop_condition(text, null.text, config.caption_dropout)
    image: Any = drop_condition(ImageCondition(z_i), ImageCondition(null.embedding), config.embedding_dropout)
    masked_latents = None
    if config.reads_masks:
        height, width = latents.shape[-2:]
        masks = generate_random_masks(len(latents), height, width, latents.device)
        masked_latents = concat_masked_latents(latents, masks)
    return ImageCondition(image.embedding, text, masked_latents)


def load_init_decoder(config: Config, source: EncodingSource, public: PublicPart | None) -> Any:
    """Return the decoder `init`, ours or a public one."""
    init = str(config.init)
    if public is None:
        decoder = load_decoder(init, config.reads_masks)
    else:
        text_encoder = None if source.text_encoder_facts is None else source.load_text_encoder()
        decoder = load_trainable_decoder(public, source.load_clip, text_encoder)
    return prepare_init_model(decoder, init, config.model, **collect_decoder_arguments(config, source))


def load_decoder(folder: str, reads_masks: bool) -> Any:
    """Load a trained decoder; let one of ours read masks, by further input channels whose weights are zero."""
    decoder = load_model((*ARCHITECTURES.values(), *PUBLIC_DECODERS), folder)
    if not reads_masks or decoder.config.reads_masks or isinstance(decoder, PUBLIC_DECODERS):
        return decoder
    # The same model with more input channels
    arguments = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    wider = type(decoder)(**{**arguments, "reads_masks": True})
    weights = decoder.state_dict()
    # Zero weights for them, so that it starts with the predictions of before
    is_unet = isinstance(decoder, UNetDecoder)
    name = "net.conv_in.weight" if is_unet else "from_latents.weight"
    positions = 1 if is_unet else decoder.latent_multiple**2  # a transformer's tokens are squares of latents
    extra = wider.state_dict()[name].shape[1] - weights[name].shape[1]
    assert extra == (decoder.config.latent_channels + 1) * positions, "further channels come after the latents'"
    zeros = weights[name].new_zeros(len(weights[name]), extra, *weights[name].shape[2:])
    weights[name] = torch.cat([weights[name], zeros], dim=1)
    wider.load_state_dict(weights)
    return wider


def export_text_encoder(source: EncodingSource, output: Path) -> None:
    """Save the decoder's text encoder, unless it is there already; delete one of an older run that had another."""
    folder = find_text_encoder_folder(output)
    if source.text_encoder_facts is None:
        if folder is not None:
            shutil.rmtree(folder)
    elif folder is None or read_stored_fingerprint(folder) != source.text_encoder_facts.identity:
        save_model_folder(source.load_text_encoder(), output, "text_encoder")


def collect_decoder_arguments(config: Config, source: EncodingSource) -> dict[str, Any]:
    """Return the model's arguments that the configuration and the frozen models decide."""
    clip, autoencoder, text_encoder = source.clip_facts, source.autoencoder_facts, source.text_encoder_facts
    assert autoencoder is not None
    text_width = clip.text_width if text_encoder is None else text_encoder.width
    return {
        "embed_dim": clip.embed_dim,
        "latent_channels": autoencoder.channels,
        "latent_size": config.data.image_size // autoencoder.factor,
        "text_width": text_width if config.reads_captions else None,
        "clip_fingerprint": clip.identity,
        "reads_masks": config.reads_masks,
        "text_encoder_fingerprint": None if text_encoder is None else text_encoder.identity,
    }


if __name__ == "__main__":
    run(main, Config, "decoder", sys.argv[1:])
