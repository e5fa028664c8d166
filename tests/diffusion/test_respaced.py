"""Karlo's and Kandinsky's scheduler beside diffusers' own."""

from pathlib import Path

import pytest
import torch
from diffusers import UnCLIPScheduler
from torch import Tensor

import t2i.diffusion.respaced
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.samplers import build_sampler
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.diffusion.stored_schedulers import check_scheduler_folder
from t2i.errors import InputError
from tests.helpers.karlo_folders import karlo
from tests.helpers.references.karlo import noise, stepped
from tests.helpers.stages import seeds


@pytest.mark.parametrize("steps", [2, 7, 25])
@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_sampling_takes_the_steps_that_diffusers_takes_when_it_is_told_where_they_lead(variance_type: str, steps: int):
    settings = {"variance_type": variance_type, "prediction_type": "epsilon", "clip_sample_range": 1.5}
    width = 2 if variance_type == "learned_range" else 1

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x.sin() * (1 + t / 1000), x.cos()][:width], dim=1)

    x = noise(2, 3, 4, 4)
    ours = sample_from_noise(predict, UnCLIPRespacedScheduler(**settings), x, Sampling(steps, seeds(1, 2)))
    theirs = stepped(UnCLIPScheduler(**settings), lambda _, x, t: predict(x, t), x, steps, seeds(1, 2))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    told = stepped(UnCLIPRespacedScheduler(**settings), lambda _, x, t: predict(x, t), x, steps, seeds(1, 2))
    torch.testing.assert_close(told, theirs, atol=0, rtol=0)  # also in diffusers' own pipelines


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_one_step_leads_from_noise_to_the_clean_sample_where_diffusers_divides_by_zero(variance_type: str):
    settings = {"variance_type": variance_type, "prediction_type": "sample", "clip_sample_range": 2.0}
    with pytest.raises(ZeroDivisionError):
        UnCLIPScheduler(**settings).set_timesteps(1)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t == 999
        return torch.cat([3 * x.sin(), x.sign()], dim=1)

    x = noise(2, 3)
    drawn = sample_from_noise(predict, UnCLIPRespacedScheduler(**settings), x, Sampling(1, seeds(1, 2)))
    torch.testing.assert_close(drawn, (3 * x.sin()).clamp(-2, 2))


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(InputError, match="the number of steps must be an integer from 1 to 1000, got 1001"):
        UnCLIPRespacedScheduler().set_timesteps(1001)


def test_a_scheduler_keeps_its_configuration_in_a_folder_that_is_accepted(tmp_path: Path):
    assert hasattr(t2i.diffusion.respaced, "SchedulerMixin")  # diffusers' pipelines look there for how to load it
    saved = UnCLIPRespacedScheduler(clip_sample_range=5.0, prediction_type="sample")
    saved.save_pretrained(tmp_path)
    check_scheduler_folder(tmp_path, "UnCLIPRespacedScheduler", module="t2i.diffusion.respaced")
    loaded = UnCLIPRespacedScheduler.from_pretrained(tmp_path)
    assert (loaded.config.clip_sample_range, loaded.config.prediction_type) == (5.0, "sample")


def test_how_far_the_prior_is_clamped_is_what_the_configuration_says():
    """diffusers' files of Karlo say 5; the code that Karlo came with clamps at 10."""
    scheduler = UnCLIPRespacedScheduler.from_pretrained(karlo() / "prior_scheduler")
    drawn = sample_from_noise(lambda x, t: 100 * x, scheduler, noise(2, 3), Sampling(3, seeds(1, 2)))
    torch.testing.assert_close(drawn.abs(), torch.full((2, 3), 5.0), atol=0.01, rtol=0)


def test_other_samplers_start_at_the_last_timestep_and_end_at_the_first_as_unclips():
    unclip = UnCLIPRespacedScheduler()
    unclip.set_timesteps(7)
    for name in ("ddpm", "ddim"):
        sampler = build_sampler(name, unclip)
        sampler.set_timesteps(7)
        assert torch.equal(sampler.timesteps, unclip.timesteps)
