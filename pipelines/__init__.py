"""Inference pipelines."""

from pipelines.base import UnCLIPPipelineOutput
from pipelines.progress import Interrupted, Preview
from pipelines.text2image import Text2ImagePipeline

__all__ = ["Interrupted", "Preview", "Text2ImagePipeline", "UnCLIPPipelineOutput"]
