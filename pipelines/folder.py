"""A pipeline's components: their classes, which of them go together, and their folder in this project's own layout."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, TypeAlias, get_args

import torch
from diffusers import SchedulerMixin

from t2i.diffusion.samplers import (
    check_prediction_type,
    check_scheduler_sampling,
    find_training_scheduler,
    warn_of_other_levels,
)
from t2i.diffusion.stored_schedulers import PROJECT_SCHEDULERS, check_scheduler_folder, load_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_component_model, load_or_explain
from t2i.files.untrusted import is_folder
from t2i.interop.folders import SourceFolder
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
from t2i.runtime.wrappers import unwrap_compiled
from t2i.sampling.embeddings import PRIOR_CLASSES

AnyCLIP: TypeAlias = CLIP | TransformersCLIP
AnyDecoder: TypeAlias = Decoder | UNetDecoder | KarloDecoder | KandinskyDecoder | StableUnCLIPDecoder | DALLE2Decoder
AnyAutoencoder: TypeAlias = Autoencoder | MoVQ | SuperResolution | DALLE2Pixels | DALLE2Cascade
AnyTextEncoder: TypeAlias = TextEncoder | MultilingualCLIP
# The modules of these classes are written into model_index.json. If one moves, `t2i.interop.folders.OLD_MODULES` must
# get its old name.
COMPONENT_CLASSES: dict[str, tuple[type, ...]] = {
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
SCHEDULED_MODELS = ("prior", "decoder", "upsampler")  # each with a component of its name and `_scheduler`
OPTIONAL_COMPONENTS = ("prior", "prior_scheduler", "upsampler", "upsampler_scheduler", "text_encoder")
# Each of these loads the folders of all
TASKS = ("Text2Image", "ImageToImage", "Inpaint", "Outpaint", "ImageVariation", "Interpolation", "TextDiff")
PIPELINE_NAMES = tuple(f"{task}Pipeline" for task in TASKS)


def check_component_types(components: Mapping[str, Any]) -> None:
    """Raise InputError for objects of other classes than their components have; None is allowed."""
    for name, value in components.items():
        model = unwrap_compiled(value)
        if value is not None and not isinstance(model, COMPONENT_CLASSES[name]):
            allowed = " or ".join(component_class.__name__ for component_class in COMPONENT_CLASSES[name])
            raise InputError(f"{name} must be a {allowed}, got {value!r:.80}, a {type(value).__name__}")


def check_pairs(components: Mapping[str, Any]) -> None:
    """Raise InputError for a model without its scheduler, and for a scheduler without its model."""
    check_prior_scheduler(components.get("prior"), components.get("prior_scheduler"))
    if (components.get("upsampler") is None) != (components.get("upsampler_scheduler") is None):
        raise InputError("upsampler and upsampler_scheduler go together; one of them is missing")


def check_prior_scheduler(prior: Any, scheduler: SchedulerMixin | None) -> None:
    """Raise InputError for a diffusion prior without a scheduler, and for a scheduler without such a prior."""
    if (prior is None or not prior.needs_scheduler) != (scheduler is None):
        what = "no prior" if prior is None else f"as prior a {type(prior).__name__}"
        has = "no prior_scheduler" if scheduler is None else "a prior_scheduler"
        raise InputError(f"this pipeline has {what} and {has}; only the diffusion prior goes with a scheduler")


def check_parts(before: Mapping[str, Any], new: Mapping[str, Any], optional: Collection[str]) -> None:
    """Raise InputError for new components that cannot be what their names say, or do not fit the others.

    before: components that are there, of which `new` may replace some. optional: names of those that may be None.
    """
    check_component_types(new)
    parts = {**before, **new}
    for name, component in new.items():
        if component is None and name not in optional:
            raise InputError(f"{name} is None, but this pipeline needs one")
        if component is not None and COMPONENT_CLASSES[name] == (SchedulerMixin,):
            trained = find_training_scheduler(parts.get(name.removesuffix("_scheduler")))
            check_scheduler_sampling(name, component, trained or before.get(name))

    # All belong to one CLIP, and the decoder to its autoencoder and text encoder
    clip, decoder = parts.get("clip"), parts.get("decoder")
    for name in SCHEDULED_MODELS:
        check_clip_fingerprint(name, parts.get(name), clip)
    for name in ("prior", "decoder"):
        if parts.get(name) is not None:
            check_embed_widths(name, parts[name], clip)
    if decoder is None:
        return
    check_text_encoder(decoder, parts["text_encoder"])
    autoencoder = parts["autoencoder"]
    if decoder.config.latent_channels != autoencoder.channels:
        channels = f"{decoder.config.latent_channels} channels, the autoencoder's have {autoencoder.channels}"
        raise InputError(f"the decoder's latents have {channels}; they were not trained together")


def check_schedules(before: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise InputError for a new scheduler of other predictions than its model's, and log other noise levels.

    Those of a model are known from the scheduler that it was stored with, or else from the one that is there before. A
    new model may be followed by its scheduler: of its predictions nothing is said yet.
    """
    for model in SCHEDULED_MODELS:
        name = f"{model}_scheduler"
        scheduler = new.get(name, before.get(name))
        trained = find_training_scheduler(new.get(model, before.get(model)))
        if trained is None and model not in new:
            trained = before.get(name)
        if scheduler is None or trained is None or not {model, name} & new.keys():
            continue
        if name in new:
            check_prediction_type(name, scheduler, trained)
        warn_of_other_levels(name, scheduler, trained)


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


class PipelineFolder(SourceFolder):
    """A folder that a pipeline is loaded from, in this project's own layout or in a public one."""

    @property
    def is_own(self) -> bool:
        """True for this project's own layout, and for what is no pipeline at all: a component alone, or damaged."""
        if (self.path / "model_index.json").is_file():
            return self.class_name in PIPELINE_NAMES
        return self.layout is None

    def lacks_component(self, name: str) -> bool:
        """Return True if the index has no component of this name."""
        return self.index.get(name, [None, None]) == [None, None]

    def check(self, names: list[str]) -> None:
        """Raise InputError, in one line, unless this is a whole pipeline in which all components of `names` are sound.

        Nothing of a component's size is allocated.
        """
        index = self.path / "model_index.json"
        if not index.is_file():
            self.require_layout()  # raises, with what the folder is instead
        if unknown := sorted(key for key in self.index.keys() - COMPONENT_CLASSES.keys() if not key.startswith("_")):
            raise InputError(f"{str(index)!r} has {unknown[0]!r:.80}; it may have {', '.join(COMPONENT_CLASSES)}")
        if self.class_name not in PIPELINE_NAMES:
            allowed = " or ".join(PIPELINE_NAMES)
            raise InputError(f"{str(index)!r} is of {self.class_name!r:.80}; it must be a {allowed}")
        needed = [
            name for name in COMPONENT_CLASSES if not (name in OPTIONAL_COMPONENTS and self.lacks_component(name))
        ]
        if missing := [name for name in needed if name not in self.index or not is_folder(self.path / name)]:
            raise InputError(f"{str(self.path)!r} is incomplete: it lacks the folders {', '.join(missing)}")
        for name in names:
            if name in needed:
                self.check_component(name)

    def pop_replaced_schedulers(self, components: dict[str, Any]) -> dict[str, Any]:
        """Remove from the caller's parts, and return, the schedulers that take the place of stored ones.

        The stored ones are loaded first, because they tell what their models were trained with.
        """
        models = {f"{model}_scheduler": model for model in SCHEDULED_MODELS if model not in components}
        given = [name for name in models if components.get(name) is not None]
        return {name: components.pop(name) for name in given if self.has_sound_scheduler(name)}

    def has_sound_scheduler(self, name: str) -> bool:
        """Return whether a scheduler of this name is stored here that can be loaded, and sample."""
        with suppress(InputError):
            if not self.is_own:
                return name in self and self.load_scheduler(name) is not None
            self.check_component(name)
            check_scheduler_sampling(name, load_scheduler(self.path / name))
            return True
        return False

    def check_component(self, name: str) -> None:
        """Raise InputError for a component of a class that is not one of ours, or whose files are not sound."""
        entry = self.index.get(name)
        module, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if COMPONENT_CLASSES[name] == (SchedulerMixin,) and module in ("diffusers", *PROJECT_SCHEDULERS):
            check_scheduler_folder(self.path / name, class_name, self.path, module)
        elif component_class := self.find_component_class(name):
            self.open_own_component(name).check_model(component_class)
        else:
            asked = f"{str(entry)[:80]} as {name}; only this project's own parts are loaded"
            raise InputError(f"{str(self.path / 'model_index.json')!r} asks for {asked}")

    def find_component_class(self, name: str) -> Any:
        """Return the class that the index names for a component; None for a scheduler, or a class that is not ours."""
        entry = self.index.get(name)
        classes = COMPONENT_CLASSES[name]
        return next((known for known in classes if entry == [known.__module__, known.__name__]), None)

    def load_component(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """Load a component that `check` has passed; dtype: None is float32."""
        component_class = self.find_component_class(name)
        return load_or_explain(
            lambda _: load_component_model(component_class, self.open_own_component(name), dtype), self.path
        )

    def check_saved_clip(self, clip: AnyCLIP) -> None:
        """Raise InputError if the CLIP was replaced after saving. Folders of older versions store no fingerprint."""
        stored = self.index.get("_clip_fingerprint")
        if stored is not None and stored != clip.identity:
            raise InputError(
                f"{str(self.path)!r} was saved with the CLIP {str(stored)[:40]}, its folder 'clip' has "
                f"{clip.identity}: the other components were not trained on its embeddings"
            )
