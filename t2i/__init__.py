"""t2i, the maintained home of unCLIP: text to image in the way of DALL-E 2.

Public names are imported at their first use, so that `import t2i` and `t2i --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

STAGES = ("clip", "autoencoder", "prior", "decoder")  # in the order of training
EXTRA_STAGES = ("upsampler", "classifier")  # optional in a pipeline

# The module in which each public name is found
_MODULES = {
    "Autoencoder": "t2i.networks.autoencoder",
    "CLIP": "t2i.networks.clip",
    "Decoder": "t2i.networks.decoder",
    "ImageToImagePipeline": "t2i.pipelines",
    "ImageVariationPipeline": "t2i.pipelines",
    "InpaintPipeline": "t2i.pipelines",
    "InputError": "t2i.errors",
    "InterpolationPipeline": "t2i.pipelines",
    "LatentClassifier": "t2i.networks.classifier",
    "OutpaintPipeline": "t2i.pipelines",
    "Prior": "t2i.networks.prior",
    "PriorPipeline": "t2i.pipelines",
    "Steering": "t2i.sampling.steering",
    "Text2ImagePipeline": "t2i.pipelines",
    "TextDiffPipeline": "t2i.pipelines",
    "UNetDecoder": "t2i.networks.unet_decoder",
    "UpsamplePipeline": "t2i.pipelines",
    "Upsampler": "t2i.networks.upsampler",
}
# Written out, because type checkers do not evaluate code
__all__ = [
    "Autoencoder",
    "CLIP",
    "Decoder",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintPipeline",
    "InputError",
    "InterpolationPipeline",
    "LatentClassifier",
    "OutpaintPipeline",
    "Prior",
    "PriorPipeline",
    "Steering",
    "Text2ImagePipeline",
    "TextDiffPipeline",
    "UNetDecoder",
    "UpsamplePipeline",
    "Upsampler",
]

if TYPE_CHECKING:  # editors and type checkers see no lazy import
    from t2i.errors import InputError
    from t2i.networks.autoencoder import Autoencoder
    from t2i.networks.classifier import LatentClassifier
    from t2i.networks.clip import CLIP
    from t2i.networks.decoder import Decoder
    from t2i.networks.prior import Prior
    from t2i.networks.unet_decoder import UNetDecoder
    from t2i.networks.upsampler import Upsampler
    from t2i.pipelines import (
        ImageToImagePipeline,
        ImageVariationPipeline,
        InpaintPipeline,
        InterpolationPipeline,
        OutpaintPipeline,
        PriorPipeline,
        Text2ImagePipeline,
        TextDiffPipeline,
        UpsamplePipeline,
    )
    from t2i.sampling.steering import Steering


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 't2i' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
