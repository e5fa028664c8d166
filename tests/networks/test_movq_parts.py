"""MoVQ in slices and tiles, which diffusers' VQModel lacks: known answers, and what each call of its networks sees."""

import pytest
import torch
from torch import Tensor

from t2i import InputError, Text2ImagePipeline
from t2i.networks.public.movq import MoVQ, run_in_tiles
from t2i.runtime.memory import count_peak_bytes
from tests.helpers.kandinsky_folders import kandinsky_21_combined, kandinsky_22_combined
from tests.helpers.karlo_folders import karlo
from tests.helpers.models import MODELS, draw
from tests.helpers.offloading import record_inputs

FOLDERS = {"2.1": kandinsky_21_combined, "2.2": kandinsky_22_combined}


@pytest.fixture
def movq() -> MoVQ:
    model = MODELS["movq"].build()
    model.coder.tile_latent_min_size = 4
    return model


@pytest.mark.parametrize("sides", [(4, 4), (3, 9), (5, 8), (17, 10)])
@pytest.mark.parametrize(("read", "written"), [(1, 3), (3, 1)])
def test_what_each_place_alone_decides_is_the_same_in_tiles(sides: tuple[int, int], read: int, written: int) -> None:
    def run(x: Tensor) -> Tensor:
        assert max(x.shape[-2:]) <= 4 * read
        enlarged = x[..., ::read, ::read].repeat_interleave(written, 2).repeat_interleave(written, 3)
        return enlarged.sin().repeat(1, 2, 1, 1)

    x = draw(2, 1, *(side * read for side in sides))
    whole = x[..., ::read, ::read].repeat_interleave(written, 2).repeat_interleave(written, 3).sin().repeat(1, 2, 1, 1)
    torch.testing.assert_close(run_in_tiles(run, x, 4, 1, read, written), whole, atol=1e-6, rtol=0)


def test_a_tile_fades_into_the_next_one_over_what_they_share() -> None:
    numbers = iter([0.0, 1.0])
    faded = run_in_tiles(lambda x: torch.full_like(x, next(numbers)), torch.zeros(1, 1, 4, 6), 4, 2, 1, 1)
    torch.testing.assert_close(faded[0, 0], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]).expand(4, 6))


def test_slices_are_single_images_and_change_nothing(movq: MoVQ) -> None:
    image, latents = draw(3, 3, 16, 16), draw(3, 4, 8, 8)
    with torch.no_grad():
        whole = movq.encode(image), movq.decode(latents)
        movq.coder.enable_slicing()
        with record_inputs(movq.coder.encoder) as encoded, record_inputs(movq.coder.decoder) as decoded:
            torch.testing.assert_close((movq.encode(image), movq.decode(latents)), whole, atol=1e-5, rtol=0)
    assert encoded == [(1, 3, 16, 16)] * 3 and decoded == [(1, 4, 8, 8)] * 3


def test_tiles_are_of_the_size_that_is_set_and_need_less_memory(movq: MoVQ) -> None:
    image, latents = draw(2, 3, 16, 12), draw(2, 4, 8, 6)
    with torch.no_grad():
        whole = movq.encode(image), movq.decode(latents)
        movq.coder.enable_tiling()
        with record_inputs(movq.coder.encoder) as encoded, record_inputs(movq.coder.decoder) as decoded:
            tiled = movq.encode(image), movq.decode(latents)
        assert encoded == [(2, 3, 8, 8)] * 6 and decoded == [(2, 4, 4, 4)] * 6
        for one, other in zip(tiled, whole, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert 1e-4 < (one - other).abs().mean() < other.std()  # norms and attention see less
        # An image of one tile is decoded as it is
        small = latents[..., :4, :4]
        torch.testing.assert_close(movq.decode(small), movq.coder.decode(small, force_not_quantize=True).sample)
        peaks = [count_peak_bytes(movq, lambda model: model.decode(torch.empty(1, 4, 4, 7)))]
        movq.coder.disable_tiling()
        peaks.append(count_peak_bytes(movq, lambda model: model.decode(torch.empty(1, 4, 4, 7))))
        assert peaks[0] < 0.8 * peaks[1]
        torch.testing.assert_close((movq.encode(image), movq.decode(latents)), whole, atol=0, rtol=0)


@pytest.mark.parametrize("version", FOLDERS)
def test_kandinsky_draws_large_pictures_in_slices_and_tiles(version: str) -> None:
    pipe = Text2ImagePipeline.from_pretrained(FOLDERS[version]())
    pipe.set_progress_bar_config(disable=True)
    latents = draw(2, 4, 16, 16)
    whole = pipe.decode(latents, "pt")
    pipe.enable_vae_slicing()
    torch.testing.assert_close(pipe.decode(latents, "pt"), whole, atol=1e-5, rtol=0)
    pipe.vae.coder.tile_latent_min_size = 8
    pipe.enable_vae_tiling()
    with record_inputs(pipe.vae.coder.decoder) as seen:
        tiled = pipe.decode(latents, "pt")
    assert seen == [(1, 4, 8, 8)] * 2 * 9
    assert 0 < (tiled - whole).abs().mean() < 0.2
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    torch.testing.assert_close(pipe.decode(latents, "pt"), whole, atol=0, rtol=0)


@pytest.mark.parametrize("folder", [kandinsky_22_combined, karlo], ids=["kandinsky 2.2", "karlo"])
def test_what_their_u_nets_do_not_have_is_refused(folder) -> None:
    pipe = Text2ImagePipeline.from_pretrained(folder())
    processors = pipe.unet.unet.attn_processors
    with pytest.raises(InputError, match="^enable_freeu has no effect on this U-Net, whose up blocks are Resnet"):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    for settings in ({}, {"vae": False}, {"unet": False}):
        with pytest.raises(InputError, match="^fuse_qkv_projections.* (not for a|not supported for models having)"):
            pipe.fuse_qkv_projections(**settings)
    assert pipe.unet.unet.attn_processors == processors
