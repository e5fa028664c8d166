"""The pipeline folder: what its parts may be, and what is refused before anything of it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from diffusers import SchedulerMixin

from t2i.diffusion.stored_schedulers import PROJECT_SCHEDULERS, check_scheduler_folder
from t2i.errors import InputError
from t2i.files.untrusted import check_folder_files, check_model_folder, is_folder, read_config
from t2i.interop.layouts import LAYOUTS_BY_CLASS, find_public_layout, read_folder_class
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder, DALLE2Pixels
from t2i.networks.decoder import Decoder
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import TextEncoder
from t2i.networks.unet_decoder import UNetDecoder
from t2i.networks.upsampler import Upsampler
from t2i.sampling.embeddings import PRIOR_CLASSES

AnyCLIP: TypeAlias = CLIP | TransformersCLIP
AnyDecoder: TypeAlias = Decoder | UNetDecoder | KarloDecoder | KandinskyDecoder | StableUnCLIPDecoder | DALLE2Decoder
AnyAutoencoder: TypeAlias = Autoencoder | MoVQ | SuperResolution | DALLE2Pixels | DALLE2Cascade
AnyTextEncoder: TypeAlias = TextEncoder | MultilingualCLIP
COMPONENT_CLASSES: dict[str, tuple[type, ...]] = {  # what a folder's components may be; a part of the file format
    "clip": get_args(AnyCLIP),
    "prior": PRIOR_CLASSES,
    "prior_scheduler": (SchedulerMixin,),
    "decoder": get_args(AnyDecoder),
    "decoder_scheduler": (SchedulerMixin,),
    "autoencoder": get_args(AnyAutoencoder),
    "upsampler": (Upsampler,),
    "upsampler_scheduler": (SchedulerMixin,),
    "text_encoder": get_args(AnyTextEncoder),
}
# What a folder may do without.
OPTIONAL_COMPONENTS: tuple[str, ...] = ("prior", "prior_scheduler", "upsampler", "upsampler_scheduler", "text_encoder")
PIPELINE_NAMES = (  # whose folders these may be; all load in each of them
    "Text2ImagePipeline",
    "ImageToImagePipeline",
    "InpaintPipeline",
    "OutpaintPipeline",
    "ImageVariationPipeline",
    "InterpolationPipeline",
    "TextDiffPipeline",
)


def is_own_layout(path: Path) -> bool:
    """Whether a folder is in this project's own layout, or is no pipeline's at all: a part of one, or damaged."""
    index = path / "model_index.json"
    if not index.is_file():
        return read_folder_class(path) not in LAYOUTS_BY_CLASS
    entries = read_config(index)
    return entries.get("_class_name") in PIPELINE_NAMES


def check_pipeline_folder(path: Path, names: list[str], variant: str | None = None) -> None:
    """Refuse a folder that is no whole pipeline of this project's own parts, or where one of `names` is not sound."""
    index = path / "model_index.json"
    if not index.is_file():
        find_public_layout(path)  # which says what the folder is instead
    check_folder_files(path)
    entries = read_config(index)
    if unknown := sorted(key for key in entries.keys() - COMPONENT_CLASSES.keys() if not key.startswith("_")):
        raise InputError(f"{str(index)!r} has {unknown[0]!r:.80}; it may have {', '.join(COMPONENT_CLASSES)}")
    if entries.get("_class_name") not in PIPELINE_NAMES:
        raise InputError(
            f"{str(index)!r} is of {entries.get('_class_name')!r:.80}; it must be a {' or '.join(PIPELINE_NAMES)}"
        )
    absent = [name for name in OPTIONAL_COMPONENTS if entries.get(name, [None, None]) == [None, None]]
    needed = [name for name in COMPONENT_CLASSES if name not in absent]
    if missing := [name for name in needed if name not in entries or not is_folder(path / name)]:
        raise InputError(f"{str(path)!r} is incomplete: it lacks the folders {', '.join(missing)}")
    for name in names:
        if name not in absent:
            check_component_folder(path, name, entries[name], variant)


def find_component_class(name: str, entry: Any) -> Any:
    """The class, of those that a component may be of, that an entry of the index names; None for any other."""
    return next((part for part in COMPONENT_CLASSES[name] if entry == [part.__module__, part.__name__]), None)


def check_component_types(components: Mapping[str, Any]) -> None:
    """Refuse objects of other classes than the parts have, by name; None is no part."""
    for name, one in components.items():
        found = getattr(one, "_orig_mod", one)  # of what torch.compile made of it
        if one is not None and not isinstance(found, COMPONENT_CLASSES[name]):
            allowed = " or ".join(part.__name__ for part in COMPONENT_CLASSES[name])
            raise InputError(f"{name} must be a {allowed}, got {one!r:.80}, a {type(one).__name__}")


def check_component_folder(path: Path, name: str, entry: Any, variant: str | None) -> None:
    """Refuse a component of a class that is not one of ours, or whose files are not sound."""
    home, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if COMPONENT_CLASSES[name] == (SchedulerMixin,) and home in ("diffusers", *PROJECT_SCHEDULERS):
        check_scheduler_folder(path / name, kind, path, home)
    elif part := find_component_class(name, entry):
        check_model_folder(part, path / name, path, variant)
    else:
        allowed = f"{str(entry)[:80]} as {name}; only this project's own parts are loaded"
        raise InputError(f"{str(path / 'model_index.json')!r} asks for {allowed}")
