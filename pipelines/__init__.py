"""Inference pipelines."""

from t2i.pipelines.base import UnCLIPPipelineOutput
from t2i.pipelines.calls.progress import Interrupted, Preview
from t2i.pipelines.image_to_image import ImageToImagePipeline
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.inpaint import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.interpolation import InterpolationPipeline
from t2i.pipelines.inversion import BipartiteLatent
from t2i.pipelines.prior import PriorPipeline, PriorPipelineOutput
from t2i.pipelines.text2image import Text2ImagePipeline
from t2i.pipelines.text_diff import TextDiffPipeline
from t2i.pipelines.upsample import UpsamplePipeline

__all__ = [
    "BipartiteLatent",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintPipeline",
    "InterpolationPipeline",
    "Interrupted",
    "OutpaintPipeline",
    "Preview",
    "PriorPipeline",
    "PriorPipelineOutput",
    "Text2ImagePipeline",
    "TextDiffPipeline",
    "UnCLIPPipelineOutput",
    "UpsamplePipeline",
]

if __name__ == "pipelines":  # imported from a checkout's root
    from t2i.aliases import alias_package

    alias_package("pipelines", "t2i.pipelines")
