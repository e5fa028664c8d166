"""Images in, larger images out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from t2i.pipelines.argument_checks import check_scheduler_of, check_step_count
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.calls.aliases import resolve_aliases
from t2i.pipelines.calls.components import CheckedPipeline
from t2i.pipelines.calls.effects import require_argument
from t2i.pipelines.calls.progress import Interruptible, Preview
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.folder import PipelineFolder
from t2i.pipelines.inputs import ImageInputs, read_image, split_images
from t2i.pipelines.loading import load_own_parts, split_loading_arguments
from t2i.pipelines.options import build_options
from t2i.pipelines.stages import upsample_images
from torch import Generator, Tensor

from t2i.checks import check_choice, check_integer, check_range
from t2i.diffusion.sampling_loop import MAX_STEPS
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.files.untrusted import is_folder
from t2i.interop.stored import resolve_part_dtype
from t2i.networks.clip import CLIP
from t2i.networks.upsampler import Upsampler
from t2i.sampling.sample import split_generators
from t2i.sampling.upsampling import DEFAULT_TILE_SIZE, MAX_ENLARGEMENTS, check_upsampled_size, resolve_tile_overlap

OUTPUT_TYPES = ("pil", "pt")


@dataclass
class UpsamplePipelineOutput(BaseOutput):
    """Result of `UpsamplePipeline`: a list of PIL images, or of (3, H, W) torch in [0, 1], by `output_type`."""

    images: list[Image.Image] | list[Tensor]


class UpsamplePipeline(Interruptible, CheckedPipeline):
    """Images of any size, through the upsampler any number of times.

    clip: only for upsamplers that take z_i, which is then that of the image.
    """

    model_cpu_offload_seq = "clip->upsampler"
    _optional_components = ["clip"]
    component_aliases = {"scheduler": "upsampler_scheduler", "unet": "upsampler"}

    def __init__(self, upsampler: Upsampler, upsampler_scheduler: SchedulerMixin, clip: CLIP | None = None):
        super().__init__()
        self.register_modules(upsampler=upsampler, upsampler_scheduler=upsampler_scheduler, clip=clip)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load what `training/train_upsampler.py` wrote, or the upsampler of a pipeline in a folder or on the hub.

        kwargs: dtype, variant, the arguments of fetching, and components, as of `UnCLIPPipeline`. Raises InputError, in
        one line, also for a pipeline without an upsampler.
        """
        kwargs = resolve_aliases(kwargs, cls.component_aliases)
        dtype, variant, fetching, components = split_loading_arguments(kwargs, cls.list_component_names())
        path = Path(pretrained_model_name_or_path)
        if not is_folder(path):
            path = Path(UnCLIPPipeline.download(str(path), variant=variant, **fetching))
        # The folder of a run: the upsampler alone
        if not (path / "model_index.json").is_file():
            parts = {
                "upsampler": load_model(Upsampler, path),
                "upsampler_scheduler": load_scheduler(path / "scheduler"),
            }
            part_dtype = resolve_part_dtype(dtype, "upsampler")
            if isinstance(part_dtype, torch.dtype):
                parts["upsampler"].to(part_dtype)
        elif not is_folder(path / "upsampler") or not is_folder(path / "upsampler_scheduler"):
            raise InputError(f"the pipeline {str(path)!r} has no upsampler; name one that `t2i train upsampler` wrote")
        else:
            # A whole pipeline: its CLIP is loaded only for upsamplers that take z_i
            folder = PipelineFolder(path, variant)
            parts = load_own_parts(folder, ("upsampler", "upsampler_scheduler"), dtype)
            if parts["upsampler"].config.embed_dim is not None and is_folder(path / "clip"):
                parts |= load_own_parts(folder, ("clip",), dtype)
        pipeline = cls(**parts)
        pipeline.remember_training()
        pipeline.register_modules(**components)
        return pipeline

    @declare_pipeline_call({"preview_every": (require_argument("on_preview"),)})
    def __call__(
        self,
        image: ImageInputs,
        times: int = 1,
        num_inference_steps: int = 4,
        level: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        tile: int = DEFAULT_TILE_SIZE,
        output_type: str = "pil",
        return_dict: bool = True,
        on_preview: Callable[[Preview], None] | None = None,
        preview_every: int = 1,
    ) -> UpsamplePipelineOutput | tuple:
        """Enlarge each image by the upsampler's factor, `times` times.

        Args:
            image: one or several, of any sizes; see `t2i.pipelines.inputs.read_images`.
            times: 1 to 8.
            num_inference_steps: each time, 1 to 1000.
            level: strength of the noise that is put on the image first (`Upsampler.config.max_level` at most): 0 trusts
                every pixel; more lets flaws be redrawn.
            generator: one for all, or one an image. An image depends on its own alone.
            tile: larger images are denoised in windows of so many pixels, which bounds the memory.
            output_type: "pil" or "pt".
            on_preview, preview_every: see `t2i.pipelines.options.DecoderOptions`. A preview is of one image.

        Raises:
            InputError: for an image that is too small or becomes too large, and for values that are not allowed.
        """
        # Check the arguments
        check_integer("times", times, 1, MAX_ENLARGEMENTS)
        check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_scheduler_of("upsampler", self)
        check_step_count("num_inference_steps", num_inference_steps, self.upsampler_scheduler)
        check_range("level", level, 0, self.upsampler.config.max_level)
        resolve_tile_overlap(tile, None, self.upsampler.image_size_multiple)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        stage = {"upsample": times, "upsample_steps": num_inference_steps, "upsample_level": level}
        _, resolved = build_options(stage | {"on_preview": on_preview, "preview_every": preview_every})
        originals = [read_image(item, None) for item in split_images(image)]
        if not originals:
            raise InputError("image has no images; give one or more")
        for original in originals:
            check_upsampled_size(self.upsampler, original.shape[-1], original.shape[-2], times)
        _, generators = split_generators(generator, len(originals))

        # Enlarge one by one, for their sizes may differ
        images: list = []
        for original, stream in zip(originals, generators):
            x = original[None].to(self._execution_device)
            x = upsample_images(self, x, self.encode_upsampler_image(x), resolved, [stream], tile)
            images += list(self.image_processor.postprocess(x.cpu(), output_type))
        self.maybe_free_model_hooks()
        return UpsamplePipelineOutput(images) if return_dict else (images,)

    def encode_upsampler_image(self, image: Tensor) -> Tensor | None:
        """Encode an image, (1, 3, H, W), as z_i, for upsamplers that take it; None without a CLIP, and for others."""
        if self.clip is None or self.upsampler.config.embed_dim is None:
            return None
        return F.normalize(self.clip.encode_image(image.to(self.clip.dtype)).float(), dim=-1)
