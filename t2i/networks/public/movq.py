"""Kandinsky's autoencoder: diffusers' VQModel behind the contract of `t2i.networks.autoencoder.Autoencoder`.

The public decoders were trained on its raw latents, neither scaled nor rounded to the codebook.
"""

from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.networks.linear import use_onednn_linear
from t2i.runtime.hooks import run_like_forward

# Names of an attention's layers in files of diffusers before 0.17.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class MoVQ(ModelMixin, ConfigMixin):
    """Autoencoder between images and Kandinsky's latents. vq: arguments of `VQModel`."""

    is_cascade = False
    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["ResnetBlock2D"]  # units that FSDP shards

    @register_to_config
    def __init__(self, vq: dict[str, Any]):
        super().__init__()
        if vq.get("lookup_from_codebook"):
            raise InputError("lookup_from_codebook must be false for a MoVQ, whose latents are vectors, got true")
        if vq.get("in_channels", 3) != 3 or vq.get("out_channels", 3) != 3:
            channels = vq.get("in_channels", 3), vq.get("out_channels", 3)
            raise InputError(f"in_channels and out_channels of a MoVQ must be 3, got {channels[0]} and {channels[1]}")
        # from_config ignores settings of older versions of diffusers.
        self.coder = use_onednn_linear(VQModel.from_config(dict(vq)))
        self.coder._no_split_modules = self._no_split_modules  # diffusers has none, and asks for them

    @classmethod
    def from_component(cls, part: Component, dtype: torch.dtype | None = None) -> Self:
        """Load a public folder `movq`. Raises InputError, in one line, if it is not a complete MoVQ."""
        settings = part.get_config_arguments()
        return load_from_components(lambda: cls(settings), {"coder.": part}, dtype, rename=rename_attention_tensor)

    @property
    def channels(self) -> int:
        return self.coder.config.vq_embed_dim or self.coder.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.coder.config.block_out_channels) - 1)

    @run_like_forward
    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct images, (B, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode(image))

    @run_like_forward
    def encode(self, image: Tensor) -> Tensor:
        """Encode images, (B, 3, H, W) in [-1, 1], to latents, (B, C, H / factor, W / factor)."""
        return self.coder.encode(image).latents

    @run_like_forward
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images, whose values may leave [-1, 1] a little."""
        return self.coder.decode(latents, force_not_quantize=True).sample


def rename_attention_tensor(name: str) -> str:
    """Return the name of an autoencoder's tensor in diffusers since 0.17, for a name in any version."""
    if ".attentions." not in name:
        return name
    return ".".join(OLD_ATTENTION_NAMES.get(part, part) for part in name.split("."))
