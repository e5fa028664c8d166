"""The priors of ECLIPSE (Patel et al. 2023), without diffusion: one pass from a caption and noise to z_i.

Their network is a PriorTransformer without the timestep's token (`t2i.interop.prior_transformer` reads it), and its
output is z_i itself, not scaled. Only the decoder is guided, away from the z_i of a negative prompt.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin
from t2i.diffusion.sampling_loop import Sampling
from t2i.networks.layers import run_checkpointed_block
from t2i.networks.linear import Linear
from t2i.networks.prior import PriorBlock, build_causal_mask, embed_caption_tokens


class EclipsePrior(PriorMixin, ModelMixin, ConfigMixin):
    """A causal transformer over [caption tokens, z_t, noise, query]; the query's output is z_i.

    The arguments are those of `Prior`. unit_length: False, because embeddings are the public CLIPs' raw projections.
    """

    needs_scheduler = takes_guidance = False
    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]  # FSDP shards each as a unit
    lora_targets = ("to_qkv", "to_out")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        context_length: int,
        width: int,
        depth: int,
        heads: int,
        clip_fingerprint: str | None = None,
        unit_length: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.from_states = Linear(text_width, width)
        self.from_text = Linear(embed_dim, width)
        self.from_image = Linear(embed_dim, width)
        self.query = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(context_length + 3, width))
        self.blocks = nn.ModuleList(PriorBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_image = Linear(width, embed_dim)

    def forward(self, noise: Tensor, text: TextEncoding) -> Tensor:
        """Return z_i of any length, (B, D), from noise of unit variance, (B, D)."""
        text = text.expand()
        # The last two positions are those of noise and query
        image = torch.stack([self.from_image(noise), self.query.expand(len(noise), -1)], dim=1) + self.positions[-2:]
        tokens = torch.cat([embed_caption_tokens(self, text), image], dim=1)
        token_mask = torch.cat([text.mask, text.mask.new_ones(len(noise), 3)], dim=1)
        mask = build_causal_mask(token_mask, tokens.shape[1])
        for block in self.blocks:
            tokens = run_checkpointed_block(self, block, tokens, mask)
        # The query is last, and so sees all other tokens
        return self.to_image(self.norm(tokens[:, -1]))

    @torch.no_grad()
    def sample_image_embeds(self, text: TextEncoding, sampling: Sampling) -> Tensor:
        """Return z_i of any length, (N, D), fp32, on the device of `text`. sampling.noise: (N, D)."""
        noise = sampling.get_noise((self.config.embed_dim,), text.device)
        return self(noise.to(self.dtype), text.to(text.device, self.dtype)).float()
