"""The maintained home of unCLIP: text-to-image in the way of DALL-E 2.

Public names are imported when they are first used, so that `import t2i` and `t2i --help` need no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

STAGES = ("clip", "autoencoder", "prior", "decoder")  # in the order of training
EXTRA_STAGES = ("upsampler", "classifier")  # which a pipeline can do without

_HOMES = {
    "Autoencoder": "t2i.autoencoder",
    "CLIP": "t2i.clip",
    "Decoder": "t2i.decoder",
    "ImageToImagePipeline": "pipelines",
    "ImageVariationPipeline": "pipelines",
    "InpaintPipeline": "pipelines",
    "InputError": "t2i.errors",
    "InterpolationPipeline": "pipelines",
    "LatentClassifier": "t2i.classifier",
    "OutpaintPipeline": "pipelines",
    "Prior": "t2i.prior",
    "Steering": "t2i.steering",
    "Text2ImagePipeline": "pipelines",
    "TextDiffPipeline": "pipelines",
    "UNetDecoder": "t2i.unet_decoder",
    "UpsamplePipeline": "pipelines",
    "Upsampler": "t2i.upsampler",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 't2i' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
