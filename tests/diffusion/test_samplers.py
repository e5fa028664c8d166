"""Every sampler against Gaussian data, whose exact denoiser is known; DDIM and its way back."""

import json
from inspect import signature
from itertools import zip_longest

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)

from t2i.diffusion.continuous import ProbabilityFlowScheduler, ReverseSDEScheduler
from t2i.diffusion.ddim import ExactDDIMScheduler, invert_sample
from t2i.diffusion.process import alpha_sigma
from t2i.diffusion.samplers import SAMPLERS, build_sampler, count_model_evaluations, resolve_sampler
from t2i.diffusion.sampling_loop import Sampling, count_steps_left, sample_from_noise
from t2i.errors import InputError
from tests.helpers.gaussian import PREDICTIONS, SCHEDULES, Gaussian, schedule
from tests.helpers.stages import seeds

COUNT = 10_000
STEPS = {"ddpm": 400, "ddim": 200, "dpmsolver++": 60, "unipc": 60, "ode": 20, "sde": 100, "sde-dpmsolver++": 100}
LACKS = {"ddpm": 0.04, "ddim": 0.03, "unipc": 0.05, "dpmsolver++": 0.05}


def last(gaussian, scheduler, count, seed=1):
    """x_T as the forward process makes it, which is not quite N(0, 1) in every schedule."""
    x = gaussian.draw(count, seed)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    return scheduler.add_noise(x, noise, torch.full((count,), 999))


def misses(gaussian, x) -> tuple[float, float]:
    """The largest error of the mean and of the covariance, in directions where both should be those of N(0, 1)."""
    z = gaussian.standardised(x)
    return z.mean(dim=0).abs().max().item(), (z.T.cov() - torch.eye(z.shape[1])).abs().max().item()


CASES = [(name, noise, "v_prediction") for name in SAMPLERS for noise in SCHEDULES]
CASES += [(name, "cosine", kind) for name in SAMPLERS for kind in ("sample", "epsilon")]


@pytest.mark.parametrize(("name", "noise", "prediction_type"), CASES)
def test_every_sampler_reaches_the_distribution(name, noise, prediction_type):
    torch.manual_seed(0)
    gaussian, scheduler = Gaussian(), schedule(noise, prediction_type)
    sampler = build_sampler(name, scheduler)
    x = sample_from_noise(
        gaussian.denoiser(scheduler), sampler, last(gaussian, scheduler, COUNT), Sampling(STEPS[name])
    )
    mean, covariance = misses(gaussian, x)
    assert mean < 4 / COUNT**0.5  # four standard errors
    assert covariance < 4 * (2 / COUNT) ** 0.5 + LACKS.get(name, 0.02)  # the same, and what the steps are too long for


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_reaches_the_distribution_with_any_eta(eta):
    torch.manual_seed(0)
    gaussian, scheduler = Gaussian(), schedule()
    x = sample_from_noise(
        gaussian.denoiser(scheduler),
        build_sampler("ddim", scheduler),
        last(gaussian, scheduler, COUNT),
        Sampling(333, eta=eta),
    )
    mean, covariance = misses(gaussian, x)
    assert mean < 4 / COUNT**0.5 and covariance < 4 * (2 / COUNT) ** 0.5 + 0.03


def test_ddim_of_all_the_noise_is_ancestral_sampling():
    gaussian, scheduler = Gaussian(), schedule()
    noise = torch.randn(5, 3, dtype=torch.float64)
    ancestral, ddim = build_sampler("ddpm", scheduler), build_sampler("ddim", scheduler)
    first = sample_from_noise(gaussian.denoiser(scheduler), ancestral, noise, Sampling(37, seeds(*range(5))))
    second = sample_from_noise(gaussian.denoiser(scheduler), ddim, noise, Sampling(37, seeds(*range(5)), eta=1.0))
    torch.testing.assert_close(first, second, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "sde-dpmsolver++", "sde", "ddim"])
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(name):
    gaussian, scheduler = Gaussian(), schedule()
    noise, eta = torch.randn(3, 3, dtype=torch.float64), 1.0 if name == "ddim" else None

    def draw(part, generators):
        return sample_from_noise(
            gaussian.denoiser(scheduler), build_sampler(name, scheduler), part, Sampling(10, generators, eta=eta)
        )

    together = draw(noise, seeds(1, 2, 3))
    torch.testing.assert_close(together[1:2], draw(noise[1:2], seeds(2)), atol=1e-9, rtol=0)
    assert (together - draw(noise, seeds(4, 5, 6))).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 61, 999, 1000])
def test_ddim_takes_each_of_its_steps_to_the_next(steps):
    scheduler = ExactDDIMScheduler.from_config(schedule().config)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and scheduler.timesteps[0] == 999
    assert steps == 1 or scheduler.timesteps.diff().max() < 0
    ends = [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps]
    assert ends == [*scheduler.timesteps[1:].tolist(), -1]


def test_without_a_name_diffusers_ddim_is_exact_and_the_same_where_steps_divide_the_training():
    gaussian, saved = Gaussian(), schedule()
    usual = resolve_sampler(None, saved, None)
    noise = last(gaussian, saved, 4000)
    drawn = [sample_from_noise(gaussian.denoiser(saved), one, noise, Sampling(25)) for one in (usual, saved)]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=0)
    exact, inexact = (
        misses(gaussian, sample_from_noise(gaussian.denoiser(saved), one, noise, Sampling(600)))[1]
        for one in (usual, saved)
    )
    assert exact < 0.1 < inexact
    other = build_sampler("unipc", saved)
    found = resolve_sampler(None, other, None)  # a copy, which sampling changes
    assert found is not other and type(found) is type(other) and found.config == other.config


@pytest.mark.parametrize("offset", [0, 1])
def test_without_set_alpha_to_one_ddim_ends_where_that_of_diffusers_does_and_inverts_from_there(offset):
    """As the schedulers of public models have it."""
    settings = {"timestep_spacing": "leading", "steps_offset": offset}
    saved, whole = (schedule(set_alpha_to_one=last, **settings) for last in (False, True))
    gaussian, noise = Gaussian(), torch.randn(50, 3, dtype=torch.float64)
    predict, exact = gaussian.denoiser(saved), resolve_sampler(None, saved, None)
    theirs, mine = (sample_from_noise(predict, one, noise, Sampling(25)) for one in (saved, exact))
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    assert (mine - sample_from_noise(predict, whole, noise, Sampling(25))).abs().max() > 1e-5
    again = sample_from_noise(predict, exact, invert_sample(predict, saved, mine, 25, refinements=20), Sampling(25))
    torch.testing.assert_close(again, mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "unipc"])
def test_no_step_leads_beyond_the_clean_sample(name):
    """diffusers' trailing timesteps for 61 steps are 62, and the last is -1."""
    gaussian, scheduler = Gaussian((0.01,)), schedule()
    x = sample_from_noise(
        gaussian.denoiser(scheduler), build_sampler(name, scheduler), torch.randn(50, 1).double(), Sampling(61)
    )
    assert (x - gaussian.mean).abs().max() < 0.6


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("noise", SCHEDULES)
def test_what_was_inverted_is_drawn_again(noise, prediction_type):
    gaussian, scheduler = Gaussian(), schedule(noise, prediction_type)
    x, predict = gaussian.draw(100), gaussian.denoiser(scheduler)
    start = invert_sample(predict, scheduler, x, 100)
    again = sample_from_noise(predict, build_sampler("ddim", scheduler), start, Sampling(100, eta=0.0))
    assert (again - x).abs().max() < 1e-3


def test_more_refinements_invert_more_exactly():
    gaussian, scheduler = Gaussian(), schedule()
    x, predict = gaussian.draw(100), gaussian.denoiser(scheduler)
    errors = [
        (
            sample_from_noise(
                predict, build_sampler("ddim", scheduler), invert_sample(predict, scheduler, x, 30, count), Sampling(30)
            )
            - x
        )
        .abs()
        .max()
        for count in (1, 2, 3, 6)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[3] < 1e-7


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "scaled_linear"])
def test_the_noise_of_a_model_of_noise_is_bounded_where_the_schedule_ends_in_noise_alone(beta_schedule):
    """Whatever the model says: here, noise of unit variance that has nothing to do with x."""
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, prediction_type="epsilon", timestep_spacing="linspace")
    said = torch.randn(4, 3, generator=seeds(1)[0])
    start = invert_sample(lambda x, t: said, scheduler, torch.randn(4, 3, generator=seeds(2)[0]), 10)
    assert start.abs().max() < 1.01 * said.abs().max() + 0.2


def test_inversion_finds_noise():
    gaussian, scheduler = Gaussian(), schedule()
    noise = invert_sample(gaussian.denoiser(scheduler), scheduler, gaussian.draw(COUNT), 100)
    assert noise.mean(dim=0).abs().max() < 4 / COUNT**0.5
    assert (noise.T.cov() - torch.eye(3)).abs().max() < 0.08


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_original_is_kept_as_far_as_the_strength_says(name):
    torch.manual_seed(0)
    gaussian, scheduler = Gaussian(), schedule()
    original, predict = gaussian.draw(200), gaussian.denoiser(scheduler)

    def far(strength):
        sampler = build_sampler(name, scheduler)
        x = sample_from_noise(
            predict, sampler, torch.randn(200, 3).double(), Sampling(20, original=original, strength=strength)
        )
        return (x - original).square().mean().item()

    little, half, all_of_it = far(0.1), far(0.5), far(1.0)
    assert little < 0.1 < half < all_of_it
    assert abs(all_of_it - 2 * gaussian.covariance.diag().mean()) < 0.4  # two independent draws


@pytest.mark.parametrize("kind", [ProbabilityFlowScheduler, ReverseSDEScheduler])
@pytest.mark.parametrize("noise", SCHEDULES)
def test_continuous_times_fall_from_the_last_to_the_first(kind, noise):
    scheduler = kind.from_config(schedule(noise).config)
    scheduler.set_timesteps(25)
    times = scheduler.timesteps.unique()
    assert len(times) == 25 and times.max() == 999 and times.min() >= 0
    assert (times != times.round()).any() and scheduler.timesteps.diff().max() <= 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_saved_and_loaded(name, tmp_path):
    sampler = build_sampler(name, schedule("scaled_linear", "sample"))
    sampler.save_pretrained(tmp_path)
    again = type(sampler).from_pretrained(tmp_path)
    assert all(again.config[key] == value for key, value in sampler.config.items() if not key.startswith("_"))
    assert again.config.prediction_type == "sample"
    torch.testing.assert_close(again.alphas_cumprod, schedule("scaled_linear").alphas_cumprod)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplings_of_one_schedule_that_run_in_turns_change_nothing_of_each_other(name):
    def draw(steps):
        """Yield x after each step of a sampling."""
        sampler, x = build_sampler(name, schedule()), torch.ones(1, 3, dtype=torch.float64)
        own = {"generator": seeds(0)[0]} if "generator" in signature(sampler.step).parameters else {}
        sampler.set_timesteps(steps)
        for t in sampler.timesteps:
            x = sampler.step(0.1 * x, t, x, **own).prev_sample
            yield x

    alone = [list(draw(4)), list(draw(7))]
    for found, expected in zip(zip_longest(draw(4), draw(7)), zip_longest(*alone), strict=True):
        for x, x_alone in zip(found, expected, strict=True):
            assert (x is None) == (x_alone is None) and (x is None or torch.equal(x, x_alone))


def test_a_learned_variance_is_used_by_ancestral_sampling_and_ignored_by_others():
    gaussian, scheduler = Gaussian(), schedule()
    plain, noise = gaussian.denoiser(scheduler), torch.randn(4, 3).double()

    def predict(share):
        return lambda x, t: torch.cat([plain(x, t), torch.full_like(x, share)], dim=1)

    def draw(name, share, learned):
        sampler = build_sampler(name, scheduler, learned_variance=learned)
        return sample_from_noise(predict(share), sampler, noise, Sampling(20, seeds(1, 2, 3, 4)))

    torch.testing.assert_close(draw("ddpm", -1.0, True), draw("ddpm", 1.0, False))  # -1 is the posterior's own
    assert (draw("ddpm", 1.0, True) - draw("ddpm", -1.0, True)).abs().max() > 1e-2
    large = DDPMScheduler.from_config(build_sampler("ddpm", scheduler).config, variance_type="fixed_large")
    torch.testing.assert_close(
        draw("ddpm", 1.0, True), sample_from_noise(plain, large, noise, Sampling(20, seeds(1, 2, 3, 4)))
    )
    for name in ("ddim", "unipc", "ode", "sde"):
        torch.testing.assert_close(draw(name, -1.0, True), draw(name, 1.0, True))


def test_a_sampler_of_another_schedulers_schedule():
    unclip = UnCLIPScheduler(prediction_type="sample", variance_type="learned_range")
    sampler = build_sampler("ddpm", unclip)
    torch.testing.assert_close(sampler.alphas_cumprod, unclip.alphas_cumprod)
    assert sampler.config.variance_type == "learned_range" and sampler.config.prediction_type == "sample"


def test_a_sampler_does_not_take_over_what_another_class_has_by_default():
    solver = build_sampler("unipc", schedule("cosine", "sample"))
    assert not build_sampler("ddim", solver).config.clip_sample
    default = build_sampler("ddim", DPMSolverMultistepScheduler())
    assert default.config.timestep_spacing == "linspace" and not default.config.clip_sample


def test_what_is_no_sampler_or_takes_no_eta_is_refused():
    with pytest.raises(InputError, match="sampler must be one of ddpm, ddim, .*; got 'euler a'"):
        build_sampler("euler a", schedule())
    noise = torch.zeros(1, 3)
    with pytest.raises(InputError, match="eta needs the sampler ddim; .* got eta=0.5"):
        sample_from_noise(lambda x, t: x, build_sampler("unipc", schedule()), noise, Sampling(5, eta=0.5))
    with pytest.raises(InputError, match="eta must be from 0 to 1, got 2"):
        sample_from_noise(lambda x, t: x, build_sampler("ddim", schedule()), noise, Sampling(5, eta=2))
    with pytest.raises(InputError, match="strength must be from 0 to 1"):
        sample_from_noise(
            lambda x, t: x, build_sampler("ddim", schedule()), noise, Sampling(5, original=noise, strength=1.5)
        )


@pytest.mark.parametrize("name", ["ddim", "ode", "sde"])
def test_our_schedulers_are_a_part_of_a_pipelines_folder(name, pipeline, tmp_path):
    pipeline.decoder_scheduler = build_sampler(name, pipeline.decoder_scheduler)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    assert type(again.decoder_scheduler) is type(pipeline.decoder_scheduler)
    again.set_progress_bar_config(disable=True)
    assert again("red circle", generator=seeds(1), num_inference_steps=3, output_type="np").images.shape[0] == 1


def test_a_scheduler_that_is_not_one_of_ours_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["decoder_scheduler"] = ["t2i.diffusion.ddim", "invert"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="must contain a scheduler of diffusers or of this project, got 'invert'"):
        type(pipeline).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pipeline_draws_with_any_sampler_and_a_picture_depends_on_its_seed_alone(name, pipeline):
    settings = {"num_inference_steps": 4, "prior_num_inference_steps": 4, "output_type": "latent"}
    settings |= {"sampler": name, "prior_sampler": name}
    saved, steps = pipeline.decoder_scheduler, []
    seen = {"on_preview": lambda preview: steps.append((preview.stage, preview.step, preview.steps))}
    together = pipeline(["red circle", "blue square"], generator=seeds(1, 2), **settings, **seen).images
    alone = pipeline("blue square", generator=seeds(2), **settings).images
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    count = 7 if name == "ode" else 4
    assert steps == [(stage, i + 1, count) for stage in ("prior", "decoder") for i in range(count)]
    assert pipeline.decoder_scheduler is saved


def test_eta_reaches_the_decoder(pipeline):
    def draw(**settings):
        return pipeline(
            "red circle", generator=seeds(1), num_inference_steps=4, output_type="latent", **settings
        ).images

    assert (draw(sampler="ddim", eta=0.8) - draw(sampler="ddim")).abs().max() > 1e-3
    torch.testing.assert_close(draw(sampler="ddim", eta=0.8), draw(eta=0.8), atol=1e-4, rtol=1e-4)
    for settings in ({"sampler": "unipc", "eta": 0.5}, {"eta": 2.0}, {"prior_sampler": "euler"}):
        with pytest.raises(
            InputError, match="eta needs the sampler ddim|eta must be from 0|prior_sampler must be one of"
        ):
            draw(**settings)


def test_the_command_line_names_every_sampler():
    from t2i.commands import flags as options

    assert all(name in options.SAMPLER_NAMES for name in SAMPLERS)


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.5, 0.2])
def test_pndm_finds_what_is_sure_from_any_step_on(strength):
    """Stable Diffusion's own: it asks twice at its second timestep, which below full strength is another one."""
    scheduler = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)
    original, noise = (torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    asked = []

    def predict(x, t):
        asked.append(int(t))
        alpha, sigma = alpha_sigma(scheduler, t, x)
        return (x - alpha * original) / sigma

    steps = round(10 * strength)
    x = sample_from_noise(
        predict, scheduler, noise, Sampling(10, original=None if strength == 1 else original, strength=strength)
    )
    assert len(asked) == count_model_evaluations(scheduler, steps)
    assert asked[1:2] == asked[2:3] and len(set(asked)) == steps
    if strength < 1:  # from pure noise, what is said of the clean sample is not that it is this one
        torch.testing.assert_close(x, original, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.001, 0.29, 0.5, 0.58, 0.6, 0.75, 0.999, 1.0])
def test_strength_takes_the_steps_that_diffusers_takes(strength):
    """Of one or more: diffusers refuses a strength that takes none."""
    for steps in (1, 7, 10, 25, 50, 100):
        assert count_steps_left(steps, strength) == max(1, min(int(steps * strength), steps))
    assert count_steps_left(25, 0.58) == 14  # not 15, the nearest
