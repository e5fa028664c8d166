"""DALLE2-pytorch's prior and decoder behind this project's contracts, against the package itself."""

import json
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import DDPMScheduler
from torch import Tensor

from t2i.diffusion.condition import ImageCondition, TextEncoding
from t2i.diffusion.ddim import ExactDDIMScheduler, build_scheduler_like
from t2i.diffusion.guidance import build_guided_predict
from t2i.diffusion.samplers import build_sampler
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.interop.dalle2_convert import convert_dalle2
from t2i.interop.dalle2_files import read_dalle2_file
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder, DALLE2Pixels
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict, sample_prior
from tests.helpers.references import dalle2 as dalle2_reference
from tests.helpers.references.dalle2 import Replay, randomised, reference

WIDTH, LONGEST, STEPS = 24, 9, 40  # D, tokens, training timesteps
NET = {"dim": WIDTH, "depth": 2, "dim_head": 12, "heads": 2, "max_text_len": LONGEST, "num_timesteps": STEPS}
PRIOR = {"image_embed_dim": WIDTH, "timesteps": STEPS, "cond_drop_prob": 0.1}
UNET = {"dim": 8, "cond_dim": 6, "dim_mults": [1, 2], "attn_dim_head": 4, "attn_heads": 2, "image_embed_dim": WIDTH}


def captions(*lengths: int) -> TextEncoding:
    """Captions of random states, as CLIP gives them: zero behind their end, z_t of unit length."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    states = torch.randn(*mask.shape, WIDTH, generator=generator) * mask[..., None]
    return TextEncoding(F.normalize(torch.randn(len(lengths), WIDTH, generator=generator), dim=-1), states, mask)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_prior(net: dict | None = None, **options: Any) -> Any:
    package = reference()
    return randomised(package.DiffusionPrior(package.DiffusionPriorNetwork(**NET | (net or {})), **PRIOR | options))


def their_decoder(unets: list[dict], **options: Any) -> Any:
    package = reference()
    return randomised(package.Decoder([package.Unet(**unet) for unet in unets], timesteps=STEPS, **options))


def converted(model: Any, config: dict, folder: Path, **options: Any) -> Path:
    """What `t2i convert` makes of a file with these weights and this configuration."""
    file, settings = folder / "model.pth", folder / "config.json"
    torch.save(model if isinstance(model, dict) else model.state_dict(), file)
    settings.write_text(json.dumps(config))
    return convert_dalle2(file, settings, folder / "out", **options)


def our_prior(theirs: Any, folder: Path, net: dict | None = None, **options: Any) -> tuple[DALLE2Prior, Any]:
    out = converted(theirs, {"prior": {"net": NET | (net or {}), **PRIOR, **options}}, folder)
    return load_model(DALLE2Prior, out).eval(), load_scheduler(out / "scheduler")


def our_decoder(theirs: Any, folder: Path, unets: list[dict], **options: Any) -> tuple[DALLE2Decoder, Any, Any]:
    out = converted(theirs, {"decoder": {"unets": unets, "timesteps": STEPS, **options}}, folder)
    rest = load_model((DALLE2Pixels, DALLE2Cascade), out / "autoencoder").eval()
    return load_model(DALLE2Decoder, out).eval(), load_scheduler(out / "scheduler"), rest


@torch.no_grad()
def replayed(monkeypatch: pytest.MonkeyPatch, noises: list[Tensor], run: Any) -> Tensor:
    """What the reference draws with these noises, one after the other."""
    replay = Replay(noises)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", replay)
        patch.setattr(torch, "randn_like", replay)
        patch.setattr(reference(), "tqdm", lambda steps, **_: steps)
        result = run()
    assert not replay.noises
    return result


NETWORKS = {
    "published": {"normformer": True},
    "several tokens each, times by a network": {
        "num_timesteps": None,
        "num_time_embeds": 2,
        "num_image_embeds": 2,
        "num_text_embeds": 3,
        "norm_in": True,
    },
    "plain": {"rotary_emb": False, "norm_out": False, "final_proj": False},
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_prior_predicts_what_the_package_predicts_for_captions_of_mixed_lengths(name: str, tmp_path: Path) -> None:
    theirs = their_prior(NETWORKS[name])
    ours, _ = our_prior(theirs, tmp_path, NETWORKS[name])
    text, x, t = captions(3, 7, 9), noise(3, WIDTH), torch.tensor([0, 17, 39])
    expected = theirs.net(x, t, text_embed=text.embedding, text_encodings=text.states)
    torch.testing.assert_close(ours(x, t, text), expected, atol=1e-5, rtol=1e-5)
    nothing = theirs.net(x, t, text_embed=text.embedding, text_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    torch.testing.assert_close(ours(x, t, ours.null(3)), nothing, atol=1e-5, rtol=1e-5)
    both = ours.null(3).cat(text)  # as guidance has them: the null is padded to the captions
    together = ours(torch.cat([x, x]), torch.cat([t, t]), both)
    torch.testing.assert_close(together, torch.cat([nothing, expected]), atol=1e-5, rtol=1e-5)


def test_the_prior_takes_vectors_alone_if_it_was_trained_so(tmp_path: Path) -> None:
    theirs = their_prior(condition_on_text_encodings=False)
    ours, _ = our_prior(theirs, tmp_path, condition_on_text_encodings=False)
    text, x, t = captions(3, 7), noise(2, WIDTH), torch.tensor([0, 17])
    torch.testing.assert_close(ours(x, t, text), theirs.net(x, t, text_embed=text.embedding), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("objective", ["sample", "v_prediction"])
def test_ancestral_sampling_of_the_prior_is_the_packages(
    scale: float, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"predict_v": objective == "v_prediction"}
    theirs = their_prior(**options)
    ours, scheduler = our_prior(theirs, tmp_path, **options)
    text = captions(2, 9)
    noises = [noise(2, WIDTH, seed=i) for i in range(STEPS + 1)]
    condition = {"text_embed": text.embedding, "text_encodings": text.states}
    expected = replayed(
        monkeypatch, noises, lambda: theirs.p_sample_loop((2, WIDTH), text_cond=condition, cond_scale=scale)
    )
    predict = build_guided_predict(ours, text, ours.null(2), scale, scheduler)
    steps = [*noises[1:STEPS], noises[STEPS]]  # theirs draws one in the last step too, and adds nothing of it
    got = ancestral(predict, build_sampler("ddpm", scheduler), noises[0], steps, monkeypatch)
    # The package hands on what the sampler ends with; here z_i has unit length, as the decoders were trained with it.
    torch.testing.assert_close(got / WIDTH**0.5, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.unscale_image_embeds(got), F.normalize(expected, dim=-1), atol=1e-4, rtol=1e-4)


def ancestral(predict: Any, scheduler: Any, start: Tensor, noises: list[Tensor], patch: pytest.MonkeyPatch) -> Tensor:
    replay = Replay(noises)
    with patch.context() as context:
        context.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", replay)
        return sample_from_noise(predict, scheduler, start, Sampling(STEPS))


class Given(ExactDDIMScheduler):
    """DDIM at given timesteps, with the last step's end as given too."""

    def at(self, times: list[int], last: int) -> "Given":
        self.times, self.last = torch.tensor(times), last
        return self

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps, self.num_inference_steps = self.times, num_inference_steps

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        found = super().previous_timestep(timestep)
        return found if found >= 0 else torch.tensor(self.last)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_ddim_of_the_prior_is_the_packages_but_for_its_noise_levels_which_are_one_step_off(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes alpha of the step before, but recovers the noise with alpha of this one. Mended, both draw the same."""
    theirs = their_prior()
    ours, scheduler = our_prior(theirs, tmp_path)
    text, steps = captions(2, 9), 6
    times = torch.linspace(-1.0, STEPS, steps + 1)[:-1].int().tolist()[::-1]
    noises = [noise(2, WIDTH, seed=i) for i in range(steps)]
    condition = {"text_embed": text.embedding, "text_encodings": text.states}

    def draw() -> Tensor:
        used = noises[: sum(time > 0 for time in times[1:]) + 1]
        return replayed(
            monkeypatch,
            used,
            lambda: theirs.p_sample_loop((2, WIDTH), text_cond=condition, cond_scale=scale, timesteps=steps),
        )

    off = draw()
    theirs.noise_scheduler.alphas_cumprod_prev = theirs.noise_scheduler.alphas_cumprod
    expected = draw()
    predict = build_guided_predict(ours, text, ours.null(2), scale, scheduler)
    sampler = build_scheduler_like(Given, scheduler).at(times[:-1], -1)
    with monkeypatch.context() as patch:
        patch.setattr("t2i.diffusion.ddim.randn_tensor", Replay(noises[1:] + [torch.zeros(2, WIDTH)]))
        got = sample_from_noise(predict, sampler, noises[0], Sampling(steps, eta=1.0)) / WIDTH**0.5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (off - expected).abs().max() > 1e-3


def test_a_prior_of_another_kind_of_picture_has_a_caption_of_any_length_and_a_batch_that_changes_nothing(
    tmp_path: Path,
) -> None:
    ours, scheduler = our_prior(their_prior(), tmp_path)
    text = captions(3, 12)  # longer than the prior's sequence: cut, as the package does
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = sample_prior(ours, scheduler, text, None, Sampling(3, generators, 2.0))
    first = TextEncoding(text.embedding[:1], text.states[:1, :3], text.mask[:1, :3])
    alone = sample_prior(ours, scheduler, first, None, Sampling(3, [torch.Generator().manual_seed(1)], 2.0))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(ours.unscale_image_embeds(ours.scale_image_embeds(both)), both)


UNETS = {
    "as published": {"memory_efficient": False, "self_attn": [False, True]},
    "captions": {"cond_on_text_encodings": True, "text_embed_dim": WIDTH, "max_text_len": LONGEST},
    "memory efficient": {"memory_efficient": True, "scale_skip_connection": True, "self_attn": [True, False]},
    "linear attention": {
        "sparse_attn": True,
        "cosine_sim_self_attn": True,
        "cosine_sim_cross_attn": True,
        "cross_embed_downsample": True,
        "pixel_shuffle_upsample": False,
        "init_cross_embed": False,
        "final_conv_kernel_size": 3,
        "num_resnet_blocks": [1, 2],
        "resnet_groups": [4, 8],
        "add_image_embeds_to_time": False,
    },
}


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_the_decoder_predicts_what_the_package_predicts(name: str, tmp_path: Path) -> None:
    unets = [UNET | UNETS[name]]
    theirs = their_decoder(unets, image_size=8, learned_variance=True)
    ours, _, _ = our_decoder(theirs, tmp_path, unets, image_size=8)
    text, x, t = captions(3, 7), noise(2, 3, 8, 8), torch.tensor([0, 33])
    z_i = captions(1, 2).embedding
    said = {"text_encodings": text.states} if ours.config.text_width else {}
    expected = theirs.unets[0](x, t, image_embed=z_i, **said)
    torch.testing.assert_close(ours(x, t, ImageCondition(z_i, text)), expected, atol=1e-5, rtol=1e-4)
    dropped = {"image_cond_drop_prob": 1.0, "text_cond_drop_prob": 1.0}
    nothing = theirs.unets[0](x, t, image_embed=z_i, **said, **dropped)
    torch.testing.assert_close(ours(x, t, ours.null(2)), nothing, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, nothing, atol=1e-3)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_ancestral_sampling_of_the_decoder_is_the_packages_but_for_its_guided_variance(
    scale: float, learned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package extrapolates the predicted variance too, out of the bounds that it is between; here the condition's
    own is taken, as GLIDE and DALL-E 2 do."""
    unets = [UNET | UNETS["captions"]]
    theirs = their_decoder(unets, image_size=8, learned_variance=learned)
    ours, scheduler, pixels = our_decoder(theirs, tmp_path, unets, image_size=8, learned_variance=learned)
    text, z_i = captions(2, 9), captions(1, 2).embedding
    noises = [noise(2, 3, 8, 8, seed=i) for i in range(STEPS + 1)]
    expected = replayed(
        monkeypatch,
        noises,
        lambda: theirs.sample(image_embed=z_i, text_encodings=text.states, cond_scale=scale),
    )
    predict = build_guided_predict(ours, ImageCondition(z_i, text), ours.null(2), scale, scheduler)
    sampler = build_sampler("ddpm", scheduler, learned)
    assert isinstance(sampler, DDPMScheduler) and sampler.config.clip_sample
    got = (pixels.decode(ancestral(predict, sampler, noises[0], noises[1:], monkeypatch)) + 1) / 2
    if learned and scale != 1:
        assert (got - expected).abs().max() > 1e-3
    else:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_ddim_of_the_decoder_is_the_packages_but_for_its_timesteps_which_end_before_the_clean_picture(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first timestep is not the last of training, and it stops at timestep 0, with that much noise left."""
    unets, steps = [UNET | UNETS["captions"]], 6
    theirs = their_decoder(unets, image_size=8, sample_timesteps=steps)
    ours, scheduler, _ = our_decoder(theirs, tmp_path, unets, image_size=8)
    times = torch.linspace(0.0, STEPS, steps + 2)[:-1].int().tolist()[::-1]
    assert times[0] < STEPS - 1 and times[-1] == 0
    text, z_i, start = captions(2, 9), captions(1, 2).embedding, noise(2, 3, 8, 8)
    unused = [torch.zeros(2, 3, 8, 8)] * (steps - 1)  # eta is 0
    expected = replayed(
        monkeypatch,
        [start, *unused],
        lambda: theirs.sample(image_embed=z_i, text_encodings=text.states, cond_scale=scale),
    )
    predict = build_guided_predict(ours, ImageCondition(z_i, text), ours.null(2), scale, scheduler)
    # The package takes the noise of the clipped clean sample, where diffusers takes the predicted noise
    sampling = Sampling(steps, use_clipped_model_output=True)
    got = sample_from_noise(predict, build_scheduler_like(Given, scheduler).at(times[:-1], 0), start, sampling)
    torch.testing.assert_close((got + 1) / 2, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("noised", [False, True])
def test_the_cascade_draws_what_the_package_draws(
    noised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unets = [UNET, {**UNET, "memory_efficient": True}]
    options = {"image_sizes": [8, 16], "use_noise_for_lowres_cond": noised, "learned_variance": False}
    theirs = their_decoder(unets, **options)
    _, scheduler, cascade = our_decoder(theirs, tmp_path, unets, **options)
    assert (cascade.factor, scheduler.config.beta_schedule) == (2, "squaredcos_cap_v2")
    assert cascade.scheduler.config.beta_schedule == "linear"
    small, start, blur = noise(2, 3, 8, 8).clamp(-1, 1), noise(2, 3, 16, 16, seed=1), noise(2, 3, 16, 16, seed=2)
    later = [noise(2, 3, 16, 16, seed=3 + i) for i in range(STEPS)]
    before, z_i = [blur] if noised else [], noise(2, WIDTH)
    expected = replayed(
        monkeypatch,
        [*before, start, *later],
        lambda: theirs.sample(image=(small + 1) / 2, image_embed=z_i, start_at_unet_number=2),
    )
    cascade.all_schedulers[0] = build_sampler("ddpm", cascade.scheduler)
    with monkeypatch.context() as patch:
        patch.setattr("t2i.networks.dalle2.decoder.generate_noise", Replay(before))
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Replay(later))
        got = cascade.draw_images(small, Sampling(STEPS, [torch.Generator(), torch.Generator()], noise=start))
    torch.testing.assert_close((got + 1) / 2, expected.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_a_picture_of_the_cascade_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    unets = [UNET, UNET, UNET]
    options = {"image_sizes": [8, 16, 32], "use_noise_for_lowres_cond": [True, False]}
    _, _, cascade = our_decoder(their_decoder(unets, **options), tmp_path, unets, **options)
    small = noise(2, 3, 8, 8)
    both = cascade.draw_images(small, Sampling(3, [torch.Generator().manual_seed(seed) for seed in (1, 2)]))
    alone = cascade.draw_images(small[1:], Sampling(3, [torch.Generator().manual_seed(2)]))
    assert both.shape == (2, 3, 32, 32) and both.abs().max() <= 1
    # Early steps divide by next to nothing, which enlarges the last bit; another noise would differ by about 1.
    torch.testing.assert_close(both[1:], alone, atol=2e-2, rtol=0)
    assert cascade.encode(cascade.decode(small)).shape == small.shape
    # Nor on the memory, which may suffice for one of them at a time
    cascade.nets[0].register_forward_pre_hook(fail_for_several)
    divided = cascade.draw_images(small, Sampling(3, [torch.Generator().manual_seed(seed) for seed in (1, 2)]))
    torch.testing.assert_close(divided, both, atol=2e-2, rtol=0)


def fail_for_several(module: Any, arguments: tuple) -> None:
    if len(arguments[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")


def test_weights_that_are_only_there_while_they_are_needed_change_nothing(tmp_path: Path) -> None:
    """As with sequential offload: between the calls they are on no device."""
    for name in ("prior", "decoder"):
        (tmp_path / name).mkdir()
    unets, options = [UNET | UNETS["captions"] | {"sparse_attn": True}, UNET], {"image_sizes": [8, 16]}
    prior, steps = our_prior(their_prior(), tmp_path / "prior")
    decoder, scheduler, cascade = our_decoder(their_decoder(unets, **options), tmp_path / "decoder", unets, **options)
    text = captions(3, 7)

    def draw() -> Tensor:
        z_i = sample_prior(
            prior, steps, text, None, Sampling(2, [torch.Generator().manual_seed(1) for _ in range(2)], 2.0)
        )
        x = sample_from_noise(
            build_decoder_predict(decoder, scheduler, build_decoder_condition(decoder, z_i, text), 2.0),
            scheduler,
            noise(2, 3, 8, 8),
            Sampling(2),
        )
        return cascade.draw_images(x, Sampling(2, [torch.Generator().manual_seed(1) for _ in range(2)]))

    expected = draw()
    for part in (prior, decoder, cascade):
        cpu_offload(part, torch.device("cpu"))
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    torch.testing.assert_close(draw(), expected)


def test_an_upsampler_alone_becomes_a_cascade_without_a_decoder(tmp_path: Path) -> None:
    unets, options = [UNET, UNET], {"image_sizes": [8, 16]}
    state = {
        name: one
        for name, one in their_decoder(unets, **options).state_dict().items()
        if not name.startswith("unets.0")
    }
    out = converted(state, {"decoder": {"unets": unets, "timesteps": STEPS, **options}}, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["autoencoder"]


def waves(model: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict of sines: weights that any release can be given."""
    return {
        name: (torch.arange(one.numel(), dtype=torch.float64) * 0.7 + i).sin().float().view(one.shape)
        for i, (name, one) in enumerate(sorted(model.state_dict().items()))
    }


OLD_PRIOR_SAYS = [[0.42761, -2.14141, 1.5454, 0.71755], [-2.9177, -1.20338, 4.02645, -2.50642]]
OLD_DECODER_SAYS = [[6.04298, 40.23568], [21.86438, 45.03153]]
OLD_NET = {**NET, "normformer": True}
OLD_UNET = {**UNET, "self_attn": [False, True], "sparse_attn": True}


@torch.no_grad()
def test_the_arithmetic_of_a_prior_of_release_1_1_0_is_that_of_its_own_release(tmp_path: Path) -> None:
    """The published one: its bias counts 128 times, queries have no unit length. The figures are release 1.1.0's."""
    config = {"embed_dim": WIDTH, "depth": 2, "head_width": 12, "heads": 2, "context_length": LONGEST}
    old = DALLE2Prior(**config, num_timesteps=STEPS, inner_norm=True, old_attention=True, learned_null=False)
    state = waves(old)
    assert "net.null_text_embed" in state
    with pytest.raises(InputError, match="net.null_text_embed.*as --release"):
        converted(state, {"prior": {"net": OLD_NET, **PRIOR}}, tmp_path)
    ours = load_model(DALLE2Prior, converted(state, {"prior": {"net": OLD_NET, **PRIOR}}, tmp_path, release="1.1.0"))
    got = ours(noise(2, WIDTH), torch.tensor([3, 30]), captions(3, 7))
    torch.testing.assert_close(got[:, :4], torch.tensor(OLD_PRIOR_SAYS), atol=1e-4, rtol=1e-4)
    assert ours.config.default_guidance_scale == 1  # no release before 1.9.0 could be guided: what was dropped was not


@torch.no_grad()
def test_the_arithmetic_of_a_decoder_of_release_1_0_2_is_that_of_its_own_release(tmp_path: Path) -> None:
    """LAION's: strided convolutions, attention scaled by the root of its width. The figures are release 1.0.2's."""
    sizes = {"embed_dim": WIDTH, "latent_channels": 3, "latent_size": 8}
    unet = {name: one for name, one in OLD_UNET.items() if name != "image_embed_dim"}
    old = DALLE2Decoder(**sizes, unet={**unet, "old_attention": True, "old_downsample": True})
    state = {
        name.replace("net.", "unets.0.", 1).replace(".cross_attn.", ".cross_attn.fn."): one
        for name, one in waves(old).items()
    }
    config = {"decoder": {"unets": [OLD_UNET], "timesteps": STEPS, "image_size": 8}}
    with pytest.raises(InputError, match="as --release"):
        converted(state, config, tmp_path)
    with pytest.raises(InputError, match="release 1.4.1; decoders of 1.4.0 to 1.4.2"):
        converted(state, config, tmp_path, release="1.4.1")
    ours = load_model(DALLE2Decoder, converted(state, config, tmp_path, release="1.0.2"))
    got = ours(noise(2, 3, 8, 8), torch.tensor([3, 30]), ImageCondition(captions(1, 2).embedding))
    torch.testing.assert_close(got[:, 0, 3, :2], torch.tensor(OLD_DECODER_SAYS), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_averaged_weights_are_taken_where_a_trainer_wrote_both(tmp_path: Path) -> None:
    from packaging.version import Version

    theirs, other = their_prior(), their_prior()
    randomised(other, seed=1)
    state = theirs.state_dict()
    saved = {"model": other.state_dict(), "ema_model": state, "version": Version("1.15.6"), "step": torch.tensor([3])}
    out = converted(saved, {"prior": {"net": NET, **PRIOR}}, tmp_path)
    ours = load_model(DALLE2Prior, out)
    assert torch.equal(ours.net.learned_query, theirs.net.learned_query)

    unets = [UNET]
    decoder, other = their_decoder(unets, image_size=8), their_decoder(unets, image_size=8)
    randomised(other, seed=1)
    averaged = {f"0.ema_model.{name}": one for name, one in decoder.unets[0].state_dict().items()}
    (tmp_path / "decoder").mkdir()
    saved = {"model": other.state_dict(), "ema": averaged | {"0.step": torch.tensor(1)}, "version": "1.15.6"}
    saved["config"] = {"decoder": {"unets": unets, "timesteps": STEPS, "image_size": 8}}
    torch.save(saved, tmp_path / "decoder.pth")
    out = convert_dalle2(tmp_path / "decoder.pth", None, tmp_path / "decoder" / "out")  # its configuration is in it
    assert torch.equal(load_model(DALLE2Decoder, out).net.to_out.weight, decoder.unets[0].to_out.weight)


def old_version(release: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A version as `packaging` pickled it in 2022: of classes that it does not have any more."""
    import packaging._structures
    import packaging.version

    class Infinity:
        pass

    class Version:
        pass

    parts = namedtuple("_Version", "epoch release dev pre post local")
    for module, name, one in (
        (packaging.version, "Version", Version),
        (packaging.version, "_Version", parts),
        (packaging._structures, "NegativeInfinityType", Infinity),
    ):
        one.__module__, one.__qualname__, one.__name__ = module.__name__, name, name
        monkeypatch.setattr(module, name, one, raising=False)
    made = Version()
    made._version = parts(0, release, None, None, None, None)
    made._key = (0, release, Infinity(), Infinity())
    return made


def test_the_release_is_read_of_the_version_that_any_packaging_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packaging.version import Version

    now, state = Version("1.15.6"), {"net.learned_query": torch.zeros(3)}
    with monkeypatch.context() as patch:
        torch.save({"model": state, "version": old_version((1, 1, 0), patch)}, tmp_path / "old.pth")
    torch.save({"model": state, "version": now}, tmp_path / "new.pth")
    assert read_dalle2_file(tmp_path / "old.pth").release == (1, 1, 0)
    assert read_dalle2_file(tmp_path / "new.pth").release == (1, 15, 6)


PUBLISHED: dict[str, tuple[dict, dict]] = {
    "LAION's prior": (
        {"dim": 768, "depth": 12, "dim_head": 64, "heads": 12, "max_text_len": 77, "num_timesteps": 1000},
        {"embed_dim": 768, "depth": 12, "heads": 12, "context_length": 77, "num_timesteps": 1000},
    ),
    "LAION's conditioned prior": (
        {"dim": 768, "depth": 24, "dim_head": 64, "heads": 32, "normformer": True, "num_timesteps": 1000},
        {"embed_dim": 768, "depth": 24, "heads": 32, "inner_norm": True, "num_timesteps": 1000},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_priors_of_published_sizes_have_the_packages_tensors(name: str) -> None:
    package, (theirs, ours) = reference(), PUBLISHED[name]
    with torch.device("meta"):
        expected = package.DiffusionPriorNetwork(**theirs).state_dict()
        found = DALLE2Prior(**ours).net.state_dict()
    expected = {name: one for name, one in expected.items() if "rotary" not in name}  # computed here
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in expected.items()}


def test_decoders_of_published_sizes_have_the_packages_tensors() -> None:
    """The package's own example, and one of more than a billion values that reads captions."""
    example = {"dim": 128, "cond_dim": 64, "dim_mults": (1, 2, 4, 8)}
    reader = {"dim": 320, "cond_dim": 512, "dim_mults": (1, 2, 3, 4), "num_resnet_blocks": 4, "attn_dim_head": 64}
    reader |= {"self_attn": (False, True, True, True), "max_text_len": 77, "text_embed_dim": 768}
    for unet, reads in ((example, False), (reader, True)):
        more = {"image_embed_dim": 768, "cond_on_image_embeds": True, "cond_on_text_encodings": reads}
        with torch.device("meta"):
            expected = reference().Unet(**unet, **more, channels_out=6).state_dict()
            found = DALLE2Decoder(768, 3, 64, unet, text_width=768 if reads else None).net.state_dict()
        assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in expected.items()}


class Foreign:
    """What no file may hold."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved | {"warmup_scheduler": Foreign()},
            "holds a 'tests.interop.test_dalle2.Foreign', which is no weights",
        ),
        (lambda saved: {"model": {"net.learned_query": [1, 2]}}, "in it is no plain tensor"),
        (lambda saved: {"model": {"other": torch.zeros(1)}}, "neither a prior .net.*. nor a decoder"),
        (lambda saved: [1], "holds a list, not a model's tensors"),
        (lambda saved: {"model": {**saved["model"], "net.more": torch.zeros(2)}}, "has unknown tensors.*net.more"),
        (lambda saved: {"model": dict(list(saved["model"].items())[:-1])}, "lacks tensors, 1 of"),
        (
            lambda saved: {"model": {**saved["model"], "noise_scheduler.betas": torch.full((STEPS,), 0.1)}},
            "noise schedule .* is not its configuration's",
        ),
        (
            lambda saved: {"model": {**saved["model"], "net.learned_query": torch.full((WIDTH,), torch.nan)}},
            "NaN",
        ),
    ],
)
def test_a_file_that_is_not_as_the_trainers_write_it_is_refused_in_one_line(
    change: Any, message: str, tmp_path: Path
) -> None:
    saved = {"model": their_prior().state_dict()}
    torch.save(change(saved), tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps({"prior": {"net": NET, **PRIOR}}))
    with pytest.raises(InputError, match=message) as raised:
        convert_dalle2(tmp_path / "model.pth", tmp_path / "config.json", tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_file_that_is_damaged_compressed_or_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"net.x": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(InputError, match="is compressed"):
        read_dalle2_file(tmp_path / "packed.pth")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="is no file of torch.save"):
        read_dalle2_file(path)
    with pytest.raises(InputError, match="no file"):
        read_dalle2_file(tmp_path / "missing.pth")


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ({"self_cond": True}, {}, "self_cond = True is not supported: the sampler"),
        ({}, {"sampling_clamp_l2norm": True}, "sampling_clamp_l2norm = True is not supported"),
        ({}, {"beta_schedule": "jsd"}, "beta_schedule must be one of cosine, linear, quadratic, got 'jsd'"),
        ({}, {"image_embed_dim": 7}, "image_embed_dim is 7, net.dim 24; they must agree"),
        ({}, {"net": [1]}, "prior.net must be a mapping"),
        ({"depth": 3}, {}, "lacks tensors"),
        ({"heads": 4}, {}, "has misshapen tensors"),
        ({"depth": 1000}, {}, "describes a larger model than its weights|lacks tensors"),
    ],
)
def test_a_configuration_that_no_model_here_computes_is_refused(
    net: dict, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        converted(their_prior(), {"prior": {"net": NET | net, **PRIOR, **options}}, tmp_path)


@pytest.mark.parametrize(
    ("unet", "options", "message"),
    [
        ({"self_cond": True}, {}, "self_cond = True is not supported"),
        ({"combine_upsample_fmaps": True}, {}, "combine_upsample_fmaps = True is not supported"),
        ({"cond_dim": WIDTH}, {}, "image_embed_dim and cond_dim are both 24"),
        ({}, {"image_size": None}, "must have 1 growing image_sizes"),
        ({}, {"beta_schedule": ["cosine", "linear"]}, "a decoder of 1 U-Nets has 2 values"),
        ({"self_attn": [True]}, {}, "self_attn must have a value for each of 2 levels"),
    ],
)
def test_a_decoders_configuration_that_no_model_here_computes_is_refused(
    unet: dict, options: dict, message: str, tmp_path: Path
) -> None:
    state = their_decoder([UNET], image_size=8).state_dict()
    config = {"unets": [UNET | unet], "timesteps": STEPS, "image_size": 8} | options
    with pytest.raises(InputError, match=message):
        converted(state, {"decoder": config}, tmp_path)


@pytest.mark.parametrize("required", [False, True])
def test_without_the_package_what_compares_is_skipped_and_fails_where_it_is_required(
    required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise InputError("dalle2_pytorch not installed")

    monkeypatch.setattr(dalle2_reference, "import_dalle2_pytorch", missing)
    monkeypatch.setenv("T2I_REFERENCE", "required" if required else "")
    ending = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(ending, match="dalle2_pytorch not installed"):
        reference()
