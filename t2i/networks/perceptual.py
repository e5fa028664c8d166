"""How different two pictures look: a distance between what a frozen network sees in them, as LPIPS measures it.

LPIPS (Zhang et al. 2018, equation 1) takes a network trained on ImageNet and weights its channels by people's
judgement. Here the network is the vision tower of a CLIP, the project's own or any of open_clip's, and all channels
weigh the same: there are no weights to download, and no labels to have.
"""

import torch
from torch import Tensor, nn

from t2i.errors import InputError
from t2i.networks.clip import CLIP


class PerceptualDistance(nn.Module):
    """The perceptual distance of a CLIP, which is frozen: gradients reach the pictures alone.

    Args:
        clip: see `t2i.interop.by_name.load_clip`. Its vision tower must tell what its layers see, as ViTs, ResNets and
        most of
            timm's do.

    Raises InputError if the tower does not.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        tower = clip.net.visual if isinstance(clip, CLIP) else clip
        if not hasattr(tower, "forward_intermediates"):
            raise InputError(f"perceptual_clip has a vision tower ({type(tower).__name__}) without layers")
        self.clip = clip.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Frozen is frozen: no dropout, no batch statistics."""
        return super().train(False)

    def extract_layer_features(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> of each layer (B, C, h, w), of unit length at every position, fp32."""
        tower = self.clip.net.visual
        found = tower.forward_intermediates(self.clip.preprocess(image), intermediates_only=True, output_fmt="NCHW")
        return [nn.functional.normalize(one.float(), dim=1) for one in found["image_intermediates"]]

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> (B,), from 0 for the same picture to 4.

        The squared distance of the features, a mean over positions and then over layers.
        """
        pairs = zip(self.extract_layer_features(image), self.extract_layer_features(other))
        return torch.stack([(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).mean(dim=0)
