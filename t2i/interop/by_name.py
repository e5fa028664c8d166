"""Load_clip, load_autoencoder, load_text_encoder: ours or public."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from t2i.errors import InputError
from t2i.files.fingerprints import EXACT_DTYPES
from t2i.files.hub import find_or_download_folder
from t2i.files.model_folder import load_model, load_or_explain, read_model_class
from t2i.files.untrusted import (
    MAX_TIMESTEPS,
    bounded_meta_device,
    check_finite_weights,
    check_folder_files,
    find_weight_files,
    is_folder,
    read_config,
    read_safetensors_header,
)
from t2i.interop.parts import PUBLIC_AUTOENCODERS, find_public_part
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import HUB_FILES, TextEncoder

VAE_FILES = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json"]


def load_autoencoder(name: str | Path, classes: tuple[type, ...] = (Autoencoder,)) -> Any:
    """An autoencoder by the name that configurations give it.

    A folder that `train_autoencoder.py` wrote, or a diffusers VAE: its folder or its repository on the hub; or a public
    pipeline, Kandinsky's with a MoVQ, or Karlo's with its super-resolution, which keep the contract of an Autoencoder.
    `classes`: what else may stand in its place.
    """

    if (public := load_public_autoencoder(str(name))) is not None:
        return public
    folder = find_or_download_folder(name, VAE_FILES)
    if read_model_class(folder) != "AutoencoderKL":
        return load_model(tuple(dict.fromkeys((*classes, Autoencoder, *PUBLIC_AUTOENCODERS))), folder)
    check_folder_files(folder)
    config = read_config(folder / "config.json")
    held = {
        name: stored for path in find_weight_files(folder) for name, stored in read_safetensors_header(path).items()
    }
    with bounded_meta_device(held, folder):
        AutoencoderKL.from_config(config)
    settings = {"use_safetensors": True, "output_loading_info": True}
    vae, info = load_or_explain(lambda path: AutoencoderKL.from_pretrained(path, **settings), folder)
    for fault in ("missing", "unexpected"):  # after loading, which renames the tensors of older files
        if names := sorted(info[f"{fault}_keys"]):
            raise InputError(f"{str(name)!r} has {len(names)} {fault} tensors for a VAE, the first is {names[0]!r}")
    check_finite_weights(vae, folder)
    return load_or_explain(lambda _: Autoencoder.from_vae(vae), folder)


def load_clip(name: str | Path) -> CLIP:
    """A CLIP by the name that configurations give it.

    A folder that `train_clip.py` wrote, or a public pair: "ViT-L-14:datacomp_xl_s13b_b90k" (open_clip's name and tag),
    "hf-hub:org/name", "local-dir:/path"; or that of a public pipeline, by its folder or name on the hub, which keeps
    the contract of a CLIP (`t2i.networks.public.transformers_clip`).
    """
    name = str(name)
    if ":" not in name or is_folder(name):
        from t2i.networks.public.transformers_clip import TransformersCLIP

        return load_public_clip(name) or load_model((CLIP, TransformersCLIP), name)
    parts = (name,) if name.startswith(("hf-hub:", "local-dir:")) else name.split(":", 1)
    return load_or_explain(lambda _: CLIP.from_open_clip(*parts), Path(name))


def load_public_text_encoder(name: str, dtype: torch.dtype) -> MultilingualCLIP | None:
    """Kandinsky 2.1's text encoder, frozen; None for other models."""
    found = find_public_part(name, ("multilingual_clip",))
    if found is None:
        return None
    return MultilingualCLIP.from_component(
        found.read_component(), found.require_part_folder("multilingual_tokenizer"), dtype
    )


def load_public_autoencoder(name: str) -> MoVQ | SuperResolution | None:
    """Kandinsky's MoVQ, or Karlo's super-resolution in its place, frozen, in fp32; None for other models."""
    found = find_public_part(name, ("movq", "super_res_first"), ("super_res_last",))
    if found is None:
        return None
    if found.part == "movq":
        return MoVQ.from_component(found.read_component(), torch.float32)
    scheduler = read_config(found.require_part_folder("super_res_scheduler") / "scheduler_config.json", MAX_TIMESTEPS)
    side = read_config(found.require_part_folder("unet") / "config.json").get("sample_size")
    parts = (found.read_component(), found.read_component("super_res_last"))
    return SuperResolution.from_components(*parts, scheduler, side, torch.float32)


def load_public_clip(name: str) -> TransformersCLIP | None:
    """The CLIP of a public pipeline, with the towers that it holds, frozen, in fp32; None for other models."""
    towers = ("text_tower", "image_tower")
    found = find_public_part(name, towers, towers)
    if found is None or found.layout is None:
        return None
    text, vision = (found.read_component(part) if found.find_part_folder(part) is not None else None for part in towers)
    folders = (found.find_part_folder("tokenizer"), vision, found.find_part_folder("image_processor"))
    return TransformersCLIP.from_components(text, *folders, torch.float32, found.root)


TEXT_ENCODER_FOLDERS = (
    "text_encoder",
    "text_encoder.replaced",
)  # of a decoder's run; the second, if a process died replacing the first


def load_text_encoder(name: str | Path, context_length: int = 128, dtype: torch.dtype = torch.float32) -> Any:
    """A text encoder by the name that configurations give it, frozen.

    The folder of a decoder's run that holds one, which knows its context length; or a model of transformers: a folder,
    or a name on the hub. Kandinsky 2.1's too, by its pipeline's, which keeps the contract of a TextEncoder.
    """
    if (public := load_public_text_encoder(str(name), dtype)) is not None:
        return public
    folder = find_or_download_folder(name, HUB_FILES)
    folder = find_text_encoder_folder(folder) or folder
    if read_model_class(folder) in ("TextEncoder", "MultilingualCLIP"):
        encoder = load_model((TextEncoder, MultilingualCLIP), folder)
        encoder.register_to_config(rounded=encoder.config.rounded or dtype not in EXACT_DTYPES)
        return encoder.to(dtype).eval().requires_grad_(False)
    return load_or_explain(lambda path: TextEncoder.from_transformers(path, context_length, dtype), folder)


def find_text_encoder_folder(run: Path) -> Path | None:
    """The text encoder in the folder of a decoder's run, None if it has none."""
    return next((run / part for part in TEXT_ENCODER_FOLDERS if is_folder(run / part)), None)
