"""The sampler and guidance, against denoisers whose answer is known."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from t2i.condition import Condition, TextEncoding
from t2i.diffusion import conditional, denoise, draw_noise, drop, guided, sample

SCHEDULERS = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@dataclass
class Answer(Condition):
    clean: torch.Tensor


class Oracle:
    """Knows the clean sample, which is its condition, and predicts it in whatever form the scheduler wants."""

    dtype = torch.float32

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def prepare(self, condition):
        return condition.clean

    def step(self, x, t, clean):
        alpha = self.scheduler.alphas_cumprod[t.long()][:, None]
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return {"sample": clean, "epsilon": noise, "v_prediction": velocity}[self.scheduler.config.prediction_type]

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
    x = sample(conditional(oracle, Answer(answer)), scheduler, noise, steps, generators)
    torch.testing.assert_close(x, answer, atol=0.05, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_ddim_reaches_the_oracles_answer_exactly(steps):
    scheduler, answer = make(DDIMScheduler, "sample"), torch.randn(3, 8)
    x = sample(conditional(Oracle(scheduler), Answer(answer)), scheduler, torch.randn(3, 8), steps)
    torch.testing.assert_close(x, answer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_unconditional_conditional_and_extrapolated(scale):
    oracle, answer = Oracle(make(DDIMScheduler, "sample")), torch.randn(2, 8)
    negative = torch.randn(2, 8)
    predict = guided(oracle, Answer(answer), Answer(negative), scale)
    torch.testing.assert_close(predict(torch.randn(2, 8), torch.tensor(5)), negative + scale * (answer - negative))


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_an_oracle_has_no_loss_and_another_model_has(prediction_type):
    scheduler = make(DDIMScheduler, prediction_type)
    x = torch.randn(64, 8)
    prediction, target = denoise(Oracle(scheduler), scheduler, x, Answer(x))
    torch.testing.assert_close(prediction, target, atol=2e-3, rtol=1e-3)
    wrong, target = denoise(Oracle(scheduler), scheduler, x, Answer(-x))
    assert (wrong - target).abs().mean() > 0.1


def test_a_shift_draws_high_noise_more_often():
    scheduler, drawn = make(DDIMScheduler, "sample"), []

    def model(noisy, t, condition):
        drawn.append(t.float().mean())
        return noisy

    for shift in (1.0, 3.0):
        denoise(model, scheduler, torch.zeros(4000, 8), Answer(torch.zeros(4000, 8)), shift)
    means = drawn
    assert abs(means[0] - 499.5) < 20
    assert abs(means[1] - 1000 * (1.5 - 0.75 * torch.log(torch.tensor(3.0)))) < 20  # the integral of 3u / (1 + 2u)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def generators(*numbers):
        return [torch.Generator().manual_seed(n) for n in numbers]

    together = draw_noise((5,), generators(1, 2, 3), torch.device("cpu"))
    torch.testing.assert_close(together[1:2], draw_noise((5,), generators(2), torch.device("cpu")), rtol=0, atol=0)


def encoding(*lengths: int) -> TextEncoding:
    length = max(lengths)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return TextEncoding(torch.randn(len(lengths), 4), torch.randn(len(lengths), length, 3), mask)


def test_dropping_chooses_between_two_values_of_different_lengths():
    text, null = encoding(5, 3), encoding(2, 2)
    assert_same(drop(text, null, 0.0), text)
    dropped = drop(text, null, 1.0)
    assert dropped.mask.tolist() == [[True, True, False, False, False]] * 2
    torch.testing.assert_close(dropped.embedding, null.embedding)
    torch.testing.assert_close(dropped.states[:, :2], null.states)


def test_conditions_repeat_and_join():
    text, other = encoding(5, 3), encoding(2)
    twice = text.repeat(2)
    assert twice.mask.sum(dim=1).tolist() == [5, 5, 3, 3]
    assert text.cat(other).mask.sum(dim=1).tolist() == [5, 3, 2]


def assert_same(a: TextEncoding, b: TextEncoding) -> None:
    for name, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, name))
