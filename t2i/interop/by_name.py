"""Load a model by the name that a configuration or a command gives it: one of this project's, or a public one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin

from t2i.diffusion.samplers import remember_training
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.fingerprints import EXACT_DTYPES
from t2i.files.hub import find_or_download_folder
from t2i.files.model_folder import load_model, load_or_explain, read_model_class
from t2i.files.untrusted import MAX_TIMESTEPS, bounded_meta_device, check_finite_weights, is_folder, read_config
from t2i.interop.folders import SourceFolder, respace_scheduler
from t2i.interop.parts import PublicPart, find_public_part
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import load_caption_encoder, load_latent_autoencoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import HUB_FILES, TextEncoder
from t2i.sampling.embeddings import load_prior

PUBLIC_AUTOENCODERS = (MoVQ, SuperResolution)
VAE_FILES = ["config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.index.json"]
# Of a decoder's run. A process that died while it replaced the first left the older one under the second name.
TEXT_ENCODER_FOLDERS = ("text_encoder", "text_encoder.replaced")

# Autoencoders


def load_autoencoder(name: str | Path, classes: tuple[type, ...] = (Autoencoder,)) -> Any:
    """Load an autoencoder.

    name: a folder that `train_autoencoder.py` wrote; a diffusers VAE, by its folder or repository on the hub; or a
    public pipeline: Kandinsky's with a MoVQ, Karlo's with its super-resolution, Stable unCLIP's with a VAE. classes: of
    this project's that are allowed, beside the public ones.
    """
    part = find_public_part(str(name), ("movq", "super_res_first", "vae"), ("super_res_last",))
    if part is not None and (part.in_pipeline or part.part != "vae"):
        return load_public_autoencoder(part)
    folder = find_or_download_folder(name, VAE_FILES)
    if read_model_class(folder) != "AutoencoderKL":
        return load_model(tuple(dict.fromkeys((*classes, Autoencoder, *PUBLIC_AUTOENCODERS))), folder)
    # A diffusers VAE
    component = Component(folder)
    with bounded_meta_device(component.tensor_specs, folder):
        AutoencoderKL.from_config(component.config)
    settings = {"use_safetensors": True, "output_loading_info": True, "variant": component.variant}
    vae, info = load_or_explain(lambda path: AutoencoderKL.from_pretrained(path, **settings), folder)
    # diffusers renames the tensors of older files while it loads them, so they are compared afterwards.
    for fault in ("missing", "unexpected"):
        if names := sorted(info[f"{fault}_keys"]):
            raise InputError(f"{str(name)!r} has {len(names)} {fault} tensors for a VAE, the first is {names[0]!r}")
    check_finite_weights(vae, folder)
    return load_or_explain(lambda _: Autoencoder.from_vae(vae), folder)


def load_public_autoencoder(part: PublicPart) -> MoVQ | SuperResolution | Autoencoder:
    """Load Kandinsky's MoVQ, Karlo's super-resolution, or Stable unCLIP's VAE, frozen, in fp32."""
    if part.part == "vae":
        return load_latent_autoencoder(part.open_component(), torch.float32)
    if part.part == "movq":
        return MoVQ.from_component(part.open_component(), torch.float32)
    first, last = part.open_component(), part.open_component("super_res_last")
    scheduler = read_config(part.source.get_folder("super_res_scheduler") / "scheduler_config.json", MAX_TIMESTEPS)
    side = read_config(part.source.get_folder("unet") / "config.json").get("sample_size")
    return SuperResolution.from_components(first, last, scheduler, side, torch.float32)


# CLIP


def load_clip(name: str | Path) -> CLIP:
    """Load a CLIP.

    name: a folder that `train_clip.py` wrote; a public pair, as "ViT-L-14:datacomp_xl_s13b_b90k" (open_clip's name and
    tag), "hf-hub:org/name" or "local-dir:/path"; or a public pipeline, by its folder or name on the hub, whose towers
    become a TransformersCLIP.
    """
    name = str(name)
    if ":" not in name or is_folder(name):
        return load_public_clip(name) or load_model((CLIP, TransformersCLIP), name)
    model, tag = (name, None) if name.startswith(("hf-hub:", "local-dir:")) else name.split(":", 1)
    return load_or_explain(lambda _: CLIP.from_open_clip(model, tag), Path(name))


def load_pipeline_clip(name: str | Path) -> Any:
    """Load the CLIP in the folder of one of this project's pipelines, or else what `load_clip` does for a folder."""
    path = Path(name)
    if is_folder(path / "clip") and (path / "model_index.json").is_file():
        return load_model((CLIP, TransformersCLIP), path / "clip")
    return load_public_clip(str(name)) or load_model((CLIP, TransformersCLIP), path)


def load_public_clip(name: str) -> TransformersCLIP | None:
    """Load the towers of a public pipeline's CLIP, frozen, in fp32; return None for other models."""
    towers = ("text_tower", "image_tower")
    part = find_public_part(name, towers, towers)
    if part is None or not part.in_pipeline:
        return None
    text, image = (part.source if part.source.find_folder(tower) is not None else None for tower in towers)
    return load_clip_towers(text, image, torch.float32)


def load_clip_towers(
    text: SourceFolder | None, image: SourceFolder | None, dtype: torch.dtype | None
) -> TransformersCLIP:
    """Load the text tower of one folder and the image tower of another, or only one of them."""
    towers: dict[str, Any] = {}
    if text is not None:
        towers |= {"text": text.open_component("text_tower"), "tokenizer": text.find_folder("tokenizer")}
    if image is not None:
        towers |= {"vision": image.open_component("image_tower"), "processor": image.find_folder("image_processor")}
    return TransformersCLIP.from_components(**towers, dtype=dtype)


# Text encoders of decoders


def load_text_encoder(name: str | Path, context_length: int = 128, dtype: torch.dtype = torch.float32) -> Any:
    """Load a text encoder, frozen.

    name: the folder of a decoder's run that has one, with its context length; a model of transformers, by its folder or
    name on the hub; or Kandinsky 2.1's pipeline, whose encoder becomes a MultilingualCLIP, or Stable unCLIP's.
    context_length: number of tokens, for models of transformers.
    """
    part = find_public_part(str(name), ("multilingual_clip", "text_encoder"))
    if part is not None and part.part == "text_encoder":
        return load_caption_encoder(part.open_component(), part.source.get_folder("text_tokenizer"), dtype)
    if part is not None:
        component, tokenizer = part.open_component(), part.source.get_folder("multilingual_tokenizer")
        return MultilingualCLIP.from_component(component, tokenizer, dtype)
    folder = find_or_download_folder(name, HUB_FILES)
    folder = find_text_encoder_folder(folder) or folder
    if read_model_class(folder) in ("TextEncoder", "MultilingualCLIP"):
        encoder = load_model((TextEncoder, MultilingualCLIP), folder)
        encoder.register_to_config(rounded=encoder.config.rounded or dtype not in EXACT_DTYPES)
        return encoder.to(dtype).eval().requires_grad_(False)
    return load_or_explain(lambda path: TextEncoder.from_transformers(path, context_length, dtype), folder)


def find_text_encoder_folder(run: Path) -> Path | None:
    """Return the folder of the text encoder in a decoder's run, None if it has none."""
    return next((run / part for part in TEXT_ENCODER_FOLDERS if is_folder(run / part)), None)


# Priors with their schedulers


def load_any_prior(
    name: str | Path, load_clip: Callable[[], Any], dtype: torch.dtype | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Load a prior, alone or in its pipeline, and its scheduler, as arguments of a pipeline.

    The result lacks `prior_scheduler` for a PriorTransformer without a scheduler beside it. load_clip: called for a
    public prior, which does not store its null condition.
    """
    part = find_public_part(str(name), ("prior",), variant=variant)
    if part is None:
        return load_own_prior(name, dtype)
    prior = load_prior_transformer(part.open_component(), load_clip(), dtype)
    if isinstance(prior, EclipsePrior):
        return {"prior": prior, "prior_scheduler": None}
    scheduler = load_prior_scheduler(part)
    remember_training(prior, scheduler)
    return {"prior": prior} | ({} if scheduler is None else {"prior_scheduler": scheduler})


def load_own_prior(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Load a prior of this project and its scheduler, None without one.

    dtype: None is float32, or the stored dtype in the folder of a pipeline with public parts.
    """
    prior, scheduler = load_prior(folder)
    source = SourceFolder(Path(folder))
    if dtype is None and source.has_public_parts:
        dtype = source.find_stored_dtypes().get("prior")
    if prior is not None and dtype is not None:
        prior.to(dtype)
    return {"prior": prior, "prior_scheduler": scheduler}


def load_prior_scheduler(prior: PublicPart) -> SchedulerMixin | None:
    """Load a public prior's scheduler: its pipeline's, or the one that an export put beside it; None without any."""
    folder = prior.source.find_folder("prior_scheduler") or prior.folder / "scheduler"
    if not is_folder(folder):
        return None
    return respace_scheduler(load_scheduler(folder, prior.source.path))
