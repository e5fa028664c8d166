"""A caption in, pictures out."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Generator, Tensor

from t2i.autoencoder import Autoencoder
from t2i.checkpoint import loaded
from t2i.clip import CLIP
from t2i.condition import TextEncoding
from t2i.config import check_choice, check_integer, check_range
from t2i.decoder import Decoder
from t2i.errors import InputError
from t2i.prior import Prior
from t2i.sampling import MAX_SCALE, MAX_STEPS, check_texts, sample_decoder, sample_prior, split_generators
from t2i.unet_decoder import UNetDecoder
from t2i.untrusted import check_files, check_model, check_scheduler, is_folder, reach, read_config

logger = logging.getLogger(__name__)

MAX_IMAGES = 1024
PARTS: dict[str, tuple[type, ...]] = {  # what a folder's components may be; a part of the file format
    "clip": (CLIP,),
    "prior": (Prior,),
    "prior_scheduler": (SchedulerMixin,),
    "decoder": (Decoder, UNetDecoder),
    "decoder_scheduler": (SchedulerMixin,),
    "autoencoder": (Autoencoder,),
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class Text2ImagePipelineOutput(BaseOutput):
    """What the pipeline returns.

    images: PIL pictures; or, by `output_type`, (N, H, W, 3) numpy or (N, 3, H, W) torch in [0, 1], or latents.
    image_embeds: (N, D), unit length: the z_i that were drawn.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    image_embeds: Tensor


class Text2ImagePipeline(DiffusionPipeline):
    """Caption -> z_t -> (prior) -> z_i -> (decoder) -> latents -> (autoencoder) -> picture."""

    model_cpu_offload_seq = "clip->prior->decoder->autoencoder"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        clip: CLIP,
        prior: Prior,
        prior_scheduler: SchedulerMixin,
        decoder: Decoder | UNetDecoder,
        decoder_scheduler: SchedulerMixin,
        autoencoder: Autoencoder,
    ):
        super().__init__()
        for name, model in {"prior": prior, "decoder": decoder}.items():
            theirs = model.config.clip_fingerprint
            if theirs is not None and theirs != clip.identity:
                raise InputError(f"the {name} was trained with the CLIP {theirs}, this pipeline has {clip.identity}")
        if decoder.config.latent_channels != autoencoder.channels:
            channels = f"{decoder.config.latent_channels} channels, the autoencoder's have {autoencoder.channels}"
            raise InputError(f"the decoder's latents have {channels}; they were not trained together")
        self.register_modules(
            clip=clip,
            prior=prior,
            prior_scheduler=prior_scheduler,
            decoder=decoder,
            decoder_scheduler=decoder_scheduler,
            autoencoder=autoencoder,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=autoencoder.factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Text2ImagePipeline":
        """A folder that `save_pretrained` or `t2i assemble` wrote, or the name of a repository on the hub.

        Raises InputError, in one line, if it is missing, incomplete, truncated or made of parts of different CLIPs.
        """
        path = Path(pretrained_model_name_or_path)
        if not is_folder(path):
            path = Path(cls.download(str(path), **kwargs))
        check_folder(path, [name for name in PARTS if name not in kwargs], kwargs.get("variant"))
        settings = {**kwargs, "use_safetensors": True}
        return loaded(lambda folder: super(Text2ImagePipeline, cls).from_pretrained(folder, **settings), path)

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **kwargs: Any) -> str:
        """Fetch a whole repository: diffusers' own download refuses components of other packages."""
        accepted = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        options = {name: kwargs[name] for name in accepted if kwargs.get(name) is not None}
        try:
            if Path(pretrained_model_name).exists():
                raise InputError(f"{str(pretrained_model_name)!r} is a file; give the folder of a model")
            options = {**reach(str(pretrained_model_name)), **options}
            return snapshot_download(str(pretrained_model_name), allow_patterns=["*.json", "*.safetensors"], **options)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"no folder {str(pretrained_model_name)!r:.200}, and no such model on the hub, or no hub ({error})"
            ) from error

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        generator: Generator | list[Generator] | None = None,
        prior_latents: Tensor | None = None,
        latents: Tensor | None = None,
        image_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> Text2ImagePipelineOutput | tuple:
        """Draw `num_images_per_prompt` pictures for each prompt: N in all, those of one prompt in a row.

        Args:
            prompt: a text or a list; may be left out if `image_embeds` is given.
            negative_prompt: what the prior is guided away from; one for all or one a prompt.
            prior_num_inference_steps, num_inference_steps: of the prior and the decoder, 1 to 1000.
            prior_guidance_scale, guidance_scale: of the prior and the decoder; 1 is off.
            generator: one for all, or one a picture. A picture depends on its own seed alone, not on the batch.
            prior_latents: (N, D), the noise that the prior starts from.
            latents: (N, C, h, w), the noise that the decoder starts from.
            image_embeds: (N, D), z_i to draw instead of the prior's; normalised to unit length.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images, image_embeds).
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step of the decoder;
                what it returns under "latents" is used.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        check_settings(
            negative_prompt,
            num_images_per_prompt,
            prior_num_inference_steps,
            prior_guidance_scale,
            num_inference_steps,
            guidance_scale,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        prompts = self.check_prompts(prompt, negative_prompt, num_images_per_prompt, image_embeds)
        count = len(prompts) * num_images_per_prompt if image_embeds is None else len(image_embeds)
        prior_generators, decoder_generators = split_generators(generator, count)
        config = self.decoder.config
        self.check_noise("prior_latents", prior_latents, (count, self.clip.embed_dim))
        self.check_noise("latents", latents, (count, config.latent_channels, config.latent_size, config.latent_size))

        if negative_prompt is not None and (prior_guidance_scale == 1 or image_embeds is not None):
            logger.warning("negative_prompt has no effect: it guides the prior, which is not guided or not used here")
        text = self.encode_prompt(prompts).repeat(num_images_per_prompt) if prompts else None
        if image_embeds is None:
            assert text is not None, "check_prompts wants prompts or embeddings"
            negative = None
            if negative_prompt is not None:
                negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
                negative = self.encode_prompt(negatives).repeat(num_images_per_prompt)
            z_i = self.sample_prior(
                text, negative, prior_num_inference_steps, prior_guidance_scale, prior_generators, prior_latents
            )
        else:
            z_i = torch.nn.functional.normalize(image_embeds.to(self._execution_device).float(), dim=-1)

        def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return latents
            return callback_on_step_end(self, step, timestep, {"latents": latents}).pop("latents", latents)

        x = self.sample_decoder(z_i, text, num_inference_steps, guidance_scale, decoder_generators, latents, on_step)
        images = x if output_type == "latent" else self.decode(x, output_type)
        self.maybe_free_model_hooks()
        return Text2ImagePipelineOutput(images, z_i) if return_dict else (images, z_i)

    def check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        image_embeds: Tensor | None,
    ) -> list[str]:
        """Refuse what does not go together; the prompts as a list."""
        if image_embeds is None and (prompt is None or prompt == []):
            raise InputError("prompt is missing; give a text, a list of texts, or image_embeds")
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        check_texts("prompt", prompts, empty=False)
        if isinstance(negative_prompt, list) and len(negative_prompt) != len(prompts):
            raise InputError(f"negative_prompt has {len(negative_prompt)} texts for {len(prompts)} prompts")
        if image_embeds is not None:
            if not isinstance(image_embeds, Tensor) or image_embeds.ndim != 2 or not len(image_embeds):
                raise InputError(f"image_embeds must be a tensor (N, {self.clip.embed_dim}), got {image_embeds!r:.80}")
            self.check_noise("image_embeds", image_embeds, (len(image_embeds), self.clip.embed_dim))
            if prompts and len(prompts) * num_images_per_prompt != len(image_embeds):
                asked = len(prompts) * num_images_per_prompt
                raise InputError(f"image_embeds has {len(image_embeds)} rows, the prompts ask for {asked} pictures")
        return list(prompts)

    def check_noise(self, name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} must be a tensor of shape {shape}, got {got}")
        if not value.isfinite().all():
            raise InputError(f"{name} must be finite, got NaN or infinity")

    def encode_prompt(self, prompts: list[str]) -> TextEncoding:
        """Says in the log what of a prompt does not fit."""
        for prompt in dict.fromkeys(prompts):
            if cut := self.clip.tokenizer.cut(prompt):
                longest = self.clip.context_length - 2
                logger.warning("a prompt is longer than %d tokens; this was cut: %r", longest, cut)
        tokens = self.clip.tokenizer(prompts).to(self._execution_device)
        return self.clip.encode_tokens(tokens)

    def sample_prior(
        self,
        text: TextEncoding,
        negative: TextEncoding | None,
        steps: int,
        scale: float,
        generators: list[Generator],
        noise: Tensor | None,
    ) -> Tensor:
        """z_i of unit length, (N, D), fp32."""
        text = text.to(self._execution_device, self.prior.dtype)
        settings = (steps, scale, generators, noise, self.progress_bar)
        return check_finite("prior", sample_prior(self.prior, self.prior_scheduler, text, negative, *settings))

    def sample_decoder(
        self,
        z_i: Tensor,
        text: TextEncoding | None,
        steps: int,
        scale: float,
        generators: list[Generator],
        noise: Tensor | None,
        on_step: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Latents of unit variance, (N, C, h, w), fp32."""
        settings = (steps, scale, generators, noise, self.progress_bar, on_step)
        x = sample_decoder(self.decoder, self.decoder_scheduler, z_i.to(self._execution_device), text, *settings)
        return check_finite("decoder", x)

    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        images = self.autoencoder.decode(latents.to(self._execution_device, self.autoencoder.dtype)).float()
        return self.image_processor.postprocess(check_finite("autoencoder", images), output_type)


def check_folder(path: Path, names: list[str], variant: str | None = None) -> None:
    """Refuse a folder that is no whole pipeline of this project's own parts, or where one of `names` is not sound."""
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(f"no model_index.json in {str(path)!r}; a model folder is what `t2i assemble` writes")
    check_files(path)
    entries = read_config(index)
    if unknown := sorted(key for key in entries.keys() - PARTS.keys() if not key.startswith("_")):
        raise InputError(f"{str(index)!r} has {unknown[0]!r:.80}; it may have {', '.join(PARTS)}")
    if entries.get("_class_name") != "Text2ImagePipeline":
        raise InputError(f"{str(index)!r} is of {entries.get('_class_name')!r:.80}; it must be a Text2ImagePipeline")
    if missing := [name for name in PARTS if name not in entries or not is_folder(path / name)]:
        raise InputError(f"{str(path)!r} is incomplete: it lacks the folders {', '.join(missing)}")
    for name in names:
        home, kind = entry if isinstance(entry := entries[name], list) and len(entry) == 2 else (None, None)
        if PARTS[name] == (SchedulerMixin,) and home == "diffusers":
            check_scheduler(path / name, kind, path)
        elif part := next((part for part in PARTS[name] if [home, kind] == [part.__module__, part.__name__]), None):
            check_model(part, path / name, path, variant)
        else:
            allowed = f"{str(entry)[:80]} as {name}; only this project's own parts are loaded"
            raise InputError(f"{str(index)!r} asks for {allowed}")


def check_settings(
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int = 1,
    prior_num_inference_steps: int = 1,
    prior_guidance_scale: float = 1.0,
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    output_type: str = "pil",
    tensor_inputs: list[str] | None = None,
) -> None:
    """What can be refused without a model."""
    check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    check_integer("prior_num_inference_steps", prior_num_inference_steps, 1, MAX_STEPS)
    check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    check_number("prior_guidance_scale", prior_guidance_scale, 0, MAX_SCALE)
    check_number("guidance_scale", guidance_scale, 0, MAX_SCALE)
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if unknown := sorted(set(tensor_inputs or []) - {"latents"}):
        raise InputError(f"callback_on_step_end_tensor_inputs may hold 'latents', got {', '.join(unknown)}")
    if negative_prompt is not None:
        check_texts("negative_prompt", [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    check_range(name, value, low, high)


def check_finite(stage: str, x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError(f"the {stage} returned values that are not finite; its weights or the precision are at fault")
    return x
