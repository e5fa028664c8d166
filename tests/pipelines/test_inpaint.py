"""Inpainting and outpainting: what is kept, what is painted, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from t2i.pipelines import InpaintPipeline, OutpaintPipeline
from t2i.pipelines.inputs import read_images, read_masks
from t2i.pipelines.jobs.assemble import assemble_pipeline

from t2i import InputError
from t2i.diffusion.condition import Condition, ImageCondition
from t2i.diffusion.denoiser import build_conditional_predict
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.inpainting import (
    build_blend_callback,
    concat_masked_latents,
    downsample_mask,
    generate_random_masks,
    paste_painted_region,
)
from t2i.diffusion.process import alpha_sigma, x0_to_prediction
from t2i.diffusion.samplers import SAMPLERS
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.diffusion.windows import Window, build_canvas_windows, build_windowed_predict
from t2i.files.model_folder import load_model
from t2i.networks.decoder import Decoder
from t2i.networks.unet_decoder import UNetDecoder
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict
from t2i.sampling.steering import Steering
from tests.helpers.stages import seeds, train

QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": 3}


def picture(width=32, height=32, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask_of(box, width=32, height=32):
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


@pytest.fixture
def inpaint(pipeline):
    return InpaintPipeline.from_pipe(pipeline)


@pytest.fixture
def outpaint(pipeline):
    return OutpaintPipeline.from_pipe(pipeline)


@pytest.mark.parametrize("size", [(32, 32), (45, 33), (32, 70)])
@pytest.mark.parametrize("prompt", [None, "red circle"])
def test_what_is_not_masked_comes_back_pixel_for_pixel(inpaint, size, prompt):
    before, mask = picture(*size), mask_of((5, 7, 20, 25), *size)
    after = inpaint(before, mask, prompt, generator=seeds(1), **QUICK).images[0]
    painted = np.asarray(mask) > 0
    assert after.size == before.size
    assert (np.asarray(after)[~painted] == np.asarray(before)[~painted]).all()
    assert (np.asarray(after)[painted] != np.asarray(before)[painted]).mean() > 0.9


def test_transparent_parts_of_a_picture_are_painted_on_request(inpaint):
    before, mask = picture(), mask_of((5, 7, 20, 25))
    hole = before.convert("RGBA")
    hole.putalpha(Image.eval(mask, lambda value: 255 - value))
    expected = inpaint(before, mask, generator=seeds(1), **QUICK).images[0]
    painted = inpaint(before, hole, generator=seeds(1), mask_channel="alpha", **QUICK).images[0]
    assert painted.tobytes() == expected.tobytes()


def test_a_painting_depends_on_its_own_seed_alone(inpaint):
    pictures, masks = [picture(seed=1), picture(seed=2)], [mask_of((0, 0, 16, 16)), mask_of((4, 4, 30, 20))]
    together = inpaint(pictures, masks, generator=seeds(1, 2, 3, 4), num_images_per_prompt=2, output_type="pt", **QUICK)
    alone = inpaint(pictures[1], masks[1], generator=seeds(4), output_type="pt", **QUICK)
    torch.testing.assert_close(together.images[3:], alone.images, atol=1e-5, rtol=0)
    assert (together.images[2] - together.images[3]).abs().max() > 1e-3


def test_less_strength_leaves_more_of_what_is_painted_over(inpaint):
    before, mask = picture(), mask_of((0, 0, 32, 16))
    settings = {"generator": seeds(1), "num_inference_steps": 10, "output_type": "pt"}
    whole, little = (inpaint(before, mask, strength=one, **settings).images for one in (1.0, 0.1))
    kept = inpaint.decode(
        inpaint.encode_latents(torch.from_numpy(np.array(before)).permute(2, 0, 1)[None] / 127.5 - 1), "pt"
    )
    top = (..., slice(0, 16), slice(None))
    assert (little[top] - kept[top]).abs().mean() < (whole[top] - kept[top]).abs().mean()


def test_outpainting_keeps_the_picture_in_the_middle(outpaint):
    before = picture(40, 32)
    after = outpaint(before, left=10, right=3, top=5, bottom=20, generator=seeds(1), **QUICK).images[0]
    assert after.size == (53, 57)
    assert (np.asarray(after)[5:37, 10:50] == np.asarray(before)).all()
    assert np.asarray(after)[:, :10].std() > 0


def test_a_small_picture_can_be_outpainted_to_the_models_size(outpaint):
    assert outpaint(picture(20, 20), right=12, bottom=12, generator=seeds(1), **QUICK).images[0].size == (32, 32)


@dataclass
class Answer(Condition):
    clean: torch.Tensor


class Oracle:
    """Believes that every image is its condition."""

    dtype = torch.float32

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def prepare(self, condition):
        return condition.clean

    def step(self, x, t, answer):
        return x0_to_prediction(self.scheduler, answer.expand_as(x), x, t)


def test_blending_holds_the_known_latents_and_paints_the_answer():
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    latents, answer, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1
    seen = []
    hold = build_blend_callback(scheduler, latents, mask, noise)

    def on_step(i, t, x):
        x = hold(i, t, x)
        seen.append((t, x))
        return x

    x = sample_from_noise(
        build_conditional_predict(Oracle(scheduler), Answer(answer)), scheduler, noise, Sampling(5, on_step=on_step)
    )
    torch.testing.assert_close(x, torch.where(mask > 0, answer, latents), atol=1e-5, rtol=0)
    for (_, held), (later, _) in zip(seen, seen[1:]):  # at the level of the next step
        expected = scheduler.add_noise(latents, noise, later.expand(2))
        torch.testing.assert_close(held[..., 3:], expected[..., 3:])


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_what_is_kept_has_the_level_of_the_next_step_whatever_samples(inpaint, sampler, strength):
    before, mask, noise = picture(), mask_of((0, 0, 32, 12)), torch.randn(1, 4, 8, 8)
    known = inpaint.encode_latents(torch.from_numpy(np.array(before)).permute(2, 0, 1)[None] / 127.5 - 1)
    seen = []

    def watch(_, step, t, tensors):
        seen.append((t, tensors["latents"].clone()))
        return {}

    settings = {"strength": strength, "latents": noise, "generator": seeds(1), "output_type": "latent"}
    inpaint(before, mask, num_inference_steps=7, **settings)  # leaves timesteps of its own
    settings |= {"sampler": sampler, "callback_on_step_end": watch, "num_inference_steps": 4}
    after = inpaint(before, mask, **settings).images
    torch.testing.assert_close(after[..., 3:, :], known[..., 3:, :], atol=1e-5, rtol=0)
    taken = round(4 * strength)
    assert len(seen) == (2 * taken - 1 if sampler == "ode" else taken)
    for (_, held), (later, _) in zip(seen, seen[1:]):
        alpha, sigma = alpha_sigma(inpaint.decoder_scheduler, later, noise)
        torch.testing.assert_close(held[..., 3:, :], (alpha * known + sigma * noise)[..., 3:, :], atol=1e-5, rtol=0)


def test_a_window_remembers_nothing_of_the_others(inpaint):
    z_i, known = torch.nn.functional.normalize(torch.randn(1, 32), dim=-1), torch.zeros(1, 5, 8, 20)
    x, t, decoder = torch.randn(1, 4, 8, 20), torch.tensor(500), inpaint.decoder
    condition, windows = build_decoder_condition(decoder, z_i, None, known), build_canvas_windows(8, 20, 8)
    assert len(windows) > 1
    first, plain = (
        build_decoder_predict(
            decoder, inpaint.decoder_scheduler, condition, Guidance(3.0, **settings), windows=windows
        )(x, t)
        for settings in ({"momentum": -0.5}, {})
    )
    torch.testing.assert_close(first, plain, atol=1e-4, rtol=1e-4)  # there is no step before the first


def test_previews_show_the_picture_with_what_is_painted(inpaint):
    before, mask, seen = picture(45, 33), mask_of((5, 7, 20, 25), 45, 33), []
    settings = {"generator": seeds(1), "on_preview": lambda one: seen.append(one.images()[0]), **QUICK}
    after = inpaint(before, mask, **settings).images[0]
    assert len(seen) == 3 and (np.asarray(seen[-1]) == np.asarray(after)).all()
    painted = np.asarray(mask) > 0
    for one in seen:
        assert one.size == before.size and (np.asarray(one)[~painted] == np.asarray(before)[~painted]).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (8, 21), (30, 17)])
def test_windows_cover_a_canvas_and_overlap_by_half(height, width):
    places = build_canvas_windows(height, width, 8)
    seen = torch.zeros(height, width)
    for place in places:
        part = place.crop(seen)
        assert part.shape == (8, 8)
        part += 1
    assert seen.min() >= 1
    for length, starts in ((height, {p.rows.start for p in places}), (width, {p.columns.start for p in places})):
        ordered = sorted(starts)
        assert ordered[0] == 0 and ordered[-1] == length - 8
        assert all(b - a <= 4 for a, b in zip(ordered, ordered[1:]))


@pytest.mark.parametrize(
    ("height", "width", "sides"), [(6, 10, (6, 10)), (10, 6, (10, 6)), (6, 30, (6, 8)), (8, 9, (8, 8))]
)
def test_a_canvas_that_is_narrower_than_a_square_has_windows_of_its_width(height, width, sides):
    windows, seen = build_canvas_windows(height, width, 8), torch.zeros(height, width)
    for window in windows:
        assert window.crop(seen).shape == window.weight.shape == sides and window.weight.min() > 0
        window.crop(seen).add_(1)
    assert seen.min() >= 1 and (height * width > 64) == (len(windows) > 1)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (38, 23), (70, 20)])
def test_a_shape_that_is_narrower_than_the_square_is_painted_in(inpaint, size):
    before, mask = picture(*size), mask_of((5, 7, 20, 18), *size)
    after = inpaint(before, mask, "red circle", generator=seeds(1), **QUICK).images[0]
    painted = np.asarray(mask) > 0
    assert after.size == before.size
    assert (np.asarray(after)[~painted] == np.asarray(before)[~painted]).all()
    assert (np.asarray(after)[painted] != np.asarray(before)[painted]).mean() > 0.9


def test_windows_of_an_oracle_say_what_the_oracle_says_of_the_whole():
    places = build_canvas_windows(20, 13, 8)
    x = torch.randn(2, 4, 20, 13)
    predict = build_windowed_predict([lambda part, t: 3 * part + t] * len(places), places)
    torch.testing.assert_close(predict(x, torch.tensor(5)), 3 * x + 5, atol=1e-4, rtol=1e-5)
    lone = build_windowed_predict([lambda part, t: part], [Window(slice(8), slice(8), torch.ones(8, 8))])
    assert lone(x[..., :8, :8], torch.tensor(5)).equal(x[..., :8, :8])


def test_a_latent_is_painted_if_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, 4] = 1
    assert downsample_mask(mask, 4)[0, 0].tolist() == [[0, 1], [0, 0]]


def test_what_is_painted_beside_the_border_takes_over_the_error_of_what_stays():
    pictures, mask = torch.zeros(1, 3, 20, 20), torch.zeros(1, 1, 20, 20)
    mask[..., 10:] = 1
    images = paste_painted_region(torch.full_like(pictures, 0.1), pictures, mask)
    assert images[..., :10].abs().max() == 0
    beside, next_to_it, far = images[0, 0, 5, 10], images[0, 0, 5, 11], images[0, 0, 5, 16]
    assert 0 <= beside < 0.05 < next_to_it < far
    torch.testing.assert_close(far, torch.tensor(0.1))


def test_masks_of_training_are_of_all_sizes_and_a_quarter_paint_everything():
    torch.manual_seed(0)
    masks = generate_random_masks(4000, 8, 8, torch.device("cpu"))
    assert masks.shape == (4000, 1, 8, 8) and set(masks.unique().tolist()) == {0, 1}
    share = masks.mean(dim=(1, 2, 3))
    assert 0.25 <= (share == 1).float().mean() < 0.35
    assert ((share > 0) & (share < 0.5)).float().mean() > 0.2 and ((share > 0.5) & (share < 1)).float().mean() > 0.2


@pytest.mark.parametrize("architecture", ["unet", "transformer"])
def test_a_decoder_that_reads_masks_sees_what_is_to_stay(architecture):
    torch.manual_seed(0)
    shape = {"embed_dim": 8, "latent_channels": 4, "latent_size": 8, "reads_masks": True}
    if architecture == "unet":
        blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
        sizes = {"block_out_channels": [16], "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8}
        unet = sizes | blocks
        decoder = UNetDecoder(**shape, unet=unet, context_width=16)
    else:
        decoder = Decoder(**shape, width=32, depth=1, heads=2, patch_size=2)
        for parameter in decoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, latents, mask = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([5, 700]),
        torch.randn(2, 4, 8, 8),
        torch.ones(2, 1, 8, 8),
    )
    z_i = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    nothing = decoder(x, t, ImageCondition(z_i))
    torch.testing.assert_close(decoder(x, t, ImageCondition(z_i, None, concat_masked_latents(latents, mask))), nothing)
    mask[..., :4] = 0
    seen = ImageCondition(z_i, None, concat_masked_latents(latents, mask))
    assert (decoder(x, t, seen) - nothing).abs().max() > 1e-3
    torch.testing.assert_close(decoder.step(x, t, decoder.prepare(seen)), decoder(x, t, seen))


def test_a_decoder_learns_to_read_masks_from_one_that_does_not(shapes, runs, tmp_path):
    before = load_model(UNetDecoder, runs / "decoder")
    frozen = {"clip": runs / "clip", "autoencoder": runs / "autoencoder"}
    settings = {"init": runs / "decoder", "reads_masks": "true", "train.learning_rate": 0, **frozen}
    train("decoder", shapes, tmp_path, 1, **settings)
    after = load_model(UNetDecoder, tmp_path / "decoder")
    condition = ImageCondition(torch.randn(2, 32), before.null(2).text)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(after(x, t, condition), before(x, t, condition))  # what it reads them with is zero
    pipeline = InpaintPipeline.from_pipe(assemble_pipeline(runs, decoder=str(tmp_path / "decoder")))
    pipeline.set_progress_bar_config(disable=True)
    wide, mask = picture(50, 32), mask_of((5, 5, 30, 30), 50, 32)
    assert pipeline(wide, mask, generator=seeds(1), **QUICK).images[0].size == (50, 32)
    train(
        "decoder",
        shapes,
        tmp_path,
        3,
        **settings | {"train.learning_rate": 1e-3, "init": tmp_path / "decoder", "train.output": tmp_path / "on"},
    )


def test_what_has_another_size_is_resized_as_in_diffusers(inpaint, caplog):
    """Masks to the size of the image and images to that of the first, by Lanczos' filter, and the log says so."""
    mask, second = mask_of((3, 3, 40, 20), 50, 45), picture(40, 36, seed=1)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, vae_scale_factor=1)
    expected = processor.preprocess(mask, 33, 64)
    assert torch.equal(read_masks(mask, 1, (33, 64)), expected)
    assert "mask_image is 50 x 45 and is resized to 64 x 33, as the image" in caplog.text
    both = read_images([picture(64, 33), second])
    processor = VaeImageProcessor(vae_scale_factor=1)
    torch.testing.assert_close(both[1:], processor.preprocess(second, 33, 64), atol=1e-6, rtol=0)
    assert "image 2 is 40 x 36 and is resized to 64 x 33, as the first image" in caplog.text
    assert inpaint([picture(64, 33), second], mask, generator=seeds(1, 2), **QUICK).images[1].size == (64, 33)


@pytest.mark.parametrize(
    ("padding", "size", "box"),
    ((3, (80, 60), (50, 20, 60, 26)), (6, (80, 60), (50, 20, 60, 26)), (3, (24, 20), (8, 6, 18, 12))),
)
def test_the_part_around_the_mask_is_painted_at_the_trained_size(inpaint, padding, size, box):
    """Also of an image that is smaller, as diffusers resizes it."""
    whole, mask = picture(*size), mask_of(box, *size)
    settings = {"prompt": "red circle", "num_images_per_prompt": 2, **QUICK}
    drawn = inpaint(whole, mask, generator=seeds(1, 2), padding_mask_crop=padding, **settings).images
    region = VaeImageProcessor.get_crop_region(mask, 32, 32, pad=padding)
    assert region[2] - region[0] == region[3] - region[1] == 10 + 2 * padding
    # The same by hand: the part, enlarged, is painted and put back
    part, part_mask = (image.crop(region).resize((32, 32), Image.Resampling.LANCZOS) for image in (whole, mask))
    painted = inpaint(part, part_mask, generator=seeds(1, 2), **settings).images
    for image, small in zip(drawn, painted):
        patch = small.resize((region[2] - region[0],) * 2, Image.Resampling.LANCZOS)
        expected = whole.copy()
        expected.paste(patch, region[:2], mask.crop(region))
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    array = inpaint(whole, mask, generator=seeds(1, 2), padding_mask_crop=padding, output_type="pt", **settings).images
    assert array.shape == (2, 3, size[1], size[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_image": mask_of((0, 0, 0, 0))}, "mask_image is all black: there is nothing to paint"),
        ({"mask_image": mask_of((0, 0, 32, 32))}, "mask_image is all white: nothing stays"),
        ({"mask_image": [mask_of((0, 0, 9, 9))] * 3}, "mask_image has 3 masks for 1 images"),
        ({"mask_image": torch.full((32, 32), 2.0)}, "mask_image has values of float32"),
        (
            {"image": picture(20, 32)},
            "image is 20 x 32 pixels, fewer than three quarters of the 32 x 32 that this model was trained on",
        ),
        ({"padding_mask_crop": -1}, "padding_mask_crop must be an integer from 0 to 4096"),
        ({"padding_mask_crop": 4, "output_type": "latent"}, "padding_mask_crop needs images"),
        ({"image": []}, "image has no images"),
        ({"strength": 0}, "strength must be from 0.001 to 1, got 0"),
        ({"prompt": ""}, "prompt must not be empty"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer"),
        ({"generator": seeds(1, 2)}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, "latents must be a tensor of shape"),
        ({"steering": Steering()}, "steering needs a class_name, a text or an image"),
        (
            {"image": [picture()] * 2, "mask_image": torch.eye(32).expand(2, -1, -1)},
            r"mask_image has the shape \(2, 32, 32\); a mask is \(H, W\)",
        ),
        ({"mask_image": np.zeros((3, 32, 32))}, r"mask_image has the shape \(3, 32, 32\); a mask is \(H, W\)"),
    ],
)
def test_bad_input_is_refused_before_any_work(inpaint, monkeypatch, settings, message):
    monkeypatch.setattr(inpaint.clip, "encode_image", lambda *_: pytest.fail("work has started"))
    monkeypatch.setattr(inpaint.autoencoder, "encode", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message):
        inpaint(**{"image": picture(), "mask_image": mask_of((0, 0, 9, 9)), **settings})


def test_margins_that_make_no_sense_are_refused(outpaint, monkeypatch):
    for margins, message in (
        ({}, "are 0; give"),
        ({"left": -1}, "left must be an integer"),
        ({"top": 9999}, "top must"),
    ):
        with pytest.raises(InputError, match=message):
            outpaint(picture(), **margins)
    monkeypatch.setattr("t2i.limits.MAX_PIXELS", 40 * 32)
    with pytest.raises(InputError, match="image with its margins is 41 x 32"):
        outpaint(picture(), left=4, right=5)
