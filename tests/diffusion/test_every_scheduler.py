"""Every scheduler of diffusers: those that are accepted do each task as closed forms have it, others are refused."""

import copy
import logging

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from t2i.diffusion import samplers
from t2i.diffusion.ddim import ExactDDIMScheduler
from t2i.diffusion.guidance import build_steered_predict
from t2i.diffusion.inpainting import build_blend_callback
from t2i.diffusion.process import alpha_sigma, own_alpha_sigma, predict_x0
from t2i.diffusion.samplers import (
    FLOW_SAMPLING_SCHEDULERS,
    SAMPLING_SCHEDULERS,
    check_prediction_type,
    check_scheduler_sampling,
    count_model_evaluations,
    find_sampling_fault,
    has_other_levels,
    list_sampling_schedulers,
    resolve_sampler,
    samples_like,
)
from t2i.diffusion.sampling_loop import Sampling, count_steps_left, generate_noise, sample_from_noise
from t2i.errors import InputError
from t2i.networks.upsampler import Upsampler, enlarge_low_resolution
from t2i.sampling.upsampling import sample_upsampler
from tests.helpers.gaussian import PREDICTIONS, Gaussian, schedule
from tests.helpers.stages import seeds
from tests.networks.test_upsampler import UNET

# Of what diffusers calls of NumPy, and of torchsde's rounding
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Should have t:UserWarning")

COUNT, STEPS = 2000, 50
KINDS = {
    name.removesuffix("Scheduler"): kind
    for name in dir(diffusers)
    if name.endswith("Scheduler") and isinstance(kind := getattr(diffusers, name), type)
}
ARGUMENTS = {"Amused": {"mask_token_id": 0}, "VQDiffusion": {"num_vec_classes": 4}}
# diffusers puts classes that raise ImportError in the place of those whose package is missing
MISSING = {name for name, kind in KINDS.items() if kind.__module__.startswith("diffusers.utils.dummy")}
SAMPLERS_HERE = [name for name in SAMPLING_SCHEDULERS if name not in MISSING]


def accepted(*left_out: str) -> list:
    """Cases of a test, those whose package is missing skipped."""
    missing = pytest.mark.skip(reason="needs scipy or torchsde, which are not installed")
    names = [name for name in SAMPLING_SCHEDULERS if name not in left_out]
    return [pytest.param(name, marks=[missing] * (name in MISSING)) for name in names]


# In between the two halves of a step diffusers' `add_noise` has another level than the step itself
HALVING = ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")


def trained(name: str = "DDIM") -> DDIMScheduler:
    """The schedule that the model knows: that of UnCLIPScheduler has one shape only."""
    return schedule("cosine" if name == "UnCLIP" else "scaled_linear", "epsilon", timestep_spacing="linspace")


def build(name: str, **settings: object) -> diffusers.SchedulerMixin:
    settings = {"skip_prk_steps": True, "lower_order_final": True} | settings
    scheduler = KINDS[name].from_config({**trained(name).config, **settings})
    return resolve_sampler(None, scheduler, None)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - MISSING))
def test_the_list_of_schedulers_that_sample_is_true(name, monkeypatch):
    monkeypatch.setattr(samplers, "list_sampling_schedulers", lambda like: ["DDIM"])  # it takes a second
    try:
        config = {**trained(name).config, **ARGUMENTS.get(name, {})}
        # A flow's schedulers read one kind of prediction, and refuse the configuration of another
        config |= {"prediction_type": "flow_prediction"} if name.startswith("FlowMatch") else {}
        scheduler = KINDS[name].from_config(config)
    except TypeError:  # of proteins, whose arguments are no noise schedule
        assert name not in SAMPLING_SCHEDULERS
        return
    if name in (*SAMPLING_SCHEDULERS, *FLOW_SAMPLING_SCHEDULERS):
        check_scheduler_sampling("decoder_scheduler", scheduler)
        return
    with pytest.raises(InputError, match="; these schedulers of diffusers work: DDIM$") as caught:
        check_scheduler_sampling("decoder_scheduler", scheduler)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "spacing"), [("scaled_linear", "leading"), ("cosine", "trailing")])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS_HERE)
def test_a_message_names_a_scheduler_only_if_it_reads_what_the_model_predicts(name, prediction_type, shape, spacing):
    like = schedule(shape, prediction_type, timestep_spacing=spacing)
    try:
        fault = find_sampling_fault(KINDS[name].from_config(like.config))
    except ValueError:  # not even built
        fault = "none of these predictions"
    has_levels = name != "UnCLIP" or shape == "cosine"
    assert samples_like(name, like) == (fault is None and has_levels)


def test_a_list_is_of_the_levels_at_hand_and_of_diffusers_defaults_where_there_are_none(monkeypatch):
    asked = []
    monkeypatch.setattr(samplers, "samples_like", lambda name, like: asked.append(like) or name == "DDIM")
    for given in (schedule("cosine", "sample"), KINDS["EDMEuler"]()):
        assert list_sampling_schedulers(given) == ["DDIM"]
    cosine, default = asked[0], asked[-1]
    assert cosine.config.prediction_type == "sample" and default.config == DDIMScheduler().config
    monkeypatch.setattr(samplers, "samples_like", lambda name, like: True)
    assert list_sampling_schedulers(KINDS["FlowMatchEulerDiscrete"]()) == list(FLOW_SAMPLING_SCHEDULERS)


def test_a_flow_and_another_process_are_not_taken_for_each_other():
    flow, shifted = KINDS["FlowMatchEulerDiscrete"](), KINDS["FlowMatchHeunDiscrete"](shift=3.0)
    solver = KINDS["UniPCMultistep"](prediction_type="flow_prediction", use_flow_sigmas=True)
    for one in (shifted, solver):
        check_prediction_type("decoder_scheduler", one, flow)
        assert not has_other_levels(one, flow)
    assert has_other_levels(KINDS["FlowMatchEulerDiscrete"](100), flow)
    for scheduler, model, works in ((trained(), flow, ".*FlowMatchEuler"), (flow, trained(), "DDIM, DDIMParallel")):
        with pytest.raises(InputError, match=f"but the decoder was trained with .*; these schedulers.* work: {works}"):
            check_prediction_type("decoder_scheduler", scheduler, model)


@pytest.mark.parametrize("missing", sorted(MISSING & set(SAMPLING_SCHEDULERS)) or [None])
def test_a_scheduler_whose_package_is_missing_is_not_named(missing):
    assert missing is None or not samples_like(missing, trained())


@pytest.mark.parametrize("name", accepted())
def test_a_sample_has_the_noise_of_its_own_seed_alone(name):
    """Also where the scheduler draws it without generators."""
    built = build(name)

    def draw(*numbers):
        scheduler, generators = copy.deepcopy(built), seeds(*numbers)
        noise = generate_noise((3,), generators, torch.device("cpu"))
        torch.manual_seed(sum(numbers))  # the global generator decides nothing
        return sample_from_noise(lambda x, t: 0.1 * x, scheduler, noise, Sampling(4, generators))

    both = draw(1, 2)
    torch.testing.assert_close(both, torch.cat([draw(1), draw(2)]), atol=1e-5, rtol=1e-5)
    assert (draw(1) - draw(2)).abs().max() > 1e-3


def test_a_seed_of_the_scheduler_itself_is_refused():
    """It would be the same for all pictures, and each depend on its batch."""
    scheduler = build("DDIM")
    scheduler.register_to_config(noise_sampler_seed=3)
    assert find_sampling_fault(scheduler) == "has noise_sampler_seed 3; it may be None"


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("name", accepted())
def test_samples_have_the_distribution_of_the_data_from_noise_and_from_noised_data(name, strength):
    torch.manual_seed(0)
    gaussian, scheduler = Gaussian(), build(name)
    noise = torch.randn(COUNT, 3, generator=seeds(2)[0]).double()
    original = None if strength is None else gaussian.draw(COUNT)
    sampling = Sampling(STEPS, original=original, strength=strength or 1.0)
    asked, predict = [], gaussian.denoiser(trained(name))

    def count(x, t):
        asked.append(t)
        return predict(x, t)

    z = gaussian.standardised(sample_from_noise(count, scheduler, noise, sampling))
    assert z.mean(dim=0).abs().max() < 4 / COUNT**0.5 + 0.06
    assert (z.T.cov() - torch.eye(3)).abs().max() < 4 * (2 / COUNT) ** 0.5 + 0.1
    assert len(asked) == count_model_evaluations(scheduler, sampling.steps_left)


@pytest.mark.parametrize("name", accepted(*HALVING))
def test_painting_is_the_plain_loop_with_the_schedulers_own_add_noise(name):
    """On data with one offset an image, which reaches the painted part from the known one."""
    gaussian, scheduler = Gaussian((3.0, 0.1, 0.05)), build(name)
    known, noise = gaussian.draw(50), torch.randn(50, 3, generator=seeds(2)[0]).double()
    mask, predict = torch.tensor([[0.0, 0.0, 1.0]]).double(), gaussian.denoiser(trained(name))
    torch.manual_seed(0)
    blend = build_blend_callback(scheduler, known, mask, noise)
    painted = sample_from_noise(predict, scheduler, noise, Sampling(10, on_step=blend))
    torch.manual_seed(0)
    plain = build(name)
    plain.set_timesteps(10)
    x = noise * plain.init_noise_sigma
    for i, t in enumerate(plain.timesteps):
        x = plain.step(predict(plain.scale_model_input(x, t), t), t, x).prev_sample
        held = known
        if i + 1 < len(plain.timesteps):
            held = plain.add_noise(known, noise, plain.timesteps[i + 1 : i + 2].expand(len(x)))
        x = torch.where(mask > 0, x, held)
    torch.testing.assert_close(painted, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", accepted())
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_kept_is_at_the_level_that_the_model_is_told(name, strength):
    scheduler, model = build(name), trained(name)
    known, noise = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    blend = build_blend_callback(scheduler, known, torch.zeros(2, 1), noise)
    errors = []

    def predict(x, t):
        alpha, sigma = alpha_sigma(model, t, x)
        errors.append((x - alpha * known - sigma * noise).abs().max().item())
        return (x - alpha * known) / sigma

    original = known if strength < 1 else None
    sampling = Sampling(10, on_step=blend, original=original, strength=strength)
    x = sample_from_noise(predict, scheduler, noise, sampling)
    assert max(errors[1:]) < 0.02  # sigmas between two timesteps are not interpolated as the model's levels are
    torch.testing.assert_close(x, known)


@pytest.mark.parametrize("settings", [{}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler])
def test_the_clean_sample_of_a_preview_or_a_guidance_is_that_of_the_schedulers_step(kind, prediction_type, settings):
    """Also where timesteps are rounded, and several steps share one."""
    scheduler = kind.from_config(schedule("scaled_linear", prediction_type).config, **settings)
    seen, taken = [], []

    def predict(x, t):
        prediction = 0.3 * x + 0.1
        seen.append(predict_x0(scheduler, prediction, x, t))
        return prediction

    step, convert = scheduler.step, getattr(scheduler, "convert_model_output", None)

    def record(*arguments, **keywords):
        result = step(*arguments, **keywords)
        if convert is None:
            taken.append(getattr(result, "pred_original_sample", None))
        return result

    def record_converted(*arguments, **keywords):
        taken.append(convert(*arguments, **keywords))
        return taken[-1]

    scheduler.step = record
    if convert is not None:
        scheduler.convert_model_output = record_converted
    sample_from_noise(predict, scheduler, torch.randn(2, 3, generator=seeds(1)[0]), Sampling(30))
    assert len(seen) == len(taken)
    for mine, theirs in zip(seen, taken):
        torch.testing.assert_close(mine, theirs.float(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", accepted())
def test_steering_by_an_exact_classifier_samples_the_posterior(name):
    """y is the first number of x with noise of deviation 0.5."""
    torch.manual_seed(0)
    gaussian, scheduler, model, y = Gaussian(), build(name), trained(name), 1.0
    covariance = gaussian.covariance

    def score(x, t):
        alpha, sigma = alpha_sigma(model, t, x)
        noisy = alpha**2 * covariance + sigma**2 * torch.eye(3)
        variance = (covariance - alpha**2 * covariance @ torch.linalg.solve(noisy, covariance))[0, 0] + 0.25
        return -((y - gaussian.estimate_x0(model, x, t)[:, 0]) ** 2) / (2 * variance)

    predict = build_steered_predict(gaussian.denoiser(model), scheduler, score, 1.0)
    x = sample_from_noise(predict, scheduler, torch.randn(COUNT, 3).double(), Sampling(30))
    gain = covariance[:, 0] / (covariance[0, 0] + 0.25)
    expected = gaussian.mean + gain * (y - gaussian.mean[0])
    assert (x.mean(dim=0) - expected).abs().max() < 0.12
    deviation = (covariance - gain[:, None] * covariance[0]).diag().sqrt()
    assert (x.std(dim=0) - deviation).abs().max() < 0.12


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_outside_of_a_sampling_levels_are_the_trained_ones(name):
    scheduler, model, like = build(name), trained(name), torch.zeros(1).double()
    for t in (0, 500, 999):
        torch.testing.assert_close(
            alpha_sigma(scheduler, torch.tensor(t), like), alpha_sigma(model, torch.tensor(t), like), atol=1e-4, rtol=0
        )
    sample_from_noise(lambda x, t: x, scheduler, torch.zeros(1, 2), Sampling(7))
    for t in (0, 501, 999):
        torch.testing.assert_close(
            alpha_sigma(scheduler, torch.tensor(t), like), alpha_sigma(model, torch.tensor(t), like), atol=1e-4, rtol=0
        )


def test_a_scheduler_that_scales_x_keeps_the_clean_sample_as_it_is():
    scheduler, like = build("EulerDiscrete"), torch.zeros(1).double()
    scheduler.set_timesteps(10)
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = own_alpha_sigma(scheduler, t, like)
        assert alpha == pytest.approx(1, abs=1e-5) and sigma == pytest.approx(scheduler.sigmas[i].item(), rel=1e-3)
        scheduler.step(like, t, like)


@pytest.mark.parametrize("name", accepted())
def test_a_learned_variance_that_a_scheduler_does_not_read_changes_nothing(name):
    scheduler = build(name, variance_type="learned_range")
    noise = torch.randn(2, 4, 3, 3, generator=seeds(1)[0])

    def draw(share):
        torch.manual_seed(0)  # some schedulers take no generators
        return sample_from_noise(
            lambda x, t: torch.cat([0.1 * x, torch.full_like(x, share)], 1),
            copy.deepcopy(scheduler),
            noise,
            Sampling(5, seeds(1, 2)),
        )

    assert draw(-0.5).shape == noise.shape and draw(-0.5).isfinite().all()
    if not name.startswith(("DDPM", "UnCLIP")):
        torch.testing.assert_close(draw(-0.5), draw(0.5))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("settings", [{"clip_sample": True, "clip_sample_range": 0.6}, {"thresholding": True}, {}])
def test_clipping_ddim_is_that_of_diffusers_either_way(settings, clipped, prediction_type):
    theirs = schedule("scaled_linear", prediction_type, **settings)
    mine, x = ExactDDIMScheduler.from_config(theirs.config), torch.randn(2, 3, 4, 4, generator=seeds(1)[0])
    expected = x
    theirs.set_timesteps(10)
    for t in theirs.timesteps:
        expected = theirs.step(0.7 * expected, t, expected, use_clipped_model_output=clipped).prev_sample
    sampling = Sampling(10, use_clipped_model_output=clipped)
    torch.testing.assert_close(sample_from_noise(lambda x, t: 0.7 * x, mine, x, sampling), expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="use_clipped_model_output needs the sampler ddim; UniPC.* does not take it"):
        sample_from_noise(lambda x, t: x, build("UniPCMultistep"), x, Sampling(3, use_clipped_model_output=True))


def test_given_timesteps_and_sigmas_are_those_of_the_steps():
    x = torch.randn(2, 3, generator=seeds(1)[0])

    def run(scheduler, **levels):
        asked = []
        drawn = sample_from_noise(
            lambda x, t: (asked.append(t.item()), 0.3 * x)[1], scheduler, x, Sampling(3, seeds(1, 2), **levels)
        )
        return drawn, asked

    for name in ("DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete"):
        drawn, asked = run(build(name), timesteps=(900, 400, 100))
        assert asked == [900, 400, 100] and drawn.isfinite().all()
    drawn, asked = run(build("EulerDiscrete"), sigmas=(10.0, 3.0, 0.5, 0.0))
    euler = build("EulerDiscrete")
    euler.set_timesteps(sigmas=[10.0, 3.0, 0.5, 0.0])
    assert asked == euler.timesteps.tolist()
    default = build("DDIM")
    default.set_timesteps(3)
    own = run(build("DDIM"), timesteps=tuple(default.timesteps.tolist()))[0]
    torch.testing.assert_close(own, run(build("DDIM"))[0], atol=0, rtol=0)
    for name, levels, message in (
        ("UniPCMultistep", {"timesteps": (9, 5)}, "UniPCMultistepScheduler does not take timesteps; the samplers ddim"),
        ("DDIM", {"sigmas": (9.0, 0.0)}, "does not take sigmas; EulerDiscreteScheduler takes them"),
        ("DDIM", {"timesteps": (1000, 5)}, "timesteps must be from 0 to 999, got 1000"),
        ("EulerDiscrete", {"timesteps": (500, 5)}, "cannot be given to this EulerDiscreteScheduler: Cannot set"),
    ):
        settings = {"use_karras_sigmas": True} if name == "EulerDiscrete" else {}
        with pytest.raises(InputError, match=message):
            run(build(name, **settings), **levels)


@pytest.mark.parametrize("steps", [1, 4, 25, 50, 100])
@pytest.mark.parametrize("strength", [0.01, 0.28, 0.29, 0.3, 0.5, 0.58, 0.6, 0.99, 1.0])
def test_a_strength_takes_as_many_steps_as_in_diffusers_but_at_least_one(steps, strength):
    assert count_steps_left(steps, strength) == max(1, min(int(steps * strength), steps))


def test_pndm_of_runge_kutta_starts_from_noise_alone():
    scheduler, x = build("PNDM", skip_prk_steps=False), torch.randn(1, 3)
    assert find_sampling_fault(scheduler) is None
    asked = []
    sample_from_noise(lambda x, t: (asked.append(t), x)[1], scheduler, x, Sampling(8))
    assert len(asked) == count_model_evaluations(scheduler, 8)
    assert isinstance(scheduler, PNDMScheduler)
    with pytest.raises(InputError, match="strength below 1 needs a PNDMScheduler with skip_prk_steps=True"):
        sample_from_noise(lambda x, t: x, scheduler, x, Sampling(8, original=x, strength=0.5))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "has use_flow_sigmas True with prediction_type epsilon"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "has timestep_type 'continuous'; it may be discrete"),
        ("EulerAncestralDiscrete", {"prediction_type": "sample"}, "cannot sample .*prediction_type not implemented"),
        ("LCM", {}, "is for consistency models"),
        ("CogVideoXDDIM", {}, "has snr_shift_scale 3.0; it may be 1.0"),
        ("DDIMInverse", {"timestep_spacing": "leading"}, "its timesteps do not fall"),
    ],
)
def test_settings_with_which_a_scheduler_draws_something_else_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        check_scheduler_sampling("decoder_scheduler", build(name, **settings))


class Recorder(Upsampler):
    """Believes that nothing has to be changed, and keeps what it is shown first."""

    def step(self, x, t, context):
        self.first = getattr(self, "first", (x, t))
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", accepted("UnCLIP"))
def test_upsampling_starts_from_the_picture_at_the_level_that_the_model_is_told(name):
    """The schedule ends far from noise, where the factors of a scheduler's own x and of the model's differ most."""
    scheduler, level = build(name, beta_start=1e-5, beta_end=7.6e-3, timestep_spacing="leading"), trained(name)
    level = DDIMScheduler.from_config(level.config, beta_start=1e-5, beta_end=7.6e-3)
    upsampler, low = Recorder(2, 8, UNET, patch_size=2).eval(), torch.rand(1, 3, 8, 8)
    sample_upsampler(upsampler, scheduler, low, Sampling(4, seeds(1)))
    x, t = upsampler.first
    start = enlarge_low_resolution(low, 2)
    alpha, sigma = alpha_sigma(level, t[0], start)
    noise = generate_noise(start.shape[1:], seeds(1), torch.device("cpu"))
    torch.testing.assert_close(x, alpha * start + sigma * noise, atol=2e-3, rtol=0)
