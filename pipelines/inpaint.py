"""Painting a part of an image anew, and beyond its borders.

A mask is 1 (white) where there is to be painted. Whatever it leaves comes back pixel for pixel.
"""

from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from PIL import Image
from t2i.pipelines.argument_checks import check_stage_inputs
from t2i.pipelines.base import UnCLIPPipeline, UnCLIPPipelineOutput
from t2i.pipelines.calls.call_keywords import DrawingKeywords
from t2i.pipelines.calls.signature import declare_pipeline_call
from t2i.pipelines.calls.texts import PromptEmbeds, choose_text_pair
from t2i.pipelines.image_to_image import (
    IDLE_TEXTS,
    Redrawing,
    check_strength,
    compute_image_embeds,
    plan_redrawing,
    read_latents,
)
from t2i.pipelines.inputs import ImageInputs, check_pixel_count, read_images, read_masks
from t2i.pipelines.memory_needed import check_batch_fits
from t2i.pipelines.stages import Canvas, run_decoder_stage
from torch import Generator, Tensor

from t2i.checks import check_integer
from t2i.data.buckets import MIN_AREA
from t2i.diffusion.inpainting import downsample_mask, paste_painted_region
from t2i.diffusion.windows import compute_window_shape
from t2i.errors import InputError

MAX_MARGIN = 4096


class PaintedImages(NamedTuple):
    """P images to paint in.

    shown: (P, 3, ...), in [-1, 1]: what the results show where there is no prompt.
    images: (P, 3, H, W), in [-1, 1], to paint in.
    masks: (P, 1, H, W), 1 where there is to be painted.
    """

    shown: Tensor
    images: Tensor
    masks: Tensor


class InpaintPipeline(UnCLIPPipeline):
    """Image and mask -> image, of any shape with about the decoder's own area; larger ones in overlapping windows."""

    @declare_pipeline_call(idle=IDLE_TEXTS)
    def __call__(
        self,
        image: ImageInputs,
        mask_image: ImageInputs,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
        mask_channel: str = "luminance",
        padding_mask_crop: int | None = None,
        image_embeds: Tensor | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint where the mask is white, `num_images_per_prompt` times. See `UnCLIPPipeline` for other arguments.

        Args:
            image: images of one size, which are not resized; others are resized to the size of the first.
                Or latents, (P, C, h, w), which are decoded first.
            mask_image: one for all or one an image, resized to theirs: white, from half the range on, is painted.
            prompt: content of the whole images. None is what they show now.
            strength: fraction of the steps that are taken, in (0, 1]; below 1, something of what is painted over stays.
            mask_channel: "alpha" paints where images that are given as masks are transparent.
            padding_mask_crop: paint the part around the mask alone, with so many pixels on each side, at the size that
                the decoder was trained on. That shows more detail in a small part. None paints the whole.
            options: `latents` have the images' size.
        """
        # Read images and masks, and check all that needs no drawing
        images = self.read_canvas(image)
        if padding_mask_crop is None:  # a part of any size is enlarged to the trained one
            self.check_canvas_size(images)
        masks = read_masks(mask_image, len(images), images.shape[-2:], channel=mask_channel)
        given = PaintedImages(images, images, masks)
        texts = choose_text_pair(
            self, len(images), prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, image_embeds is not None
        )
        resolved = self.resolve_options(**options)
        redrawing = plan_redrawing(self, len(images), texts, num_images_per_prompt, generator, resolved, image_embeds)
        # Paint the whole images, or the parts around the masks
        if padding_mask_crop is None:
            return self.paint_images(given, redrawing, strength, return_dict)
        check_integer("padding_mask_crop", padding_mask_crop, 0, MAX_MARGIN)
        return self.paint_crops(given, padding_mask_crop, redrawing, strength, return_dict)

    def paint_crops(
        self, given: PaintedImages, padding: int, redrawing: Redrawing, strength: float, return_dict: bool
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint the parts around the masks, enlarged or reduced to the trained size, and put them into the images."""
        if redrawing.decoder.output_type == "latent":
            raise InputError("padding_mask_crop needs images, but output_type is 'latent'; choose another output_type")
        side, processor = self.image_size, self.image_processor
        images, masks = (
            processor.numpy_to_pil(x.movedim(1, -1).numpy()) for x in (given.images / 2 + 0.5, given.masks)
        )
        regions = [processor.get_crop_region(mask, side, side, pad=padding) for mask in masks]

        def crop(whole: list[Image.Image]) -> Tensor:
            parts = [image.crop(region) for image, region in zip(whole, regions)]
            parts = [processor.resize(part, side, side, resize_mode="fill") for part in parts]
            return torch.from_numpy(processor.pil_to_numpy(parts)).movedim(-1, 1)

        # Paint
        parts = PaintedImages(given.shown, 2 * crop(images) - 1, (crop(masks)[:, :1] >= 0.5).float())
        in_images = replace(redrawing, decoder=replace(redrawing.decoder, output_type="pil"))
        drawn: Any = self.paint_images(parts, in_images, strength)
        sources = [i for i in range(len(images)) for _ in range(redrawing.images_per_prompt)]
        whole = [
            processor.apply_overlay(masks[i], images[i], painted, regions[i])
            for i, painted in zip(sources, drawn.images, strict=True)
        ]

        # In the form that was asked for
        result: Any = [image.convert("RGB") for image in whole]
        if redrawing.decoder.output_type != "pil":
            result = processor.pil_to_numpy(result)
        if redrawing.decoder.output_type == "pt":
            result = torch.from_numpy(result).movedim(-1, 1)
        return self.build_output(result, drawn.image_embeds, return_dict)

    def paint_images(
        self,
        given: PaintedImages,
        redrawing: Redrawing,
        strength: float = 1.0,
        return_dict: bool = True,
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint in the given images. redrawing: the checked arguments."""
        # Check the arguments
        check_strength(strength)
        if redrawing.decoder.upsample:
            raise InputError("upsample is not for inpainting, which keeps pixels as they are; upsample its images")
        decoder, generators = redrawing.decoder, redrawing.generators
        count = len(generators)
        padded, mask = (self.pad_to_latent_cells(x).to(self._execution_device) for x in (given.images, given.masks))
        height, width = padded.shape[-2:]
        sides, repeats = (height, width), redrawing.images_per_prompt
        check_stage_inputs(self, redrawing.prior, decoder, count, canvas=sides, images_per_prompt=repeats)
        sized = replace(decoder, height=height, width=width)
        window = compute_window_shape(*self.compute_latent_shape(sized)[1:], self.latent_shape[-1])
        check_batch_fits(self, redrawing.prior, sized, count, window=window)

        # Decoded images are cropped to the given ones' size, and show the given pixels where nothing is painted
        whole, inside = (x.repeat_interleave(repeats, dim=0).to(padded.device) for x in (given.images, given.masks))

        def to_images(latents: Tensor, output_type: str = "pil", is_preview: bool = True) -> Any:
            painted = self.decode_images(latents) if is_preview else self.decode_images(latents, decoder, generators)
            painted = painted[..., : whole.shape[-2], : whole.shape[-1]]
            return self.image_processor.postprocess(paste_painted_region(painted, whole, inside), output_type)

        # Draw
        z_i, text = compute_image_embeds(self, given.shown, redrawing)
        latents = self.encode_latents(padded).repeat_interleave(repeats, dim=0)
        mask = downsample_mask(mask, self.autoencoder.factor).repeat_interleave(repeats, dim=0)
        canvas = Canvas(latents, mask, strength, to_images)
        x = run_decoder_stage(self, z_i, text, decoder, generators, canvas=canvas)
        is_latent = decoder.output_type == "latent"
        drawn = x if is_latent else to_images(x, decoder.output_type, is_preview=False)
        return self.build_output(drawn, z_i, return_dict)

    def read_canvas(self, image: Any) -> Tensor:
        """Return images to paint in, (P, 3, H, W), in [-1, 1]. Latents, (P, C, h, w), are decoded."""
        latents = read_latents(self, image)
        return read_images(image) if latents is None else self.decode_images(latents).clamp(-1, 1).cpu()

    def pad_to_latent_cells(self, x: Tensor) -> Tensor:
        """Pad images or masks, (P, 3 or 1, H, W), to whole latents: images repeat their border, masks get zeros."""
        multiple = self.autoencoder.factor
        # A canvas that is narrower than the square windows is denoised in its own width
        if min(x.shape[-2:]) < self.image_size:
            multiple *= self.decoder.latent_multiple
        right, bottom = (-side % multiple for side in (x.shape[-1], x.shape[-2]))
        return F.pad(x, (0, right, 0, bottom), mode="constant" if x.shape[1] == 1 else "replicate")

    def check_canvas_size(self, images: Tensor) -> None:
        """Refuse images with fewer pixels than the shapes that a decoder may have been trained on.

        Windows cover larger images with parts of the trained size. For a smaller one there is no such part: it would
        be denoised as a whole, at an area that no training has, and would not show what the prompt says.
        """
        height, width = images.shape[-2:]
        if height * width < MIN_AREA * self.image_size**2:
            square = f"{self.image_size} x {self.image_size}"
            raise InputError(
                f"image is {width} x {height} pixels, fewer than three quarters of the {square} that this model was "
                "trained on: it was shown nothing so small; enlarge it, or outpaint it to that size"
            )


class OutpaintPipeline(InpaintPipeline):
    """Image -> a larger image around it."""

    @declare_pipeline_call(idle=IDLE_TEXTS)
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
        return_dict: bool = True,
        image_embeds: Tensor | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> UnCLIPPipelineOutput | tuple:
        """Paint `left`, `right`, `top` and `bottom` pixels around each image. See `UnCLIPPipeline` for the rest."""
        margins = collect_margins(left=left, right=right, top=top, bottom=bottom)
        images = self.read_canvas(image)
        check_enlarged_size(images.shape[-1], images.shape[-2], margins)
        # The border is repeated, because the latents of kept pixels depend on their neighbours too
        enlarged = F.pad(images, margins, mode="replicate")
        self.check_canvas_size(enlarged)
        mask = F.pad(torch.zeros_like(images[:, :1]), margins, value=1.0)
        texts = choose_text_pair(
            self, len(images), prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, image_embeds is not None
        )
        resolved = self.resolve_options(**options)
        redrawing = plan_redrawing(self, len(images), texts, num_images_per_prompt, generator, resolved, image_embeds)
        # A margin has nothing to keep: always all of the steps are taken
        return self.paint_images(PaintedImages(images, enlarged, mask), redrawing, 1.0, return_dict)


def collect_margins(left: int, right: int, top: int, bottom: int) -> tuple[int, int, int, int]:
    """Return the pixels on each side, in the order of the arguments. Raises InputError if none has any."""
    margins = (left, right, top, bottom)
    for name, value in zip(("left", "right", "top", "bottom"), margins):
        check_integer(name, value, 0, MAX_MARGIN)
    if not any(margins):
        raise InputError("left, right, top and bottom are 0; give the pixels to paint on one side at least")
    return margins


def check_enlarged_size(width: int, height: int, margins: tuple[int, int, int, int]) -> None:
    """Refuse margins, left, right, top and bottom, that enlarge an image beyond the largest size that is allowed."""
    left, right, top, bottom = margins
    check_pixel_count("image with its margins", width + left + right, height + top + bottom)
