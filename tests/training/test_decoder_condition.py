"""The condition of a decoder's training step: z_i with noise."""

import pytest
import torch
from t2i.training.train_decoder import Config, build_training_condition

from t2i.data.dataset import Batch
from t2i.networks.decoder import Decoder


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_the_noise_of_embeddings_is_a_part_of_their_length(noise):
    decoder = Decoder(embed_dim=64, latent_channels=4, latent_size=4, width=32, depth=1, heads=2)
    z_i = torch.nn.functional.normalize(torch.randn(512, 64), dim=-1) * 3
    batch = Batch(index=torch.arange(512), image_embeds=z_i, latents=torch.zeros(512, 4, 4, 4))
    config = Config(clip="", autoencoder="", embedding_dropout=0.0, embedding_noise=noise)
    seen = build_training_condition(config, decoder, batch).embedding
    assert ((seen - z_i).square().sum(-1) / z_i.square().sum(-1)).mean().sqrt() == pytest.approx(noise, rel=0.02)
