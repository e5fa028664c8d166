"""A public model as the components of this project's pipelines, from the folder or the folders that it comes in."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UnCLIPScheduler

from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import load_model, read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import load_public_clip
from t2i.interop.layouts import (
    DEFAULT_PRIORS,
    LAYOUTS_BY_CLASS,
    PublicFolder,
    PublicLayout,
    find_public_layout,
    read_folder_class,
)
from t2i.interop.parts import PublicPart, find_public_part
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.interop.stored import Dtypes, check_variant, has_public_parts, read_stored_dtypes, resolve_part_dtype
from t2i.networks.clip import CLIP
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder, load_caption_encoder, load_latent_autoencoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.sampling.embeddings import PRIOR_CLASSES, load_prior

CLIP_TOWERS = ("text_tower", "image_tower")
MISSING_CLIP_HINT = "name a folder or repository that has it as clip=... (--clip)"
MISSING_PART_HINT = "name the folder or repository of the other as prior=... (--prior)"


def load_components(
    folder: str | Path,
    prior: str | Path | None = None,
    clip: str | Path | None = None,
    dtype: Dtypes = None,
    variant: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The components of `t2i.pipelines.base.UnCLIPPipeline`, by its argument names, of a model in a public layout.

    Args:
        folder: of the decoder, or of the whole model.
        prior: the folder that holds the prior, where it is another; of the two either may be `folder`. A prior alone,
            public or of this project, draws embeddings of the CLIP in the other folder.
        clip: the folder that the CLIP is in, if it is in neither.
        dtype: of the weights, of all parts or by their names; None, and what is not named, are left as they are stored.
        variant: of the weights' files, such as "fp16".
        given: components that the caller has, instead of those of the folders.

    At most one tensor is held beyond the components. Raises InputError, in one line, for folders that are no whole
    model together, or that do not belong together.
    """
    found = dict(given or {})
    ours = None if prior is None or read_folder_class(Path(prior)) in LAYOUTS_BY_CLASS else prior
    if ours is not None:
        check_own_prior(Path(ours))
    paths = [Path(path) for path in (folder, None if ours else prior, clip) if path is not None]
    check_variant(variant, *paths)
    sources = ModelFolders([PublicFolder(path, variant) for path in paths], found)
    sources.check_compatible_parts(ours)
    if "clip" not in found:
        found["clip"] = load_model_clip(sources, resolve_part_dtype(dtype, "clip"))
    if "text_encoder" not in found:
        found["text_encoder"] = load_folder_text_encoder(sources.decoder, resolve_part_dtype(dtype, "text_encoder"))
    if "prior" not in found:
        of_prior = resolve_part_dtype(dtype, "prior")
        found |= load_model_prior(sources, found["clip"], of_prior) if ours is None else load_own_prior(ours, of_prior)
    if "decoder" not in found:
        found["decoder"] = load_folder_decoder(sources.decoder, resolve_part_dtype(dtype, "decoder"))
        found["decoder"].set_null_condition(found["clip"], found["text_encoder"])
    if "decoder_scheduler" not in found:
        found["decoder_scheduler"] = sources.decoder.load_scheduler("decoder_scheduler")
    if "autoencoder" not in found:
        found["autoencoder"] = load_folder_autoencoder(sources.decoder, resolve_part_dtype(dtype, "autoencoder"))
    return found


def load_model_clip(sources: "ModelFolders", dtype: torch.dtype | None) -> TransformersCLIP:
    return load_clip_towers(sources.find_clip_tower("text_tower"), sources.find_clip_tower("image_tower"), dtype)


def load_clip_towers(
    text: PublicFolder | None, image: PublicFolder | None, dtype: torch.dtype | None
) -> TransformersCLIP:
    return TransformersCLIP.from_components(
        text=None if text is None else text.read_component("text_tower"),
        tokenizer=None if text is None else text.folder("tokenizer"),
        vision=None if image is None else image.read_component("image_tower"),
        processor=None if image is None else image.folder("image_processor"),
        dtype=dtype,
    )


def load_model_prior(sources: "ModelFolders", clip: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """The prior, told what its CLIP says of the empty caption, and its scheduler; nothing where there is none."""
    if sources.prior is None:
        return {}
    prior = load_prior_transformer(sources.prior.read_component("prior"), clip, dtype)
    if isinstance(prior, EclipsePrior):  # it draws in one pass
        return {"prior": prior}
    found = find_public_part(str(sources.prior.path), ("prior",))
    scheduler = None if found is None else load_prior_scheduler(found)
    home = next((one for one in sources.folders if "prior_scheduler" in one), None)
    if scheduler is None and home is not None:
        scheduler = home.load_scheduler("prior_scheduler")
    if scheduler is None and "prior_scheduler" not in sources.given:
        raise InputError(
            f"{str(sources.prior.path)!r} is a diffusion prior without a scheduler; name its pipeline, or give "
            "prior_scheduler=..."
        )
    return {"prior": prior, "prior_scheduler": scheduler}


def check_own_prior(folder: Path) -> None:
    """Refuse a folder that is neither a prior of this project nor in a public layout, saying what it is."""
    known = {prior.__name__ for prior in PRIOR_CLASSES}
    if not any(
        is_folder(part) and read_model_class(part) in known for part in (folder, folder / "model", folder / "prior")
    ):
        find_public_layout(folder)


def load_own_prior(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """One of this project's, such as what `t2i convert` wrote or a fine-tuned one, and its scheduler if it has one.

    dtype: None is float32, or that of the files in a folder that holds a public model.
    """
    prior, scheduler = load_prior(folder)
    if dtype is None and is_folder(folder) and has_public_parts(Path(folder)):
        dtype = read_stored_dtypes(Path(folder)).get("prior")
    if prior is not None and dtype is not None:
        prior.to(dtype)
    return {"prior": prior, "prior_scheduler": scheduler}


def load_any_prior(
    folder: str | Path, load_clip: Callable[[], Any], dtype: torch.dtype | None = None, variant: str | None = None
) -> dict[str, Any]:
    """A prior of this project, or a public one, alone or in its pipeline, for the CLIP of `load_clip()`.

    With its scheduler, as `load_prior_scheduler`, unless it is a PriorTransformer and none lies beside it.
    """
    found = find_public_part(str(folder), ("prior",))
    if found is None:
        return load_own_prior(folder, dtype)
    prior = load_prior_transformer(Component(found.folder, found.root, variant), load_clip(), dtype)
    if isinstance(prior, EclipsePrior):
        return {"prior": prior, "prior_scheduler": None}
    scheduler = load_prior_scheduler(found)
    return {"prior": prior} | ({} if scheduler is None else {"prior_scheduler": scheduler})


def load_prior_scheduler(found: PublicPart) -> SchedulerMixin | None:
    """Of a public prior: its pipeline's, or the one in the folder `load_scheduler` of an exported one; None without
    any."""
    folder = found.find_part_folder("prior_scheduler") or found.folder / "scheduler"
    if not is_folder(folder):
        return None
    made = load_scheduler(folder, found.root)
    return UnCLIPRespacedScheduler.from_config(made.config) if isinstance(made, UnCLIPScheduler) else made


def load_any_clip(folder: str | Path) -> Any:
    """The CLIP of a pipeline, public or of this project, or of a folder that `t2i train clip` wrote; in fp32."""
    path = Path(folder)
    in_pipeline = is_folder(path / "clip") and (path / "model_index.json").is_file()
    found = None if in_pipeline else load_public_clip(str(folder))
    return load_model((CLIP, TransformersCLIP), path / "clip" if in_pipeline else path) if found is None else found


def load_layout_components(
    folder: Path, layout: PublicLayout, dtype: torch.dtype | None, variant: str | None
) -> dict[str, Any] | None:
    """Of a public folder what another layout needs, and nothing else; None if the folder has not all of it."""
    check_variant(variant, folder)
    source = PublicFolder(folder, variant)
    parts = layout.part_folders.keys()
    if not parts <= source.layout.part_folders.keys():
        return None
    components: dict[str, Any] = {}
    if "prior" in parts and (found := find_public_part(str(folder), ("prior",))) is not None:
        # Without its CLIP: what it reads without a caption is not in the files of the layout.
        components["prior"] = load_prior_transformer(Component(found.folder, found.root, variant), None, dtype)
        components["prior_scheduler"] = load_prior_scheduler(found)
    if {*CLIP_TOWERS} & parts:
        text, image = (source if part in parts else None for part in CLIP_TOWERS)
        components["clip"] = load_clip_towers(text, image, dtype)
    if layout.family:
        components["text_encoder"] = load_folder_text_encoder(source, dtype)
        components["decoder"] = load_folder_decoder(source, dtype)
        components["decoder_scheduler"] = source.load_scheduler("decoder_scheduler")
        components["autoencoder"] = load_folder_autoencoder(source, dtype)
    return components


def load_folder_decoder(source: PublicFolder, dtype: torch.dtype | None) -> Any:
    match source.layout.family:
        case "karlo":
            return KarloDecoder.from_components(
                source.read_component("unet"), source.read_component("projection"), dtype
            )
        case "kandinsky":
            return KandinskyDecoder.from_component(source.read_component("unet"), dtype)
        case _:
            noising = dict(source.load_scheduler("noising_scheduler").config)
            parts = (source.read_component("unet"), source.read_component("normalizer"))
            return StableUnCLIPDecoder.from_components(*parts, noising, dtype)


def load_folder_text_encoder(source: PublicFolder, dtype: torch.dtype | None) -> Any:
    """The decoder's own; None where it reads CLIP's tokens or none."""
    if "multilingual_clip" in source:
        part, tokenizer = source.read_component("multilingual_clip"), source.folder("multilingual_tokenizer")
        return MultilingualCLIP.from_component(part, tokenizer, dtype)
    if "text_encoder" in source:
        return load_caption_encoder(source.read_component("text_encoder"), source.folder("text_tokenizer"), dtype)
    return None


def load_folder_autoencoder(source: PublicFolder, dtype: torch.dtype | None) -> Any:
    match source.layout.family:
        case "karlo":
            first, last = source.read_component("super_res_first"), source.read_component("super_res_last")
            scheduler = dict(source.load_scheduler("super_res_scheduler").config)
            low_size = source.read_component("unet").config.get("sample_size")
            return SuperResolution.from_components(first, last, scheduler, low_size, dtype)
        case "kandinsky":
            return MoVQ.from_component(source.read_component("movq"), dtype)
        case _:
            return load_latent_autoencoder(source.read_component("vae"), dtype)


class ModelFolders:
    """The folders that a model comes in, and which of them has what.

    decoder: the first that has one. prior: the second folder's, for it is named as the prior's, or else the first's.
    """

    decoder: PublicFolder

    def __init__(self, folders: list[PublicFolder], given: Collection[str] = ()):
        self.folders, self.given = folders, given
        self.prior = next((one for one in [*folders[1:2], *folders] if "prior" in one), None)
        decoder = next((one for one in folders if one.layout.family), None)
        if decoder is None:
            first = folders[0]
            raise InputError(f"{str(first.path)!r}, {first.layout.title}, holds no decoder; {MISSING_PART_HINT}")
        self.decoder = decoder

    def find_clip_tower(self, part: str) -> PublicFolder | None:
        """Where a tower of CLIP is: beside the prior that was trained with it, if it is there."""
        order = [*self.folders[2:], *([self.prior] if self.prior else []), *self.folders]
        return next((one for one in order if part in one), None)

    def check_compatible_parts(self, own: str | Path | None = None) -> None:
        """Refuse what is no whole model, or does not belong together. Reads towers that several folders have.

        own: a prior of this project's.
        """
        if "clip" in self.given:
            return
        first, prior = self.folders[0], own or (None if self.prior is None else self.prior.path)
        if not any(self.find_clip_tower(part) for part in CLIP_TOWERS):
            usual = next((prior for name, prior in DEFAULT_PRIORS.items() if name.endswith(first.layout.name)), None)
            hint = f", such as {usual}" if usual else ""
            if prior is None:
                raise InputError(
                    f"{str(first.path)!r}, {first.layout.title}, holds no prior and no CLIP; {MISSING_PART_HINT}{hint}"
                )
            raise InputError(
                f"neither {str(first.path)!r}, {first.layout.title}, nor the prior in {str(prior)!r} holds a CLIP; "
                f"{MISSING_CLIP_HINT}{hint}"
            )
        if prior is not None and self.find_clip_tower("text_tower") is None:
            raise InputError(
                f"{str(prior)!r} is a prior, for which there is no text encoder of its CLIP; {MISSING_CLIP_HINT}"
            )
        for part in CLIP_TOWERS:
            self.check_same_towers(part)
        sizes = self.collect_embed_sizes()
        for what, size in sizes[1:]:
            if size != sizes[0][1]:
                raise InputError(
                    f"{sizes[0][0]} reads embeddings of {sizes[0][1]} dimensions, {what} makes them of {size}; "
                    "they were not trained together"
                )

    def collect_embed_sizes(self) -> list[tuple[str, Any]]:
        """What reads or makes z_i, and of how many dimensions."""
        found = [(f"the decoder in {str(self.decoder.path)!r}", read_decoder_embed_dim(self.decoder))]
        if self.prior is not None:
            size = self.prior.read_component("prior").config.get("embedding_dim", 768)
            found.append((f"the prior in {str(self.prior.path)!r}", size))
        for part in CLIP_TOWERS:
            if (home := self.find_clip_tower(part)) is not None:
                found.append((f"the CLIP in {str(home.path)!r}", read_tower_embed_dim(home, part)))
        return found

    def check_same_towers(self, part: str) -> None:
        """Refuse folders with different towers, each in its place."""
        homes = [one for one in self.folders if part in one]
        digests = [compute_tower_digest(home.read_component(part)) for home in homes] if len(homes) > 1 else []
        for home, digest in zip(homes[1:], digests[1:]):
            if digest != digests[0]:
                pair = f"{str(homes[0].path)!r} and {str(home.path)!r}"
                which = "text encoders" if part == "text_tower" else "image encoders"
                raise InputError(
                    f"{pair} are of different CLIPs: their {which} are {digests[0]} and {digest}; "
                    "they were not trained together"
                )


def read_decoder_embed_dim(source: PublicFolder) -> Any:
    """Dimensions of the z_i that a decoder reads, by its configuration and its header."""
    match source.layout.family:
        case "karlo":
            return source.read_component("projection").config.get("clip_embeddings_dim", 768)
        case "kandinsky":
            return read_matrix_side(source.read_component("unet"), "add_embedding.image_proj.weight", 1)
        case _:
            return source.read_component("normalizer").config.get("embedding_dim", 768)


def read_tower_embed_dim(source: PublicFolder, part: str) -> int:
    name = "text_projection.weight" if part == "text_tower" else "visual_projection.weight"
    return read_matrix_side(source.read_component(part), name, 0)


def read_matrix_side(component: Component, name: str, axis: int) -> int:
    """A side of a matrix that must be there."""
    if name not in component.tensor_specs or len(component.tensor_specs[name].shape) != 2:
        raise InputError(f"{str(component.folder)!r} has no matrix {name!r}, which tells the size of its embeddings")
    return component.tensor_specs[name].shape[axis]


def compute_tower_digest(component: Component) -> str:
    """16 hexadecimal digits for a tower's weights, the same in fp32 and fp16."""
    each = {
        name: hashlib.sha256(tensor.half().reshape(-1).numpy()).hexdigest()
        for name, tensor in component.iterate_tensors()
        if tensor.is_floating_point()
    }
    return hashlib.sha256("".join(f"{name}{each[name]}" for name in sorted(each)).encode()).hexdigest()[:16]
