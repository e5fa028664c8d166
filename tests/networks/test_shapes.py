"""Networks on images of other shapes than squares."""

import pytest
import torch

from t2i.diffusion.condition import ImageCondition
from t2i.diffusion.inpainting import concat_masked_latents
from t2i.networks.clip import CLIP
from t2i.networks.decoder import Decoder, build_grid_embedding
from t2i.networks.perceptual import PerceptualDistance, cut_into_squares
from t2i.networks.unet_decoder import UNetDecoder
from tests.networks.test_decoder import UNET

SHAPES = [(6, 10), (10, 6), (4, 14), (8, 8)]


def build_decoder(kind: str, reads_masks: bool = False):
    torch.manual_seed(0)
    if kind == "unet":
        decoder = UNetDecoder(8, 4, 8, unet=UNET, context_width=16, reads_masks=reads_masks)
    else:
        decoder = Decoder(8, 4, 8, 32, 2, 2, patch_size=2, condition_width=16, reads_masks=reads_masks)
    for parameter in decoder.parameters():  # nothing is zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder.eval()


@pytest.mark.parametrize("shape", [(12, 8), (8, 20), (6, 11), (5, 16)])
def test_positions_of_other_shapes_lie_between_those_of_training(shape):
    """A place at a fraction of the height and width has the embedding of that fraction, in closed form."""
    side, width = 8, 32
    decoder = Decoder(8, 4, side, width, 1, 2)
    assert decoder.resize_position_grid(side, side) is decoder.positions
    resized = decoder.resize_position_grid(*shape).detach().unflatten(0, shape)
    rows, columns = ((torch.arange(count) + 0.5) * side / count - 0.5 for count in shape)
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    waves = [torch.cat([(places[:, None] * frequencies).cos(), (places[:, None] * frequencies).sin()], dim=1)
             for places in (rows, columns)]  # fmt: skip
    expected = torch.cat([waves[0][:, None].expand(-1, shape[1], -1), waves[1][None].expand(shape[0], -1, -1)], dim=-1)
    inside = ((rows >= 1) & (rows <= side - 2))[:, None] & ((columns >= 1) & (columns <= side - 2))
    assert inside.sum() > 10
    torch.testing.assert_close(resized[inside], expected[inside], atol=0.08, rtol=0)
    # And to that of the nearest place of the square, at the border too
    nearest = (resized.flatten(0, 1) @ build_grid_embedding(side, width).T).argmax(dim=1).unflatten(0, shape)
    places = torch.stack([nearest // side, nearest % side])
    true = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).clamp(0, side - 1)
    assert (places - true).abs().max() <= 0.75


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoders_predict_and_learn_in_every_shape(kind, shape):
    decoder, x, t = build_decoder(kind), torch.randn(2, 4, *shape), torch.tensor([10, 500])
    assert all(side % decoder.latent_multiple == 0 for side in shape)
    condition = ImageCondition(torch.nn.functional.normalize(torch.randn(2, 8), dim=-1))
    prediction = decoder(x, t, condition)
    assert prediction.shape == x.shape
    with torch.no_grad():
        torch.testing.assert_close(decoder.step(x, t, decoder.prepare(condition)), prediction, atol=1e-4, rtol=1e-4)
    prediction.square().mean().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in decoder.parameters() if one.requires_grad)
    # Mirrored in the other direction, the shape has another prediction
    assert not torch.allclose(decoder(x.transpose(-1, -2), t, condition).transpose(-1, -2), prediction, atol=1e-3)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_decoder_of_masks_keeps_nothing_where_none_is_given(kind, shape):
    decoder, x, t = build_decoder(kind, reads_masks=True), torch.randn(2, 4, *shape), torch.tensor([10, 500])
    z_i = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    nothing = concat_masked_latents(torch.zeros_like(x), torch.ones_like(x[:, :1]))
    with torch.no_grad():
        assert decoder(x, t, ImageCondition(z_i)).equal(decoder(x, t, ImageCondition(z_i, None, nothing)))


def test_squares_cover_an_image_and_a_square_is_itself():
    image = torch.arange(2 * 3 * 4 * 10).view(2, 3, 4, 10)
    parts = cut_into_squares(image)
    assert parts.shape == (6, 3, 4, 4)
    assert parts.equal(torch.cat([image[..., :4], image[..., 3:7], image[..., 6:]]))
    assert cut_into_squares(image.transpose(-1, -2)).equal(parts.transpose(-1, -2))
    assert cut_into_squares(image[..., :4]).equal(image[..., :4])


def test_the_perceptual_distance_sees_the_ends_of_a_wide_image():
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    distance = PerceptualDistance(CLIP(model, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}))
    image, other = torch.rand(2, 3, 16, 32) * 2 - 1, torch.rand(2, 3, 16, 32) * 2 - 1
    halves = [distance(image[..., part], other[..., part]) for part in (slice(16), slice(16, 32))]
    torch.testing.assert_close(distance(image, other), (halves[0] + halves[1]) / 2)
    changed = image.clone()
    changed[..., :2] = -changed[..., :2]
    assert (distance(image, changed) > 1e-4).all()
