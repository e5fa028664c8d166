"""Painting a part of a picture anew, and beyond its borders. A mask is white (1) where there is to be painted; whatever
it leaves comes back pixel for pixel."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from t2i.pipelines.base import MAX_IMAGES, Canvas, UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.image_to_image import check_strength
from t2i.pipelines.inputs import ImageInputs, check_pixel_count, read_images, read_masks
from t2i.pipelines.memory_needed import check_batch_fits
from torch import Generator, Tensor

from t2i.checks import check_integer, check_texts
from t2i.diffusion.inpainting import downsample_mask, paste_painted_region
from t2i.errors import InputError
from t2i.sampling.sample import split_generators

MAX_MARGIN = 4096


class InpaintPipeline(UnCLIPPipeline):
    """Picture and mask -> picture, of any size from the decoder's own on; larger ones in overlapping windows."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInputs,
        mask_image: ImageInputs,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        negative_image_embeds: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint where the mask is white, `num_images_per_prompt` times for each picture: those of one in a row.

        Args:
            image: pictures of one size; see `t2i.pipelines.inputs.read_images`. They are not resized.
            mask_image: one for all or one a picture, of the pictures' size: white, from half the range on, is painted.
            prompt: what the whole pictures are to show; one for all or one a picture. None is what they show now.
            negative_prompt: what the prior is guided away from.
            strength: share of the steps that are taken, in (0, 1]; below 1, something of what is painted over stays.
            generator: one for all, or one a drawn picture.
            negative_image_embeds: (N, D), z_i that the decoder is guided away from, such as those drawn for what is not
                wanted; None is the decoder's null.
            return_dict: False returns the tuple (images, image_embeds).
            options: those of `t2i.pipelines.options.PriorOptions` and `DecoderOptions`. `latents` have the pictures'
            size.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        pictures = read_images(image)
        self.check_canvas_size(pictures)
        masks = read_masks(mask_image, len(pictures), pictures.shape[-2:])
        settings = (prompt, negative_prompt, strength, num_images_per_prompt, generator, negative_image_embeds, options)
        return self.paint_images(pictures, pictures, masks, *settings, return_dict=return_dict)

    def paint_images(
        self,
        shown: Tensor,
        pictures: Tensor,
        masks: Tensor,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        strength: float,
        each: int,
        generator: Generator | list[Generator] | None,
        negative_image_embeds: Tensor | None,
        options: dict[str, Any],
        return_dict: bool,
    ) -> UnCLIPPipelineOutput | tuple:
        """Without a prompt, pictures show what `shown`, (P, 3, ...), shows."""
        self.interrupted = False
        check_integer("num_images_per_prompt", each, 1, MAX_IMAGES)
        check_strength(strength)
        prior, decoder = self.resolve_options(**options)
        if decoder.upsample:
            raise InputError("upsample is not for inpainting, which keeps pixels as they are; upsample its pictures")
        prompts = self.check_prompts("prompt", prompt, len(pictures))
        check_texts("prompt", prompts, empty=False)
        negatives = self.check_prompts("negative_prompt", negative_prompt, len(pictures))
        count = len(pictures) * each
        prior_generators, generators = split_generators(generator, count)
        canvas, mask = (self.pad_to_latent_cells(one).to(self._execution_device) for one in (pictures, masks))
        height, width = (side // self.autoencoder.factor for side in canvas.shape[-2:])
        self.check_stage_inputs(
            prior if prompts else None, replace(decoder, latents=None, super_res_latents=None), count
        )
        self.check_tensor("latents", decoder.latents, (count, self.latent_shape[0], height, width))
        self.check_super_resolution(decoder, (count, 3, *canvas.shape[-2:]))
        sides = dict(zip(("height", "width"), canvas.shape[-2:]))
        check_batch_fits(
            self, prior if prompts else None, replace(decoder, **sides), count, window=self.latent_shape[-1]
        )
        away = self.build_negative_condition(negative_image_embeds, count)
        whole, inside = (one.repeat_interleave(each, dim=0).to(canvas.device) for one in (pictures, masks))

        def to_images(latents: Tensor, output_type: str = "pil", *last: Any) -> Any:
            painted = self.decode_images(latents, *last)[..., : whole.shape[-2], : whole.shape[-1]]
            return self.image_processor.postprocess(paste_painted_region(painted, whole, inside), output_type)

        z_i, text = self.compute_image_embeds(prompts, negatives, shown, each, prior, prior_generators, decoder)
        latents = self.encode_latents(canvas).repeat_interleave(each, dim=0)
        mask = downsample_mask(mask, self.autoencoder.factor).repeat_interleave(each, dim=0)
        x = self.sample_decoder(z_i, text, decoder, generators, away, Canvas(latents, mask, strength, to_images))
        images = x if decoder.output_type == "latent" else to_images(x, decoder.output_type, decoder, generators)
        return self.build_output(images, z_i, return_dict)

    def pad_to_latent_cells(self, x: Tensor) -> Tensor:
        """(P, ., H, W), continued by its border to whole latents; of a mask, by nothing."""
        right, bottom = (-side % self.autoencoder.factor for side in (x.shape[-1], x.shape[-2]))
        if x.shape[1] == 1:
            return F.pad(x, (0, right, 0, bottom))
        return F.pad(x, (0, right, 0, bottom), mode="replicate")

    def check_canvas_size(self, pictures: Tensor) -> None:
        height, width = pictures.shape[-2:]
        if min(height, width) < self.image_size:
            raise InputError(
                f"image is {width} x {height} pixels; this model paints pictures of {self.image_size} x "
                f"{self.image_size} or more: enlarge it, or outpaint it to that size"
            )


class OutpaintPipeline(InpaintPipeline):
    """Picture -> a larger picture around it."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: ImageInputs,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        negative_image_embeds: Tensor | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint `left`, `right`, `top` and `bottom` pixels around each picture; the rest is as for `InpaintPipeline`.

        Raises:
            InputError: for a value that is not allowed, before any work starts.
        """
        margins = check_margins(left=left, right=right, top=top, bottom=bottom)
        pictures = read_images(image)
        check_enlarged_size(pictures.shape[-1], pictures.shape[-2], *margins)
        canvas = F.pad(pictures, margins, mode="replicate")
        self.check_canvas_size(canvas)
        mask = F.pad(torch.zeros_like(pictures[:, :1]), margins, value=1.0)
        settings = (prompt, negative_prompt, 1.0, num_images_per_prompt, generator, negative_image_embeds, options)
        return self.paint_images(pictures, canvas, mask, *settings, return_dict=return_dict)


def check_margins(**margins: int) -> tuple[int, ...]:
    """Pixels on each side, in the order of the arguments."""
    for name, value in margins.items():
        check_integer(name, value, 0, MAX_MARGIN)
    if not any(margins.values()):
        raise InputError("left, right, top and bottom are 0; give the pixels to paint on one side at least")
    return tuple(margins.values())


def check_enlarged_size(width: int, height: int, left: int, right: int, top: int, bottom: int) -> None:
    """Refuse margins that make of a picture one larger than is taken."""
    check_pixel_count("image with its margins", width + left + right, height + top + bottom)
