"""The sampler and guidance, against denoisers whose answer is known."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from t2i.diffusion.condition import Condition, ImageCondition, TextEncoding
from t2i.diffusion.denoiser import build_conditional_predict
from t2i.diffusion.loss import (
    check_loss_settings,
    compute_loss_weight,
    compute_weighted_mse,
    drop_condition,
    predict_noised_batch,
)
from t2i.diffusion.process import (
    alpha_sigma,
    build_noise_scheduler,
    compute_prediction_target,
    predict_x0,
    x0_to_prediction,
)
from t2i.diffusion.sampling_loop import Sampling, generate_noise, sample_from_noise
from t2i.errors import InputError

SCHEDULERS = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@dataclass
class Answer(Condition):
    x0: torch.Tensor


class Oracle:
    """Knows the clean sample, which is its condition, and predicts it in whatever form the scheduler wants."""

    dtype = torch.float32

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def prepare(self, condition):
        return condition.x0

    def step(self, x, t, x0):
        alpha = self.scheduler.alphas_cumprod[t.long()][:, None]
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        return {"sample": x0, "epsilon": noise, "v_prediction": velocity}[self.scheduler.config.prediction_type]

    def __call__(self, x, t, condition):
        return self.step(x, t, self.prepare(condition))

    def null(self, count):
        return Answer(torch.zeros(count, 8))


def make(scheduler_class, prediction_type):
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    if scheduler_class in (DDIMScheduler, DDPMScheduler):
        settings |= {"clip_sample": False, "timestep_spacing": "trailing"}
    return scheduler_class(**settings)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_an_oracle_is_followed_to_the_clean_sample(scheduler_class, prediction_type):
    scheduler = make(scheduler_class, prediction_type)
    oracle, answer = Oracle(scheduler), torch.randn(3, 8)
    noise = torch.randn(3, 8)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    steps = 20 if prediction_type != "epsilon" else 100  # noise tells little of the clean sample at the far end
    x = sample_from_noise(
        build_conditional_predict(oracle, Answer(answer)), scheduler, noise, Sampling(steps, generators)
    )
    torch.testing.assert_close(x, answer, atol=0.05, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_ddim_reaches_the_oracles_answer_exactly(steps):
    scheduler, answer = make(DDIMScheduler, "sample"), torch.randn(3, 8)
    x = sample_from_noise(
        build_conditional_predict(Oracle(scheduler), Answer(answer)), scheduler, torch.randn(3, 8), Sampling(steps)
    )
    torch.testing.assert_close(x, answer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_a_prediction_and_the_clean_sample_that_it_stands_for_say_the_same(prediction_type):
    scheduler, x = make(DDIMScheduler, prediction_type), torch.randn(5, 8).double()
    noise, t = torch.randn(5, 8).double(), torch.tensor([0, 30, 400, 800, 990])
    noisy = scheduler.add_noise(x, noise, t)
    prediction = compute_prediction_target(scheduler, x, noise, t)
    torch.testing.assert_close(predict_x0(scheduler, prediction, noisy, t), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x0_to_prediction(scheduler, x, noisy, t), prediction, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        predict_x0(scheduler, prediction[:1], noisy[:1], torch.tensor(-1)),
        noisy[:1] if prediction_type != "sample" else prediction[:1],
    )


def test_levels_between_two_timesteps_lie_between_theirs():
    scheduler, like = make(DDIMScheduler, "sample"), torch.zeros(1, dtype=torch.float64)
    (low, _), (between, rest), (high, _) = (alpha_sigma(scheduler, torch.tensor(t), like) for t in (500, 500.5, 501))
    assert high < between < low
    torch.testing.assert_close(between**2 + rest**2, torch.ones_like(between))
    torch.testing.assert_close(alpha_sigma(scheduler, torch.tensor(500.0), like)[0], low)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_an_oracle_has_no_loss_and_another_model_has(prediction_type):
    scheduler = make(DDIMScheduler, prediction_type)
    x = torch.randn(64, 8)
    prediction, expected, _ = predict_noised_batch(Oracle(scheduler), scheduler, x, Answer(x))
    torch.testing.assert_close(prediction, expected, atol=2e-3, rtol=1e-3)
    wrong, expected, _ = predict_noised_batch(Oracle(scheduler), scheduler, x, Answer(-x))
    assert (wrong - expected).abs().mean() > 0.1


def test_a_shift_draws_high_noise_more_often():
    scheduler, drawn = make(DDIMScheduler, "sample"), []

    def model(noisy, t, condition):
        drawn.append(t.float().mean())
        return noisy

    for shift in (1.0, 3.0):
        predict_noised_batch(model, scheduler, torch.zeros(4000, 8), Answer(torch.zeros(4000, 8)), shift)
    means = drawn
    assert abs(means[0] - 499.5) < 20
    assert abs(means[1] - 1000 * (1.5 - 0.75 * torch.log(torch.tensor(3.0)))) < 20  # the integral of 3u / (1 + 2u)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_min_snr_is_its_closed_form(prediction_type):
    scheduler, t = make(DDIMScheduler, prediction_type), torch.arange(1000)
    snr = [abar / (1 - abar) for abar in scheduler.alphas_cumprod.double().tolist()]
    closed = {
        "sample": [min(s, 5) for s in snr],
        "epsilon": [min(s, 5) / s for s in snr],
        "v_prediction": [min(s, 5) / (s + 1) for s in snr],
    }[prediction_type]
    weight = compute_loss_weight(scheduler, t, "min_snr", 5.0)
    torch.testing.assert_close(weight, torch.tensor(closed), rtol=1e-3, atol=1e-9)  # 1 - abar is rounded
    assert compute_loss_weight(scheduler, t, "none", 5.0).eq(1).all()


def test_min_snr_weighs_the_same_error_the_same_whatever_is_predicted():
    """One wrong clean sample, said as a sample, as noise and as velocity: one loss."""
    torch.manual_seed(0)
    x, noise, t = torch.randn(200, 8).double(), torch.randn(200, 8).double(), torch.arange(100, 900, 4)
    losses = []
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        scheduler = make(DDIMScheduler, prediction_type)
        oracle = Oracle(scheduler)
        wrong = oracle.step(scheduler.add_noise(x, noise, t), t, x + 0.1)
        weight = compute_loss_weight(scheduler, t, "min_snr", 5.0)
        losses.append(compute_weighted_mse(wrong, compute_prediction_target(scheduler, x, noise, t), weight))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=0)


def test_a_weight_counts_for_its_own_sample_alone():
    prediction, expected = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.zeros(2, 2)
    assert compute_weighted_mse(prediction, expected, torch.tensor([1.0, 0.0])) == 2.5  # (1 + 9) / 2, over two samples
    assert compute_weighted_mse(prediction, expected, torch.tensor([1.0, 1.0])) == ((prediction - expected) ** 2).mean()


ZERO_SNR = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}
ZERO_SNR |= {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_schedule_that_ends_in_pure_noise_trains_and_samples(prediction_type, weighting):
    scheduler = build_noise_scheduler({**ZERO_SNR, "prediction_type": prediction_type})
    assert scheduler.alphas_cumprod[-1] == 0
    x = torch.randn(16, 8)
    prediction, expected, t = predict_noised_batch(Oracle(scheduler), scheduler, x, Answer(-x), shift=1e9)
    assert t.eq(999).all()  # the last step alone
    wanted_there = {"sample": x, "v_prediction": -x}[prediction_type]  # v = sqrt(abar) noise - sqrt(1 - abar) x
    torch.testing.assert_close(expected, wanted_there)
    assert compute_weighted_mse(prediction, expected, compute_loss_weight(scheduler, t, weighting, 5.0)).isfinite()
    every = compute_loss_weight(scheduler, torch.arange(1000), weighting, 5.0)
    assert every.isfinite().all() and every[:-1].gt(0).all()
    answer = torch.randn(3, 8)
    drawn = sample_from_noise(
        build_conditional_predict(Oracle(scheduler), Answer(answer)), scheduler, torch.randn(3, 8), Sampling(20)
    )
    torch.testing.assert_close(drawn, answer, atol=1e-4, rtol=0)


def test_noise_cannot_be_predicted_from_pure_noise_and_the_schedule_says_so():
    with pytest.raises(InputError, match="rescale_betas_zero_snr, needs .* sample or v_prediction, got epsilon"):
        build_noise_scheduler({**ZERO_SNR, "prediction_type": "epsilon"})
    with pytest.raises(InputError, match="one of sample, v_prediction, epsilon, flow_prediction; got 'score'"):
        build_noise_scheduler({"prediction_type": "score"})


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def generators(*numbers):
        return [torch.Generator().manual_seed(n) for n in numbers]

    together = generate_noise((5,), generators(1, 2, 3), torch.device("cpu"))
    torch.testing.assert_close(together[1:2], generate_noise((5,), generators(2), torch.device("cpu")), rtol=0, atol=0)


def encoding(*lengths: int) -> TextEncoding:
    length = max(lengths)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return TextEncoding(torch.randn(len(lengths), 4), torch.randn(len(lengths), length, 3), mask)


def test_dropping_chooses_between_two_values_of_different_lengths():
    text, null = encoding(5, 3), encoding(2, 2)
    assert_same(drop_condition(text, null, 0.0), text)
    dropped = drop_condition(text, null, 1.0)
    assert dropped.mask.tolist() == [[True, True, False, False, False]] * 2
    torch.testing.assert_close(dropped.embedding, null.embedding)
    torch.testing.assert_close(dropped.states[:, :2], null.states)


def test_conditions_repeat_and_join():
    text, other = encoding(5, 3), encoding(2)
    twice = text.repeat(2)
    assert len(twice) == 4 and twice.expand().mask.sum(dim=1).tolist() == [5, 5, 3, 3]
    assert text.cat(other).mask.sum(dim=1).tolist() == [5, 3, 2]
    both = twice.cat(other.repeat(2)).take_rows(torch.tensor([5, 2, 1]))
    assert len(both) == 3 and both.expand().mask.sum(dim=1).tolist() == [2, 3, 5]


def test_repeated_conditions_share_their_tensors_and_are_equal_by_index():
    text = encoding(5, 3)
    image = ImageCondition(torch.randn(2, 4), text, torch.randn(2, 1, 2, 2)).repeat(3)
    assert image.text.states.data_ptr() == text.states.data_ptr() and image.masked_latents.shape[0] == 6
    first, groups = image.find_unique_rows()
    assert first.tolist() == [0, 3] and groups.tolist() == [0, 0, 0, 1, 1, 1]
    other = ImageCondition(torch.randn(6, 4), text.repeat(3))  # one image each of the same captions
    assert other.find_unique_rows()[0].tolist() == list(range(6))
    whole = image.expand()
    assert whole.rows is None and whole.text.rows is None and whole.embedding.shape == (6, 4)
    torch.testing.assert_close(whole.text.pooled[4], text.embedding[1])


def assert_same(a: TextEncoding, b: TextEncoding) -> None:
    for name, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer from 1 to 100000, got 0"),
        ({"beta_start": 5.0}, "does not turn images into noise"),
        ({"trained_betas": [0.1, 1.0], "prediction_type": "epsilon"}, "ends in pure noise"),
    ],
)
def test_a_schedule_that_is_none_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build_noise_scheduler(arguments)


def test_a_weighting_that_leaves_pure_noise_untrained_is_refused():
    scheduler = build_noise_scheduler({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    check_loss_settings(scheduler, "none")
    with pytest.raises(InputError, match="leave out one of the two"):
        check_loss_settings(scheduler, "min_snr")
