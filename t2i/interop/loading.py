"""Load a public model, from one folder or several, as the components of this project's pipelines."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from t2i.diffusion.samplers import remember_training
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.fingerprints import compute_tensors_fingerprint
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import load_clip_towers, load_own_prior, load_prior_scheduler
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import DEFAULT_PRIORS, PublicLayout
from t2i.interop.parts import locate_public_part
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.interop.stored import Dtypes, check_variant, resolve_part_dtype
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder, load_caption_encoder, load_latent_autoencoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.sampling.embeddings import PRIOR_CLASSES

CLIP_TOWERS = ("text_tower", "image_tower")
MISSING_CLIP_HINT = "name a folder or repository that has it as clip=... (--clip)"
MISSING_PART_HINT = "name the folder or repository of the other as prior=... (--prior)"


def load_components(
    folder: SourceFolder,
    prior: SourceFolder | None = None,
    clip: SourceFolder | None = None,
    dtype: Dtypes = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the components of a model in a public layout, by the argument names of `t2i.pipelines.base.UnCLIPPipeline`.

    folder: path of the decoder, or of the whole model. prior: the folder with the prior, where it is another; either of
    the two may hold the decoder. A prior alone, public or of this project, is sampled with the CLIP of `folder` or
    `clip`. clip: the folder with the CLIP, if it is in neither. dtype: data type of the weights, for all components or
    by their names; None is as stored. overrides: components to take their place.

    At most one tensor is held beyond the components. Raises InputError for folders that are no whole model together.
    """
    # Find out which folder holds what, before anything is loaded
    own_prior = prior if prior is not None and prior.layout is None else None
    if own_prior is not None:
        check_own_prior(own_prior)
    folders = [source for source in (folder, None if own_prior else prior, clip) if source is not None]
    check_variant(folder.variant, *(source.path for source in folders))
    components = dict(overrides or {})
    sources = ModelFolders(folders, components)
    sources.check_compatible_parts(own_prior)

    # Load; the decoder's null condition is made by the CLIP
    if "clip" not in components:
        text, image = (sources.find_clip_tower(part) for part in CLIP_TOWERS)
        components["clip"] = load_clip_towers(text, image, resolve_part_dtype(dtype, "clip"))
    if "prior" not in components:
        prior_dtype = resolve_part_dtype(dtype, "prior")
        if own_prior is not None:
            components = load_own_prior(own_prior.path, prior_dtype) | components
        else:
            components = load_model_prior(sources, components["clip"], prior_dtype) | components
    loaded = load_decoder_components(sources.decoder, dtype, components)
    components |= loaded
    if "decoder" in loaded:
        components["decoder"].set_null_condition(components["clip"], components["text_encoder"])
    return components


def check_own_prior(folder: SourceFolder) -> None:
    """Raise InputError for a folder that holds no prior of this project, with what it is instead."""
    known = {prior.__name__ for prior in PRIOR_CLASSES}
    places = (folder.path, folder.path / "model", folder.path / "prior")
    if not any(is_folder(place) and read_model_class(place) in known for place in places):
        folder.require_layout()  # raises


def load_layout_components(source: SourceFolder, layout: PublicLayout, dtype: torch.dtype | None) -> dict | None:
    """Load the components of a public folder that another layout has; None if the folder lacks any of them."""
    check_variant(source.variant, source.path)
    source.check_public_parts()
    parts = layout.part_folders.keys()
    if not all(part in source for part in parts):
        return None
    components: dict[str, Any] = {}
    prior = locate_public_part(source, ("prior",)) if "prior" in parts else None
    if prior is not None:
        # Without its CLIP: the null condition is not in the files of the layout.
        components["prior"] = load_prior_transformer(prior.open_component(), None, dtype)
        components["prior_scheduler"] = load_prior_scheduler(prior)
    if {*CLIP_TOWERS} & parts:
        text, image = (source if part in parts else None for part in CLIP_TOWERS)
        components["clip"] = load_clip_towers(text, image, dtype)
    if layout.family:
        components |= load_decoder_components(source, dtype)
    return components


# The components of a folder


def load_decoder_components(source: SourceFolder, dtype: Dtypes, overrides: Collection[str] = ()) -> dict[str, Any]:
    """Load the decoder, its text encoder, its scheduler and its autoencoder, but for those in `overrides`."""
    loaders = {"text_encoder": load_text_encoder, "decoder": load_decoder, "autoencoder": load_autoencoder}
    components = {
        name: load(source, resolve_part_dtype(dtype, name)) for name, load in loaders.items() if name not in overrides
    }
    if "decoder_scheduler" not in overrides:
        components["decoder_scheduler"] = source.load_scheduler("decoder_scheduler")
    return components


def load_model_prior(sources: "ModelFolders", clip: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Load the prior, with its CLIP's empty caption as null, and its scheduler; nothing if no folder has a prior."""
    if sources.prior is None:
        return {}
    prior = load_prior_transformer(sources.prior.open_component("prior"), clip, dtype)
    if isinstance(prior, EclipsePrior):  # draws in one pass
        return {"prior": prior}
    # Beside the prior, or else in any of the folders
    part = locate_public_part(sources.prior, ("prior",))
    scheduler = None if part is None else load_prior_scheduler(part)
    other = next((source for source in sources.folders if "prior_scheduler" in source), None)
    if scheduler is None and other is not None:
        scheduler = other.load_scheduler("prior_scheduler")
    if scheduler is None and "prior_scheduler" not in sources.overrides:
        raise InputError(
            f"{str(sources.prior.path)!r} is a diffusion prior without a scheduler; name its pipeline, or give "
            "prior_scheduler=..."
        )
    remember_training(prior, scheduler)
    return {"prior": prior, "prior_scheduler": scheduler}


def load_decoder(source: SourceFolder, dtype: torch.dtype | None) -> Any:
    """Load the decoder of a public folder, as the class of its family."""
    match source.family:
        case "karlo":
            return KarloDecoder.from_components(
                source.open_component("unet"), source.open_component("projection"), dtype
            )
        case "kandinsky":
            return KandinskyDecoder.from_component(source.open_component("unet"), dtype)
        case _:
            noising = dict(source.load_scheduler("noising_scheduler").config)
            unet, normalizer = source.open_component("unet"), source.open_component("normalizer")
            return StableUnCLIPDecoder.from_components(unet, normalizer, noising, dtype)


def load_text_encoder(source: SourceFolder, dtype: torch.dtype | None) -> Any:
    """Load the decoder's own text encoder; None if the decoder reads CLIP's tokens, or no caption."""
    if "multilingual_clip" in source:
        tokenizer = source.get_folder("multilingual_tokenizer")
        return MultilingualCLIP.from_component(source.open_component("multilingual_clip"), tokenizer, dtype)
    if "text_encoder" in source:
        return load_caption_encoder(source.open_component("text_encoder"), source.get_folder("text_tokenizer"), dtype)
    return None


def load_autoencoder(source: SourceFolder, dtype: torch.dtype | None) -> Any:
    match source.family:
        case "karlo":
            first, last = source.open_component("super_res_first"), source.open_component("super_res_last")
            scheduler = dict(source.load_scheduler("super_res_scheduler").config)
            low_size = source.open_component("unet").config.get("sample_size")
            return SuperResolution.from_components(first, last, scheduler, low_size, dtype)
        case "kandinsky":
            return MoVQ.from_component(source.open_component("movq"), dtype)
        case _:
            return load_latent_autoencoder(source.open_component("vae"), dtype)


# What belongs together


class ModelFolders:
    """The folders that a model comes in, and which of them holds which part.

    folders: paths of the model, of its prior, and of its CLIP. overrides: names of components that the caller has.
    `decoder`: first folder with a decoder. `prior`: the second folder if it has a prior, else the first that has one.
    """

    decoder: SourceFolder

    def __init__(self, folders: list[SourceFolder], overrides: Collection[str] = ()):
        for folder in folders:
            folder.check_public_parts()
        self.folders, self.overrides = folders, overrides
        self.prior = next((folder for folder in [*folders[1:2], *folders] if "prior" in folder), None)
        decoder = next((folder for folder in folders if folder.family), None)
        if decoder is None:
            raise InputError(f"{describe_folder(folders[0])}, holds no decoder; {MISSING_PART_HINT}")
        self.decoder = decoder

    def find_clip_tower(self, part: str) -> SourceFolder | None:
        """Return the folder of a tower of CLIP: the caller's, or else the one beside the prior trained with it."""
        order = [*self.folders[2:], *([self.prior] if self.prior else []), *self.folders]
        return next((folder for folder in order if part in folder), None)

    def check_compatible_parts(self, own_prior: SourceFolder | None = None) -> None:
        """Raise InputError for parts that are no whole model, or do not belong together. own_prior: one of ours."""
        if "clip" in self.overrides:
            return
        self.check_clip_found(own_prior)
        for part in CLIP_TOWERS:
            self.check_same_towers(part)
        (reader, width), *others = self.collect_embed_sizes()
        for owner, size in others:
            if size != width:
                raise InputError(
                    f"{reader} reads embeddings of {width} dimensions, {owner} makes them of {size}; "
                    "they were not trained together"
                )

    def check_clip_found(self, own_prior: SourceFolder | None) -> None:
        """Raise InputError if no folder has a CLIP, or none the text encoder that the prior reads."""
        # No tower at all, or none for the captions that a prior reads
        first, prior = self.folders[0], own_prior or self.prior
        if not any(self.find_clip_tower(part) for part in CLIP_TOWERS):
            layout_name = first.require_layout().name
            example = next((place for name, place in DEFAULT_PRIORS.items() if name.endswith(layout_name)), None)
            hint = f", such as {example}" if example else ""
            if prior is None:
                raise InputError(f"{describe_folder(first)}, holds no prior and no CLIP; {MISSING_PART_HINT}{hint}")
            raise InputError(
                f"neither {describe_folder(first)}, nor the prior in {str(prior.path)!r} holds a CLIP; "
                f"{MISSING_CLIP_HINT}{hint}"
            )
        if prior is not None and self.find_clip_tower("text_tower") is None:
            raise InputError(
                f"{str(prior.path)!r} is a prior, for which there is no text encoder of its CLIP; {MISSING_CLIP_HINT}"
            )

    def collect_embed_sizes(self) -> list[tuple[str, Any]]:
        """Return each part that reads or makes z_i, and the width of its z_i. The decoder is the first."""
        sizes = [(f"the decoder in {str(self.decoder.path)!r}", read_decoder_embed_dim(self.decoder))]
        if self.prior is not None:
            size = self.prior.open_component("prior").config.get("embedding_dim", 768)
            sizes.append((f"the prior in {str(self.prior.path)!r}", size))
        for part in CLIP_TOWERS:
            if (folder := self.find_clip_tower(part)) is not None:
                name = "text_projection.weight" if part == "text_tower" else "visual_projection.weight"
                width = read_matrix_side(folder.open_component(part), name, 0)
                sizes.append((f"the CLIP in {str(folder.path)!r}", width))
        return sizes

    def check_same_towers(self, part: str) -> None:
        """Raise InputError if two of the folders have different towers."""
        folders = [folder for folder in self.folders if part in folder]
        digests = [compute_tower_digest(folder.open_component(part)) for folder in folders] if len(folders) > 1 else []
        for folder, digest in zip(folders[1:], digests[1:]):
            if digest != digests[0]:
                kind = "text encoders" if part == "text_tower" else "image encoders"
                raise InputError(
                    f"{str(folders[0].path)!r} and {str(folder.path)!r} are of different CLIPs: their {kind} are "
                    f"{digests[0]} and {digest}; they were not trained together"
                )


def describe_folder(folder: SourceFolder) -> str:
    return f"{str(folder.path)!r}, {folder.require_layout().title}"


def read_decoder_embed_dim(source: SourceFolder) -> Any:
    """Return the width of the z_i that a decoder reads, from its configuration or its header."""
    match source.family:
        case "karlo":
            return source.open_component("projection").config.get("clip_embeddings_dim", 768)
        case "kandinsky":
            return read_matrix_side(source.open_component("unet"), "add_embedding.image_proj.weight", 1)
        case _:
            return source.open_component("normalizer").config.get("embedding_dim", 768)


def read_matrix_side(component: Component, name: str, axis: int) -> int:
    if name not in component.tensor_specs or len(component.tensor_specs[name].shape) != 2:
        raise InputError(f"{str(component.folder)!r} has no matrix {name!r}, which has the width of its embeddings")
    return component.tensor_specs[name].shape[axis]


def compute_tower_digest(component: Component) -> str:
    """Return 16 hexadecimal digits for a tower's weights, the same in fp32 and fp16."""
    # Old files have tables of positions beside the weights, in integers.
    tensors = {name: tensor for name, tensor in component.iterate_tensors() if tensor.is_floating_point()}
    return compute_tensors_fingerprint(tensors)
