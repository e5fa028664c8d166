"""Rectified flow against Gaussian data, whose velocity, paths and likelihood are known."""

import math

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from t2i.diffusion.continuous import AncestralScheduler
from t2i.diffusion.ddim import invert_sample
from t2i.diffusion.flow import draw_flow_timesteps, get_flow_shift
from t2i.diffusion.guidance import Guidance, build_guided_predict, build_steered_predict
from t2i.diffusion.inpainting import build_blend_callback
from t2i.diffusion.likelihood import compute_ode_bits, compute_variational_bound
from t2i.diffusion.loss import check_loss_settings, compute_diffusion_loss, predict_noised_batch
from t2i.diffusion.process import (
    alpha_sigma,
    build_noise_scheduler,
    compute_prediction_target,
    posterior_coefficients,
    predict_x0,
    preserve_variance,
    x0_to_prediction,
)
from t2i.diffusion.samplers import (
    FLOW_SAMPLING_SCHEDULERS,
    SAMPLERS,
    build_sampler,
    check_scheduler_sampling,
    count_model_evaluations,
    find_sampling_fault,
    list_sampling_schedulers,
    resolve_sampler,
)
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.errors import InputError
from tests.diffusion.test_every_scheduler import KINDS, MISSING
from tests.diffusion.test_guidance import Answer, Oracle
from tests.helpers.gaussian import Gaussian
from tests.helpers.stages import seeds

# Of what diffusers calls of NumPy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COUNT, STEPS = 2000, 50
NAMES = [*FLOW_SAMPLING_SCHEDULERS, *SAMPLERS]
RANDOM = ("SASolver", "ddpm", "sde", "sde-dpmsolver++")
SHIFTS = (1.0, 3.0)


def trained(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that training stores."""
    return build_noise_scheduler({"prediction_type": "flow_prediction", "shift": shift})


def build(name: str, shift: float = 1.0, **settings: object) -> diffusers.SchedulerMixin:
    """A sampler by its name here, or a scheduler of diffusers as its users make it of the stored one."""
    if name in SAMPLERS:
        return build_sampler(name, trained(shift))
    if not name.startswith("FlowMatch"):
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift} | settings
    kind = getattr(diffusers, f"{name}Scheduler")
    return resolve_sampler(None, kind.from_config(trained(shift).config, **settings), None)


def draw(name: str, noise: torch.Tensor, predict: object = None, shift: float = 1.0, **settings: object):
    torch.manual_seed(5)  # some schedulers take no generators
    scheduler = build(name, shift)
    predict = predict or Gaussian().denoiser(trained())
    return sample_from_noise(predict, scheduler, noise, Sampling(**{"steps": STEPS, **settings}))


def make_noise(count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, 3, generator=seeds(2)[0]).double()


# The process


def test_noise_levels_targets_and_predictions_are_those_of_a_straight_path():
    scheduler, x, noise = trained(3.0), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    t = torch.tensor([0.5, 100.0, 750.25, 1000.0])
    alpha, sigma = alpha_sigma(scheduler, t, x)
    torch.testing.assert_close(sigma[:, 0], t.double() / 1000)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    assert alpha_sigma(scheduler, torch.tensor(-1), x) == (1, 0)
    noisy, velocity = alpha * x + sigma * noise, compute_prediction_target(scheduler, x, noise, t)
    torch.testing.assert_close(velocity, noise - x)
    torch.testing.assert_close(predict_x0(scheduler, velocity, noisy, t), x)
    torch.testing.assert_close(x0_to_prediction(scheduler, x, noisy, t), velocity)
    torch.testing.assert_close(preserve_variance(scheduler, noisy, t), noisy / (alpha**2 + sigma**2).sqrt())


def test_the_posterior_is_that_of_two_gaussian_numbers():
    """Of x_s and x_t = a x_s + rest given x0, by their joint covariance."""
    scheduler, like = trained(), torch.zeros(1).double()
    for t, s in ((1000.0, 400.0), (700.0, 650.0), (2.0, 1.0)):
        (alpha, sigma), (alpha_s, sigma_s) = (alpha_sigma(scheduler, torch.tensor(at), like) for at in (t, s))
        shared = alpha / alpha_s * sigma_s**2  # the covariance of both
        gain = shared / sigma**2
        found = posterior_coefficients(scheduler, torch.tensor(t), torch.tensor(s), like)
        expected = (
            gain,
            alpha_s - gain * alpha,
            sigma_s**2 - gain * shared,
            sigma**2 - (alpha / alpha_s * sigma_s) ** 2,
        )
        torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    assert posterior_coefficients(scheduler, torch.tensor(1.0), torch.tensor(-1), like)[2] == 0


def test_the_exact_denoiser_predicts_the_known_velocity_of_a_gaussian():
    scheduler, gaussian = trained(), Gaussian((0.7,))
    mean, variance, x = gaussian.mean, gaussian.covariance[0, 0], torch.randn(6, 1).double()
    for sigma in (0.1, 0.5, 1.0):
        gain = (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)
        expected = gain * (x - (1 - sigma) * mean) - mean
        torch.testing.assert_close(gaussian.denoiser(scheduler)(x, torch.tensor(1000 * sigma)), expected)


# Sampling


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_distribution_of_the_data_from_noise_and_from_noised_data(name, strength):
    gaussian, asked = Gaussian(), []
    predict = gaussian.denoiser(trained())

    def count(x, t):
        asked.append(t)
        return predict(x, t)

    original = None if strength is None else gaussian.draw(COUNT)
    settings = {"original": original, "strength": strength or 1.0}
    z = gaussian.standardised(draw(name, make_noise(), count, **settings))
    assert z.mean(dim=0).abs().max() < 4 / COUNT**0.5 + 0.06
    assert (z.T.cov() - torch.eye(3)).abs().max() < 4 * (2 / COUNT) ** 0.5 + 0.1
    assert len(asked) == count_model_evaluations(build(name), Sampling(STEPS, **settings).steps_left)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_each_sample_is_where_the_ode_leads_its_noise(name, shift):
    """In each direction from the noise e to mean + deviation e."""
    gaussian, noise = Gaussian((1.5, 1.0, 0.2)), make_noise(20)
    values, directions = torch.linalg.eigh(gaussian.covariance)
    expected = gaussian.mean + (noise @ directions * values.sqrt()) @ directions.T
    found = draw(name, noise, gaussian.denoiser(trained()), shift, steps=200)
    assert (found - expected).abs().max() < 0.08  # of Euler's method; the others are nearer
    if name not in ("FlowMatchEulerDiscrete", "ddim"):
        assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_and_ddim_are_diffusers_own_loop_with_the_sigmas_of_flux(shift):
    noise, predict, plain = make_noise(5).float(), Gaussian().denoiser(trained()), trained(shift)
    plain.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = noise
    for t in plain.timesteps:
        x = plain.step(predict(x.double(), t).float(), t, x).prev_sample
    for name in ("FlowMatchEulerDiscrete", "ddim"):
        torch.testing.assert_close(draw(name, noise.double(), shift=shift, steps=4).float(), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_kept_in_painting_is_at_the_level_that_the_model_is_told(name, strength):
    scheduler, model, known, noise = build(name, 2.0), trained(), make_noise(2), torch.randn(2, 3).double()
    blend = build_blend_callback(scheduler, known, torch.zeros(2, 1), noise)
    errors = []

    def predict(x, t):
        alpha, sigma = alpha_sigma(model, t, x)
        errors.append((x - alpha * known - sigma * noise).abs().max().item())
        return (x - known) / sigma

    original = known if strength < 1 else None
    x = sample_from_noise(predict, scheduler, noise, Sampling(10, on_step=blend, original=original, strength=strength))
    assert max(errors) < 0.01  # diffusers rounds the timesteps of some
    torch.testing.assert_close(x, known)


@pytest.mark.parametrize("name", FLOW_SAMPLING_SCHEDULERS)
def test_the_clean_sample_of_a_preview_or_a_guidance_is_that_of_the_schedulers_step(name):
    scheduler, seen, taken = build(name, 3.0), [], []
    convert = getattr(scheduler, "convert_model_output", None)

    def predict(x, t):
        seen.append((predict_x0(scheduler, 0.3 * x + 0.1, x, t), x, t / 1000))
        return 0.3 * x + 0.1

    def record(*arguments, **keywords):
        taken.append(convert(*arguments, **keywords))
        return taken[-1]

    if convert is not None and name != "DEISMultistep":  # DEIS converts to noise
        scheduler.convert_model_output = record
    sample_from_noise(predict, scheduler, make_noise(2).float(), Sampling(12))
    for mine, theirs in zip(seen, taken):
        torch.testing.assert_close(mine[0], theirs.float(), atol=1e-5, rtol=1e-5)
    for x0, x, sigma in seen:
        torch.testing.assert_close(x0, x - sigma * (0.3 * x + 0.1), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_steering_by_an_exact_classifier_samples_the_posterior(name):
    """y is the first number of x with noise of deviation 0.5."""
    gaussian, model, y = Gaussian(), trained(), 1.0
    covariance = gaussian.covariance

    def score(x, t):
        alpha, sigma = alpha_sigma(model, t, x)
        noisy = alpha**2 * covariance + sigma**2 * torch.eye(3)
        variance = (covariance - alpha**2 * covariance @ torch.linalg.solve(noisy, covariance))[0, 0] + 0.25
        return -((y - gaussian.estimate_x0(model, x, t)[:, 0]) ** 2) / (2 * variance)

    torch.manual_seed(5)
    scheduler = build(name)
    predict = build_steered_predict(gaussian.denoiser(model), scheduler, score, 1.0)
    x = sample_from_noise(predict, scheduler, make_noise(), Sampling(30))
    gain = covariance[:, 0] / (covariance[0, 0] + 0.25)
    assert (x.mean(dim=0) - gaussian.mean - gain * (y - gaussian.mean[0])).abs().max() < 0.12
    assert (x.std(dim=0) - (covariance - gain[:, None] * covariance[0]).diag().sqrt()).abs().max() < 0.12


def test_all_the_noise_of_ddim_is_ancestral_sampling():
    noise = make_noise(5)
    settings = {"steps": 37, "generators": seeds(*range(5))}
    first = draw("ddpm", noise, **settings)
    settings["generators"] = seeds(*range(5))
    torch.testing.assert_close(draw("ddim", noise, eta=1.0, **settings), first, atol=1e-6, rtol=0)
    assert isinstance(build("ddpm"), AncestralScheduler)


@pytest.mark.parametrize("name", ["ddpm", "sde", "sde-dpmsolver++", "ddim"])
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(name):
    noise, settings = make_noise(3), {"steps": 8} | ({"eta": 1.0} if name == "ddim" else {})
    together = draw(name, noise, generators=seeds(1, 2, 3), **settings)
    torch.testing.assert_close(together[1:2], draw(name, noise[1:2], generators=seeds(2), **settings))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", NAMES)
def test_given_noise_levels_are_those_of_the_steps_or_are_refused(name, shift):
    def follow(**settings):
        seen = []
        scheduler = build(name, shift)
        sample_from_noise(lambda x, t: (seen.append(t.item()), x)[1], scheduler, make_noise(2), Sampling(**settings))
        return seen

    if name in ("FlowMatchEulerDiscrete", "ddim"):
        assert follow(steps=3, timesteps=(900, 500.5, 20)) == pytest.approx([900, 500.5, 20], rel=1e-5)
        with pytest.raises(InputError, match="timesteps must be from 0 to 1000, got 1001"):
            follow(steps=2, timesteps=(1001, 20))
    else:
        with pytest.raises(
            InputError, match="Scheduler does not take timesteps; for a flow, the sampler ddim and Flow"
        ):
            follow(steps=3, timesteps=(900, 500.5, 20))
    if name in ("FlowMatchEulerDiscrete", "UniPCMultistep", "unipc"):
        shifted = [1000 * shift * u / (1 + (shift - 1) * u) for u in (0.9, 0.5, 0.1)]
        assert follow(steps=3, sigmas=(0.9, 0.5, 0.1, 0)) == pytest.approx(shifted, abs=1)
        with pytest.raises(InputError, match="sigmas of a flow must end with 0, the clean sample, got 0.1 as the last"):
            follow(steps=2, sigmas=(0.9, 0.5, 0.1))
        with pytest.raises(InputError, match="sigmas of a flow must be from 0 to 1, got 14"):
            follow(steps=2, sigmas=(14, 0.5, 0))
    else:
        with pytest.raises(InputError, match="Scheduler does not take sigmas; for a flow, the sampler unipc and Flow"):
            follow(steps=3, sigmas=(0.9, 0.5, 0.1, 0))


# Guidance


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "DPMSolverMultistep"])
def test_guidance_draws_what_its_settings_say(name):
    """The model answers 1 with the condition and 0 without; guidance of 3 wants 3."""
    x, expected = torch.randn(2, 8), {"plain": 3.0, "interval": 1.0, "rescale": None, "projected": 1.0}
    settings = {
        "plain": Guidance(3.0),
        "interval": Guidance(3.0, interval=(0.95, 1.0)),  # the last steps, which decide here, are not guided
        "rescale": Guidance(3.0, rescale=0.5),
        "projected": Guidance(3.0, parallel=0.0),  # the difference is along the answer
    }
    for kind, guidance in settings.items():
        scheduler = build(name)
        positive, negative = Answer(torch.ones(2, 8)), Answer(torch.zeros(2, 8))
        predict = build_guided_predict(Oracle(scheduler), positive, negative, guidance, scheduler)
        drawn = sample_from_noise(predict, scheduler, x, Sampling(12))
        if expected[kind] is not None:
            torch.testing.assert_close(drawn, torch.full_like(x, expected[kind]), atol=2e-3, rtol=0)
        t = torch.tensor(400.0)
        velocity = lambda answer, t=t: (x - answer) / 0.4  # noqa: E731
        if kind == "rescale":  # diffusers' rescale_noise_cfg of velocities
            guided, positive = velocity(3.0), velocity(1.0)
            ratio = positive.std(dim=1, keepdim=True) / guided.std(dim=1, keepdim=True)
            torch.testing.assert_close(predict(x, t), guided * (0.5 * ratio + 0.5))
        elif kind == "interval":
            torch.testing.assert_close(predict(x, t), velocity(1.0))
            torch.testing.assert_close(predict(x, torch.tensor(960.0)), (x - 3) / 0.96)


# Inversion and likelihood


@pytest.mark.parametrize("shift", SHIFTS)
def test_inversion_finds_the_noise_and_ddim_draws_the_sample_again(shift):
    gaussian, scheduler = Gaussian((0.9,)), trained(shift)
    x, predict = gaussian.draw(20), gaussian.denoiser(scheduler)
    noise = invert_sample(predict, scheduler, x, 200)
    torch.testing.assert_close(noise, (x - gaussian.mean) / gaussian.covariance[0, 0].sqrt(), atol=0.05, rtol=0)
    again = sample_from_noise(predict, build_sampler("ddim", scheduler), noise, Sampling(200))
    torch.testing.assert_close(again, x, atol=1e-6, rtol=0)


def true_bits(gaussian: Gaussian, x: torch.Tensor) -> torch.Tensor:
    return -gaussian.distribution.log_prob(x) / math.log(2) / x.shape[1]


def along_axes(*variances: float) -> Gaussian:
    gaussian = Gaussian(variances)
    gaussian.covariance = gaussian.covariance.diag().diag()
    gaussian.distribution = torch.distributions.MultivariateNormal(gaussian.mean, gaussian.covariance)
    return gaussian


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_odes_likelihood_of_each_sample_is_its_own(shift):
    """Where the data's directions are the axes the trace needs no estimate."""
    gaussian, scheduler = along_axes(4.0, 1.0, 0.6), trained(shift)
    x = gaussian.draw(50)
    found = compute_ode_bits(gaussian.denoiser(scheduler), scheduler, x, seeds(*range(50)), steps=50)
    torch.testing.assert_close(found, true_bits(gaussian, x), atol=5e-3, rtol=5e-3)


def test_the_bound_is_near_the_likelihood():
    gaussian, scheduler = along_axes(4.0, 1.0, 0.6), trained()
    x, predict = gaussian.draw(4000), gaussian.denoiser(scheduler)
    wide = lambda y, t: predict(y.reshape(-1, 3), t).reshape(y.shape)  # noqa: E731
    data, generators = x.reshape(20, -1), seeds(*range(20))
    bound = compute_variational_bound(wide, scheduler, data, generators, "large", 300)
    assert abs(bound.total_bits.mean() / true_bits(gaussian, x).mean() - 1) < 0.02
    assert bound.prior.eq(0).all()  # a flow ends in pure noise
    assert compute_variational_bound(wide, scheduler, data, generators, "small", 20).total_bits.isfinite().all()


# Training


def test_timesteps_are_logit_normal_and_a_shift_moves_their_logit_by_its_logarithm():
    """The odds sigma / (1 - sigma) are multiplied by the shift."""
    torch.manual_seed(0)
    for own, given, mean, deviation in ((1.0, 1.0, 0.0, 1.0), (3.0, 2.0, -0.5, 0.7)):
        t = draw_flow_timesteps(trained(own), torch.zeros(20_000, 1), given, (mean, deviation))
        logits = torch.logit(t.double() / 1000)
        assert abs(logits.mean() - mean - math.log(own * given)) < 0.03
        assert abs(logits.std() - deviation) < 0.02
        assert t.min() > 0 and t.max() <= 1000


def test_an_oracle_has_no_loss_and_nothing_as_the_prediction_has_that_of_noise_and_data():
    torch.manual_seed(0)
    scheduler, x = trained(), 2 * torch.randn(20_000, 4)
    prediction, target, t = predict_noised_batch(
        lambda x, t, answer: (x - answer.x0) / (t / 1000)[:, None], *(scheduler, x, Answer(x))
    )
    torch.testing.assert_close(prediction, target, atol=2e-2, rtol=1e-3)
    losses, mean = compute_diffusion_loss(lambda x, t, answer: torch.zeros_like(x), scheduler, x, Answer(x))
    assert losses["loss"].item() == pytest.approx(1 + 4, rel=0.02) and mean.eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_schedule": "linear"}, "scheduler.beta_schedule does not go with .*flow_prediction, which takes num_"),
        ({"timestep_spacing": "trailing"}, "scheduler.timestep_spacing does not go with"),
        ({"shift": 0}, "scheduler.shift must be from 0.01 to 100, got 0"),
        ({"num_train_timesteps": 0}, "scheduler.num_train_timesteps must be an integer from 1"),
    ],
)
def test_a_schedule_of_another_process_is_refused(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        build_noise_scheduler({"prediction_type": "flow_prediction", **arguments})
    assert "\n" not in str(caught.value)
    assert build_noise_scheduler({"prediction_type": "flow_prediction", "beta_schedule": None, "shift": 2}).shift == 2
    with pytest.raises(InputError, match="scheduler is not valid for DDIMScheduler: .*'shift'"):
        build_noise_scheduler({"shift": 3.0})


def test_settings_of_the_loss_that_do_not_fit_the_process_are_refused():
    with pytest.raises(InputError, match="loss_weighting=min_snr does not go with .*=flow_prediction, whose timesteps"):
        check_loss_settings(trained(), "min_snr")
    with pytest.raises(InputError, match="model.learned_variance does not go with scheduler.prediction_type=flow"):
        check_loss_settings(trained(), "none", learned_variance=True)
    with pytest.raises(InputError, match="logit_mean and logit_std need .*=flow_prediction, got v_prediction; leave"):
        check_loss_settings(build_noise_scheduler({"prediction_type": "v_prediction"}), "none", (0.5, 1.0))
    check_loss_settings(trained(), "none", (0.5, 1.0))


# Schedulers of diffusers


def test_the_list_of_schedulers_that_sample_from_a_flow_is_true():
    """But for DDIM, which diffusers itself has for no flow."""
    for name in KINDS.keys() - MISSING - {"DDIM", "DDIMParallel"}:
        try:
            scheduler = build(name)
        except TypeError:  # of other arguments
            continue
        assert (find_sampling_fault(scheduler) is None) == (name in list_sampling_schedulers(trained())), name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DPMSolverMultistep", {"use_flow_sigmas": False}, "has use_flow_sigmas False with prediction_type flow_pred"),
        ("UniPCMultistep", {"prediction_type": "epsilon"}, "has use_flow_sigmas True with prediction_type epsilon"),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}, "cannot sample"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "cannot sample"),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, "cannot sample .*`mu` must be passed"),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "is for consistency models"),
        ("FlowMatchLCM", {}, "is for consistency models"),
    ],
)
def test_settings_with_which_a_scheduler_draws_something_else_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        check_scheduler_sampling("decoder_scheduler", build(name, 2.0, **settings))
    works = "DDIM" if settings.get("prediction_type") == "epsilon" else "DEISMultistep, DPMSolverMultistep"
    assert f"these schedulers of diffusers work: {works}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_shift_is_kept_from_one_scheduler_to_another():
    for name in NAMES:
        assert get_flow_shift(build(name, 3.0)) == 3.0
        assert get_flow_shift(build_sampler("unipc", build(name, 3.0))) == 3.0
