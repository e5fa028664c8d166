"""The upsampler: what it is told, what it may be given, and that windows leave no trace."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from t2i.training.train_upsampler import Config, RandomCrops, blur_images

from t2i.config import CONFIG_FOLDER, load_config
from t2i.diffusion.sampling_loop import Sampling
from t2i.diffusion.windows import build_windowed_predict
from t2i.errors import InputError
from t2i.networks.upsampler import (
    LowResolution,
    Upsampler,
    UpsamplerContext,
    augment_low_resolution,
    enlarge_low_resolution,
    reduce_to_low_resolution,
)
from t2i.sampling.upsampling import (
    build_tile_slices,
    build_tile_windows,
    check_upsampled_size,
    compute_fade_weights,
    derive_stage_generators,
    sample_upsampler,
)
from tests.helpers.processes.forked import run_program
from tests.helpers.stages import arguments, seeds, train

UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 1e-5, "beta_end": 7.6e-3}
SCHEDULER = DDIMScheduler(**SCHEDULE, prediction_type="sample", clip_sample=False, timestep_spacing="trailing")


def make(factor: int = 2, embed_dim: int | None = None, **more) -> Upsampler:
    torch.manual_seed(0)
    upsampler = Upsampler(factor, 8, UNET, patch_size=2, embed_dim=embed_dim, **more)
    for parameter in upsampler.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return upsampler.eval()


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(count, 3, height, width) * 2 - 1


class Oracle:
    """A denoiser that says `answer(x, low)`."""

    dtype, device, image_size_multiple = torch.float32, torch.device("cpu"), 4
    config = SimpleNamespace(factor=2, max_level=1.0, embed_dim=None)

    def __init__(self, answer):
        self.answer = answer

    def prepare(self, condition: LowResolution) -> UpsamplerContext:
        return UpsamplerContext(enlarge_low_resolution(condition.low, 2), condition.level)

    def step(self, x, t, context):
        return self.answer(x, context.low)

    def null(self, count: int) -> LowResolution:
        return LowResolution(torch.zeros(count, 3, 8, 8), torch.ones(count))


def test_an_oracle_that_knows_the_pictures_draws_them_in_any_number_of_steps():
    truth = pictures(2, 16, 24)
    for steps in (1, 5):
        drawn = sample_upsampler(
            Oracle(lambda x, low: truth), SCHEDULER, reduce_to_low_resolution(truth, 2), Sampling(steps, seeds(1, 2))
        )
        torch.testing.assert_close(drawn, truth, atol=1e-5, rtol=0)


def test_an_oracle_of_velocity_under_another_sampler_draws_them_too():
    truth = pictures(1, 16, 16)
    zero = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = DPMSolverMultistepScheduler.from_config(zero.config, rescale_betas_zero_snr=False)
    alpha_of = {}

    class Velocity(Oracle):
        def step(self, x, t, context):
            alpha = alpha_of.setdefault(int(t[0]), scheduler.alphas_cumprod[int(t[0])].sqrt())
            return (alpha * x - truth) / (1 - alpha**2).sqrt()

    drawn = sample_upsampler(Velocity(None), scheduler, reduce_to_low_resolution(truth, 2), Sampling(6, seeds(1)))
    torch.testing.assert_close(drawn, truth, atol=1e-3, rtol=0)


def test_windows_say_what_the_whole_says_where_the_network_is_local():
    torch.manual_seed(0)
    kernel = torch.randn(3, 6, 5, 5) / 12
    oracle = Oracle(lambda x, low: F.conv2d(torch.cat([x, low], dim=1), kernel, padding=2).tanh())
    low = pictures(2, 31, 45)  # which no window fits
    whole = sample_upsampler(oracle, SCHEDULER, low, Sampling(4, seeds(1, 2)))
    assert whole.shape == (2, 3, 62, 90)
    windows = sample_upsampler(oracle, SCHEDULER, low, Sampling(4, seeds(1, 2)), tile=24, overlap=8)
    torch.testing.assert_close(windows, whole, atol=1e-5, rtol=0)
    # The control: with too little overlap for five by five pixels the windows show.
    narrow = sample_upsampler(oracle, SCHEDULER, low, Sampling(4, seeds(1, 2)), tile=24, overlap=4)
    assert (narrow - whole).abs().max() > 1e-3


def test_a_picture_that_a_window_holds_is_denoised_whole_and_no_window_is_larger_than_asked():
    seen = []

    def predict(x, t):
        seen.append(tuple(x.shape[-2:]))
        return x

    def predict_by_tiles(tile):
        windows = build_tile_windows(40, 64, tile, 16)
        return build_windowed_predict([predict] * len(windows), windows)(x, torch.tensor(3))

    x = torch.randn(1, 3, 40, 64)
    assert torch.equal(predict_by_tiles(64), x) and seen == [(40, 64)]
    seen.clear()
    torch.testing.assert_close(predict_by_tiles(32), x)
    assert set(seen) == {(32, 32)} and len(seen) == 2 * 3


@pytest.mark.parametrize("side", [24, 25, 40, 57])
def test_windows_cover_every_pixel_and_neighbours_share_it_evenly(side):
    windows = build_tile_slices(side, 24, 8)
    total = torch.zeros(side)
    for span in windows:
        total[span] += compute_fade_weights(span, side, 8)
    assert windows[0].start == 0 and windows[-1].stop == side and total.min() > 0
    assert side == 57 or torch.allclose(total, torch.ones(side)) or windows[-1].start % 16  # the last is moved back


def test_level_zero_leaves_the_low_resolution_and_level_one_nothing_of_it():
    low, noise = pictures(2, 8, 8), torch.randn(2, 3, 8, 8)
    assert torch.equal(augment_low_resolution(low, torch.zeros(2), noise), low)
    assert torch.equal(augment_low_resolution(low, torch.ones(2), noise), noise)
    torch.manual_seed(0)
    unit = torch.randn(1, 3, 400, 400)
    assert augment_low_resolution(unit, torch.tensor([0.6]), torch.randn_like(unit)).std() == pytest.approx(1, abs=0.01)


def test_every_condition_is_used_and_preparing_twice_changes_nothing():
    upsampler = make(embed_dim=6, max_level=1.0)
    x, t, level = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0.1, 0.3])
    given = LowResolution(pictures(2, 8, 8), level, F.normalize(torch.randn(2, 6), dim=-1))
    full = upsampler(x, t, given)
    context = upsampler.prepare(given)
    for _ in range(2):
        torch.testing.assert_close(upsampler.step(x, t, context), full)
    others = {"low": given.low.flip(0), "level": level.flip(0), "embedding": torch.zeros(2, 6)}
    for name, value in others.items():
        assert not torch.allclose(upsampler(x, t, replace(given, **{name: value})), full, atol=1e-3), name
    assert not torch.allclose(upsampler(x, t.flip(0), given), full, atol=1e-3)
    assert (
        upsampler.step(x, t, upsampler.prepare(upsampler.null(2).cat(given).map_tensors(lambda both: both[:2]))).shape
        == x.shape
    )


@pytest.mark.parametrize("factor", [2, 4])
def test_an_untrained_upsampler_is_the_resized_picture(factor):
    upsampler, low = Upsampler(factor, 8, UNET, patch_size=2), pictures(1, 9, 7)
    drawn = sample_upsampler(upsampler, SCHEDULER, low, Sampling(3, seeds(0)))
    torch.testing.assert_close(drawn, enlarge_low_resolution(low, factor).clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_picture_does_not_depend_on_its_batch_nor_on_windows_that_it_does_not_need():
    upsampler, low = make(), pictures(3, 10, 12)
    both = sample_upsampler(upsampler, SCHEDULER, low, Sampling(3, seeds(5, 6, 7)), level=0.2)
    alone = sample_upsampler(upsampler, SCHEDULER, low[1:2], Sampling(3, seeds(6)), level=0.2, tile=32, overlap=8)
    torch.testing.assert_close(alone, both[1:2], atol=1e-5, rtol=0)
    other = sample_upsampler(upsampler, SCHEDULER, low[1:2], Sampling(3, seeds(9)), level=0.2)
    assert (other - alone).abs().max() > 1e-3


def test_each_time_a_picture_is_enlarged_has_a_stream_of_its_own():
    first, second = (derive_stage_generators(seeds(4, 5), stage) for stage in (1, 2))
    assert derive_stage_generators(seeds(9, 5), 1)[1].initial_seed() == first[1].initial_seed()
    drawn = {tuple(torch.randn(4, generator=one).tolist()) for one in (*first, *second, *seeds(4, 5))}
    assert len(drawn) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": torch.zeros(1, 3, 1, 9)}, "sides of at least 2 pixels, got 9 x 1"),
        ({"low": torch.zeros(1, 1, 8, 8)}, r"low must be images, \(N, 3, height, width\), got \(1, 1, 8, 8\)"),
        ({"low": torch.zeros(2, 3, 8, 8)}, "1 generators for 2 images"),
        ({"low": torch.zeros(1, 3, 1, 1).expand(1, 3, 4000, 4000)}, "40,000,000 pixels, 4000 x 4000 would become 8000"),
        ({"steps": 0}, "steps must be an integer from 1 to 1000, got 0"),
        ({"level": 0.7}, "level must be from 0 to 0.5, got 0.7"),
        ({"tile": 30}, "tile must be a multiple of 4, got 30"),
        ({"tile": 32, "overlap": 18}, "overlap must be an integer from 4 to 16, got 18"),
        ({"tile": 32, "overlap": 6}, "overlap must be a multiple of 4, got 6"),
    ],
)
def test_what_cannot_be_upsampled_is_refused_in_one_line(settings, message):
    given = {"low": pictures(1, 8, 8)} | settings
    sampling = Sampling(given.pop("steps", 4), seeds(0))
    with pytest.raises(InputError, match=message) as caught:
        sample_upsampler(make(), SCHEDULER, sampling=sampling, **given)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit_and_factors_that_are_not_known_are_refused():
    upsampler, t = make(), torch.tensor([1])
    given = LowResolution(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(InputError, match="must have 16x16 pixels as the enlarged low resolution, got 16x12"):
        upsampler(torch.zeros(1, 3, 16, 12), t, given)
    with pytest.raises(InputError, match="must be multiples of 4 pixels, got 18 x 16"):
        upsampler(torch.zeros(1, 3, 18, 16), t, replace(given, low=torch.zeros(1, 3, 9, 8)))
    with pytest.raises(InputError, match="takes no z_i, got a condition with it"):
        upsampler(torch.zeros(1, 3, 16, 16), t, replace(given, embedding=torch.zeros(1, 6)))
    with pytest.raises(InputError, match="factor must be one of 2, 4; got 3"):
        Upsampler(3, 8, UNET)
    with pytest.raises(InputError, match="multiples of the factor 2, got 9 x 8"):
        reduce_to_low_resolution(torch.zeros(1, 3, 8, 9), 2)
    with pytest.raises(InputError, match="2000 x 2000 would become 8000 x 8000"):
        check_upsampled_size(upsampler, 2000, 2000, times=2)


def test_blur_is_a_gaussian_of_its_width_and_none_at_zero():
    point = torch.zeros(2, 1, 21, 21)
    point[:, :, 10, 10] = 1
    sharp, soft = blur_images(point, torch.tensor([0.0, 1.2]))
    assert torch.equal(sharp, point[0])
    place = torch.arange(21.0) - 10
    assert soft.sum() == pytest.approx(1, abs=1e-4)
    assert (soft[0].sum(dim=1) * place.square()).sum().sqrt() == pytest.approx(1.2, abs=0.02)


def test_crops_are_parts_of_their_pictures_and_a_function_of_the_position(shapes):
    config = load_config(Config, "upsampler", arguments("upsampler", shapes, shapes))
    crops, whole = RandomCrops(config), RandomCrops(replace(config, crop_size=32))
    first, again, later = (crops.__getitems__([(4, draw)]).image[0] for draw in (7, 7, 8))
    assert first.shape == (3, 16, 16) and torch.equal(first, again) and not torch.equal(first, later)
    everywhere = whole.__getitems__([(4, 0)]).image.unfold(2, 16, 1).unfold(3, 16, 1)
    assert ((everywhere - first[None, :, None, None]).abs().amax(dim=(0, 1, 4, 5)) == 0).any()


def test_it_learns_to_draw_what_bicubic_blurs_and_loads_in_a_fresh_process(shapes, tmp_path):
    train("upsampler", shapes, tmp_path, 200, **{"train.learning_rate": 3e-3, "train.log_every": 1})
    log = [float(x) for x in re.findall(r'"loss": ([\d.e-]+)', (tmp_path / "upsampler/metrics.jsonl").read_text())]
    assert sum(log[-100:]) / 100 < 0.6 * sum(log[:10]) / 10
    code = f"""if True:
        from pathlib import Path
        import torch
        from t2i.files.model_folder import load_model
        from t2i.diffusion.stored_schedulers import load_scheduler
        from t2i.data import CaptionedPictures
        from t2i.networks.upsampler import Upsampler, enlarge_low_resolution, reduce_to_low_resolution
        from t2i.diffusion.sampling_loop import Sampling
        from t2i.sampling.upsampling import sample_upsampler
        from t2i.config import DataConfig
        folder = Path({str(tmp_path / "upsampler")!r})
        upsampler, scheduler = load_model(Upsampler, folder), load_scheduler(folder / "scheduler")
        pictures = CaptionedPictures(DataConfig({str(shapes)!r}, 32), "held_out")
        truth = torch.stack([pictures.load_image(i) for i in range(4)])
        low = reduce_to_low_resolution(truth, 2)
        drawn = sample_upsampler(upsampler.eval(), scheduler, low, Sampling(4, [torch.Generator() for _ in low]))
        print(float((drawn - truth).square().mean()), float((enlarge_low_resolution(low, 2) - truth).square().mean()))
    """
    done = run_program(["-c", code])
    assert done.returncode == 0, done.stderr
    ours, bicubic = map(float, done.stdout.split())
    assert ours < 0.85 * bicubic


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(shapes, tmp_path):
    settings = {"train.save_every": 2, "train.gradient_accumulation": 2, "train.batch_size": 6}
    for name, steps in (("unbroken", [4]), ("broken", [2, 4])):
        for count in steps:
            train("upsampler", shapes, tmp_path / name, count, **settings)
    files = [tmp_path / name / "upsampler/model/diffusion_pytorch_model.safetensors" for name in ("unbroken", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["upsampler", "upsampler-2x"])
def test_a_real_size_is_what_its_file_says_and_runs(name):
    path = CONFIG_FOLDER / "base" / f"{name}.yaml"
    config = load_config(Config, "upsampler", [str(path)])
    with torch.device("meta"):
        upsampler = Upsampler(config.factor, config.crop_size // config.factor, **config.model)
        x = torch.randn(2, 3, config.crop_size, config.crop_size)
        assert upsampler(x, torch.tensor([1, 2]), upsampler.null(2)).shape == x.shape
    said = re.search(r"([\d.]+) M parameters", path.read_text())
    assert said is not None
    assert sum(p.numel() for p in upsampler.parameters()) == pytest.approx(float(said[1]) * 1e6, rel=0.02)
