"""The stages of unCLIP in a pipeline: how they are loaded, what goes with what, and what can be asked of them."""

import copy
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
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
from t2i.pipelines.options import DecoderOptions, PriorOptions, ResolvedOptions, build_options
from t2i.pipelines.watched import WatchedPipeline
from torch import Tensor

from t2i.checks import check_integer, check_multiple_of, check_range, check_texts
from t2i.diffusion.samplers import check_scheduler_sampling, resolve_sampler
from t2i.diffusion.sampling_loop import check_eta
from t2i.errors import InputError
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import is_folder
from t2i.interop.fetching import fetch_model_folder
from t2i.interop.folders import replace_old_modules
from t2i.interop.stored import has_bf16
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.upsampler import Upsampler
from t2i.runtime.compiling import check_compiler, compile_steps
from t2i.runtime.devices import check_bf16_support, warn_of_slow_bf16
from t2i.sampling.embeddings import AnyPrior, check_scale_only, default_guidance_scale
from t2i.sampling.steering import check_steering
from t2i.sampling.upsampling import check_upsampled_size


class StagedPipeline(WatchedPipeline):
    """CLIP, prior, decoder, autoencoder, upsampler and text encoder. All load from the same folders."""

    model_cpu_offload_seq = "clip->text_encoder->prior->decoder->autoencoder->upsampler"
    _callback_tensor_inputs = ["latents"]
    _optional_components = list(OPTIONAL_COMPONENTS)

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
        check_component_types({"clip": clip, "prior": prior, "decoder": decoder, "autoencoder": autoencoder})
        schedulers = {"decoder_scheduler": decoder_scheduler, "prior_scheduler": prior_scheduler}
        check_component_types({**schedulers, "upsampler_scheduler": upsampler_scheduler, "upsampler": upsampler})
        check_component_types({"text_encoder": text_encoder})
        for name, scheduler in schedulers.items():
            if scheduler is not None:
                check_scheduler_sampling(name, scheduler)
        for name, model in {"prior": prior, "decoder": decoder, "upsampler": upsampler}.items():
            fingerprint = None if model is None else model.config.clip_fingerprint
            if fingerprint is not None and fingerprint != clip.identity:
                raise InputError(
                    f"the {name} was trained with the CLIP {fingerprint}, this pipeline has {clip.identity}"
                )
        check_embed_widths(clip, prior, decoder)
        check_text_encoder(decoder, text_encoder)
        if (prior is None or not prior.needs_scheduler) != (prior_scheduler is None):
            what = "no prior" if prior is None else f"as prior a {type(prior).__name__}"
            has = "no prior_scheduler" if prior_scheduler is None else "a prior_scheduler"
            raise InputError(f"this pipeline has {what} and {has}; only the diffusion prior goes with a scheduler")
        if (upsampler is None) != (upsampler_scheduler is None):
            raise InputError("upsampler and upsampler_scheduler go together; one of them is missing")
        if decoder.config.latent_channels != autoencoder.channels:
            channels = f"{decoder.config.latent_channels} channels, the autoencoder's have {autoencoder.channels}"
            raise InputError(f"the decoder's latents have {channels}; they were not trained together")
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
            dtype: of the weights; or a dict of dtypes by component (`t2i.interop.stored.DTYPE_PARTS`), in which
                "default" is the rest. "auto" is the stored dtype. None is the stored dtype for public models, also
                after they were saved here, and float32 for models that were trained here, which may be stored in half
                precision. torch.bfloat16 is refused where the machine cannot compute in it.
            variant: of the file names, such as "fp16". A component without files of it is read from its plain ones.
            compile: compile the decoder's steps, once for each size and number of images and each length of captions
                that it reads, at the first step of each.
            kwargs: other components, which replace those of the folder, and diffusers' arguments.

        Raises InputError, in one line, if the model is missing, incomplete, truncated or made of parts of different
        CLIPs, and for a variant that no component has.
        """
        if any(has_bf16(kwargs.get(name)) for name in ("dtype", "torch_dtype")):
            check_bf16_support()
        if kwargs.pop("compile", False):
            check_compiler()
            pipeline = cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
            compile_steps(pipeline.decoder)
            return pipeline
        # Find the folder
        names = [part for part in ("prior", "clip") if isinstance(kwargs.get(part), str | Path)]
        check_component_types(
            {part: kwargs[part] for part in COMPONENT_CLASSES if part in kwargs and part not in names}
        )
        path = Path(pretrained_model_name_or_path)
        if not is_folder(path):
            path = Path(cls.download(str(path), **kwargs))
        folder = PipelineFolder(path, kwargs.get("variant"))
        # Load it
        if folder.is_own:
            settings = {**build_own_arguments(folder, cls.download, **kwargs), "use_safetensors": True}
            # diffusers looks for the class that the folder names in the class of the caller, so super() must be bound.
            pipeline = load_or_explain(lambda path: super(StagedPipeline, cls).from_pretrained(path, **settings), path)
            if "clip" not in kwargs:
                folder.check_saved_clip(pipeline.clip)
        else:
            name = str(pretrained_model_name_or_path)
            pipeline = cls(**load_public_components(name, folder, cls.download, **kwargs))
            pipeline.register_to_config(_name_or_path=name)
        warn_of_slow_bf16(pipeline.components)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the index that diffusers loads components by, with the modules of today."""
        config = super().load_config(*args, **kwargs)
        return replace_old_modules(config) if isinstance(config, dict) else config

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the index. Beside public models, which do not store which CLIP is theirs, it has the fingerprint."""
        if not self.clip.unit_length:
            self.register_to_config(_clip_fingerprint=self.clip.identity)
        super().save_config(save_directory, *args, **kwargs)

    def offload_all_but(self, *names: str) -> None:
        """Take the other components off the device, under `enable_model_cpu_offload`, until they are used again.

        Its hooks offload the component before in a caption's order alone. That is not enough where CLIP is followed by
        the autoencoder or the decoder.
        """
        kept = [getattr(self, name) for name in names]
        for hook in getattr(self, "_all_hooks", []):
            if not any(hook.model is model for model in kept):
                hook.offload()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Self:
        """Build this pipeline from the components of another one, which stay as they are; `components` replace some."""
        other = cls(**{**pipeline.components, **components})
        other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return other

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **kwargs: Any) -> str:
        """Download what is read of a repository. diffusers' own method refuses components of other packages."""
        options = {name: kwargs[name] for name in FETCH_ARGUMENTS if kwargs.get(name) is not None}
        return str(fetch_model_folder(pretrained_model_name, variant=kwargs.get("variant"), **options))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the pictures that the decoder was trained on."""
        config = self.decoder.config
        return config.latent_channels, config.latent_size, config.latent_size

    @property
    def is_cascade(self) -> bool:
        """True if decoding is a diffusion of its own."""
        return self.autoencoder.is_cascade

    @property
    def default_decoder_options(self) -> dict[str, Any]:
        """Defaults of `DecoderOptions` that depend on the decoder."""
        return {
            "num_inference_steps": self.decoder.default_steps,
            "guidance_scale": self.decoder.default_guidance_scale,
        }

    def compute_latent_shape(self, options: DecoderOptions) -> tuple[int, int, int]:
        """(C, h, w) of the pictures that the options ask for."""
        sides = ((side or self.image_size) // self.autoencoder.factor for side in (options.height, options.width))
        return self.latent_shape[0], *sides  # type: ignore[return-value]

    @property
    def image_size(self) -> int:
        """The side, in pixels, of the pictures that the decoder was trained on."""
        return self.decoder.config.latent_size * self.autoencoder.factor

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
        prior_default = {"prior_guidance_scale": default_guidance_scale(self.prior)}
        return self.build_options(options, self.default_decoder_options | prior_default)

    @classmethod
    def build_options(cls, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> ResolvedOptions:
        """Check the options of this kind of pipeline, also before a model is loaded. See `options.build_options`."""
        return build_options(options, defaults)

    # Checks of arguments and options

    def check_prompts(self, name: str, prompt: str | list[str] | None, count: int | None = None) -> list[str]:
        """Return texts as a list, one text repeated `count` times. Raises InputError for anything else."""
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        check_texts(name, prompts)
        if count is None or not prompts:
            return list(prompts)
        if isinstance(prompt, list) and len(prompts) != count:
            raise InputError(f"{name} has {len(prompts)} texts for {count} prompts")
        return list(prompts) if isinstance(prompt, list) else prompts * count

    def check_tensor(self, name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        """Raise InputError for a tensor of another shape, and for values that are not finite. None passes."""
        if value is None:
            return
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} must be a tensor of shape {shape}, got {got}")
        if not value.isfinite().all():
            raise InputError(f"{name} must be finite, got NaN or infinity")

    def check_stage_inputs(
        self, prior: PriorOptions | None, decoder: DecoderOptions, count: int, any_size: bool = False
    ) -> None:
        """Raise InputError for options that these stages do not take, to draw `count` images.

        prior: None if the prior is not used. any_size: allow other sizes than the decoder was trained on.
        """
        self.check_stage_options(prior, decoder)
        self.check_image_sides(decoder, any_size)
        channels, height, width = self.compute_latent_shape(decoder)
        height_in_pixels, width_in_pixels = height * self.autoencoder.factor, width * self.autoencoder.factor
        if decoder.steering is not None:
            check_steering("steering", decoder.steering, self.clip, self.autoencoder, count)
        if prior is not None:
            self.check_tensor("prior_latents", prior.prior_latents, (count, self.clip.embed_dim))
        self.check_tensor("latents", decoder.latents, (count, channels, height, width))
        self.check_tensor("image_embeds_noise", decoder.image_embeds_noise, (count, self.clip.embed_dim))
        self.check_super_resolution(decoder, (count, 3, height_in_pixels, width_in_pixels))
        self.check_upsampling(decoder, height_in_pixels, width_in_pixels)

    def check_stage_options(self, prior: PriorOptions | None, decoder: DecoderOptions) -> None:
        """Raise InputError for what these models and schedulers cannot do. prior: None if the prior is not used."""
        # The prior
        if prior is not None:
            if self.prior is None and self.clip.reads_captions and not self.clip.unit_length:
                raise InputError("this model has no prior; give prior=..., the folder of one, or image_embeds")
            if self.prior_scheduler is not None:
                scheduler = resolve_sampler(prior.prior_sampler, self.prior_scheduler, self.prior)
                check_step_count("prior_num_inference_steps", prior.prior_num_inference_steps, scheduler)
            elif prior.prior_sampler is not None:
                raise InputError(
                    f"prior_sampler needs a diffusion prior, which this is not; got {prior.prior_sampler!r}"
                )
            if isinstance(self.prior, AutoregressivePrior):
                check_scale_only(prior.prior_guidance_scale)

        # The decoder
        levels = self.decoder.noise_levels
        if levels is not None:
            check_integer("noise_level", decoder.noise_level, 0, levels - 1)
        elif decoder.noise_level or decoder.image_embeds_noise is not None:
            name = "noise_level" if decoder.noise_level else "image_embeds_noise"
            raise InputError(
                f"{name} needs a decoder that adds noise to image_embeds (Stable unCLIP's); this one does not"
            )
        scheduler = resolve_sampler(decoder.sampler, self.decoder_scheduler, self.decoder)
        check_eta(scheduler, decoder.eta)
        check_step_count("num_inference_steps", decoder.num_inference_steps, scheduler)

    def check_image_sides(self, options: DecoderOptions, any_size: bool) -> None:
        """Raise InputError for a height or width that cannot be drawn."""
        for name, side in {"height": options.height, "width": options.width}.items():
            if side in (None, self.image_size):
                continue
            if not any_size:
                raise InputError(f"{name} is {side}, but the images have the size of the given ones; leave it out")
            if options.steering is not None:
                raise InputError(f"{name} must be {self.image_size} for images that are steered, got {side}")
            check_multiple_of(name, side, self.autoencoder.factor * compute_latent_multiple(self.decoder))

    def check_super_resolution(self, options: DecoderOptions, shape: tuple[int, ...]) -> None:
        """Raise InputError for super_res_latents of another shape, and for super_res options without a cascade."""
        changed = [] if options.super_res_latents is None else ["super_res_latents"]
        if options.super_res_num_inference_steps != DecoderOptions.super_res_num_inference_steps:
            changed.append("super_res_num_inference_steps")
        if changed and not self.is_cascade:
            raise InputError(
                f"{changed[0]} needs a cascade, which ends with a super-resolution (Karlo); this model does not"
            )
        self.check_tensor("super_res_latents", options.super_res_latents, shape)

    def check_upsampling(self, options: DecoderOptions, height: int, width: int) -> None:
        """Raise InputError if images of this size cannot be upsampled as the options say."""
        if not options.upsample:
            return
        if self.upsampler is None or self.upsampler_scheduler is None:
            raise InputError(f"upsample is {options.upsample}, but this pipeline has no upsampler; load one")
        check_range("upsample_level", options.upsample_level, 0, self.upsampler.config.max_level)
        check_upsampled_size(self.upsampler, width, height, options.upsample)
        check_step_count("upsample_steps", options.upsample_steps, self.upsampler_scheduler)


def compute_latent_multiple(decoder: Any) -> int:
    """Return what the sides of a decoder's latents must be a multiple of: a U-Net halves them, others cut patches."""
    parts = dict(decoder.named_children())
    net = parts.get("net", parts.get("unet"))
    return decoder.config.get("patch_size", 1) if net is None else 2 ** (len(net.config.block_out_channels) - 1)


def check_embed_widths(clip: AnyCLIP, prior: AnyPrior | None, decoder: AnyDecoder) -> None:
    """Refuse stages whose embeddings have other dimensions than the CLIP's, or its token states, where they say so."""
    for name, model in {"prior": prior, "decoder": decoder}.items():
        if model is not None and model.config.embed_dim != clip.embed_dim:
            width = f"the CLIP's have {clip.embed_dim}"
            raise InputError(f"the {name}'s embeddings have {model.config.embed_dim} dimensions, {width}: another CLIP")
        states = None if model is None else model.states_width
        if states is not None and clip.reads_captions and states != clip.text_width:
            width = f"the CLIP's have {clip.text_width}"
            raise InputError(f"the {name} reads token states of {states} dimensions, {width}: another CLIP")


def check_text_encoder(decoder: AnyDecoder, text_encoder: AnyTextEncoder | None) -> None:
    """Refuse another text encoder than the decoder was trained with, one that it does not read, or none."""
    expected = decoder.config.get("text_encoder_fingerprint")
    identity = None if text_encoder is None else text_encoder.identity
    if identity != expected:
        captions = f"captions from the text encoder {expected}" if expected else "no text encoder's captions"
        raise InputError(f"the decoder was trained with {captions}, this pipeline has {identity or 'no text encoder'}")


def check_step_count(name: str, steps: int, scheduler: SchedulerMixin) -> None:
    """Raise InputError for more steps than a scheduler takes: most take at most as many as the training had."""
    try:
        copy.deepcopy(scheduler).set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{name} is {steps}, which {type(scheduler).__name__} refuses: {error}") from error
