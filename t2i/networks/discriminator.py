"""The discriminator: a network that classifies patches as parts of real images or of reconstructions.

It is the second player of adversarial training (VQGAN, Esser et al. 2021; pix2pix, Isola et al. 2017, section 3.2.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.checks import check_integer, check_multiple_of

NORM_GROUPS = 8
GRADIENT_SCALE = 4096.0  # keeps small gradients above zero in half precision; cancels in their ratio
ADAM_BETAS = (0.5, 0.9)  # shorter averages than usual, because the opponent changes at every step


class Discriminator(nn.Module):
    """PatchGAN: a logit for each of many overlapping patches, positive for real images.

    Normalisation is over groups of channels of an image, so a logit depends neither on the batch nor on earlier steps.

    Args:
        width: channels after the first convolution, a multiple of 8; they double up to eight times as many.
        depth: convolutions that halve the resolution. A patch has 16 pixels a side with depth 1, 34 with 2, 70 with 3.
    """

    def __init__(self, width: int = 64, depth: int = 3):
        super().__init__()
        check_integer("discriminator.width", width, NORM_GROUPS, 1024)
        check_multiple_of("discriminator.width", width, NORM_GROUPS)
        check_integer("discriminator.depth", depth, 1, 6)
        self.depth = depth
        # Convolutions of 4 x 4: `depth` halve the resolution, two more leave it but for the border
        channels = [width * min(2**i, 8) for i in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(zip(channels, channels[1:])):
            stride = 2 if i + 1 < depth else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(NORM_GROUPS, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, (B, 1, h, w), about 2**depth pixels apart, of images (B, 3, H, W) in [-1, 1]."""
        return self.layers(image)

    @property
    def min_image_size(self) -> int:
        """The smallest side of an image, in pixels, for which there is a logit."""
        return 3 * 2**self.depth


def compute_hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, (), which drives logits of images up to 1, of reconstructions down to -1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def compute_frozen_logits(discriminator: nn.Module, image: Tensor) -> Tensor:
    """Return logits whose gradient reaches the images, but not the discriminator's weights."""
    weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, weights, (image,))


def compute_adaptive_weight(likeness: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of the adversarial loss with which both losses pull equally (VQGAN, equation 7).

    It is the ratio of the norms of their gradients at the last layer, (), at most 10,000, without a gradient itself.

    Args:
        likeness: the loss of the reconstruction, ().
        adversarial: the loss by the discriminator, ().
        weight: matrix of the last layer.
    """
    # The graph is retained, because the training step's own backward pass follows.
    norms = [
        torch.autograd.grad(loss * GRADIENT_SCALE, weight, retain_graph=True)[0].float().norm()
        for loss in (likeness, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6 * GRADIENT_SCALE)).clamp(0, 1e4).detach()
