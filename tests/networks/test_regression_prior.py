"""Regression priors: least squares, and the mean of the tokens."""

import torch
import torch.nn.functional as F

from t2i.diffusion.condition import TextEncoding
from t2i.networks.regression_prior import RegressionPrior
from tests.helpers.small_priors import D, W, captions, shaken, unit


def test_the_linear_prior_is_least_squares():
    z_t, z_i = unit(400, D, seed=3), unit(400, D, seed=4)
    prior = RegressionPrior(D, W, "linear")
    prior.set_embed_statistics(z_i.mean(dim=0), z_i.std(dim=0))
    text = TextEncoding(z_t, torch.zeros(400, 1, W), torch.ones(400, 1, dtype=torch.bool))
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(prior(text), prior.scale_image_embeds(z_i))
        loss.backward()
        return loss

    optimizer.step(closure)
    affine = torch.cat([z_t, torch.ones(400, 1)], dim=1)
    expected = affine @ torch.linalg.lstsq(affine, z_i).solution
    torch.testing.assert_close(prior.sample_image_embeds(text), F.normalize(expected, dim=-1), atol=1e-3, rtol=0)


def test_the_mlp_reads_the_mean_of_the_tokens_that_there_are():
    prior, text = shaken(RegressionPrior(D, W, "mlp", width=32)), captions(5, 2)
    before = prior.sample_image_embeds(text)
    text.states[1, 2:] = 1e3
    torch.testing.assert_close(prior.sample_image_embeds(text), before)
    text.states[1, 1] += 1
    assert not torch.allclose(prior.sample_image_embeds(text)[1], before[1], atol=1e-4)
