"""Load a public prior or decoder so that training can start from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.parts import PublicPart, find_public_part
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder
from t2i.texts import wrap_text

PublicDecoder = KarloDecoder | KandinskyDecoder | StableUnCLIPDecoder
PUBLIC_DECODERS = (KarloDecoder, KandinskyDecoder, StableUnCLIPDecoder)
DECODER_PARTS = ("projection", "normalizer", "noising_scheduler")  # that a public decoder may have beside its U-Net


def find_trainable_part(init: str | None, part: str, others: tuple[str, ...] = ()) -> PublicPart | None:
    """Find the part of the public model `init`; None if it is not a public model's name.

    Raises InputError for a public model that is not trained here.
    """
    if init is None:
        return None
    if is_folder(init) and (class_name := str(read_model_class(Path(init)))).startswith("DALLE2"):
        raise InputError(f"{init!r} is a {class_name}: converted models of DALLE2-pytorch are not trained here")
    public = find_public_part(init, (part,), others)
    config = {} if public is None else public.open_component().config
    if part == "unet" and config.get("addition_embed_type") == "image_hint":
        raise InputError(
            f"{init!r} has a ControlNet's U-Net, which is not trained here: no data set has its control images"
        )
    return public


@dataclass(frozen=True)
class CLIPSummary:
    """The properties of a CLIP that a prior needs, for a caller that has not loaded the CLIP."""

    embed_dim: int
    text_width: int
    unit_length: bool
    null: TextEncoding  # of the empty caption

    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        assert wrap_text(texts) == [""], "the summary contains the empty caption alone"
        return self.null


def load_trainable_prior(part: PublicPart, clip: CLIPSummary) -> Prior | EclipsePrior:
    """Load a PriorTransformer in fp32: as a Prior, whose null is the CLIP's empty caption, or as an EclipsePrior."""
    return load_prior_transformer(part.open_component(), clip, torch.float32).requires_grad_(True)


def load_trainable_decoder(part: PublicPart, load_clip: Callable[[], Any], text_encoder: Any = None) -> PublicDecoder:
    """Load a public decoder, in fp32; its null is made by the CLIP of `load_clip()` and the text encoder."""
    unet = part.open_component()
    decoder: PublicDecoder
    # The public U-Nets are told apart by how they take z_i
    match unet.config.get("class_embed_type"):
        case "identity":
            decoder = KarloDecoder.from_components(unet, part.open_component("projection"), torch.float32)
        case "projection":
            normalizer, noising = part.open_component("normalizer"), part.source.load_scheduler("noising_scheduler")
            decoder = StableUnCLIPDecoder.from_components(unet, normalizer, dict(noising.config), torch.float32)
        case _:
            decoder = KandinskyDecoder.from_component(unet, torch.float32)
    decoder.set_null_condition(load_clip(), text_encoder)
    return decoder.requires_grad_(True)
