"""The perceptual distance: how different two images look, measured in the features of a frozen network.

As LPIPS (Zhang et al. 2018, equation 1), but the network is the vision tower of a CLIP, and all channels have the same
weight, so neither weights nor labels have to be downloaded.
"""

import torch
from torch import Tensor, nn

from t2i.errors import InputError
from t2i.networks.clip import CLIP


class PerceptualDistance(nn.Module):
    """The perceptual distance by a CLIP, which is frozen: gradients reach only the images.

    Args:
        clip: see `t2i.interop.by_name.load_clip`. Its vision tower must return the features of its layers, as ViTs,
            ResNets and most of timm's do. Raises InputError for any other.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        tower = clip.net.visual if isinstance(clip, CLIP) else clip
        if not hasattr(tower, "forward_intermediates"):
            raise InputError(f"perceptual_clip has a vision tower ({type(tower).__name__}) without layers")
        self.clip = clip.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in evaluation mode, without dropout and batch statistics."""
        return super().train(False)

    def extract_layer_features(self, image: Tensor) -> list[Tensor]:
        """Return the features of each layer, (B, C, h, w), of images (B, 3, H, W) in [-1, 1]."""
        tower = self.clip.net.visual
        output = tower.forward_intermediates(self.clip.preprocess(image), intermediates_only=True, output_fmt="NCHW")
        return output["image_intermediates"]

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Return the distances of two batches, (B, 3, H, W) in [-1, 1]: (B,), from 0 for the same image to 4.

        Images that are no squares are compared in squares that cover them, for a CLIP sees squares alone.
        """
        layers = (self.extract_layer_features(cut_into_squares(part)) for part in (image, other))
        # The squares of an image are B rows apart
        return compare_layers(*layers).unflatten(0, (-1, len(image))).mean(dim=0)


def cut_into_squares(image: Tensor) -> Tensor:
    """Return the fewest squares that cover images, (B, C, H, W), evenly spaced: (K B, C, S, S), S the short side."""
    height, width = image.shape[-2:]
    short, long = min(height, width), max(height, width)
    count = -(-long // short)
    # From one end to the other, with equal overlaps
    starts = [number * (long - short) // max(1, count - 1) for number in range(count)]
    dim = -1 if width > height else -2
    return image if count == 1 else torch.cat([image.narrow(dim, start, short) for start in starts])


def compare_layers(layers: list[Tensor], others: list[Tensor]) -> Tensor:
    """Return the distances of two batches by the features of each layer, (B, C, h, w): (B,), from 0 to 4, fp32.

    It is the squared distance of features of unit length, averaged over positions and then over layers.
    """
    pairs = [[nn.functional.normalize(layer.float(), dim=1) for layer in pair] for pair in zip(layers, others)]
    return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).mean(dim=0)
