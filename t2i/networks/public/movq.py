"""Kandinsky's autoencoder: diffusers' VQModel behind the contract of `t2i.networks.autoencoder.Autoencoder`.

The public decoders were trained on its raw latents, neither scaled nor rounded to the codebook. A VQModel has neither
slicing nor tiling, so both are here.
"""

from collections.abc import Callable
from itertools import product
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
TILE_SIZE = 64  # latents along a side, of images of 512 pixels


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
        # As an AutoencoderKL has them. The sample_size of a published MoVQ, 32 pixels, is none for tiles
        self.coder.use_slicing = self.coder.use_tiling = False
        self.coder.tile_latent_min_size, self.coder.tile_overlap_factor = TILE_SIZE, 0.25

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
        return self.run_in_parts(lambda part: self.coder.encode(part).latents, image, self.factor, 1)

    @run_like_forward
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images, whose values may leave [-1, 1] a little."""
        return self.run_in_parts(
            lambda part: self.coder.decode(part, force_not_quantize=True).sample, latents, 1, self.factor
        )

    def run_in_parts(self, run: Callable[[Tensor], Tensor], x: Tensor, read: int, written: int) -> Tensor:
        """Return `run(x)`, image by image and tile by tile where the coder's slicing and tiling are enabled.

        read, written: sides of x and of the result for a side of one latent.
        """
        size, overlap = self.coder.tile_latent_min_size, self.coder.tile_overlap_factor
        parts = x.split(1) if self.coder.use_slicing else [x]
        if self.coder.use_tiling and max(x.shape[-2:]) > size * read:
            parts = [run_in_tiles(run, part, size, int(size * overlap), read, written) for part in parts]
        else:
            parts = [run(part) for part in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def run_in_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, read: int, written: int
) -> Tensor:
    """Return `run(x)`, computed of square tiles that fade into each other where they overlap.

    Args:
        run: from (B, C, H, W) to (B, C', H written / read, W written / read).
        size, overlap: sides of a tile, and of what two of them share, in latents. The last tile may share more.
        read, written: sides of x and of the result for a side of one latent.
    """
    height, width = (side // read for side in x.shape[-2:])
    result, weights = None, x.new_zeros(height * written, width * written, dtype=torch.float32)
    for top, left in product(list_tile_starts(height, size, overlap), list_tile_starts(width, size, overlap)):
        tile = run(x[:, :, top * read : (top + size) * read, left * read : (left + size) * read])
        # Where no other tile is, any weight gives the tile itself
        down, across = (build_ramp(side, overlap * written, x.device) for side in tile.shape[-2:])
        weight = down[:, None] * across
        if result is None:
            result = tile.new_zeros(*tile.shape[:2], *weights.shape, dtype=torch.float32)
        rows, columns = (slice(start * written, (start + size) * written) for start in (top, left))
        result[:, :, rows, columns] += weight * tile
        weights[rows, columns] += weight
    assert result is not None, "there is a tile"
    return (result / weights).to(x.dtype)


def build_ramp(side: int, overlap: int, device: torch.device) -> Tensor:
    """Return (side,) weights, which rise from 1 at either end to overlap + 1 and stay there."""
    positions = torch.arange(1, side + 1, device=device, dtype=torch.float32)
    return torch.minimum(positions, positions.flip(0)).clamp(max=overlap + 1)


def list_tile_starts(side: int, size: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side; the last one ends with it."""
    return [*range(0, side - size, size - overlap), max(0, side - size)]


def rename_attention_tensor(name: str) -> str:
    """Return the name of an autoencoder's tensor in diffusers since 0.17, for a name in any version."""
    if ".attentions." not in name:
        return name
    return ".".join(OLD_ATTENTION_NAMES.get(part, part) for part in name.split("."))
