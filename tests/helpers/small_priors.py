"""Small priors with random weights, and captions for them."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from t2i.diffusion.condition import TextEncoding
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.prior import Prior

D, W, LENGTH = 16, 12, 10


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def captions(*lengths: int) -> TextEncoding:
    states = torch.randn(len(lengths), max(lengths), W, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextEncoding(unit(len(lengths), D, seed=2), states, mask)


def shaken(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def autoregressive(components: int = 6, buckets: int = 32, embed_dim: int = D) -> AutoregressivePrior:
    torch.manual_seed(0)
    prior = AutoregressivePrior(embed_dim, W, LENGTH, 32, 2, 4, components, buckets)
    null = TextEncoding(torch.zeros(1, embed_dim), torch.zeros(1, 2, W), torch.ones(1, 2, dtype=torch.bool))
    prior.set_embed_statistics(null, unit(300, embed_dim))
    return shaken(prior)


def diffusion() -> tuple[Prior, DDIMScheduler]:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    return shaken(Prior(D, W, LENGTH, 32, 2, 4)), scheduler
