"""Write components in the public layouts again: those that came from one, and those that were trained from it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin, UnCLIPScheduler
from torch import Tensor

from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.errors import InputError
from t2i.files.tensor_file import save_tensors
from t2i.interop.layouts import DIFFUSERS_STEM, LAYOUTS_BY_NAME, TRANSFORMERS_PARTS, TRANSFORMERS_STEM, PublicLayout
from t2i.interop.prior_transformer import (
    build_transformer_config,
    map_tensor_names,
    split_prior_tensors,
    to_prior_transformer,
)
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.prior import Prior
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import TextEncoder

DECODER_CLASSES = {"karlo": KarloDecoder, "kandinsky": KandinskyDecoder, "stable": StableUnCLIPDecoder}
AUTOENCODER_CLASSES = {"karlo": SuperResolution, "kandinsky": MoVQ, "stable": Autoencoder}
RESAMPLING_NUMBERS = {"bilinear": 2, "bicubic": 3}  # PIL's


def export_layout(components: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write a pipeline's components into a folder in the public layout of this name (`LAYOUTS_BY_NAME`).

    Raises InputError, before anything is written, as `check_exportable_components` does.
    """
    layout = check_exportable_components(components, name)
    index: dict[str, Any] = {"_class_name": layout.classes[0], "_diffusers_version": diffusers.__version__}
    for part, place in layout.part_folders.items():
        class_name = PART_WRITERS[part](components, folder if place == "." else folder / place)
        of_transformers = part in TRANSFORMERS_PARTS or part.endswith(("tokenizer", "processor"))
        library = "transformers" if of_transformers else "diffusers"
        index[place] = [PIPELINE_MODULES.get(part, library), class_name]
    if "." not in index:
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    elif components.get("prior_scheduler") is not None:
        # A prior alone has no index. Its scheduler is for this project, which looks for it beside the prior.
        save_library_model(convert_to_public_scheduler(components["prior_scheduler"]), folder / "scheduler")


# Checks


def check_exportable_components(components: Mapping[str, Any], name: str) -> PublicLayout:
    """Return a public layout. Raises InputError for components that its classes cannot compute, with the reason."""
    # The classes that each part of the layout can be written from
    layout = LAYOUTS_BY_NAME[name]
    allowed: dict[str, tuple[type, ...]] = {}
    if layout.family:
        allowed["decoder"] = (DECODER_CLASSES[layout.family],)
        allowed["autoencoder"] = (AUTOENCODER_CLASSES[layout.family],)
    if "prior" in layout.part_folders:
        allowed["prior"] = (Prior,) if "prior_scheduler" in layout.part_folders else (Prior, EclipsePrior)
    if {"text_tower", "image_tower"} & layout.part_folders.keys():
        allowed["clip"] = (TransformersCLIP,)
    if "multilingual_clip" in layout.part_folders:
        allowed["text_encoder"] = (MultilingualCLIP,)
    if "text_encoder" in layout.part_folders:
        allowed["text_encoder"] = (TextEncoder,)
    # The components
    for part, classes in allowed.items():
        component = components.get(part)
        if not isinstance(component, classes):
            kind = "nothing" if component is None else f"a {type(component).__name__}"
            names = " or ".join(allowed_class.__name__ for allowed_class in classes)
            raise InputError(
                f"the {part.replace('_', ' ')} is {kind}; {name} holds the weights of a {names}, which computes "
                "differently; no file of that layout can represent it"
            )
    check_component_kinds(components, layout)
    if "prior" in allowed and isinstance(components["prior"], Prior):
        to_prior_transformer(components["prior"])  # raises for a prior that it cannot express
    return layout


def check_component_kinds(components: Mapping[str, Any], layout: PublicLayout) -> None:
    """Raise InputError for components of the right class that are another kind of it than the layout's."""
    for part, tower in (("text_tower", "text_encoder"), ("image_tower", "image_encoder")):
        if part in layout.part_folders and getattr(components["clip"], tower) is None:
            raise InputError(f"this pipeline's CLIP has no {tower.replace('_', ' ')}, which {layout.name} holds")
    if layout.family == "kandinsky":
        reads_captions = components["decoder"].config.text_width is not None
        if reads_captions != ("multilingual_clip" in layout.part_folders):
            reads, expected = ("captions", "none") if reads_captions else ("no captions", "them")
            raise InputError(
                f"the decoder reads {reads}, that of {layout.name} reads {expected}: it is another Kandinsky's"
            )
        controlled = components["decoder"].control_factor is not None
        if controlled != layout.name.endswith("controlnet"):
            kind = "a ControlNet" if controlled else "no ControlNet"
            raise InputError(f"the decoder is {kind}, which {layout.name} does not hold; its layout is another")


# Writers of parts: each returns the name of the class for the index


def save_library_model(model: Any, target: Path) -> str:
    """Save a model of diffusers' or transformers' own class."""
    model.save_pretrained(target)
    return type(model).__name__


def save_plain_model(
    class_name: str, config: dict[str, Any], tensors: dict[str, Tensor], target: Path, stem: str = DIFFUSERS_STEM
) -> str:
    """Save a model whose public class is no longer in a library, or is inside a pipeline only."""
    write_config(target / "config.json", config)
    save_tensors(target / f"{stem}.safetensors", tensors, {"format": "pt"})
    return class_name


def write_config(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))


def save_prior(components: Mapping[str, Any], target: Path) -> str:
    """Write a prior as a PriorTransformer, and return the name of its class."""
    prior = components["prior"]
    if not isinstance(prior, EclipsePrior):
        return save_library_model(to_prior_transformer(prior), target)
    # A PriorTransformer without a token for the time, which is what an EclipsePrior is read from
    sizes = build_transformer_config(prior.config)
    config = {"_class_name": "PriorTransformer", **sizes, "additional_embeddings": 3}
    state = prior.state_dict()
    # Nothing reads the statistics of z_i, but the class has them.
    state |= {"mean": torch.zeros_like(state["to_image.bias"]), "std": torch.ones_like(state["to_image.bias"])}
    tensors = split_prior_tensors(state, map_tensor_names(prior.config.depth, time=False))
    return save_plain_model("PriorTransformer", config, tensors, target)


def convert_to_public_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler of diffusers that our respaced one stands for; others as they are."""
    respaced = isinstance(scheduler, UnCLIPRespacedScheduler)
    return UnCLIPScheduler.from_config(scheduler.config) if respaced else scheduler


def save_scheduler(scheduler: SchedulerMixin, target: Path) -> str:
    scheduler = convert_to_public_scheduler(scheduler)
    if not hasattr(diffusers, type(scheduler).__name__):
        raise InputError(f"the scheduler is a {type(scheduler).__name__}, which public pipelines cannot load")
    return save_library_model(scheduler, target)


def save_tokenizer(tokenizer: Any, target: Path, class_name: str) -> str:
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(target)
    return class_name


def save_caption_tokenizer(components: Mapping[str, Any], target: Path) -> str:
    """Save the tokenizer of Stable Diffusion's text encoder, with all special tokens: padding is read, too."""
    tokenizer = components["text_encoder"].tokenizer
    content = json.loads(tokenizer.tokenizer.to_str())
    vocab, ends = content["model"]["vocab"], content["post_processor"]
    # Versions of tokenizers store a merge as "a b" or as ["a", "b"].
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"])
    merges = [(first, second) for first, second in pairs]
    pad = next(word for word, number in vocab.items() if number == tokenizer.pad)
    public = CLIPTokenizer(vocab, merges, tokenizer.context_length, pad, ends["cls"][0], ends["sep"][0])
    return save_tokenizer(public, target, "CLIPTokenizer")


def save_image_processor(components: Mapping[str, Any], target: Path) -> str:
    """Write the preprocessor_config.json for the preprocessing of this project's CLIP."""
    config = components["clip"].config
    # A size of one number is the shorter side, as in CLIPImageProcessor.
    steps, side = config.preprocess, config.vision["image_size"]
    size = [side] if steps["resize"] is None else steps["resize"]
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": steps["resize"] is not None,
        "size": {"shortest_edge": size[0]} if len(size) == 1 else {"height": size[0], "width": size[1]},
        "resample": RESAMPLING_NUMBERS[steps["resample"]],
        "do_center_crop": steps["crop"] is not None,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(steps["mean"]),
        "image_std": list(steps["std"]),
    }
    write_config(target / "preprocessor_config.json", content)
    return "CLIPImageProcessor"


def save_text_projection(components: Mapping[str, Any], target: Path) -> str:
    """Write Karlo's text projection, and return the name of its class."""
    decoder = components["decoder"]
    config = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": decoder.config.extra_tokens,
        "clip_embeddings_dim": decoder.config.embed_dim,
        "time_embed_dim": decoder.unet.time_embedding.linear_2.out_features,
        "cross_attention_dim": decoder.config.context_width,
    }
    return save_plain_model("UnCLIPTextProjModel", config, decoder.text_proj.state_dict(), target)


def save_embed_normalizer(components: Mapping[str, Any], target: Path) -> str:
    """Write the mean and deviation that noised z_i are normalized by, and return the name of the class."""
    decoder = components["decoder"]
    config = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": decoder.config.embed_dim}
    return save_plain_model("StableUnCLIPImageNormalizer", config, decoder.normalizer.state_dict(), target)


def save_multilingual_clip(components: Mapping[str, Any], target: Path) -> str:
    """Write Kandinsky's text encoder, and return the name of its class."""
    encoder = components["text_encoder"]
    config = encoder.transformer.config.to_dict() | {
        "model_type": "M-CLIP",
        "architectures": ["MultilingualCLIP"],
        "numDims": encoder.config.pooled_width,
        "transformerDimensions": encoder.width,
    }
    return save_plain_model("MultilingualCLIP", config, encoder.state_dict(), target, TRANSFORMERS_STEM)


def make_model_writer(name: str, attribute: str) -> "PartWriter":
    """Return a writer of a library's model that a component has as an attribute."""
    return lambda components, target: save_library_model(getattr(components[name], attribute), target)


PartWriter = Callable[[Mapping[str, Any], Path], str]
# The folder of diffusers' pipelines that an index names for a class
PIPELINE_MODULES = {"projection": "unclip", "normalizer": "stable_diffusion", "multilingual_clip": "kandinsky"}
PART_WRITERS: dict[str, PartWriter] = {
    "prior": save_prior,
    "prior_scheduler": lambda components, target: save_scheduler(components["prior_scheduler"], target),
    "text_tower": make_model_writer("clip", "text_encoder"),
    "tokenizer": lambda components, target: save_tokenizer(components["clip"].tokenizer, target, "CLIPTokenizer"),
    "image_tower": make_model_writer("clip", "image_encoder"),
    "image_processor": save_image_processor,
    "unet": make_model_writer("decoder", "unet"),
    "decoder_scheduler": lambda components, target: save_scheduler(components["decoder_scheduler"], target),
    "projection": save_text_projection,
    "super_res_first": make_model_writer("autoencoder", "super_res_first"),
    "super_res_last": make_model_writer("autoencoder", "super_res_last"),
    "super_res_scheduler": lambda components, target: save_scheduler(components["autoencoder"].scheduler, target),
    "movq": make_model_writer("autoencoder", "coder"),
    "vae": make_model_writer("autoencoder", "coder"),
    "normalizer": save_embed_normalizer,
    "noising_scheduler": lambda components, target: save_library_model(
        DDPMScheduler(**components["decoder"].config.noising), target
    ),
    "multilingual_clip": save_multilingual_clip,
    "multilingual_tokenizer": lambda components, target: save_tokenizer(
        components["text_encoder"].tokenizer, target, "XLMRobertaTokenizer"
    ),
    "text_encoder": make_model_writer("text_encoder", "net"),
    "text_tokenizer": save_caption_tokenizer,
}
