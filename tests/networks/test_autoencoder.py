"""Autoencoders of our own."""

from pathlib import Path

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from t2i.networks.autoencoder import Autoencoder
from tests.helpers.stages import train

VAE = {
    "latent_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def test_an_autoencoder_without_norms_begins_with_blocks_that_change_nothing():
    autoencoder = Autoencoder(VAE, patch_size=2, group_norm=False)
    assert not any(isinstance(layer, nn.GroupNorm | nn.SiLU) for layer in autoencoder.modules())
    blocks = [
        layer for layer in autoencoder.modules() if isinstance(layer, ResnetBlock2D) and not layer.use_in_shortcut
    ]
    assert blocks
    for block in blocks:
        x = torch.randn(1, block.in_channels, 4, 4)
        assert torch.equal(block(x, None), x)
    assert any(isinstance(layer, nn.GroupNorm) for layer in Autoencoder(VAE).modules()), "they are there by default"


def test_an_autoencoder_without_norms_trains_and_loads(shapes: Path, tmp_path: Path):
    train("autoencoder", shapes, tmp_path, **{"model.group_norm": "false"})
    autoencoder = Autoencoder.from_pretrained(tmp_path / "autoencoder/model")
    assert autoencoder.config.group_norm is False
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = autoencoder.encode(images)
    assert autoencoder.decode(latents).shape == images.shape and latents.isfinite().all()
