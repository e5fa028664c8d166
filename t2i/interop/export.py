"""This project's components written in the public layouts again: what was read from one, or trained from it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin, UnCLIPScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.errors import InputError
from t2i.files.atomic import raise_as_oserror
from t2i.interop.layouts import LAYOUTS_BY_NAME, PART_CLASSES, TRANSFORMERS_PARTS, PublicLayout
from t2i.interop.prior_transformer import map_tensor_names, to_prior_transformer
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

# What a layout's parts are made of here, and why nothing else will do.
# Tensors of a PriorTransformer that begin with a batch of one, and in how many dimensions.
BATCH_DIMS = {"positional_embedding": 1, "prd_embedding": 2, "clip_mean": 1, "clip_std": 1}
DECODER_CLASSES = {"karlo": KarloDecoder, "kandinsky": KandinskyDecoder, "stable": StableUnCLIPDecoder}
AUTOENCODER_CLASSES = {"karlo": SuperResolution, "kandinsky": MoVQ, "stable": Autoencoder}


def export_layout(components: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write a pipeline's components into a folder in a public layout, the name of which is in `LAYOUTS_BY_NAME`.

    Raises InputError, before anything is written, as `check_exportable_components` does.
    """
    layout = check_exportable_components(components, name)
    index: dict[str, Any] = {"_class_name": layout.classes[0], "_diffusers_version": diffusers.__version__}
    for part, place in layout.part_folders.items():
        target = folder if place == "." else folder / place
        kind = PART_WRITERS[part](components, target)
        library = (
            "transformers" if part in TRANSFORMERS_PARTS or part.endswith(("tokenizer", "processor")) else "diffusers"
        )
        index[place] = [PIPELINE_MODULES.get(part, library), kind]
    if "." in layout.part_folders.values():  # a prior alone has no index; its scheduler lies beside it for this project
        if components.get("prior_scheduler") is not None:
            save_library_model(convert_to_public_scheduler(components["prior_scheduler"]), folder / "scheduler")
    else:
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def check_exportable_components(components: Mapping[str, Any], name: str) -> PublicLayout:
    """Refuse components whose arithmetic the classes of a public layout do not have, saying which and why."""
    layout = LAYOUTS_BY_NAME[name]
    found = {part: components.get(part) for part in ("clip", "prior", "decoder", "autoencoder", "text_encoder")}
    wanted: dict[str, tuple[type, ...]] = {}
    if layout.family:
        wanted |= {"decoder": (DECODER_CLASSES[layout.family],), "autoencoder": (AUTOENCODER_CLASSES[layout.family],)}
    if "prior" in layout.part_folders:
        wanted["prior"] = (Prior,) if "prior_scheduler" in layout.part_folders else (Prior, EclipsePrior)
    if {"text_tower", "image_tower"} & layout.part_folders.keys():
        wanted["clip"] = (TransformersCLIP,)
    if "multilingual_clip" in layout.part_folders:
        wanted["text_encoder"] = (MultilingualCLIP,)
    if "text_encoder" in layout.part_folders:
        wanted["text_encoder"] = (TextEncoder,)
    for part, classes in wanted.items():
        if not isinstance(found[part], classes):
            ours = "nothing" if found[part] is None else f"a {type(found[part]).__name__}"
            names = " or ".join(one.__name__ for one in classes)
            raise InputError(
                f"the {part.replace('_', ' ')} is {ours}; {name} holds the weights of a {names}, whose arithmetic is "
                "another, so that no file of that layout draws the same"
            )
    check_component_kinds(found, layout)
    if isinstance(found["prior"], Prior) and "prior" in layout.part_folders:
        to_prior_transformer(found["prior"])  # which says why, if it cannot
    return layout


def check_component_kinds(found: Mapping[str, Any], layout: PublicLayout) -> None:
    """Refuse what is of the right class, but another of its kinds."""
    clip, decoder = found["clip"], found["decoder"]
    for part, tower in (("text_tower", "text_encoder"), ("image_tower", "image_encoder")):
        if part in layout.part_folders and getattr(clip, tower) is None:
            raise InputError(f"this pipeline's CLIP has no {tower.replace('_', ' ')}, which {layout.name} holds")
    if layout.family == "kandinsky":
        reads = decoder.config.text_width is not None
        if reads != ("multilingual_clip" in layout.part_folders):
            ours, theirs = ("captions", "none") if reads else ("no captions", "them")
            raise InputError(
                f"the decoder reads {ours}, that of {layout.name} reads {theirs}: it is another Kandinsky's"
            )


def save_library_model(model: Any, target: Path) -> str:
    """One of diffusers' or transformers' own models."""
    model.save_pretrained(target)
    return type(model).__name__


def save_plain_model(
    model: nn.Module,
    target: Path,
    config: dict[str, Any],
    stem: str = "diffusion_pytorch_model",
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """A model whose public class is not in the libraries any more, or only inside a pipeline."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    with raise_as_oserror():
        held = model.state_dict() if tensors is None else tensors
        contiguous = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(contiguous, target / f"{stem}.safetensors", metadata={"format": "pt"})


def save_prior(components: Mapping[str, Any], target: Path) -> str:
    prior = components["prior"]
    if isinstance(prior, EclipsePrior):
        save_plain_model(prior, target, build_eclipse_config(prior), tensors=build_eclipse_tensors(prior))
        return "PriorTransformer"
    return save_library_model(to_prior_transformer(prior), target)


def build_eclipse_config(prior: EclipsePrior) -> dict[str, Any]:
    """Of the PriorTransformer without a time that an EclipsePrior was read from."""
    config = prior.config
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
        "additional_embeddings": 3,
    }


def build_eclipse_tensors(prior: EclipsePrior) -> dict[str, Tensor]:
    """By their public names. The statistics of z_i, which nothing reads, are those of no change."""
    held = prior.state_dict()
    nothing = {"mean": torch.zeros_like, "std": torch.ones_like}
    held |= {name: make(held["to_image.bias"]) for name, make in nothing.items()}
    found = {}
    for ours, theirs in map_tensor_names(prior.config.depth, time=False).items():
        for name, tensor in zip(theirs, held[ours].chunk(len(theirs))):
            found[name] = tensor.reshape((1,) * BATCH_DIMS.get(name, 0) + tensor.shape).contiguous()
    return found


def convert_to_public_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of diffusers that ours stands for, if it does for one."""
    respaced = isinstance(scheduler, UnCLIPRespacedScheduler)
    return UnCLIPScheduler.from_config(scheduler.config) if respaced else scheduler


def save_scheduler(scheduler: SchedulerMixin, target: Path) -> str:
    scheduler = convert_to_public_scheduler(scheduler)
    if not hasattr(diffusers, type(scheduler).__name__):
        raise InputError(f"the scheduler is a {type(scheduler).__name__}, which public pipelines do not know")
    return save_library_model(scheduler, target)


def save_tokenizer(tokenizer: Any, target: Path, kind: str) -> str:
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(target)
    return kind


def save_caption_tokenizer(components: Mapping[str, Any], target: Path) -> str:
    """Of Stable Diffusion's text encoder, with its special tokens: the one that pads is read, too."""
    tokenizer = components["text_encoder"].tokenizer
    found = json.loads(tokenizer.tokenizer.to_str())
    vocab, ends = found["model"]["vocab"], found["post_processor"]
    split = (pair.split(" ") if isinstance(pair, str) else pair for pair in found["model"]["merges"])
    pairs = [(first, second) for first, second in split]
    pad = next(word for word, number in vocab.items() if number == tokenizer.pad)
    words = CLIPTokenizer(vocab, pairs, tokenizer.context_length, pad, ends["cls"][0], ends["sep"][0])
    return save_tokenizer(words, target, "CLIPTokenizer")


def save_image_processor(components: Mapping[str, Any], target: Path) -> str:
    """The preprocessor_config.json of what this project's CLIP does with pictures."""
    steps, side = components["clip"].config.preprocess, components["clip"].config.vision["image_size"]
    size, crop = steps["resize"], steps["crop"]
    found: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_rescale": True}
    found |= {"do_resize": size is not None, "do_center_crop": crop is not None, "do_normalize": True}
    size = [side] if size is None else size
    found["size"] = {"shortest_edge": size[0]} if len(size) == 1 else {"height": size[0], "width": size[1]}
    found |= {"crop_size": {"height": side, "width": side}, "rescale_factor": 1 / 255}
    found |= {"resample": {"bilinear": 2, "bicubic": 3}[steps["resample"]]}
    found |= {"image_mean": list(steps["mean"]), "image_std": list(steps["std"])}
    target.mkdir(parents=True, exist_ok=True)
    (target / "preprocessor_config.json").write_text(json.dumps(found, indent=2))
    return "CLIPImageProcessor"


def save_text_projection(components: Mapping[str, Any], target: Path) -> str:
    decoder = components["decoder"]
    config = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": decoder.config.extra_tokens,
        "clip_embeddings_dim": decoder.config.embed_dim,
        "time_embed_dim": decoder.unet.time_embedding.linear_2.out_features,
        "cross_attention_dim": decoder.config.context_width,
    }
    save_plain_model(decoder.text_proj, target, config)
    return "UnCLIPTextProjModel"


def save_embed_normalizer(components: Mapping[str, Any], target: Path) -> str:
    decoder = components["decoder"]
    config = {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": decoder.config.embed_dim}
    save_plain_model(decoder.normalizer, target, config)
    return "StableUnCLIPImageNormalizer"


def save_multilingual_clip(components: Mapping[str, Any], target: Path) -> str:
    encoder = components["text_encoder"]
    config = encoder.transformer.config.to_dict() | {
        "model_type": "M-CLIP",
        "architectures": ["MultilingualCLIP"],
        "numDims": encoder.config.pooled_width,
        "transformerDimensions": encoder.width,
    }
    save_plain_model(encoder, target, config, "model")
    return "MultilingualCLIP"


PartWriter = Callable[[Mapping[str, Any], Path], str]
PIPELINE_MODULES = {  # the pipeline's module that a class is looked for in
    "projection": "unclip",
    "normalizer": "stable_diffusion",
    "multilingual_clip": "kandinsky",
}
PART_WRITERS: dict[str, PartWriter] = {
    "prior": save_prior,
    "prior_scheduler": lambda c, target: save_scheduler(c["prior_scheduler"], target),
    "text_tower": lambda c, target: save_library_model(c["clip"].text_encoder, target),
    "tokenizer": lambda c, target: save_tokenizer(c["clip"].tokenizer, target, "CLIPTokenizer"),
    "image_tower": lambda c, target: save_library_model(c["clip"].image_encoder, target),
    "image_processor": save_image_processor,
    "unet": lambda c, target: save_library_model(c["decoder"].unet, target),
    "decoder_scheduler": lambda c, target: save_scheduler(c["decoder_scheduler"], target),
    "projection": save_text_projection,
    "super_res_first": lambda c, target: save_library_model(c["autoencoder"].super_res_first, target),
    "super_res_last": lambda c, target: save_library_model(c["autoencoder"].super_res_last, target),
    "super_res_scheduler": lambda c, target: save_scheduler(c["autoencoder"].scheduler, target),
    "movq": lambda c, target: save_library_model(c["autoencoder"].coder, target),
    "vae": lambda c, target: save_library_model(c["autoencoder"].coder, target),
    "normalizer": save_embed_normalizer,
    "noising_scheduler": lambda c, target: save_library_model(DDPMScheduler(**c["decoder"].config.noising), target),
    "multilingual_clip": save_multilingual_clip,
    "multilingual_tokenizer": lambda c, target: save_tokenizer(
        c["text_encoder"].tokenizer, target, PART_CLASSES["multilingual_tokenizer"][0]
    ),
    "text_encoder": lambda c, target: save_library_model(c["text_encoder"].net, target),
    "text_tokenizer": save_caption_tokenizer,
}
