"""What training takes from public models: the component that it starts from, and the frozen ones beside it.

`init`, `clip` and `autoencoder` of a configuration name the folder of a public pipeline, the folder of one of its
components, such as FOLDER/unet, or a repository on the hub.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.component import Component, read_model_index
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.fetching import fetch_model_folder
from t2i.interop.layouts import LAYOUTS, LAYOUTS_BY_CLASS, PART_CLASSES, TRANSFORMERS_PARTS, PublicLayout
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.networks.prior import Prior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.super_resolution import SuperResolution

PublicDecoder = KarloDecoder | KandinskyDecoder
PUBLIC_DECODERS, PUBLIC_AUTOENCODERS = (KarloDecoder, KandinskyDecoder), (MoVQ, SuperResolution)  # of public models


@dataclass(frozen=True)
class PublicPart:
    """A part of a public pipeline.

    part: as `t2i.interop.layouts` calls it. folder: of the part. root: of the pipeline, or `folder` again, where the
    part lies alone. layout: of the pipeline.
    """

    part: str
    folder: Path
    root: Path
    layout: PublicLayout | None

    def find_part_folder(self, part: str) -> Path | None:
        """The folder of another part of the pipeline, if it is there."""
        place = None if self.layout is None else self.layout.part_folders.get(part)
        return self.root / place if place is not None and is_folder(self.root / place) else None

    def require_part_folder(self, part: str) -> Path:
        """The same. Raises InputError if it is not there."""
        folder = self.find_part_folder(part)
        if folder is None:
            missing = part if self.layout is None else self.layout.part_folders.get(part, part)
            raise InputError(
                f"{str(self.folder)!r} goes with the folder {missing!r} of its pipeline, which is not there; name the "
                "folder of a whole pipeline, or of a part in one"
            )
        return folder

    def read_component(self, part: str | None = None) -> Component:
        """This part, or another one, checked but for its tensors. Raises InputError if it is not there."""
        stem = "model" if (part or self.part) in TRANSFORMERS_PARTS else "diffusion_pytorch_model"
        return Component(self.folder if part is None else self.require_part_folder(part), self.root, stem=stem)


def find_public_part(name: str, parts: tuple[str, ...], others: tuple[str, ...] = ()) -> PublicPart | None:
    """Where a part of the public model of this name is, the first of `parts` that it has; None for other models.

    Of a repository on the hub these parts alone are fetched, with `others` and all configurations.
    Raises InputError for a public pipeline without it, or a name that is neither a folder nor on the hub.
    """
    if not is_folder(name) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is None:
        return None
    path = fetch_model_folder(name, (*parts, *others), otherwise=build_file_patterns(*parts, *others)).absolute()
    layout = read_folder_layout(path)
    if layout is not None:
        part = next((part for part in parts if part in layout.part_folders), None)
        if part is None:
            held = ", ".join(layout.part_folders.values())
            missing = " or ".join(parts)
            raise InputError(f"{name!r} is {layout.title} ({layout.name}): it holds {held}, and no {missing}")
        return PublicPart(part, path / layout.part_folders[part], path, layout)
    home, kind = read_folder_layout(path.parent), read_model_class(path)
    if home is not None:
        part = next((part for part in parts if home.part_folders.get(part) == path.name), None)
        if part is not None:
            return PublicPart(part, path, path.parent, home)
    alone = [part for part in parts if part not in TRANSFORMERS_PARTS]  # these are nothing without their tokenizer
    part = next((part for part in alone if kind in PART_CLASSES[part]), None)
    return None if part is None else PublicPart(part, path, path, None)


def read_folder_layout(folder: Path) -> PublicLayout | None:
    name = read_model_index(folder).get("_class_name")
    return LAYOUTS_BY_CLASS.get(name) if isinstance(name, str) else None


def build_file_patterns(*parts: str) -> list[str]:
    """Patterns of the files of these parts, and of all configurations, in any layout: where no list of them is had."""
    places = sorted(
        {layout.part_folders[part] for layout in LAYOUTS for part in parts if part in layout.part_folders} - {"."}
    )
    stems = [f"{stem}{end}.safetensors" for stem in ("diffusion_pytorch_model", "model") for end in ("", "-*")]
    return ["*.json", "*.txt", *(f"{place}/{stem}" for place in places for stem in stems)]  # * matches folders too


def check_part_trainable(init: str | None, part: str, others: tuple[str, ...] = ()) -> None:
    """Refuse to start from a public model that is not trained here, before anything else is loaded."""
    if init is not None and is_folder(init) and (kind := str(read_model_class(Path(init)))).startswith("DALLE2"):
        raise InputError(f"{init!r} is a {kind}: converted models of DALLE2-pytorch are not trained here")
    found = None if init is None else find_public_part(init, (part,), others)
    config = {} if found is None else found.read_component().config
    if part == "unet" and config.get("class_embed_type") == "projection":
        raise InputError(
            f"{init!r} has the U-Net of Stable unCLIP, which is not trained here; of public models, Karlo's and "
            "Kandinsky's decoders are"
        )
    if part == "prior" and config.get("additional_embeddings", 4) == 3:
        raise InputError(
            f"{init!r} has an ECLIPSE prior, which draws in one pass: there is no noise to train it with; start from a "
            "diffusion prior (additional_embeddings 4)"
        )


@dataclass(frozen=True)
class CLIPSummary:
    """Of a CLIP what a prior asks, without the CLIP."""

    embed_dim: int
    text_width: int
    unit_length: bool
    null: TextEncoding

    def encode_text(self, texts: list[str]) -> TextEncoding:
        assert texts == [""], "the empty caption alone is known"
        return self.null


def load_trainable_prior(found: PublicPart, clip: CLIPSummary) -> Prior:
    """A PriorTransformer as this project's Prior, in fp32, to be trained; its null is `clip`'s empty caption."""
    prior = load_prior_transformer(found.read_component(), clip, torch.float32)
    assert isinstance(prior, Prior), "others were refused before"
    return prior.requires_grad_(True)


def load_trainable_decoder(found: PublicPart, load_clip: Callable[[], Any], text_encoder: Any = None) -> PublicDecoder:
    """Karlo's or Kandinsky's decoder in fp32, to be trained; its null is what `load_clip()` says of nothing."""
    part = found.read_component()
    decoder: PublicDecoder
    match part.config.get("class_embed_type"):
        case "identity":
            decoder = KarloDecoder.from_components(part, found.read_component("projection"), torch.float32)
        case _:
            decoder = KandinskyDecoder.from_component(part, torch.float32)
    decoder.set_null_condition(load_clip(), text_encoder)
    return decoder.requires_grad_(True)
