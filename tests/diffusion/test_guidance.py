"""Guidance and steering, against denoisers whose answer is known."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from t2i.diffusion.condition import Condition
from t2i.diffusion.denoiser import build_conditional_predict
from t2i.diffusion.guidance import (
    Guidance,
    build_guided_predict,
    build_steered_predict,
    parse_guidance,
    parse_guidance_value,
)
from t2i.diffusion.process import alpha_sigma, predict_x0, x0_to_prediction
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.errors import InputError

KINDS = ["sample", "epsilon", "v_prediction"]


@dataclass
class Answer(Condition):
    x0: torch.Tensor


class Oracle:
    """Predicts the clean sample that its condition is."""

    dtype = torch.float32

    def __init__(self, scheduler):
        self.scheduler, self.sizes = scheduler, []

    def prepare(self, condition):
        return condition.x0

    def step(self, x, t, answer):
        self.sizes.append(len(x))
        return x0_to_prediction(self.scheduler, answer, x, t)


def make(kind="sample", scheduler=DDIMScheduler):
    return scheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )


def guide(guidance, kind="sample", t=500, positive=None, negative=None):
    """The clean sample that a guided oracle predicts at t; the oracle."""
    scheduler = make(kind)
    oracle = Oracle(scheduler)
    x, t = torch.randn(positive.shape), torch.tensor(t)
    predict = build_guided_predict(oracle, Answer(positive), Answer(negative), guidance, scheduler)
    return predict_x0(scheduler, predict(x, t), x, t), oracle


@pytest.fixture
def ends():
    torch.manual_seed(0)
    return {"positive": torch.randn(2, 64), "negative": torch.randn(2, 64)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_unconditional_conditional_and_extrapolated(scale, kind, ends):
    expected = ends["negative"] + scale * (ends["positive"] - ends["negative"])
    torch.testing.assert_close(guide(scale, kind, **ends)[0], expected, atol=1e-4, rtol=1e-4)


def test_outside_its_interval_the_model_runs_once_and_is_not_guided(ends):
    guidance = Guidance(3.0, interval=(0.2, 0.6))
    for t, size in ((100, 2), (199, 2), (200, 4), (600, 4), (601, 2), (999, 2)):
        sample, oracle = guide(guidance, t=t, **ends)
        assert oracle.sizes == [size]
        assert torch.equal(sample, ends["positive"]) == (size == 2)


def test_rescaling_gives_back_the_deviation_of_the_wanted_sample(ends):
    plain, _ = guide(5.0, **ends)
    whole, _ = guide(Guidance(5.0, rescale=1.0), **ends)
    torch.testing.assert_close(whole.std(dim=1), ends["positive"].std(dim=1))
    half, _ = guide(Guidance(5.0, rescale=0.5), **ends)
    torch.testing.assert_close(half, (plain + whole) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholding_bounds_a_sample_by_the_unguided_one(kind, ends):
    sample, _ = guide(Guidance(5.0, threshold=0.9), kind, **ends)
    bound = ends["positive"].abs().quantile(0.9, dim=1)
    torch.testing.assert_close(sample.abs().amax(dim=1), bound, atol=1e-3, rtol=1e-3)
    unguided, _ = guide(Guidance(1.0, threshold=0.9), kind, **ends)
    torch.testing.assert_close(unguided, ends["positive"], atol=1e-4, rtol=1e-4)


def test_projected_guidance_with_everything_at_rest_is_plain_guidance(ends):
    plain, _ = guide(3.0, **ends)
    torch.testing.assert_close(guide(Guidance(3.0, norm=1e6), **ends)[0], plain, atol=1e-5, rtol=1e-5)


def test_projected_guidance_leaves_the_part_along_the_wanted_sample(ends):
    positive = ends["positive"]
    sample, _ = guide(Guidance(3.0, parallel=0.0), **ends)
    along = ((sample - positive) * positive).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(2), atol=1e-3, rtol=0)
    assert (sample - positive).norm() > 1
    # The rest is the difference less its projection.
    difference = positive - ends["negative"]
    share = (difference * positive).sum(1, keepdim=True) / positive.square().sum(1, keepdim=True)
    torch.testing.assert_close(sample, positive + 2 * (difference - share * positive), atol=1e-4, rtol=1e-4)


def test_projected_guidance_bounds_the_difference(ends):
    sample, _ = guide(Guidance(2.0, norm=0.1), **ends)
    torch.testing.assert_close((sample - ends["positive"]).square().mean(dim=1).sqrt(), torch.full((2,), 0.1))


def test_momentum_averages_the_differences_of_one_sampling(ends):
    scheduler, x, t = make(), torch.randn(2, 64), torch.tensor(500)
    predict = build_guided_predict(
        Oracle(scheduler), Answer(ends["positive"]), Answer(ends["negative"]), Guidance(2.0, momentum=-0.5), scheduler
    )
    difference = ends["positive"] - ends["negative"]
    for share in (1.0, 0.5, 0.75):  # d, d - d / 2, d - d / 4
        torch.testing.assert_close(predict(x, t), ends["positive"] + share * difference)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (float("nan"), "g must be a number from 0 to 1000, got nan"),
        (Guidance(2.0, interval=(0.7, 0.3)), "g.interval must rise, got 0.7 to 0.3"),
        (Guidance(2.0, interval=(0.7,)), "g.interval must be two numbers"),
        (Guidance(2.0, interval=(-1, 1)), "g.interval must be from 0 to 1, got -1"),
        (Guidance(2.0, rescale=1.5), "g.rescale must be from 0 to 1"),
        (Guidance(2.0, threshold=0.1), "g.threshold must be from 0.5 to 1"),
        (Guidance(2.0, norm="big"), "g.norm must be a number"),
        (Guidance(2.0, momentum=1.0), "g.momentum must be from -0.99 to 0.99"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(guidance, message):
    with pytest.raises(InputError, match=message):
        parse_guidance_value("g", guidance)


def test_guidance_is_read_from_texts():
    settings = ["interval=0.2:0.8", "rescale=0.7", "norm=15"]
    assert parse_guidance("g", 3.0, settings) == Guidance(3.0, (0.2, 0.8), rescale=0.7, norm=15.0)
    for text in ("strength=3", "rescale", "rescale=much", "interval=0.3", "scale=2", "rescale=1:2"):
        with pytest.raises(InputError, match="rescale|interval|KEY=VALUE"):
            parse_guidance("g", 3.0, [text])


class Gaussian:
    """The exact denoiser of data from N(mean, deviation^2), in each dimension."""

    dtype = torch.float64

    def __init__(self, scheduler, mean, deviation):
        self.scheduler, self.mean, self.deviation = scheduler, mean, deviation

    def prepare(self, condition):
        return None

    def step(self, x, t, context):
        alpha, sigma = alpha_sigma(self.scheduler, t[:1].squeeze(), x)
        gain = alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2)
        return x0_to_prediction(self.scheduler, self.mean + gain * (x - alpha * self.mean), x, t[:1].squeeze())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("of_x0", [False, True])
def test_an_exact_classifier_moves_the_mean_to_the_posterior(kind, scheduler, of_x0):
    """Data from N(0.5, 0.8^2); a label y = x + noise of 0.6 was seen to be 1.5: a Gaussian posterior, in closed form.

    The classifier of noisy samples knows p(y | x_t). That of the clean estimate is p(y | x0_hat) with the variance that
    x0 has beside its estimate added: the same function, for x0_hat is linear in x_t.
    """
    scheduler = make(kind, scheduler)
    mean, deviation, seen, error = 0.5, 0.8, 1.5, 0.6
    predict = build_conditional_predict(Gaussian(scheduler, mean, deviation), Answer(torch.zeros(1)))

    def score(x, t):
        alpha, sigma = alpha_sigma(scheduler, t, x)
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        estimate = x if of_x0 else mean + gain * (x - alpha * mean)
        spread = deviation**2 * (1 - gain * alpha) + error**2
        return (-((seen - estimate) ** 2) / (2 * spread)).sum(dim=1)

    noise = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    drawn = sample_from_noise(
        build_steered_predict(predict, scheduler, score, 1.0, of_x0), scheduler, noise, Sampling(200)
    )
    variance = 1 / (1 / deviation**2 + 1 / error**2)
    posterior = variance * (mean / deviation**2 + seen / error**2)
    torch.testing.assert_close(drawn.mean(), torch.tensor(posterior).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(), torch.tensor(variance).double(), atol=0.02, rtol=0)


def test_steering_by_nothing_is_no_steering():
    predict = build_conditional_predict(Gaussian(make(), 0.0, 1.0), Answer(torch.zeros(1)))
    assert build_steered_predict(predict, make(), lambda x, t: x.sum(dim=1), 0) is predict
