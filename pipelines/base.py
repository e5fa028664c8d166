"""Base of the pipelines that draw with unCLIP: their components, and what is encoded and decoded with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from t2i.pipelines.argument_checks import check_images, check_tensor
from t2i.pipelines.calls.adapters import Adapters
from t2i.pipelines.calls.aliases import DiffusersNames, resolve_aliases
from t2i.pipelines.calls.callbacks import CALLBACK_TENSORS
from t2i.pipelines.calls.components import CheckedPipeline
from t2i.pipelines.calls.encoding import PromptEncoding
from t2i.pipelines.calls.progress import Interruptible
from t2i.pipelines.folder import (
    COMPONENT_CLASSES,
    OPTIONAL_COMPONENTS,
    AnyAutoencoder,
    AnyCLIP,
    AnyDecoder,
    AnyTextEncoder,
    PipelineFolder,
    check_component_types,
)
from t2i.pipelines.loading import FETCH_ARGUMENTS, build_own_arguments, load_public_components
from t2i.pipelines.options import OUTPUT_TYPES, DecoderOptions, ResolvedOptions, build_options, list_prior_defaults
from t2i.pipelines.stages import check_finite_values, sample_super_resolution
from torch import Generator, Tensor

from t2i.checks import check_choice, check_multiple_of
from t2i.files.known_words import UnknownWord
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import is_folder
from t2i.interop.fetching import fetch_model_folder
from t2i.interop.folders import normalize_index
from t2i.interop.stored import check_dtype, has_bf16
from t2i.networks.upsampler import Upsampler
from t2i.runtime.compiling import check_compiler, compile_steps
from t2i.runtime.devices import check_bf16_support, warn_of_slow_bf16
from t2i.runtime.memory import run_in_halves
from t2i.sampling.embeddings import AnyPrior

MAX_IMAGES = 1024


@dataclass
class UnCLIPPipelineOutput(BaseOutput):
    """Result of a pipeline.

    images: PIL images; or, by `output_type`, (N, H, W, 3) numpy or (N, 3, H, W) torch in [0, 1], or latents.
    image_embeds: (N, D): the z_i of the images, of unit length if the CLIP's `unit_length`.
    unknown_words: words of the texts that were in no caption in training; None without any, or if they are not known.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    image_embeds: Tensor
    unknown_words: list[UnknownWord] | None = None


class UnCLIPPipeline(Adapters, DiffusersNames, PromptEncoding, Interruptible, CheckedPipeline):
    """CLIP, prior, decoder, autoencoder, upsampler and text encoder. All pipelines load from the same folders.

    A subclass adds a `__call__`; `from_pipe` shares the components without copies. Arguments that the calls share:

        image: images to start from; see `t2i.pipelines.inputs.read_images`.
        prompt: content of the images: one text for all, or one for each given image.
        negative_prompt: text that the prior is guided away from; one for all or one for each, as `prompt`.
        num_images_per_prompt: images for each prompt or given image. Those of one are in a row.
        generator: one for all, or one for each image. An image depends on its own seed alone, not on its batch.
        image_embeds: z_i of what is drawn, in place of the prior's and of that of given images: (P, D), a row for each
            of them, or (N, D), one for each image that is drawn.
        prompt_embeds, negative_prompt_embeds: encodings in place of the texts: what `encode_prompt` returns, or
            (states, pooled) or (states, pooled, mask); see `t2i.pipelines.calls.texts.read_prompt_embeds`.
        return_dict: False returns the tuple (images, image_embeds) in place of a `UnCLIPPipelineOutput`.
        options: fields of `t2i.pipelines.options.PriorOptions` and `DecoderOptions`.

    Each raises InputError for a value that is not allowed, before any work starts.
    """

    model_cpu_offload_seq = "clip->text_encoder->prior->decoder->autoencoder->upsampler"
    _callback_tensor_inputs = list(CALLBACK_TENSORS)
    _optional_components = list(OPTIONAL_COMPONENTS)
    component_aliases = {"scheduler": "decoder_scheduler", "unet": "decoder", "vae": "autoencoder"}

    # Components: construction, loading and saving

    def __init__(
        self,
        clip: AnyCLIP,
        decoder: AnyDecoder,
        decoder_scheduler: SchedulerMixin,
        autoencoder: AnyAutoencoder,
        prior: AnyPrior | None = None,
        prior_scheduler: SchedulerMixin | None = None,
        upsampler: Upsampler | None = None,
        upsampler_scheduler: SchedulerMixin | None = None,
        text_encoder: AnyTextEncoder | None = None,
    ):
        super().__init__()
        self.register_modules(
            clip=clip,
            decoder=decoder,
            decoder_scheduler=decoder_scheduler,
            autoencoder=autoencoder,
            prior=prior,
            prior_scheduler=prior_scheduler,
            upsampler=upsampler,
            upsampler_scheduler=upsampler_scheduler,
            text_encoder=text_encoder,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=autoencoder.factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a folder or from a repository on the hub.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` or `t2i assemble` wrote, one in a public
                layout (`t2i.interop.layouts`), or the name of a repository.
            prior: a component; or, for a public model in two parts, the folder or repository of the other part. May be
                left out for a decoder's repository whose prior is known. May also name a prior alone: a run's folder,
                or a PriorTransformer.
            clip: a component; or the folder or repository of a public model's CLIP, if neither part has it.
            dtype: data type of the weights; or a dict of dtypes by component (`t2i.interop.stored.DTYPE_PARTS`), in
                which "default" is the rest. "auto" is the stored dtype. None is the stored dtype for public models,
                also after they were saved here, and float32 for models that were trained here, which may be stored in
                half precision. torch.bfloat16 is refused where the machine cannot compute in it.
            variant: suffix of the file names, such as "fp16". A component without files of it is read from its plain
                ones.
            compile: compile the decoder's steps, once for each size and number of images and each length of captions
                that it reads, at the first step of each.
            kwargs: other components, which replace those of the folder, and diffusers' arguments.

        Raises InputError, in one line, if the model is missing, incomplete, truncated or made of parts of different
        CLIPs, and for a variant that no component has.
        """
        # Check the arguments
        kwargs = resolve_aliases(kwargs, cls.component_aliases)
        older = kwargs.pop("torch_dtype", None)  # the older name of `dtype`
        kwargs["dtype"] = check_dtype(older if kwargs.get("dtype") is None else kwargs["dtype"])
        if has_bf16(kwargs["dtype"]):
            check_bf16_support()
        if kwargs.pop("compile", False):
            check_compiler()
            pipeline = cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
            compile_steps(pipeline.decoder)
            return pipeline
        named = [part for part in ("prior", "clip") if isinstance(kwargs.get(part), str | Path)]
        check_component_types({part: kwargs[part] for part in COMPONENT_CLASSES if part in kwargs.keys() - named})

        # Find the folder, and load it
        path = Path(pretrained_model_name_or_path)
        if not is_folder(path):
            path = Path(cls.download(str(path), **kwargs))
        folder = PipelineFolder(path, kwargs.get("variant"))
        schedulers = folder.pop_replaced_schedulers(kwargs)
        if folder.is_own:
            settings = {**build_own_arguments(folder, cls.download, **kwargs), "use_safetensors": True}
            # diffusers looks for the class that the folder names in the class of the caller, so super() must be bound.
            pipeline = load_or_explain(lambda path: super(UnCLIPPipeline, cls).from_pretrained(path, **settings), path)
            if "clip" not in kwargs:
                folder.check_saved_clip(pipeline.clip)
        else:
            name = str(pretrained_model_name_or_path)
            pipeline = cls(**load_public_components(name, folder, cls.download, **kwargs))
            pipeline.register_to_config(_name_or_path=name)
        # In this order, because the caller's schedulers are compared with those of the training
        pipeline.remember_training(given=kwargs.keys() - named)
        pipeline.register_modules(**schedulers)
        warn_of_slow_bf16(pipeline.components)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the index that diffusers loads components by, which names no code of the folder."""
        config = super().load_config(*args, **kwargs)
        return normalize_index(config) if isinstance(config, dict) else config

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the index. Beside public models, which do not store which CLIP is theirs, it has the fingerprint."""
        if not self.clip.unit_length:
            self.register_to_config(_clip_fingerprint=self.clip.identity)
        super().save_config(save_directory, *args, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **kwargs: Any) -> str:
        """Download what is read of a repository. diffusers' own method refuses components of other packages."""
        options = {name: kwargs[name] for name in FETCH_ARGUMENTS if kwargs.get(name) is not None}
        return str(fetch_model_folder(pretrained_model_name, variant=kwargs.get("variant"), **options))

    # Sizes and options

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of the latents, (C, h, w), that the decoder was trained on."""
        config = self.decoder.config
        return config.latent_channels, config.latent_size, config.latent_size

    @property
    def image_size(self) -> int:
        """The side, in pixels, of the images that the decoder was trained on."""
        return self.decoder.config.latent_size * self.autoencoder.factor

    @property
    def is_cascade(self) -> bool:
        """True if decoding is a diffusion of its own."""
        return self.autoencoder.is_cascade

    def compute_image_shape(self, options: DecoderOptions) -> tuple[int, int]:
        """Return the height and width, in pixels, that the options ask for."""
        return options.height or self.image_size, options.width or self.image_size

    def compute_latent_shape(self, options: DecoderOptions) -> tuple[int, int, int]:
        """Return (C, h, w) of the images that the options ask for."""
        height, width = self.compute_image_shape(options)
        return self.latent_shape[0], height // self.autoencoder.factor, width // self.autoencoder.factor

    @property
    def default_decoder_options(self) -> dict[str, Any]:
        """Defaults of `DecoderOptions` that depend on the decoder."""
        decoder = self.decoder
        return {"num_inference_steps": decoder.default_steps, "guidance_scale": decoder.default_guidance_scale}

    def resolve_options(self, resolved: ResolvedOptions | None = None, **options: Any) -> ResolvedOptions:
        """Return the checked options of both stages, with this model's defaults for those that are left out.

        Each `__call__` passes its `**options` through here. A caller that draws many times resolves them once and then
        calls the pipeline with `resolved=...`, which is returned as it is.

        Raises:
            InputError: for a value that is not allowed.
            TypeError: for an unknown name.
        """
        if resolved is not None:
            return resolved
        return self.build_options(options, self.default_decoder_options | list_prior_defaults(self.prior))

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options of this kind of pipeline, also before a model is loaded. See `options.build_options`."""
        return build_options(options, defaults)

    # Encoding and decoding

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images, (N, 3, H, W) in [-1, 1], by CLIP as z_i, (N, D), fp32. Raises InputError for others."""
        check_images(images)
        self.offload_all_but("clip")
        z_i = run_in_halves(self.clip.encode_image, images.to(self._execution_device, self.clip.dtype))
        return self.normalize_embeds(check_finite_values("CLIP", z_i.float()))

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images, (N, 3, H, W) in [-1, 1], as latents of unit variance, (N, C, h, w), fp32.

        Raises InputError for others, and for sides that are no multiples of the autoencoder's factor.
        """
        check_images(images)
        for name, side in zip(("height", "width"), images.shape[-2:]):
            check_multiple_of(f"{name} of images", side, self.autoencoder.factor)
        self.offload_all_but("autoencoder")
        latents = run_in_halves(self.autoencoder.encode, images.to(self._execution_device, self.autoencoder.dtype))
        return check_finite_values("autoencoder", latents.float())

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        options: DecoderOptions | None = None,
        generators: list[Generator] | None = None,
    ) -> Any:
        """Decode latents into images in the form of `output_type`. options, generators: see `decode_images`."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_images(latents, options, generators), output_type)

    @torch.no_grad()
    def decode_images(
        self, latents: Tensor, options: DecoderOptions | None = None, generators: list[Generator] | None = None
    ) -> Tensor:
        """Decode latents into images, (N, 3, H, W), fp32, about in [-1, 1].

        The decoding of a cascade (Karlo) is a diffusion, which needs the options and generators of the decoder. Without
        them, as for previews, a cascade only enlarges the latents. Raises InputError for latents of another shape.
        """
        check_tensor("latents", latents, ("N", self.latent_shape[0], "h", "w"))
        latents = latents.to(self._execution_device, self.autoencoder.dtype)
        if options is not None:  # the last stage, not a preview
            self.offload_all_but("autoencoder")
        if options is None or generators is None or not self.is_cascade:
            return check_finite_values("autoencoder", run_in_halves(self.autoencoder.decode, latents).float())
        return sample_super_resolution(self, latents, options, generators)

    def build_output(self, images: Any, z_i: Tensor, return_dict: bool) -> UnCLIPPipelineOutput | tuple:
        """Return the result of a call, and release the device from offloaded models."""
        self.maybe_free_model_hooks()
        return UnCLIPPipelineOutput(images, z_i) if return_dict else (images, z_i)
