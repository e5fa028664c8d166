"""Inference pipelines."""

from pipelines.text2image import Text2ImagePipeline, Text2ImagePipelineOutput

__all__ = ["Text2ImagePipeline", "Text2ImagePipelineOutput"]
