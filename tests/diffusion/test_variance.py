"""The posterior, and a variance that is learned: both have closed forms on Gaussian data."""

from dataclasses import dataclass

import pytest
import torch

from t2i.diffusion.condition import Condition, ImageCondition, TextEncoding
from t2i.diffusion.guidance import Guidance, build_guided_predict, build_steered_predict
from t2i.diffusion.loss import compute_diffusion_loss
from t2i.diffusion.process import (
    alpha_sigma,
    join_variance,
    posterior_coefficients,
    posterior_mean_variance,
    predict_x0,
    reverse_log_variance,
    split_variance,
    variational_term,
    x0_to_prediction,
)
from t2i.diffusion.samplers import build_sampler
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.networks.decoder import Decoder
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.helpers.gaussian import SCHEDULES, Gaussian, schedule
from tests.helpers.stages import seeds, train


@dataclass
class Nothing(Condition):
    count: torch.Tensor


@pytest.mark.parametrize(("t", "previous"), [(999, 998), (500, 250), (10, 0), (5, -1)])
@pytest.mark.parametrize("noise", SCHEDULES)
def test_the_posterior_is_what_bayes_says(noise, t, previous):
    """q(x_s | x_t, x0) is the conditional of the joint Gaussian of x_s and x_t given x0."""
    scheduler = schedule(noise)
    x0, x_t = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    (a_t, s_t), (a_s, s_s) = (alpha_sigma(scheduler, torch.tensor(time), x0) for time in (t, previous))
    covariance = s_s**2 * a_t / a_s  # of x_s and x_t, as x_t = a_t / a_s x_s + fresh noise
    mean, variance = posterior_mean_variance(scheduler, x0, x_t, torch.tensor(t), torch.tensor(previous))
    torch.testing.assert_close(mean, a_s * x0 + covariance / s_t**2 * (x_t - a_t * x0))
    torch.testing.assert_close(variance, s_s**2 - covariance**2 / s_t**2, atol=1e-12, rtol=1e-6)


def test_the_posterior_of_a_batch_is_that_of_each():
    scheduler, x0, x_t = schedule(), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t, previous = torch.tensor([999, 40, 0]), torch.tensor([998, 3, -1])
    together = posterior_mean_variance(scheduler, x0, x_t, t, previous)
    for i in range(3):
        one = posterior_mean_variance(scheduler, x0[i : i + 1], x_t[i : i + 1], t[i], previous[i])
        torch.testing.assert_close(together[0][i : i + 1], one[0])
        torch.testing.assert_close(together[1][i].squeeze(), one[1])
    torch.testing.assert_close(together[0][2], x0[2])


def test_the_terms_of_the_bound_are_those_of_torch_distributions():
    scheduler, t, previous = schedule(), torch.tensor([700, 3, 0]), torch.tensor([699, 2, -1])
    x0, x_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    guess, log_variance = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    terms = variational_term(scheduler, x0 - guess, log_variance, t, previous)
    true_mean, true_variance = posterior_mean_variance(scheduler, x0, x_t, t, previous)
    mean, _ = posterior_mean_variance(scheduler, guess, x_t, t, previous)
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    true = torch.distributions.Normal(true_mean[:2], true_variance[:2].sqrt().expand(2, 5))
    kl = torch.distributions.kl_divergence(true, torch.distributions.Normal(ours.mean[:2], ours.stddev[:2]))
    torch.testing.assert_close(terms[:2], kl, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(terms[2], -ours.log_prob(x0)[2])


def reverse_variance(scheduler, variance, t):
    """Of p(x_{t-1} | x_t) where x0 is N(0, variance): that of the posterior, and of what x_t leaves open of x0."""
    times = torch.tensor(t), torch.tensor(t - 1)
    alpha, sigma = alpha_sigma(scheduler, times[0], torch.zeros(1, 1).double())
    of_x, of_sample, small, _ = posterior_coefficients(scheduler, *times, torch.zeros(1, 1).double())
    left = variance * sigma**2 / (alpha**2 * variance + sigma**2)
    return small + of_sample**2 * left


def test_a_learned_variance_trains_to_the_closed_form():
    """A table of variances, trained by the hybrid loss beside the exact mean."""
    torch.manual_seed(0)
    variance = torch.tensor([0.8, 0.1], dtype=torch.float64)
    scheduler = schedule("cosine", "sample", num_train_timesteps=10)
    shares = torch.zeros(10, 2, dtype=torch.float64, requires_grad=True)

    def model(x, t, condition):
        alpha, sigma = alpha_sigma(scheduler, t, x)
        mean = x * alpha * variance / (alpha**2 * variance + sigma**2)
        return torch.cat([mean, shares[t]], dim=1)

    optimizer = torch.optim.Adam([shares], 0.1)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 600)
        x = torch.randn(512, 2).double() * variance.sqrt()
        losses, _ = compute_diffusion_loss(model, scheduler, x, Nothing(torch.zeros(512)))
        optimizer.zero_grad()
        (1000 * losses["loss"]).backward()
        optimizer.step()
    for t in range(1, 10):
        t_, s_ = torch.tensor([t]), torch.tensor([t - 1])
        learned = reverse_log_variance(scheduler, shares[t : t + 1], t_, s_).exp()
        torch.testing.assert_close(learned.detach()[0], reverse_variance(scheduler, variance, t), rtol=0.1, atol=0)


def test_the_bound_does_not_reach_the_mean():
    torch.manual_seed(0)
    scheduler = schedule("cosine", "sample")
    mean = torch.full((), 0.3, requires_grad=True)

    def model(share):
        return lambda x, t, condition: torch.cat([mean.expand_as(x), torch.full_like(x, share)], dim=1)

    gradients = []
    for one in (model(-1.0), model(0.5), lambda x, t, condition: mean.expand_as(x)):
        torch.manual_seed(1)
        losses, _ = compute_diffusion_loss(one, scheduler, torch.randn(64, 3), Nothing(torch.zeros(64)))
        (gradient,) = torch.autograd.grad(losses["loss"], mean)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_a_learned_variance_makes_ancestral_sampling_in_few_steps_exact():
    """The exact reverse steps of one-dimensional data need no small steps; the posterior's variance does."""
    torch.manual_seed(0)
    gaussian, scheduler = Gaussian((0.3,)), schedule()
    plain = gaussian.denoiser(scheduler)
    sampler = build_sampler("ddpm", scheduler, learned_variance=True)
    sampler.set_timesteps(8)
    ends = dict(zip(sampler.timesteps.tolist(), [*sampler.timesteps[1:].tolist(), -1]))

    def predict(x, t):
        previous = torch.tensor(ends[int(t)])
        alpha, sigma = alpha_sigma(scheduler, t, x)
        _, of_sample, small, large = posterior_coefficients(scheduler, t, previous, x)
        exact = small + of_sample**2 * 0.3 * sigma**2 / (alpha**2 * 0.3 + sigma**2)
        share = 2 * (exact / small).log() / (large / small).log() - 1 if previous >= 0 else torch.zeros(())
        return torch.cat([plain(x, t), share * torch.ones_like(x)], dim=1)

    noise = torch.randn(20_000, 1).double()
    exact = sample_from_noise(predict, sampler, noise, Sampling(8))
    small = sample_from_noise(plain, build_sampler("ddpm", scheduler), noise, Sampling(8))
    # The last step, to the clean sample, has no noise, so that a little is lacking in both.
    assert abs(exact.var() / 0.3 - 1) < 0.2 < 0.35 < abs(small.var() / 0.3 - 1)


def models(learned: bool):
    unet = {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    unet |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    shape = {"embed_dim": 8, "latent_channels": 4, "latent_size": 8, "learned_variance": learned}
    yield Decoder(**shape, width=16, depth=1, heads=2, patch_size=2), (4, 8, 8), ImageCondition(torch.randn(2, 8))
    yield UNetDecoder(**shape, unet=unet, context_width=16), (4, 8, 8), ImageCondition(torch.randn(2, 8))
    text = TextEncoding(torch.randn(2, 8), torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    yield Prior(8, 6, 5, width=16, depth=1, heads=2, learned_variance=learned), (8,), text


def test_a_model_with_a_learned_variance_predicts_twice_the_channels():
    for learned, times in ((False, 1), (True, 2)):
        for model, shape, condition in models(learned):
            x, t = torch.randn(2, *shape), torch.tensor([3, 500])
            assert model(x, t, condition).shape == (2, times * shape[0], *shape[1:])
            assert model.step(x, t, model.prepare(condition)).shape == (2, times * shape[0], *shape[1:])
            mean, share = split_variance(model(x, t, condition), x)
            assert mean.shape == x.shape and (share is None) == (not learned)


class Split:
    """Says of its condition what is to be the mean, and twice of it, what is to be the variance."""

    dtype = torch.float32

    def prepare(self, condition):
        return condition.count

    def step(self, x, t, count):
        return torch.cat([count, 2 * count], dim=1)


def test_guidance_moves_the_mean_and_leaves_the_variance():
    scheduler, positive, negative = schedule("cosine", "sample"), torch.randn(2, 4), torch.randn(2, 4)
    x, t = torch.randn(2, 4), torch.tensor(500)
    for guidance in (3.0, Guidance(3.0, parallel=0.5), Guidance(3.0, rescale=0.5), Guidance(3.0, threshold=0.9)):
        predict = build_guided_predict(Split(), Nothing(positive), Nothing(negative), guidance, scheduler)
        mean, share = split_variance(predict(x, t), x)
        torch.testing.assert_close(share, 2 * positive)
        assert (mean - positive).abs().max() > 0.01
    mean, share = split_variance(
        build_guided_predict(Split(), Nothing(positive), Nothing(negative), 3.0, scheduler)(x, t), x
    )
    torch.testing.assert_close(mean, negative + 3 * (positive - negative))
    pushed = build_steered_predict(predict, scheduler, lambda x, t: x.sum(dim=1), 1.0)
    torch.testing.assert_close(split_variance(pushed(x, t), x)[1], 2 * positive)


def test_a_prediction_with_a_variance_says_the_same_clean_sample():
    scheduler, x, x0, t = schedule(), torch.randn(2, 4), torch.randn(2, 4), torch.tensor(300)
    prediction = x0_to_prediction(scheduler, x0, x, t)
    torch.testing.assert_close(predict_x0(scheduler, torch.cat([prediction, x], dim=1), x, t), x0)
    torch.testing.assert_close(join_variance(x, torch.cat([x0, t * x], dim=1))[:, 4:], t * x)
    assert join_variance(x, x0) is x


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_stages_train_with_a_learned_variance_and_draw(stage, shapes, runs, tmp_path):
    from t2i.diffusion.stored_schedulers import load_scheduler
    from t2i.files.model_folder import load_model
    from t2i.sampling.sample import build_decoder_condition, sample_decoder, sample_prior

    for name in ("clip", "autoencoder"):
        (tmp_path / name).symlink_to(runs / name)
    train(stage, shapes, tmp_path, **{"model.learned_variance": True})
    model = load_model((Prior, Decoder, UNetDecoder), str(tmp_path / stage / "model"))
    assert model.config.learned_variance
    scheduler = build_sampler("ddpm", load_scheduler(tmp_path / stage / "scheduler"), learned_variance=True)
    if stage == "prior":
        drawn = sample_prior(model, scheduler, model.null(2), None, Sampling(4, seeds(1, 2), 2.0))
    else:
        z_i = torch.nn.functional.normalize(torch.randn(2, model.config.embed_dim), dim=-1)
        drawn = sample_decoder(
            model, scheduler, build_decoder_condition(model, z_i, None), Sampling(4, seeds(1, 2), 2.0)
        )
    assert drawn.isfinite().all() and len(drawn) == 2
