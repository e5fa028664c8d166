"""The prior alone: captions in, z_i out, which any of the other pipelines draws as its `image_embeds`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from t2i.pipelines.argument_checks import check_prior_options, check_tensor
from t2i.pipelines.base import MAX_IMAGES
from t2i.pipelines.calls.adapters import Adapters
from t2i.pipelines.calls.aliases import resolve_aliases
from t2i.pipelines.calls.call_keywords import PriorAliases, PriorPipelineKeywords
from t2i.pipelines.calls.callbacks import PRIOR_CALLBACK_TENSORS
from t2i.pipelines.calls.components import CheckedPipeline
from t2i.pipelines.calls.encoding import PromptEncoding
from t2i.pipelines.calls.progress import Interruptible
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.calls.texts import PromptEmbeds, choose_texts
from t2i.pipelines.folder import AnyCLIP, PipelineFolder
from t2i.pipelines.loading import load_own_parts, split_loading_arguments
from t2i.pipelines.options import (
    PRIOR_OPTION_NAMES,
    DecoderOptions,
    ResolvedOptions,
    build_options,
    list_prior_defaults,
)
from t2i.pipelines.stages import run_prior_stage
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import Generator, Tensor

from t2i.checks import check_choice, check_integer
from t2i.errors import InputError
from t2i.files.known_words import UnknownWord
from t2i.files.untrusted import is_folder
from t2i.sampling.embeddings import AnyPrior
from t2i.sampling.sample import split_generators

OUTPUT_TYPES = ("pt", "np")
OPTION_ALIASES = {name: f"prior_{name}" for name in PriorAliases.__annotations__}


@dataclass
class PriorPipelineOutput(BaseOutput):
    """Result of `PriorPipeline`.

    image_embeds: (N, D), z_i, fp32, for `image_embeds` of another pipeline.
    negative_image_embeds: (N, D), z_i of the negative prompts, for `negative_image_embeds`; None without any, which is
        the decoder's own null there.
    unknown_words: as in `UnCLIPPipelineOutput`.
    """

    image_embeds: Tensor | np.ndarray
    negative_image_embeds: Tensor | np.ndarray | None
    unknown_words: list[UnknownWord] | None = None

    def to_tuple(self) -> tuple[Any, Any]:
        """Return (image_embeds, negative_image_embeds), both also where the second is None."""
        return self.image_embeds, self.negative_image_embeds


class PriorPipeline(Adapters, PromptEncoding, Interruptible, CheckedPipeline):
    """Caption -> z_t -> (prior) -> z_i. The decoder and the autoencoder need not be in memory."""

    model_cpu_offload_seq = "clip->prior"
    _optional_components = ["prior_scheduler"]
    _callback_tensor_inputs = list(PRIOR_CALLBACK_TENSORS)
    component_aliases = {"scheduler": "prior_scheduler"}

    def __init__(self, clip: AnyCLIP, prior: AnyPrior, prior_scheduler: SchedulerMixin | None = None):
        super().__init__()
        self.register_modules(clip=clip, prior=prior, prior_scheduler=prior_scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load the CLIP and the prior of any pipeline's folder or repository; arguments as of `UnCLIPPipeline`.

        Of this project's own folders nothing else is read. Raises InputError, also for a model without a prior.
        """
        path = Path(pretrained_model_name_or_path)
        folder = PipelineFolder(path, kwargs.get("variant")) if is_folder(path) else None
        kwargs = resolve_aliases(kwargs, cls.component_aliases)
        # Any other model is loaded whole, and its parts are taken over
        if folder is None or not (folder.is_own or folder.class_name == cls.__name__):
            return cls.from_pipe(Text2ImagePipeline.from_pretrained(pretrained_model_name_or_path, **kwargs))
        dtype, _, _, components = split_loading_arguments(kwargs, cls.list_component_names())
        if folder.lacks_component("prior"):
            raise InputError(f"the pipeline {str(path)!r} has no prior")
        has_scheduler = not folder.lacks_component("prior_scheduler")
        pipeline = cls(**load_own_parts(folder, ("clip", "prior", "prior_scheduler")[: 2 + has_scheduler], dtype))
        pipeline.remember_training()
        pipeline.register_modules(**components)
        return pipeline

    def resolve_options(
        self, resolved: ResolvedOptions | None = None, output_type: str = "pt", **options: Any
    ) -> ResolvedOptions:
        """Return the checked options, as `UnCLIPPipeline.resolve_options` does."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        return resolved or build_options(options, list_prior_defaults(self.prior), PRIOR_OPTION_NAMES)

    @declare_pipeline_call(aliases=OPTION_ALIASES)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        output_type: str = "pt",
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        **options: Unpack[PriorPipelineKeywords],
    ) -> PriorPipelineOutput | tuple:
        """Sample `num_images_per_prompt` z_i for each prompt: those of `Text2ImagePipeline` for the same seeds.

        Args:
            prompt: a text or a list.
            negative_prompt: text that the prior is guided away from; one for all or one a prompt. Its own z_i, from the
                same noise, are returned too.
            num_images_per_prompt: z_i for each prompt, in a row.
            generator: one for all, or one for each z_i.
            return_dict: False returns the tuple (image_embeds, negative_image_embeds).
            output_type: "pt" or "np".
            prompt_embeds, negative_prompt_embeds: encodings in place of the texts; see
                `t2i.pipelines.calls.texts.read_prompt_embeds`.

        Options may also have diffusers' names, without `prior_`: num_inference_steps, guidance_scale, latents,
        callback_on_step_end and callback_on_step_end_tensor_inputs.

        Raises InputError for a value that is not allowed, before any work starts.
        """
        # Check the arguments
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        prior, _ = self.resolve_options(output_type=output_type, **options)
        texts = choose_texts(self, "prompt", prompt, prompt_embeds, empty=False)
        if not len(texts):
            raise InputError("prompt is missing; give a text, a list of texts, or prompt_embeds")
        negatives = choose_texts(self, "negative_prompt", negative_prompt, negative_prompt_embeds, len(texts))
        count = len(texts) * num_images_per_prompt
        generators, _ = split_generators(generator, count)
        check_prior_options(self, prior)
        check_tensor("prior_latents", prior.prior_latents, (count, self.clip.embed_dim))

        # Sample. Both start from the same noise.
        same_noise = [stream.clone_state() for stream in generators]
        text = self.encode_prompt(texts).repeat(num_images_per_prompt)
        negative = self.encode_prompt(negatives).repeat(num_images_per_prompt) if len(negatives) else None
        no_preview = DecoderOptions()
        z_i, z_not = run_prior_stage(self, text, negative, prior, generators, no_preview), None
        if negative is not None:
            # Callbacks are of the prompt alone
            uncalled = replace(prior, prior_callback_on_step_end=None)
            z_not = run_prior_stage(self, negative, None, uncalled, same_noise, no_preview)
        self.maybe_free_model_hooks()
        if output_type == "np":
            z_i, z_not = (None if z is None else z.cpu().numpy() for z in (z_i, z_not))
        return PriorPipelineOutput(z_i, z_not) if return_dict else (z_i, z_not)
