"""`t2i convert` of DALLE2-pytorch's files: its configuration and tensors become folders of this project's models."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import Module

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically, raise_as_oserror
from t2i.files.untrusted import (
    TensorSpec,
    bounded_meta_device,
    check_finite_weights,
    check_tensor_specs,
    format_error,
    read_config,
)
from t2i.interop.dalle2_files import DALLE2File, parse_release, read_dalle2_file
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder, DALLE2Pixels
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.dalle2.unet import UnetConfig
from t2i.networks.tokenizer import build_public_tokenizer

logger = logging.getLogger(__name__)

STORED_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
PRIOR_ARGUMENT_NAMES = {  # the reference's argument: ours
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
UNSUPPORTED_OPTIONS = {  # options that no published model was made with, and why they are not there
    "self_cond": "the sampler would have to hand each estimate to the next step",
    "sampling_clamp_l2norm": "no scheduler normalises every estimate",
    "init_image_embed_l2norm": "sampling starts from noise as it is",
    "resnet_weight_standardization": "its convolutions are not written",
    "combine_upsample_fmaps": "its combiner is not written",
    "unconditional": "a decoder here reads z_i",
    "learned_variance_constrain_frac": "schedulers read the variance as it is predicted",
}
UNET_UNUSED = ("out_dim", "attend_at_middle", "checkpoint_during_training")  # the last two change nothing in drawing
UNET_DERIVED = ("channels", "channels_out", "lowres_cond", "lowres_noise_cond", "cond_on_image_embeds")
UNET_ARGUMENTS = {field.name for field in fields(UnetConfig)} - set(UNET_DERIVED)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of pictures
OLDEST_DECODER_RELEASE, OLDEST_PRIOR_RELEASE = (1, 0, 2), (0, 23, 3)  # releases whose models were compared with these
NEW_ATTENTION_RELEASE, SCALED_ATTENTION_RELEASE = (1, 4, 0), (1, 4, 3)  # releases that changed attention


def convert_dalle2(
    source: Path, config: Path | None, folder: Path, release: str | None = None, fp16: bool = False
) -> Path:
    """Write a prior or a decoder of DALLE2-pytorch as a new folder, whole or not at all.

    `model` and `scheduler`, as a training run has them; of a decoder also `autoencoder`, which stands for the rest of
    its cascade, if any; `clip`, if the file holds the CLIP. `t2i assemble` takes the folder as --prior or --decoder.

    Args:
        source: a .pth file of its trainers, or a plain state dict.
        config: the JSON of its training; not needed where the file holds it.
        release: of DALLE2-pytorch that trained it, where the file does not say and it matters.

    Raises InputError, in one line, for what cannot be read or that no model here computes.
    """
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists; give a new folder")
    settings = None if config is None else read_config(config)
    file = read_dalle2_file(source)
    if release is not None:
        file.release = parse_release(release)
    settings = file.config if settings is None else settings
    if settings is None:
        raise InputError(f"{str(source)!r} holds no configuration; give the JSON of its training by --config")
    is_prior = any(name.startswith("net.") for name in file.state)
    if not is_prior and not any(name.startswith("unets.") for name in file.state):
        first = next(iter(file.state))
        raise InputError(f"{str(source)!r} is neither a prior (net.*) nor a decoder (unets.*), its first is {first!r}")
    section, inner = ("prior", "net") if is_prior else ("decoder", "unets")
    settings = settings.get(section, settings)
    if not isinstance(settings, dict) or inner not in settings:
        raise InputError(f"the configuration of a {section} must have {section}.{inner}; it has {list(settings)!r:.80}")
    sections = [settings[inner]] if is_prior else settings[inner]
    if not isinstance(sections, list) or not all(isinstance(one, dict) for one in sections) or not sections:
        form = "a mapping" if is_prior else "a list of mappings"
        raise InputError(f"{section}.{inner} must be {form}, got {settings[inner]!r:.80}")
    parts = (convert_dalle2_prior if is_prior else convert_dalle2_decoder)(file, settings, source)
    if clip := convert_stored_clip(file, settings, source):
        parts["clip"] = clip
    logger.info("took %s of %s", file.weights_name, source)
    with create_folder_atomically(folder) as unfinished, raise_as_oserror():
        for name, part in parts.items():
            if fp16 and isinstance(part, Module):
                part.half()
            part.save_pretrained(unfinished / name)
    return folder


def convert_dalle2_prior(file: DALLE2File, settings: dict[str, Any], source: Path) -> dict[str, Any]:
    network = settings["net"]
    check_unsupported_options(settings, network)
    for key in network.keys() - PRIOR_ARGUMENT_NAMES.keys() - {*UNSUPPORTED_OPTIONS, "attn_dropout", "ff_dropout"}:
        logger.warning("%s: the option %s of a prior's net is unknown and changes nothing", source, key)
    config = {ours: network[name] for name, ours in PRIOR_ARGUMENT_NAMES.items() if network.get(name) is not None}
    if (width := settings.get("image_embed_dim", network.get("dim"))) != network.get("dim"):
        raise InputError(f"image_embed_dim is {width}, net.dim {network.get('dim')}; they must agree")
    held = select_prefixed_tensors(file.state, "net.", "net.")
    rotary = [name for name in held if name.endswith("rotary_emb.freqs")]
    for name in rotary:  # computed here, and the same in every file
        check_rotary_frequencies(held.pop(name), name, source)
    learned, old = detect_prior_features(file, held, source)
    config |= {
        "learned_null": learned,
        "old_attention": old,
        "reads_captions": settings.get("condition_on_text_encodings", True),
        "embed_scale": settings.get("image_embed_scale"),
    }
    prior = build_loaded_model(lambda: DALLE2Prior(**config), held, source)
    objective = resolve_prediction_type(settings.get("predict_v", False), settings.get("predict_x_start", True))
    scheduler = convert_noise_schedule(
        settings.get("beta_schedule", "cosine"), settings.get("timesteps", 1000), objective
    )
    scheduler["clip_sample"] = objective == "epsilon"
    check_noise_schedule(file.state.get("noise_scheduler.betas"), scheduler, source)
    return {"model": prior, "scheduler": DDIMScheduler(**scheduler)}


def detect_prior_features(file: DALLE2File, held: dict[str, Tensor], source: Path) -> tuple[bool, bool]:
    """Whether a prior knows what it is to be told nothing, and whether its attention is as before release 1.4.3."""
    if "net.null_text_encodings" in held:
        if (1, 9, 0) <= (file.release or SCALED_ATTENTION_RELEASE) < (1, 10, 4):
            logger.warning("%s is of a release from 1.9.0 to 1.10.3, which never dropped z_t: do not guide it", source)
        return True, False
    release = require_file_release(file, source, "net.null_text_embed, as priors before 1.9.0")
    if release < OLDEST_PRIOR_RELEASE:
        raise InputError(f"{str(source)!r} is of release {format_release(release)}; priors before 0.23.3 do not load")
    logger.warning("%s is of a release before 1.9.0, where nothing was dropped: do not guide it", source)
    return False, release < SCALED_ATTENTION_RELEASE


@dataclass
class CascadeStage:
    """A U-Net of a decoder's cascade as its configuration has it."""

    unet: dict[str, Any]  # arguments of ours
    size: int  # of its pictures' sides
    scheduler: dict[str, Any]  # arguments of DDIMScheduler
    learned_variance: bool
    noise_level: int | None  # that its small picture is noised to
    tensors: dict[str, Tensor]  # by its own names; empty if the file lacks it


def convert_dalle2_decoder(file: DALLE2File, settings: dict[str, Any], source: Path) -> dict[str, Any]:
    check_unsupported_options(settings, *settings["unets"])
    if any(name.startswith("vaes.") for name in file.state):
        raise InputError(f"{str(source)!r} denoises latents of a VQGAN (vaes.*); only decoders of pictures load")
    stages = read_cascade_stages(file, settings, source)
    present = [i for i, stage in enumerate(stages) if any(name.startswith("to_out.") for name in stage.tensors)]
    if present not in ([0], list(range(len(stages))), list(range(1, len(stages)))) or not present:
        raise InputError(
            f"{str(source)!r} has the U-Nets {present} of {len(stages)}; it must have the first or the others"
        )
    channels = settings.get("channels", 3)
    parts: dict[str, Any] = {"autoencoder": DALLE2Pixels(channels)}
    if 0 in present:
        first = stages[0]
        reads = first.unet.pop("cond_on_text_encodings", False)
        width = first.unet.pop("text_embed_dim", None)
        config = {
            "embed_dim": first.unet.pop("image_embed_dim", None),
            "latent_channels": channels,
            "latent_size": first.size,
            "text_width": width if reads else None,
            "learned_variance": first.learned_variance,
        }
        held = select_prefixed_tensors(first.tensors, "", "net.")
        parts["model"] = build_loaded_model(lambda: DALLE2Decoder(unet=first.unet, **config), held, source)
        parts["scheduler"] = DDIMScheduler(**first.scheduler)
    if len(stages) > 1 and 1 in present:
        parts["autoencoder"] = convert_dalle2_cascade(stages, channels, source)
    return parts


def convert_dalle2_cascade(stages: list[CascadeStage], channels: int, source: Path) -> DALLE2Cascade:
    held: dict[str, Tensor] = {}
    for i, stage in enumerate(stages[1:]):
        if stage.unet.get("cond_on_text_encodings"):
            raise InputError(f"U-Net {i + 2} of {str(source)!r} reads captions while it enlarges, which none here does")
        if stage.learned_variance:
            stage.unet["channels_out"] = 2 * channels
        held |= select_prefixed_tensors(stage.tensors, "", f"nets.{i}.")
    config = {
        "low_size": stages[0].size,
        "sizes": [stage.size for stage in stages[1:]],
        "unets": [stage.unet for stage in stages[1:]],
        "schedulers": [stage.scheduler for stage in stages[1:]],
        "noise_levels": [stage.noise_level for stage in stages[1:]],
    }
    return build_loaded_model(lambda: DALLE2Cascade(**config, channels=channels), held, source)


def read_cascade_stages(file: DALLE2File, settings: dict[str, Any], source: Path) -> list[CascadeStage]:
    """The U-Nets with what the configuration says of each; where it says one thing, that holds as in the reference."""
    count = len(settings["unets"])
    sizes = settings.get("image_sizes") or [settings.get("image_size")]
    if len(sizes) != count or any(not isinstance(size, int) for size in sizes) or sizes != sorted(set(sizes)):
        raise InputError(f"a decoder of {count} U-Nets must have {count} growing image_sizes, got {sizes!r:.80}")
    usual = [*["cosine"] * max(count - 1, 1), "linear"]
    kinds = expand_per_unet(settings.get("beta_schedule") or usual[:count], count)
    velocities, samples = (expand_per_unet(settings.get(key, False), count) for key in ("predict_v", "predict_x_start"))
    learned = settings.get("learned_variance", True)  # one value is the first U-Net's
    learned = [*(learned if isinstance(learned, list) else [learned]), *[False] * count]
    noised = settings.get("use_noise_for_lowres_cond", False)  # one value is the further ones'
    noised = noised if isinstance(noised, list) else [noised] * (count - 1)
    noised = noised if len(noised) == count else [False, *noised]
    if len(noised) != count:
        raise InputError(f"use_noise_for_lowres_cond has {len(noised) - 1} values for {count - 1} further U-Nets")
    level = int(settings.get("lowres_noise_sample_level", 0.2) * 1000)
    stages = []
    for i, given in enumerate(settings["unets"]):
        objective = resolve_prediction_type(velocities[i], samples[i])
        arguments = convert_noise_schedule(kinds[i], settings.get("timesteps", 1000), objective)
        if settings.get("use_dynamic_thres"):
            ratio = settings.get("dynamic_thres_percentile", 0.95)
            arguments |= {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": 1e6}
        check_noise_schedule(file.state.get(f"noise_schedulers.{i}.betas"), arguments, source)
        held = select_prefixed_tensors(file.state, f"unets.{i}.", "")
        unet = convert_unet_arguments(file, given, held, source)
        held = {name.replace(".cross_attn.fn.", ".cross_attn."): tensor for name, tensor in held.items()}
        stages.append(CascadeStage(unet, sizes[i], arguments, bool(learned[i]), level if noised[i] else None, held))
    return stages


def convert_unet_arguments(
    file: DALLE2File, given: dict[str, Any], held: dict[str, Tensor], source: Path
) -> dict[str, Any]:
    """A U-Net's arguments, and which releases' layers it has. `held`: its tensors, by its own names."""
    arguments = {}
    for key, value in given.items():
        if key in UNET_ARGUMENTS and value is not None:
            arguments[key] = value
        elif key not in (*UNET_UNUSED, *UNET_DERIVED, *UNSUPPORTED_OPTIONS):
            logger.warning("%s: the option %s of a U-Net is unknown and changes nothing", source, key)
    # A convolution of 4 x 4 pixels came before the shuffled ones. Where several stand side by side nothing tells but
    # the names of attention, which changed later.
    strided = any(re.fullmatch(r"downs\.\d+\.[04]\.weight", name) and one.shape[-1] == 4 for name, one in held.items())
    crossed = any(re.match(r"downs\.\d+\.[04]\.convs\.", name) for name in held)
    release: tuple[int, ...] = SCALED_ATTENTION_RELEASE
    if strided or (crossed and any(".cross_attn.fn." in name for name in held)):
        release = require_file_release(file, source, "layers as before 1.10.0")
        if not OLDEST_DECODER_RELEASE <= release < NEW_ATTENTION_RELEASE and not release >= SCALED_ATTENTION_RELEASE:
            found = f"{str(source)!r} is of release {format_release(release)}"
            raise InputError(f"{found}; decoders of 1.4.0 to 1.4.2 and before 1.0.2 do not load")
    return arguments | {"old_attention": release < NEW_ATTENTION_RELEASE, "old_downsample": strided}


def require_file_release(file: DALLE2File, source: Path, what: str) -> tuple[int, ...]:
    """The release that trained a model. Raises InputError if nobody says."""
    if file.release is None:
        said = "and does not say which release trained it; give --release, such as 1.1.0"
        raise InputError(f"{str(source)!r} has {what}, {said}")
    return file.release


def format_release(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def select_prefixed_tensors(state: dict[str, Tensor], prefix: str, ours: str) -> dict[str, Tensor]:
    """The tensors under a prefix, under another."""
    return {ours + name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def build_loaded_model(make: Callable[[], Any], held: dict[str, Tensor], source: Path) -> Any:
    """The model of `make` with these tensors, as they are stored. Nothing of its size is made before they fit."""
    stored = {
        name: TensorSpec(STORED_DTYPE_NAMES.get(one.dtype, str(one.dtype)), tuple(one.shape))
        for name, one in held.items()
    }
    with bounded_meta_device(stored, source):
        wanted = make().state_dict()
    check_tensor_specs(wanted, stored, source)
    with init_empty_weights(include_buffers=False):
        model = make()
    try:
        model.load_state_dict(held, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"{str(source)!r} does not fit its configuration ({format_error(error)})") from error
    check_finite_weights(model, source)
    return model.eval().requires_grad_(False)


def check_unsupported_options(*sections: dict[str, Any]) -> None:
    for section in sections:
        for key, why in UNSUPPORTED_OPTIONS.items():
            if section.get(key):
                raise InputError(f"{key} = {section[key]!r} is not supported: {why}")


def expand_per_unet(value: Any, count: int | None) -> list:
    """A value of each U-Net; one stands for all `count`."""
    if isinstance(value, list | tuple):
        if count is not None and len(value) != count:
            raise InputError(f"a decoder of {count} U-Nets has {len(value)} values for them: {value!r:.80}")
        return list(value)
    return [value] * (count or 1)


def resolve_prediction_type(velocity: bool, sample: bool) -> str:
    return "v_prediction" if velocity else "sample" if sample else "epsilon"


def convert_noise_schedule(kind: Any, steps: Any, objective: str) -> dict[str, Any]:
    """Arguments of DDIMScheduler for a schedule by DALLE2-pytorch's name. Its estimates are cut to [-1, 1]."""
    check_integer("timesteps", steps, 2, 100_000)
    names = {"cosine": "squaredcos_cap_v2", "linear": "linear", "quadratic": "scaled_linear"}
    if kind not in names:
        raise InputError(f"beta_schedule must be one of {', '.join(names)}, got {kind!r:.80}")
    scaled = {"beta_start": 0.1 / steps, "beta_end": 20.0 / steps} if kind != "cosine" else {}
    shared = {"prediction_type": objective, "timestep_spacing": "trailing", "clip_sample": True}
    return {"num_train_timesteps": steps, "beta_schedule": names[kind], **scaled, **shared}


def check_noise_schedule(betas: Tensor | None, arguments: dict[str, Any], source: Path) -> None:
    """Refuse a configuration whose noise schedule is another than the file's."""
    ours = DDIMScheduler(**arguments).betas
    near = 1e-5 if betas is None or betas.dtype == torch.float32 else 1e-2
    if betas is not None and (betas.shape != ours.shape or not torch.allclose(betas.float(), ours, rtol=0, atol=near)):
        said = f"{arguments['beta_schedule']} of {arguments['num_train_timesteps']} steps"
        raise InputError(f"the noise schedule in {str(source)!r} is not its configuration's ({said})")


def check_rotary_frequencies(frequencies: Tensor, name: str, source: Path) -> None:
    width = 2 * len(frequencies)
    ours = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    if not torch.allclose(frequencies.float(), ours, rtol=1e-2):
        raise InputError(f"{name} in {str(source)!r} are not the usual rotary frequencies, which are computed here")


def convert_stored_clip(file: DALLE2File, settings: dict[str, Any], source: Path) -> CLIP | None:
    """The frozen CLIP that a file holds, as this project's; None if it holds none."""
    import open_clip

    held = select_prefixed_tensors(file.state, "clip.clip.", "net.")
    if not held:
        return None
    given = settings.get("clip")
    make, name = (given.get("make"), given.get("model")) if isinstance(given, dict) else (None, None)
    if make not in ("openai", "open_clip") or not isinstance(name, str):
        logger.warning("the CLIP in %s is left out: its configuration does not say which it is", source)
        return None
    # OpenAI's have QuickGELU, which open_clip has under another name: with the plain one embeddings are ruined.
    known_as = name.replace("/", "-") + ("-quickgelu" if make == "openai" else "")
    config = open_clip.get_model_config(known_as)
    if config is None:
        raise InputError(f"open_clip knows no model {known_as!r:.80}, which the configuration names as {make} {name}")
    for extra in ("input_resolution", "context_length", "vocab_size"):
        held.pop(f"net.{extra}", None)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    tokenizer, kind = build_public_tokenizer(known_as, config["text_cfg"])
    clip = build_loaded_model(lambda: CLIP(config, preprocess, kind), held, source)
    clip.tokenizer = tokenizer
    return clip
