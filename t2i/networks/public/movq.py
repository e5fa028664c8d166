"""Kandinsky's autoencoder: diffusers' VQModel behind the contract of `t2i.networks.autoencoder.Autoencoder`.

Its latents are the public decoders' own: neither scaled (the `scaling_factor` of the configuration is never used) nor
rounded to the codebook, which only its training needs.
"""

from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.networks.linear import use_onednn_linear

# How files of diffusers before 0.17 call the parts of an attention.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class MoVQ(ModelMixin, ConfigMixin):
    """Between pictures and Kandinsky's latents.

    Args:
        vq: arguments of `VQModel`.
    """

    _supports_gradient_checkpointing = True  # diffusers' blocks do it
    _no_split_modules = ["ResnetBlock2D"]  # what FSDP shards as one

    @register_to_config
    def __init__(self, vq: dict[str, Any]):
        super().__init__()
        if vq.get("lookup_from_codebook"):
            raise InputError("lookup_from_codebook is true: latents of a codebook's numbers are no MoVQ's")
        if vq.get("in_channels", 3) != 3 or vq.get("out_channels", 3) != 3:
            raise InputError(f"a MoVQ is of pictures with 3 channels, got {vq['in_channels']} in its configuration")
        self.coder = use_onednn_linear(VQModel.from_config(dict(vq)))  # which passes over settings of older versions

    @classmethod
    def from_component(cls, part: Component, dtype: torch.dtype | None = None) -> Self:
        """Of a public folder `movq`. Raises InputError, in one line, for one that is no whole MoVQ."""
        settings = part.get_config_arguments()
        return load_from_components(lambda: cls(settings), {"coder.": part}, dtype, rename=rename_movq_tensor)

    @property
    def channels(self) -> int:
        return self.coder.config.vq_embed_dim or self.coder.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.coder.config.block_out_channels) - 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> its reconstruction."""
        return self.decode(self.encode(image))

    @apply_forward_hook
    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H / factor, W / factor), as the public decoders know them."""
        return self.coder.encode(image).latents

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """The reverse; values may leave [-1, 1] a little."""
        return self.coder.decode(latents, force_not_quantize=True).sample


def rename_movq_tensor(name: str) -> str:
    """A tensor's name as diffusers has it since 0.17."""
    if ".attentions." not in name:
        return name
    return ".".join(OLD_ATTENTION_NAMES.get(part, part) for part in name.split("."))
