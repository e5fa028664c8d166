"""Train the decoder: image embedding -> latents.

accelerate launch training/train_decoder.py configs/emoji/decoder.yaml train.steps=1000
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from t2i.training.common.encodings import EncodingSource, open_source, read_stored_fingerprint
from t2i.training.common.entry import run
from t2i.training.common.finetuning import load_init_model, resolve_init_scheduler
from t2i.training.common.loop import Stage, build_accelerator, fit
from t2i.training.common.lora import LoraConfig, add_adapters, check_lora_init, export_adapted_model
from t2i.training.common.preview import Preview, SampleConfig, choose_columns

from t2i.checks import check_choice, check_multiple_of, check_range
from t2i.config import DataConfig, TrainConfig, build_or_explain
from t2i.data import Batch
from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.inpainting import concat_masked_latents, generate_random_masks
from t2i.diffusion.loss import check_loss_weighting, compute_diffusion_loss, drop_condition
from t2i.diffusion.process import build_noise_scheduler
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.model_folder import load_model, save_model_folder
from t2i.interop.by_name import find_text_encoder_folder, load_text_encoder
from t2i.interop.parts import PublicPart, find_public_part
from t2i.interop.trainable import PUBLIC_DECODERS, check_part_trainable, load_trainable_decoder
from t2i.networks.decoder import Decoder
from t2i.networks.text_encoder import DTYPES, MAX_TOKENS, TextEncoder
from t2i.networks.unet_decoder import UNetDecoder

ARCHITECTURES = {"transformer": Decoder, "unet": UNetDecoder}


@dataclass
class Config:
    clip: str = (
        "???"  # folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    )
    # Folder of a trained autoencoder; a diffusers VAE, or the public pipeline that `init` is of: a folder or a hub name
    autoencoder: str = "???"
    cache: str | None = None  # folder that `t2i data cache` wrote; without one, pictures are encoded in every step
    architecture: str = "unet"  # or transformer
    model: dict[str, Any] = field(default_factory=dict)  # its arguments, but for what CLIP and the autoencoder tell
    # Folder of a trained decoder to start from, instead of random weights; or Karlo's or Kandinsky's, by the folder or
    # hub name of the pipeline. Its architecture stays as it is.
    init: str | None = None
    lora: LoraConfig | None = None  # train adapters of this rank on `init`, not its weights: rank, alpha, targets
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDIMScheduler; else as of `init`
    reads_captions: bool = False  # caption tokens as a second condition
    text_encoder: str | None = None  # where they come from: T5, BERT, ... (a folder, or a hub name); null is CLIP
    text_encoder_tokens: int = 128  # of a caption at most, fewer if the encoder knows fewer; what is longer is cut
    text_encoder_dtype: str = "float32"  # or bfloat16, which takes half the memory, or float16
    embedding_dropout: float = 0.1
    caption_dropout: float = 0.5
    reads_masks: bool = False  # inpainting: the decoder sees the latents that are to stay beside the noisy ones
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which lets the steps of low noise count less
    min_snr_gamma: float = 5.0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # what is drawn every train.sample_every steps

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        check_range("embedding_dropout", self.embedding_dropout, 0, 1)
        check_range("caption_dropout", self.caption_dropout, 0, 1)
        check_range("timestep_shift", self.timestep_shift, 0.01, 100)
        check_range("min_snr_gamma", self.min_snr_gamma, 0.01, 1000)
        check_loss_weighting(build_noise_scheduler(self.scheduler), self.loss_weighting)
        check_lora_init(self.lora, self.init)
        check_range("text_encoder_tokens", self.text_encoder_tokens, 3, MAX_TOKENS)
        check_choice("text_encoder_dtype", self.text_encoder_dtype, tuple(DTYPES))
        if self.text_encoder is not None and not self.reads_captions:
            raise InputError(f"text_encoder={self.text_encoder!r} is for a decoder with reads_captions=true")

    @property
    def load_text_encoder(self) -> Callable[[], TextEncoder] | None:
        if self.text_encoder is None:
            return None
        return partial(load_text_encoder, self.text_encoder, self.text_encoder_tokens, DTYPES[self.text_encoder_dtype])


def main(config: Config) -> None:
    check_part_trainable(config.init, "unet", ("projection",))
    names = (config.clip, config.autoencoder, config.reads_captions)
    source = open_source(config.cache, config.data, *names, config.load_text_encoder)
    accelerator = build_accelerator(config.train)
    fit(accelerator, build_stage(config, source, accelerator.device), config.train)


def build_stage(config: Config, source: EncodingSource, device: torch.device) -> Stage:
    source.to(device)
    assert source.autoencoder is not None
    check_multiple_of("data.image_size", config.data.image_size, source.autoencoder.factor)
    made_from: dict[str, Any] = {"text_encoder": None, **source.made_from}
    needed = collect_decoder_arguments(config, source)
    public = None if config.init is None else find_public_part(config.init, ("unet",), ("projection",))
    scheduler = resolve_init_scheduler(
        config.init, config.scheduler, public and public.source.find_folder("decoder_scheduler")
    )
    check_loss_weighting(scheduler, config.loss_weighting)
    if config.init is None:
        decoder = build_or_explain(ARCHITECTURES[config.architecture], "model", config.model, **needed)
    else:
        load: Callable[[str], Any] = partial(load_decoder, reads_masks=config.reads_masks)
        if public is not None:
            load = partial(load_public_decoder, public, source)
        decoder = load_init_model(load, config.init, config.model, **needed)
        made_from["init"] = compute_weights_fingerprint(decoder)
    if config.lora is not None:
        add_adapters(decoder, config.lora)
    decoder.to(device)

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = source.encode(batch)
        x, text = batch.latents, batch.tokens or batch.text
        z_i = decoder.noise_image_embeds(batch.image_embeds)
        null = decoder.null(len(x)).expand()
        if text is not None:
            text = drop_condition(ImageCondition(z_i, text).text, null.text, config.caption_dropout)
        condition = drop_condition(ImageCondition(z_i), ImageCondition(null.embedding), config.embedding_dropout)
        known = None
        if config.reads_masks:
            known = concat_masked_latents(x, generate_random_masks(len(x), *x.shape[-2:], x.device))
        condition = ImageCondition(condition.embedding, text, known)
        weighting = (config.timestep_shift, config.loss_weighting, config.min_snr_gamma)
        return compute_diffusion_loss(model, scheduler, x, condition, *weighting)[0]

    def export(average: torch.nn.Module) -> None:
        export_adapted_model(average, Path(config.train.output))
        save_model_folder(scheduler, Path(config.train.output), "scheduler")
        export_text_encoder(source, Path(config.train.output))

    preview = None
    if config.train.sample_every:
        drawn = Preview(config.sample, choose_columns(source, config.sample), source.clip.identity)
        preview = partial(drawn.preview_decoder, scheduler=scheduler, load_autoencoder=source.load_autoencoder)
    workers, held_out = config.data.num_workers, source.validation
    return Stage(decoder, loss, source.dataset, export, made_from, asdict(config), workers, held_out, preview)


def load_decoder(folder: str, reads_masks: bool) -> Any:
    """A trained decoder; one of ours that reads no masks learns it: what it reads them with starts at zero."""
    decoder = load_model((*ARCHITECTURES.values(), *PUBLIC_DECODERS), folder)
    if not reads_masks or decoder.config.reads_masks or isinstance(decoder, PUBLIC_DECODERS):
        return decoder
    arguments = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    wider = type(decoder)(**{**arguments, "reads_masks": True})
    weights, patch = decoder.state_dict(), getattr(decoder.config, "patch_size", 1)
    name = "net.conv_in.weight" if isinstance(decoder, UNetDecoder) else "from_latents.weight"
    extra = wider.state_dict()[name].shape[1] - weights[name].shape[1]
    assert extra == (decoder.config.latent_channels + 1) * patch**2, "further channels come after the latents'"
    weights[name] = torch.cat(
        [weights[name], weights[name].new_zeros(len(weights[name]), extra, *weights[name].shape[2:])], dim=1
    )
    wider.load_state_dict(weights)
    return wider


def load_public_decoder(found: PublicPart, source: EncodingSource, init: str) -> Any:
    """Karlo's or Kandinsky's decoder; its null is what the source's models say of nothing."""
    text_encoder = None if source.text_encoder is None else source.load_text_encoder()
    return load_trainable_decoder(found, source.load_clip, text_encoder)


def export_text_encoder(source: EncodingSource, output: Path) -> None:
    """Once, for it does not change; without one, an older run's goes."""
    folder = find_text_encoder_folder(output)
    if source.text_encoder is None:
        if folder is not None:
            shutil.rmtree(folder)
    elif folder is None or read_stored_fingerprint(folder) != source.text_encoder.identity:
        save_model_folder(source.load_text_encoder(), output, "text_encoder")


def collect_decoder_arguments(config: Config, source: EncodingSource) -> dict[str, Any]:
    """What a decoder takes over from the models that it is trained with."""
    clip, autoencoder, text_encoder = source.clip, source.autoencoder, source.text_encoder
    assert autoencoder is not None
    text_width = clip.text_width if text_encoder is None else text_encoder.width
    return {
        "embed_dim": clip.embed_dim,
        "latent_channels": autoencoder.channels,
        "latent_size": config.data.image_size // autoencoder.factor,
        "text_width": text_width if config.reads_captions else None,
        "clip_fingerprint": clip.identity,
        "reads_masks": config.reads_masks,
        "text_encoder_fingerprint": text_encoder and text_encoder.identity,
    }


if __name__ == "__main__":
    run(main, Config, "decoder", sys.argv[1:])
