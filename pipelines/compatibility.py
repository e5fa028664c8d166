"""Which components of a pipeline go together."""

from collections.abc import Mapping
from typing import Any

from t2i.pipelines.folder import check_component_types

from t2i.diffusion.samplers import check_scheduler_sampling
from t2i.errors import InputError


def check_components(components: Mapping[str, Any]) -> None:
    """Raise InputError for components of other classes, and for those that were not trained together.

    components: the arguments of `UnCLIPPipeline`, by name.
    """
    check_component_types(components)
    clip, decoder, autoencoder = (components[name] for name in ("clip", "decoder", "autoencoder"))
    prior, prior_scheduler, upsampler = (components[name] for name in ("prior", "prior_scheduler", "upsampler"))
    for name in ("decoder_scheduler", "prior_scheduler"):
        if components[name] is not None:
            check_scheduler_sampling(name, components[name])

    # All belong to one CLIP, and the decoder to its autoencoder and text encoder
    for name, model in {"prior": prior, "decoder": decoder, "upsampler": upsampler}.items():
        check_clip_fingerprint(name, model, clip)
    for name, model in {"prior": prior, "decoder": decoder}.items():
        if model is not None:
            check_embed_widths(name, model, clip)
    check_text_encoder(decoder, components["text_encoder"])
    if decoder.config.latent_channels != autoencoder.channels:
        channels = f"{decoder.config.latent_channels} channels, the autoencoder's have {autoencoder.channels}"
        raise InputError(f"the decoder's latents have {channels}; they were not trained together")

    # Models and their schedulers
    if (prior is None or not prior.needs_scheduler) != (prior_scheduler is None):
        what = "no prior" if prior is None else f"as prior a {type(prior).__name__}"
        has = "no prior_scheduler" if prior_scheduler is None else "a prior_scheduler"
        raise InputError(f"this pipeline has {what} and {has}; only the diffusion prior goes with a scheduler")
    if (upsampler is None) != (components["upsampler_scheduler"] is None):
        raise InputError("upsampler and upsampler_scheduler go together; one of them is missing")


def check_clip_fingerprint(name: str, model: Any, clip: Any) -> None:
    """Raise InputError for a model that was trained with another CLIP. Without a model or a CLIP nothing is checked."""
    fingerprint = None if model is None or clip is None else model.config.clip_fingerprint
    if fingerprint is not None and fingerprint != clip.identity:
        raise InputError(f"the {name} was trained with the CLIP {fingerprint}, this pipeline has {clip.identity}")


def check_embed_widths(name: str, model: Any, clip: Any) -> None:
    """Raise InputError if a model's embeddings, or the token states that it reads, have other widths than the CLIP's.

    Not all public models store a fingerprint: their widths alone show that a CLIP is another one.
    """
    if model.config.embed_dim != clip.embed_dim:
        width = f"the CLIP's have {clip.embed_dim}"
        raise InputError(f"the {name}'s embeddings have {model.config.embed_dim} dimensions, {width}: another CLIP")
    states = model.states_width
    if states is not None and clip.reads_captions and states != clip.text_width:
        width = f"the CLIP's have {clip.text_width}"
        raise InputError(f"the {name} reads token states of {states} dimensions, {width}: another CLIP")


def check_text_encoder(decoder: Any, text_encoder: Any) -> None:
    """Raise InputError for another text encoder than the decoder was trained with, for one too many, or for none."""
    expected = decoder.config.get("text_encoder_fingerprint")
    identity = None if text_encoder is None else text_encoder.identity
    if identity != expected:
        captions = f"captions from the text encoder {expected}" if expected else "no text encoder's captions"
        raise InputError(f"the decoder was trained with {captions}, this pipeline has {identity or 'no text encoder'}")
