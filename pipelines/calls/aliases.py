"""diffusers' names of components, and its methods on their networks, on the components that a pipeline really has."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D

from t2i.errors import InputError
from t2i.runtime.wrappers import unwrap_compiled

FREE_U_BLOCKS = (UpBlock2D, CrossAttnUpBlock2D)  # in which diffusers applies it


def alias_component(alias: str, name: str) -> Any:
    """Return a property that reads and writes a component by another name."""

    def read(pipeline: Any) -> Any:
        return getattr(pipeline, name)

    def write(pipeline: Any, value: Any) -> None:
        setattr(pipeline, name, value)

    return property(read, write, doc=f"The component `{name}`, by diffusers' name `{alias}`.")


def resolve_aliases(components: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return keyword arguments with the real names of components. Raises InputError for one under both names."""
    for alias, name in aliases.items():
        if alias in components and name in components:
            raise InputError(f"{alias} is {name}, which is given too; leave one out")
    return {aliases.get(key, key): value for key, value in components.items()}


class DiffusersNames:
    """Base of pipelines: the methods by which diffusers changes their networks.

    Each method raises InputError where a network has no such thing.
    """

    decoder: Any
    autoencoder: Any

    def enable_vae_slicing(self) -> None:
        """Decode latents one by one, which needs less memory."""
        call_networks("enable_slicing", [(self.autoencoder, "coder")])

    def disable_vae_slicing(self) -> None:
        """Decode all latents at once again."""
        call_networks("disable_slicing", [(self.autoencoder, "coder")])

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in overlapping tiles, which needs less memory; seams may show."""
        call_networks("enable_tiling", [(self.autoencoder, "coder")])
        # Configurations of models that were trained here do not name their size, and small tiles show more seams
        coder, side = self.autoencoder.coder, self.decoder.config.latent_size
        if coder.tile_latent_min_size < side:
            coder.tile_latent_min_size = side
            coder.tile_sample_min_size = side * 2 ** (len(coder.config.block_out_channels) - 1)

    def disable_vae_tiling(self) -> None:
        """Encode and decode images whole again."""
        call_networks("disable_tiling", [(self.autoencoder, "coder")])

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute the attention of a U-Net in slices, which needs less memory; see diffusers for `slice_size`."""
        call_networks("set_attention_slice", [(self.decoder, "unet")], slice_size=slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention at once again."""
        call_networks("set_attention_slice", [(self.decoder, "unet")], slice_size=None)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh the skip connections (s1, s2) and the backbone (b1, b2) of a U-Net anew (FreeU, Si et al. 2023).

        Blocks with joint attention, as in Karlo and Kandinsky, have no such weights.
        """
        blocks = getattr(getattr(self.decoder, "unet", None), "up_blocks", ())
        if blocks and not any(isinstance(block, FREE_U_BLOCKS) for block in blocks):
            kinds = ", ".join(sorted({type(block).__name__ for block in blocks}))
            raise InputError(f"enable_freeu has no effect on this U-Net, whose up blocks are {kinds}")
        call_networks("enable_freeu", [(self.decoder, "unet")], s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        call_networks("disable_freeu", [(self.decoder, "unet")])

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Compute queries, keys and values in one product. Joint attention, as in Karlo and Kandinsky, is refused."""
        networks = [(self.decoder, "unet")] * unet + [(self.autoencoder, "coder")] * vae
        call_networks("fuse_qkv_projections", networks)

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Undo `fuse_qkv_projections`."""
        networks = [(self.decoder, "unet")] * unet + [(self.autoencoder, "coder")] * vae
        call_networks("unfuse_qkv_projections", networks)


def call_networks(method: str, networks: list[tuple[Any, str]], **settings: Any) -> None:
    """Call a method of the network of diffusers, by its name, in each component.

    Raises InputError, before any is called, for a component without such a network; and for one that refuses.
    """
    calls: list[Any] = []
    for component, name in networks:
        model = unwrap_compiled(component)
        calls.append(getattr(getattr(model, name, None), method, None))
        if calls[-1] is None:
            raise InputError(f"{method} is not for a {type(model).__name__}: no network in it has that")
    for call in calls:
        try:
            call(**settings)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"{method}: {error}") from error
