"""The bound and the ODE's likelihood, against Gaussian data whose likelihood is known."""

import json
import math

import pytest
import torch

from t2i.diffusion.likelihood import compute_level_log_probability, compute_ode_bits, compute_variational_bound
from t2i.diffusion.process import alpha_sigma, posterior_coefficients
from t2i.errors import InputError
from tests.helpers.gaussian import PREDICTIONS, SCHEDULES, Gaussian, schedule

COUNT = 1000
CASES = [(noise, "v_prediction") for noise in SCHEDULES] + [("cosine", kind) for kind in PREDICTIONS[:2]]


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def true_bits(gaussian, x):
    return -gaussian.distribution.log_prob(x) / math.log(2) / x.shape[1]


def learned(gaussian, scheduler):
    """The exact denoiser, and the exact variance of its reverse steps, where the data's directions are the axes."""
    variance = gaussian.covariance.diag()

    def predict(x, t):
        alpha, sigma = alpha_sigma(scheduler, t, x)
        left = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        _, of_x0, small, large = posterior_coefficients(scheduler, t, t - 1, x)
        if t == 0:
            exact, small = left, posterior_coefficients(scheduler, torch.tensor(1), torch.tensor(0), x)[2]
        else:
            exact = small + of_x0**2 * left
        share = 2 * (exact / small).log() / (large / small).log() - 1
        return torch.cat([gaussian.denoiser(scheduler)(x, t), share.expand_as(x)], dim=1)

    return predict


def axes(gaussian):
    """The same data with the axes as its directions."""
    gaussian.covariance = gaussian.covariance.diag().diag()
    gaussian.distribution = torch.distributions.MultivariateNormal(gaussian.mean, gaussian.covariance)
    return gaussian


def rows(predict, x):
    """Many samples side by side in each of a few rows, (B, 3 n), for fewer generators."""

    def wide(y, t):
        found = predict(y.reshape(-1, 3), t)
        return torch.cat([part.reshape(y.shape) for part in found.split(3, dim=1)], dim=1)

    return wide, x.reshape(20, -1)


@pytest.mark.parametrize(
    ("noise", "prediction_type", "terms"),
    [("cosine", "v_prediction", None), ("linear", "epsilon", 400), ("scaled_linear", "sample", 400)],
)
def test_the_bound_is_the_negative_log_likelihood_of_the_exact_reverse_process(noise, prediction_type, terms):
    gaussian, scheduler = axes(Gaussian((4.0, 1.0, 0.6))), schedule(noise, prediction_type)
    x = gaussian.draw(12_000)
    predict, data = rows(learned(gaussian, scheduler), x)
    bound = compute_variational_bound(predict, scheduler, data, generators(20), terms=terms)
    assert bound.steps.shape == (20, terms or 999)
    assert abs(bound.total_bits.mean() / true_bits(gaussian, x).mean() - 1) < 0.01


def test_a_posteriors_variance_is_too_small_and_the_bound_says_so():
    gaussian, scheduler = axes(Gaussian((4.0, 1.0, 0.6))), schedule()
    x = gaussian.draw(12_000)
    true = true_bits(gaussian, x).mean()
    predict, data = rows(gaussian.denoiser(scheduler), x)
    found = {
        variance: compute_variational_bound(predict, scheduler, data, generators(20), variance, 300).total_bits.mean()
        / true
        for variance in ("small", "large")
    }
    assert found["small"] > 1.1 and abs(found["large"] - 1) < 0.012


def test_few_terms_stand_for_all():
    gaussian, scheduler = axes(Gaussian((4.0, 1.0, 0.6))), schedule()
    x = gaussian.draw(12_000)
    predict, data = rows(learned(gaussian, scheduler), x)
    few = [
        compute_variational_bound(predict, scheduler, data, generators(20 + i)[i:], terms=60).total_bits.mean()
        for i in range(5)
    ]
    assert abs(torch.stack(few).mean() / true_bits(gaussian, x).mean() - 1) < 0.02


@pytest.mark.parametrize("terms", [1, 2, 37, 500, 998, 999])
def test_the_terms_cover_every_step_once(terms):
    """With a constant error all is known: each term stands for its own stretch."""
    scheduler = schedule("cosine", "sample")
    bound = compute_variational_bound(lambda x, t: x, scheduler, torch.zeros(2, 3).double(), generators(2), terms=terms)
    assert len(bound.spaced_timesteps) == terms == bound.steps.shape[1]
    assert bound.spaced_timesteps.min() >= 1 and bound.spaced_timesteps.max() <= 999
    assert terms == 1 or bound.spaced_timesteps.diff().min() >= 1
    assert terms < 999 or bound.spaced_timesteps.tolist() == list(range(1, 1000))


@pytest.mark.parametrize(("noise", "prediction_type", "probes"), [(*case, 1) for case in CASES] + [(*CASES[0], 4)])
def test_the_odes_likelihood_is_the_true_one(noise, prediction_type, probes):
    gaussian, scheduler = Gaussian((4.0, 1.0, 0.6)), schedule(noise, prediction_type)
    x = gaussian.draw(COUNT)
    found = compute_ode_bits(gaussian.denoiser(scheduler), scheduler, x, generators(COUNT), steps=25, probes=probes)
    assert found.shape == (COUNT,)
    assert abs(found.mean() / true_bits(gaussian, x).mean() - 1) < 0.01


def test_the_odes_likelihood_of_each_sample_is_its_own_where_the_trace_needs_no_estimate():
    gaussian, scheduler = axes(Gaussian((4.0, 1.0, 0.6))), schedule()
    x = gaussian.draw(50)
    found = compute_ode_bits(gaussian.denoiser(scheduler), scheduler, x, generators(50), steps=50)
    torch.testing.assert_close(found, true_bits(gaussian, x), atol=5e-3, rtol=5e-3)


def test_the_levels_of_a_picture_share_the_whole_probability():
    x = (torch.arange(256).double() / 255 * 2 - 1)[None]
    for mean, variance in ((0.0, 0.1), (-0.99, 1e-4), (0.7, 1e-6), (3.0, 0.01)):
        found = compute_level_log_probability(x, torch.full_like(x, mean), torch.full_like(x, math.log(variance)))
        assert found.isfinite().all()
        assert abs(found.exp().sum() - 1) < 1e-6
    middle = compute_level_log_probability(x, torch.zeros_like(x), torch.full_like(x, math.log(0.25)))
    density = torch.distributions.Normal(0.0, 0.5).log_prob(x) + math.log(2 / 255)
    torch.testing.assert_close(middle[:, 1:-1], density[:, 1:-1], atol=1e-4, rtol=1e-4)


def test_the_bound_of_pictures_counts_levels():
    """Data known exactly up to their level cost nothing in L_0; a density would have no end."""
    scheduler = schedule("cosine", "sample")
    x = (torch.randint(256, (4, 12)).double() / 255) * 2 - 1
    predict = lambda noisy, t: x  # noqa: E731
    bound = compute_variational_bound(predict, scheduler, x, generators(4), terms=50, images=True)
    assert bound.data.min() > 0 and bound.data.max() < 1  # a deviation of 1.2 levels' halves: 0.7 bits
    assert bound.steps.abs().max() < 1e-6 and bound.prior.abs().max() < 1e-4
    density = compute_variational_bound(predict, scheduler, x, generators(4), terms=50)
    torch.testing.assert_close(density.steps, bound.steps)
    assert density.data.max() < -4


def test_the_bound_of_a_sample_does_not_depend_on_those_beside_it():
    gaussian, scheduler = axes(Gaussian((4.0, 1.0, 0.6))), schedule()
    x, predict = gaussian.draw(3), gaussian.denoiser(scheduler)
    for seed in (0, 1):
        together = compute_variational_bound(predict, scheduler, x, generators(3), terms=20, seed=seed)
        alone = compute_variational_bound(predict, scheduler, x[1:2], generators(3)[1:2], terms=20, seed=seed)
        torch.testing.assert_close(alone.total_bits[0], together.total_bits[1])
        assert alone.spaced_timesteps.tolist() == together.spaced_timesteps.tolist()
    assert (
        compute_variational_bound(predict, scheduler, x, generators(3), terms=20).spaced_timesteps.tolist()
        != alone.spaced_timesteps.tolist()
    )


def test_a_shipped_model_is_measured(pipeline, shapes, tmp_path):
    from t2i.evaluation.likelihood import LikelihoodSettings, evaluate_model_likelihood

    out = tmp_path / "figures" / "likelihood.json"
    result = evaluate_model_likelihood(pipeline, shapes, out, LikelihoodSettings(3, 3, 3))
    assert json.loads(out.read_text()) == result
    assert {"t2i", "torch", "diffusers", "python"} == result["versions"].keys()
    for split in ("train", "held_out"):
        for stage in ("prior", "decoder"):
            figures = result[split][stage]
            parts = sum(figures[name]["bits"] for name in ("bound_prior", "bound_steps", "bound_data"))
            assert abs(figures["bound"]["bits"] - parts) < 1e-3 * max(1, abs(parts))
            assert math.isfinite(figures["ode"]["bits"]) and figures["ode"]["standard_error"] > 0
    assert evaluate_model_likelihood(pipeline, shapes, out, LikelihoodSettings(3, 3, 3)) == result
    with pytest.raises(InputError, match="has 4 images in held_out; count must be at most that, got 5"):
        evaluate_model_likelihood(pipeline, shapes, out, LikelihoodSettings(5))
    with pytest.raises(InputError, match="count must be an integer from 2"):
        LikelihoodSettings(count=1)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="variance must be one of small, large; got 'medium'"):
        compute_variational_bound(lambda x, t: x, schedule(), torch.zeros(1, 3), generators(1), variance="medium")
    with pytest.raises(InputError, match="probes must be an integer"):
        compute_ode_bits(lambda x, t: x, schedule(), torch.zeros(1, 3), generators(1), probes=0)
