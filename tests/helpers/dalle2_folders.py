"""A pipeline of converted DALLE2-pytorch files at tiny size, with random weights; the package itself is not needed."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder
from torch import nn

from t2i.interop.dalle2_convert import convert_dalle2
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.tokenizer import PublicTokenizer
from tests.helpers.public_folders import EMBED_DIM, built

STEPS = 40  # of the training
TOWERS = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": EMBED_DIM, "heads": 2, "layers": 1},
}
NET = {"dim": EMBED_DIM, "depth": 1, "dim_head": 8, "heads": 2, "max_text_len": 77, "num_timesteps": STEPS}
UNET = {"dim": 8, "cond_dim": 6, "dim_mults": [1, 2], "attn_dim_head": 4, "attn_heads": 2}
READER = {**UNET, "cond_on_text_encodings": True, "text_embed_dim": EMBED_DIM, "max_text_len": 77}


def state(model: nn.Module, ours: str = "", theirs: str = "") -> dict[str, torch.Tensor]:
    return {name.replace(ours, theirs, 1): tensor for name, tensor in model.state_dict().items()}


@built
def dalle2(folder: Path) -> None:
    """In this project's layout: CLIP, prior, and a decoder of two U-Nets, 8 and 16 pixels."""
    torch.manual_seed(0)
    parts = folder.with_name("dalle2-parts")
    clip = CLIP(TOWERS, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}, "clip")
    clip.tokenizer = PublicTokenizer(open_clip.SimpleTokenizer(context_length=77))
    clip.save_pretrained(parts / "clip")
    prior = DALLE2Prior(EMBED_DIM, 1, heads=2, head_width=8, context_length=77, num_timesteps=STEPS)
    reader = {name: one for name, one in READER.items() if not name.startswith(("cond_on", "text"))}
    decoder = DALLE2Decoder(EMBED_DIM, 3, 8, reader, text_width=EMBED_DIM)
    cascade = DALLE2Cascade(8, [16], [UNET], [{}], [None])
    weights = state(decoder, "net.", "unets.0.") | state(cascade, "nets.0.", "unets.1.")
    shared: dict[str, Any] = {"timesteps": STEPS}
    unets = [{**READER, "image_embed_dim": EMBED_DIM}, UNET]
    for name, tensors, settings in (
        ("prior", state(prior), {"net": NET, "image_embed_dim": EMBED_DIM, **shared}),
        ("decoder", weights, {"unets": unets, "image_sizes": [8, 16], **shared}),
    ):
        torch.save({"model": tensors, "version": "1.15.6"}, parts / f"{name}.pth")
        (parts / f"{name}.json").write_text(json.dumps({name: settings}))
        convert_dalle2(parts / f"{name}.pth", parts / f"{name}.json", parts / name)
    folder.rmdir()
    assemble_pipeline_folder(parts, folder)
