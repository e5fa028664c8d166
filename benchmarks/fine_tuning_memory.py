"""What fine-tuning a public model takes: parameters, state and saved activations, computed on the meta device.

python -m benchmarks.fine_tuning_memory
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from t2i.training.common.lora import LoraConfig, add_adapters
from torch import Tensor, nn

from t2i.diffusion.condition import ImageCondition, TextEncoding, TokenStates
from t2i.networks.prior import Prior
from t2i.networks.public.kandinsky import KandinskyDecoder, derive_kandinsky_config
from t2i.networks.public.karlo import KarloDecoder, derive_karlo_config

UNET = {
    "sample_size": 64,
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
KANDINSKY = {
    "in_channels": 4,
    "out_channels": 8,
    "block_out_channels": [384, 768, 1152, 1536],
    "cross_attention_dim": 768,
}
IMAGE = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 1280}
BOTH = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 1024}
KARLO = {"in_channels": 3, "out_channels": 6, "block_out_channels": [320, 640, 960, 1280], "cross_attention_dim": 1536}
PROJECTION = {"clip_embeddings_dim": 768, "time_embed_dim": 1280, "cross_attention_dim": 1536}
MODELS = ("Karlo prior", "Kandinsky 2.1 prior", "Kandinsky 2.2 prior")
MODELS += ("Karlo decoder", "Kandinsky 2.1 decoder", "Kandinsky 2.2 decoder")


def make(name: str) -> Any:
    if name.endswith("prior"):
        width = 1280 if "2.2" in name else 768
        return Prior(width, width, 77, width=2048, depth=20, heads=32, unit_length=False)
    if name.startswith("Karlo"):
        settings = (UNET | KARLO | {"class_embed_type": "identity"}, PROJECTION)
        parts: list[Any] = [
            SimpleNamespace(folder=Path(name), settings=lambda found=found: dict(found)) for found in settings
        ]
        return KarloDecoder(**derive_karlo_config(*parts))
    unet = UNET | KANDINSKY | (IMAGE if "2.2" in name else BOTH)
    return KandinskyDecoder(unet, **derive_kandinsky_config(unet))


def inputs(model: Any, count: int) -> tuple[Any, ...]:
    """Of a step; captions have 77 tokens."""
    config, t = model.config, torch.zeros(count, dtype=torch.long)
    z, mask = torch.zeros(count, config.embed_dim), torch.ones(count, 77, dtype=torch.bool)
    states = torch.zeros(count, 77, config.text_width or 1)
    if isinstance(model, Prior):
        return z, t, TextEncoding(z, states, mask)
    x = torch.zeros(count, config.latent_channels, config.latent_size, config.latent_size)
    return x, t, ImageCondition(z, None if config.text_width is None else TokenStates(states, mask, z))


def kept(name: str, checkpointing: bool) -> float:
    """MiB that autograd keeps for the backward pass of one more sample, fp32."""
    model = make(name).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = []
    for count in (1, 2):
        held: dict[int, tuple[Any, int]] = {}

        def keep(tensor: Tensor, held: dict[int, tuple[Any, int]] = held) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter):
                held[storage._cdata] = (storage, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(*inputs(model, count)).square().mean()
        found.append(sum(size for _, size in held.values()))
        del loss
    return (found[1] - found[0]) / 2**20


def main() -> None:
    with torch.device("meta"):
        for name in MODELS:
            model = make(name)
            total = sum(one.numel() for one in model.parameters())
            add_adapters(model, LoraConfig())
            adapters = sum(one.numel() for one in model.parameters() if one.requires_grad)
            state, small = 20 * total / 1e9, (4 * total + 20 * adapters) / 1e9
            activations = ", ".join(f"{kept(name, checkpointing):,.0f} MiB" for checkpointing in (False, True))
            sizes = f"{total / 1e6:8,.1f} M | {state:.1f} GB | {adapters / 1e6:.1f} M, {small:.1f} GB"
            print(f"| {name:21} | {sizes} | {activations} |", flush=True)


if __name__ == "__main__":
    main()
