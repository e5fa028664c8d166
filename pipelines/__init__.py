"""Inference pipelines."""

from pipelines.base import UnCLIPPipelineOutput
from pipelines.image_to_image import ImageToImagePipeline
from pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from pipelines.progress import Interrupted, Preview
from pipelines.text2image import Text2ImagePipeline

__all__ = [
    "ImageToImagePipeline",
    "InpaintPipeline",
    "Interrupted",
    "OutpaintPipeline",
    "Preview",
    "Text2ImagePipeline",
    "UnCLIPPipelineOutput",
]
