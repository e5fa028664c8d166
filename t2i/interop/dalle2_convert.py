"""Convert DALLE2-pytorch's files (`t2i convert FILE.pth`) to folders of this project's models."""

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import Module

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically, raise_as_oserror
from t2i.files.component import TensorComponent, load_from_components
from t2i.files.untrusted import read_config
from t2i.interop.dalle2_files import DALLE2File, format_release, parse_release, read_dalle2_file, require_file_release
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder, DALLE2Pixels
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.dalle2.unet import UnetConfig
from t2i.networks.public.transformers_clip import CLIP_MEAN, CLIP_STD
from t2i.networks.tokenizer import build_public_tokenizer

logger = logging.getLogger(__name__)

# DALLE2-pytorch's name: ours
PRIOR_ARGUMENT_NAMES = {
    "dim": "embed_dim",
    "depth": "depth",
    "heads": "heads",
    "dim_head": "head_width",
    "ff_mult": "mlp_ratio",
    "max_text_len": "context_length",
    "num_timesteps": "num_timesteps",
    "num_time_embeds": "time_tokens",
    "num_image_embeds": "image_tokens",
    "num_text_embeds": "text_tokens",
    "norm_in": "norm_in",
    "norm_out": "norm_out",
    "final_proj": "project_out",
    "normformer": "inner_norm",
    "rotary_emb": "rotary",
}
UNSUPPORTED_OPTIONS = {  # no published model was made with these; with the reason why they are missing
    "self_cond": "the sampler would have to hand each estimate to the next step",
    "sampling_clamp_l2norm": "no scheduler normalises every estimate",
    "init_image_embed_l2norm": "sampling starts from noise as it is",
    "resnet_weight_standardization": "its convolutions are not written",
    "combine_upsample_fmaps": "its combiner is not written",
    "unconditional": "a decoder here reads z_i",
    "learned_variance_constrain_frac": "schedulers read the variance as it is predicted",
}
PRIOR_UNUSED = ("attn_dropout", "ff_dropout")
UNET_UNUSED = ("out_dim", "attend_at_middle", "checkpoint_during_training")  # the last two change nothing in drawing
UNET_DERIVED = ("channels", "channels_out", "lowres_cond", "lowres_noise_cond", "cond_on_image_embeds")
UNET_ARGUMENTS = {field.name for field in fields(UnetConfig)} - set(UNET_DERIVED)
# DALLE2-pytorch's name: diffusers'
BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "quadratic": "scaled_linear"}
OLDEST_DECODER_RELEASE, OLDEST_PRIOR_RELEASE = (1, 0, 2), (0, 23, 3)  # of models that were compared with these
NEW_ATTENTION_RELEASE, SCALED_ATTENTION_RELEASE = (1, 4, 0), (1, 4, 3)  # changed attention


def convert_dalle2(
    source: Path, config: Path | None, folder: Path, release: str | None = None, fp16: bool = False
) -> Path:
    """Write a prior or a decoder of DALLE2-pytorch as a new folder, whole or not at all, and return the folder.

    It has `model` and `scheduler`, like a training run. A decoder's also has `autoencoder`, which stands for the rest
    of its cascade, and a file with a CLIP gives `clip`. `t2i assemble` takes the folder as --prior or --decoder.

    Args:
        source: a .pth file of its trainers, or a plain state dict.
        config: the JSON of its training; not needed if the file holds it.
        release: version of DALLE2-pytorch that trained it, if the file does not have it and it matters.
        fp16: store the weights in half precision.
    """
    # Read the file and its configuration
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists; give a new folder")
    settings = None if config is None else read_config(config)
    file = read_dalle2_file(source)
    if release is not None:
        file.release = parse_release(release)
    settings = file.config if settings is None else settings
    if settings is None:
        raise InputError(f"{file.name} holds no configuration; give the JSON of its training by --config")
    # The names of the tensors decide what the file is; the configuration may describe both.
    is_prior = any(name.startswith("net.") for name in file.state)
    if not is_prior and not any(name.startswith("unets.") for name in file.state):
        first = next(iter(file.state))
        raise InputError(
            f"{file.name} is neither a prior (net.*) nor a decoder (unets.*); its first tensor is {first!r}"
        )
    settings = select_model_section(settings, is_prior)

    # Convert and write
    parts = (convert_dalle2_prior if is_prior else convert_dalle2_decoder)(file, settings)
    if clip := convert_stored_clip(file, settings):
        parts["clip"] = clip
    logger.info("read the weights %s of %s", file.weights_name, source)
    with create_folder_atomically(folder) as unfinished, raise_as_oserror():
        for name, part in parts.items():
            if fp16 and isinstance(part, Module):
                part.half()
            part.save_pretrained(unfinished / name)
    return folder


def select_model_section(settings: dict[str, Any], is_prior: bool) -> dict[str, Any]:
    """Return the section of a configuration that describes the model, after a check of its form."""
    section, inner = ("prior", "net") if is_prior else ("decoder", "unets")
    settings = settings.get(section, settings)
    if not isinstance(settings, dict) or inner not in settings:
        raise InputError(f"the configuration of a {section} must have {section}.{inner}; it has {list(settings)!r:.80}")
    networks = [settings[inner]] if is_prior else settings[inner]
    if not isinstance(networks, list) or not all(isinstance(network, dict) for network in networks) or not networks:
        form = "a mapping" if is_prior else "a list of mappings"
        raise InputError(f"{section}.{inner} must be {form}, got {settings[inner]!r:.80}")
    return settings


# Prior


def convert_dalle2_prior(file: DALLE2File, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `model` and `scheduler` of a prior."""
    # Arguments
    network = settings["net"]
    check_unsupported_options(settings, network)
    for key in network.keys() - {*PRIOR_ARGUMENT_NAMES, *UNSUPPORTED_OPTIONS, *PRIOR_UNUSED}:
        logger.warning("%s: the option %s of a prior's net is unknown and changes nothing", file.path, key)
    config = {name: network[key] for key, name in PRIOR_ARGUMENT_NAMES.items() if network.get(key) is not None}
    if (width := settings.get("image_embed_dim", network.get("dim"))) != network.get("dim"):
        raise InputError(f"image_embed_dim is {width}, net.dim {network.get('dim')}; they must agree")

    # Tensors; rotary frequencies are computed here, and are the same in every file
    tensors = {name: tensor for name, tensor in file.state.items() if name.startswith("net.")}
    for name in [name for name in tensors if name.endswith("rotary_emb.freqs")]:
        frequencies = tensors.pop(name).float()
        width = 2 * len(frequencies)
        if not torch.allclose(frequencies, 10_000 ** (-torch.arange(0, width, 2) / width), rtol=1e-2):
            raise InputError(f"{name} in {file.name} are not the usual rotary frequencies, which are computed here")
    # What the tensors and the release decide
    learned_null, old_attention = detect_prior_features(file, tensors)
    config |= {
        "learned_null": learned_null,
        "old_attention": old_attention,
        "reads_captions": settings.get("condition_on_text_encodings", True),
        "embed_scale": settings.get("image_embed_scale"),
    }
    prior = load_from_components(lambda: DALLE2Prior(**config), {"": TensorComponent(tensors, file.path)})

    # Scheduler
    prediction = resolve_prediction_type(settings.get("predict_v", False), settings.get("predict_x_start", True))
    kind, steps = settings.get("beta_schedule", "cosine"), settings.get("timesteps", 1000)
    scheduler = convert_noise_schedule(kind, steps, prediction) | {"clip_sample": prediction == "epsilon"}
    check_noise_schedule(file, "noise_scheduler.betas", scheduler)
    return {"model": prior, "scheduler": DDIMScheduler(**scheduler)}


def detect_prior_features(file: DALLE2File, tensors: dict[str, Tensor]) -> tuple[bool, bool]:
    """Return whether a prior has a learned null condition, and whether its attention is that before release 1.4.3."""
    if "net.null_text_encodings" in tensors:
        if (1, 9, 0) <= (file.release or SCALED_ATTENTION_RELEASE) < (1, 10, 4):
            logger.warning(
                "%s was trained without dropout of z_t (a release from 1.9.0 to 1.10.3); use guidance scale 1",
                file.path,
            )
        return True, False
    release = require_file_release(file, "net.null_text_embed, as priors before 1.9.0")
    if release < OLDEST_PRIOR_RELEASE:
        raise InputError(f"{file.name} is of release {format_release(release)}; priors before 0.23.3 do not load")
    logger.warning("%s was trained without condition dropout (a release before 1.9.0); use guidance scale 1", file.path)
    return False, release < SCALED_ATTENTION_RELEASE


# Decoder


@dataclass
class CascadeStage:
    """A U-Net of a decoder's cascade, as its configuration describes it."""

    unet: dict[str, Any]  # arguments of ours
    size: int  # sides of its images
    scheduler: dict[str, Any]  # arguments of DDIMScheduler
    learned_variance: bool
    noise_level: int | None  # that its small image is noised to
    tensors: dict[str, Tensor]  # by its own names; empty if the file lacks it


def convert_dalle2_decoder(file: DALLE2File, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `model` and `scheduler` of the first U-Net, and `autoencoder` for the others."""
    # Trainers save the U-Nets that they trained: the first, the others, or all
    check_unsupported_options(settings, *settings["unets"])
    if any(name.startswith("vaes.") for name in file.state):
        raise InputError(f"{file.name} denoises latents of a VQGAN (vaes.*); only decoders of images load")
    stages = read_cascade_stages(file, settings)
    present = [i for i, stage in enumerate(stages) if any(name.startswith("to_out.") for name in stage.tensors)]
    if present not in ([0], list(range(len(stages))), list(range(1, len(stages)))) or not present:
        raise InputError(f"{file.name} has the U-Nets {present} of {len(stages)}; it must have the first or the others")
    # The first U-Net is the decoder, the others are the cascade after it
    channels = settings.get("channels", 3)
    parts: dict[str, Any] = {"autoencoder": DALLE2Pixels(channels)}
    if 0 in present:
        first = stages[0]
        reads_captions = first.unet.pop("cond_on_text_encodings", False)
        text_width = first.unet.pop("text_embed_dim", None)
        config = {
            "embed_dim": first.unet.pop("image_embed_dim", None),
            "latent_channels": channels,
            "latent_size": first.size,
            "text_width": text_width if reads_captions else None,
            "learned_variance": first.learned_variance,
        }
        net = TensorComponent(first.tensors, file.path)
        parts["model"] = load_from_components(lambda: DALLE2Decoder(unet=first.unet, **config), {"net.": net})
        parts["scheduler"] = DDIMScheduler(**first.scheduler)
    if len(stages) > 1 and 1 in present:
        parts["autoencoder"] = convert_dalle2_cascade(file, stages, channels)
    return parts


def convert_dalle2_cascade(file: DALLE2File, stages: list[CascadeStage], channels: int) -> DALLE2Cascade:
    """Return the U-Nets after the first, which enlarge its images."""
    tensors: dict[str, Tensor] = {}
    for i, stage in enumerate(stages[1:]):
        if stage.unet.get("cond_on_text_encodings"):
            reason = "upsampling U-Nets that read captions are not supported"
            raise InputError(f"U-Net {i + 2} of {file.name} reads captions; {reason}")
        if stage.learned_variance:
            stage.unet["channels_out"] = 2 * channels
        tensors |= {f"nets.{i}.{name}": tensor for name, tensor in stage.tensors.items()}
    config = {
        "low_size": stages[0].size,
        "sizes": [stage.size for stage in stages[1:]],
        "unets": [stage.unet for stage in stages[1:]],
        "schedulers": [stage.scheduler for stage in stages[1:]],
        "noise_levels": [stage.noise_level for stage in stages[1:]],
    }
    nets = TensorComponent(tensors, file.path)
    return load_from_components(lambda: DALLE2Cascade(**config, channels=channels), {"": nets})


def read_cascade_stages(file: DALLE2File, settings: dict[str, Any]) -> list[CascadeStage]:
    """Return the U-Nets with their settings. An option with one value applies to the U-Nets that the reference applies
    it to: all, the first, or all but the first."""
    # Options for each U-Net
    count = len(settings["unets"])
    sizes = settings.get("image_sizes") or [settings.get("image_size")]
    if len(sizes) != count or any(not isinstance(size, int) for size in sizes) or sizes != sorted(set(sizes)):
        raise InputError(f"a decoder of {count} U-Nets must have {count} growing image_sizes, got {sizes!r:.80}")
    default_kinds = [*["cosine"] * max(count - 1, 1), "linear"]
    kinds = expand_per_unet(settings.get("beta_schedule") or default_kinds[:count], count)
    velocities, samples = (expand_per_unet(settings.get(key, False), count) for key in ("predict_v", "predict_x_start"))
    learned = settings.get("learned_variance", True)  # one value is the first U-Net's
    learned = [*(learned if isinstance(learned, list) else [learned]), *[False] * count]
    noised = settings.get("use_noise_for_lowres_cond", False)  # one value is that of the others
    noised = noised if isinstance(noised, list) else [noised] * (count - 1)
    noised = noised if len(noised) == count else [False, *noised]
    if len(noised) != count:
        raise InputError(f"use_noise_for_lowres_cond has {len(noised) - 1} values for {count - 1} further U-Nets")
    noise_level = int(settings.get("lowres_noise_sample_level", 0.2) * 1000)

    # The U-Nets
    stages = []
    for i, unet in enumerate(settings["unets"]):
        prediction = resolve_prediction_type(velocities[i], samples[i])
        scheduler = convert_noise_schedule(kinds[i], settings.get("timesteps", 1000), prediction)
        if settings.get("use_dynamic_thres"):
            ratio = settings.get("dynamic_thres_percentile", 0.95)
            scheduler |= {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": 1e6}
        check_noise_schedule(file, f"noise_schedulers.{i}.betas", scheduler)
        tensors = select_prefixed_tensors(file.state, f"unets.{i}.")
        arguments = convert_unet_arguments(file, unet, tensors)
        tensors = {name.replace(".cross_attn.fn.", ".cross_attn."): tensor for name, tensor in tensors.items()}
        level = noise_level if noised[i] else None
        stages.append(CascadeStage(arguments, sizes[i], scheduler, bool(learned[i]), level, tensors))
    return stages


def convert_unet_arguments(file: DALLE2File, settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return our arguments for a U-Net, with the layers of the release that trained it. tensors: by its names."""
    arguments = {}
    for key, value in settings.items():
        if key in UNET_ARGUMENTS and value is not None:
            arguments[key] = value
        elif key not in (*UNET_UNUSED, *UNET_DERIVED, *UNSUPPORTED_OPTIONS):
            logger.warning("%s: the option %s of a U-Net is unknown and changes nothing", file.path, key)
    # Older releases sample down by a convolution of 4 x 4 pixels, newer ones by shuffling pixels. A block with several
    # convolutions side by side has either; then the names of attention, which changed later, decide.
    strided = any(
        re.fullmatch(r"downs\.\d+\.[04]\.weight", name) and tensor.shape[-1] == 4 for name, tensor in tensors.items()
    )
    crossed = any(re.match(r"downs\.\d+\.[04]\.convs\.", name) for name in tensors)
    release: tuple[int, ...] = SCALED_ATTENTION_RELEASE
    if strided or (crossed and any(".cross_attn.fn." in name for name in tensors)):
        release = require_file_release(file, "layers as before 1.10.0")
        if not OLDEST_DECODER_RELEASE <= release < NEW_ATTENTION_RELEASE and not release >= SCALED_ATTENTION_RELEASE:
            prefix = f"{file.name} is of release {format_release(release)}"
            raise InputError(f"{prefix}; decoders of 1.4.0 to 1.4.2 and before 1.0.2 do not load")
    return arguments | {"old_attention": release < NEW_ATTENTION_RELEASE, "old_downsample": strided}


def expand_per_unet(value: Any, count: int) -> list:
    """Return a list of values, one for each U-Net; a single value is repeated."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InputError(f"a decoder of {count} U-Nets has {len(value)} values for them: {value!r:.80}")
    return list(value)


# CLIP


def convert_stored_clip(file: DALLE2File, settings: dict[str, Any]) -> CLIP | None:
    """Return the frozen CLIP that a file holds, as this project's; None if it holds none."""
    import open_clip

    tensors = select_prefixed_tensors(file.state, "clip.clip.")
    if not tensors:
        return None
    section = settings.get("clip")
    make, name = (section.get("make"), section.get("model")) if isinstance(section, dict) else (None, None)
    if make not in ("openai", "open_clip") or not isinstance(name, str):
        logger.warning("the CLIP in %s is left out: its configuration does not name it", file.path)
        return None
    # OpenAI's models have QuickGELU, which open_clip has under another name. With the plain one embeddings are ruined.
    model_name = name.replace("/", "-") + ("-quickgelu" if make == "openai" else "")
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise InputError(f"open_clip has no model {model_name!r:.80}, which the configuration names as {make} {name}")
    # Numbers of OpenAI's JIT archives, which are no weights
    for extra in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(extra, None)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": CLIP_MEAN, "std": CLIP_STD}
    tokenizer, kind = build_public_tokenizer(model_name, config["text_cfg"])
    clip = load_from_components(lambda: CLIP(config, preprocess, kind), {"net.": TensorComponent(tensors, file.path)})
    clip.tokenizer = tokenizer
    return clip


# Shared by prior and decoder


def select_prefixed_tensors(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_unsupported_options(*sections: dict[str, Any]) -> None:
    for section in sections:
        for key, reason in UNSUPPORTED_OPTIONS.items():
            if section.get(key):
                raise InputError(f"{key} = {section[key]!r} is not supported: {reason}")


def resolve_prediction_type(velocity: bool, sample: bool) -> str:
    """Return diffusers' name of what a model predicts."""
    if velocity:
        return "v_prediction"
    return "sample" if sample else "epsilon"


def convert_noise_schedule(kind: Any, steps: Any, prediction: str) -> dict[str, Any]:
    """Return arguments of DDIMScheduler for a schedule of DALLE2-pytorch, whose estimates are clipped to [-1, 1]."""
    check_integer("timesteps", steps, 2, 100_000)
    if kind not in BETA_SCHEDULES:
        raise InputError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {kind!r:.80}")
    betas = {} if kind == "cosine" else {"beta_start": 0.1 / steps, "beta_end": 20.0 / steps}
    shared = {"prediction_type": prediction, "timestep_spacing": "trailing", "clip_sample": True}
    return {"num_train_timesteps": steps, "beta_schedule": BETA_SCHEDULES[kind], **betas, **shared}


def check_noise_schedule(file: DALLE2File, name: str, arguments: dict[str, Any]) -> None:
    """Raise InputError if the file stores another noise schedule than its configuration describes."""
    betas, expected = file.state.get(name), DDIMScheduler(**arguments).betas
    if betas is None:
        return
    tolerance = 1e-5 if betas.dtype == torch.float32 else 1e-2
    if betas.shape != expected.shape or not torch.allclose(betas.float(), expected, rtol=0, atol=tolerance):
        described = f"{arguments['beta_schedule']} of {arguments['num_train_timesteps']} steps"
        raise InputError(f"the noise schedule in {file.name} is not its configuration's ({described})")
