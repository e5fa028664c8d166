"""Both decoders: one contract."""

import pytest
import torch

from t2i.diffusion.condition import ImageCondition, TextEncoding
from t2i.networks.decoder import Decoder
from t2i.networks.unet_decoder import UNetDecoder

UNET = {
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def make(kind: str, text_width: int | None):
    torch.manual_seed(0)
    if kind == "transformer":
        decoder = Decoder(8, 4, 8, width=32, depth=2, heads=2, patch_size=2, condition_width=16, text_width=text_width)
    else:
        decoder = UNetDecoder(8, 4, 8, unet=UNET, context_width=16, text_width=text_width)
    for parameter in decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return decoder.eval()


def condition(count: int, text_width: int | None, length: int = 5) -> ImageCondition:
    torch.manual_seed(1)
    z_i = torch.nn.functional.normalize(torch.randn(count, 8), dim=-1)
    if text_width is None:
        return ImageCondition(z_i)
    mask = torch.arange(length) < torch.arange(2, 2 + count)[:, None]
    return ImageCondition(z_i, TextEncoding(z_i, torch.randn(count, 5, text_width)[:, :length], mask))


@pytest.mark.parametrize("text_width", [None, 6])
@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_the_condition_and_the_time_are_used_and_preparing_twice_changes_nothing(kind, text_width):
    decoder, given = make(kind, text_width), condition(3, text_width)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    full = decoder(x, t, given)
    assert full.shape == x.shape
    context = decoder.prepare(given)
    for _ in range(2):  # a context serves every step
        torch.testing.assert_close(decoder.step(x, t, context), full, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full, decoder(x, t, decoder.null(3)), atol=1e-3)
    assert not torch.allclose(full, decoder(x, t.flip(0), given), atol=1e-3)


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_padding_of_captions_is_never_read(kind):
    decoder, given = make(kind, 6), condition(2, 6)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 500])
    before = decoder(x, t, given)
    given.text.states[0, 2:] = 1e3
    torch.testing.assert_close(decoder(x, t, given), before, atol=1e-5, rtol=1e-5)


def test_a_condition_and_nothing_share_a_batch():
    decoder, given = make("transformer", 6), condition(2, 6)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    both = decoder(torch.cat([x, x]), torch.cat([t, t]), decoder.null(2).cat(given))
    torch.testing.assert_close(
        both, torch.cat([decoder(x, t, decoder.null(2)), decoder(x, t, given)]), atol=1e-5, rtol=1e-5
    )


def test_the_transformer_draws_other_sizes():
    decoder = make("transformer", None)
    assert decoder(torch.randn(1, 4, 12, 6), torch.tensor([5]), condition(1, None)).shape == (1, 4, 12, 6)


def test_a_fresh_transformer_predicts_nothing():
    fresh = Decoder(8, 4, 8, width=32, depth=2, heads=2)
    assert fresh(torch.randn(1, 4, 8, 8), torch.tensor([5]), condition(1, None)).abs().max() == 0
