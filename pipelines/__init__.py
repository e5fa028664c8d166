"""Inference pipelines."""

from pipelines.base import UnCLIPPipelineOutput
from pipelines.image_to_image import ImageToImagePipeline
from pipelines.image_variation import ImageVariationPipeline
from pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from pipelines.interpolation import InterpolationPipeline
from pipelines.inversion import BipartiteLatent
from pipelines.progress import Interrupted, Preview
from pipelines.text2image import Text2ImagePipeline
from pipelines.text_diff import TextDiffPipeline
from pipelines.upsample import UpsamplePipeline

__all__ = [
    "BipartiteLatent",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintPipeline",
    "InterpolationPipeline",
    "Interrupted",
    "OutpaintPipeline",
    "Preview",
    "Text2ImagePipeline",
    "TextDiffPipeline",
    "UnCLIPPipelineOutput",
    "UpsamplePipeline",
]
