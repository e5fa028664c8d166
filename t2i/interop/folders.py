"""The folder that a model comes in: its index, its layout and its components, each read once."""

import logging
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, UnCLIPScheduler

from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.samplers import check_scheduler_sampling
from t2i.diffusion.stored_schedulers import check_scheduler_folder
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import DIFFUSERS_CODE, check_folder_files, is_folder, read_config
from t2i.interop.layouts import KNOWN_LIBRARIES, LAYOUTS, LAYOUTS_BY_CLASS, PART_CLASSES, PublicLayout, get_weight_stem

logger = logging.getLogger(__name__)

NETWORKS = ("autoencoder", "autoregressive_prior", "clip", "decoder", "prior", "regression_prior", "text_encoder")
PUBLIC_NETWORKS = ("eclipse", "kandinsky", "karlo", "movq", "multilingual_clip", "stable_unclip", "super_resolution")
# Modules that older versions wrote into model_index.json -> the modules of the same classes today. Folders of users
# stay as they are: the names are replaced where an index is read.
OLD_MODULES = {
    **{f"t2i.{name}": f"t2i.networks.{name}" for name in (*NETWORKS, "unet_decoder", "upsampler")},
    **{f"t2i.interop.{name}": f"t2i.networks.public.{name}" for name in (*PUBLIC_NETWORKS, "transformers_clip")},
    "t2i.interop.dalle2_decoder": "t2i.networks.dalle2.decoder",
    "t2i.interop.dalle2_prior": "t2i.networks.dalle2.prior",
    "t2i.ddim": "t2i.diffusion.ddim",
    "t2i.continuous": "t2i.diffusion.continuous",
    "t2i.interop.scheduler": "t2i.diffusion.respaced",
}
PUBLIC_MODULES = ("t2i.networks.public.", "t2i.networks.dalle2.")


def normalize_index(index: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a model_index.json with the modules of today, and its own class by its name alone.

    The name of a class comes with that of a module where diffusers shall run the folder's `pipeline.py`.
    """
    replaced = dict(index)
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            replaced[name] = [OLD_MODULES.get(entry[0], entry[0]), entry[1]]
    match index.get("_class_name"):
        case [str(module), str(own)] if f"{module}.py" == DIFFUSERS_CODE and own not in LAYOUTS_BY_CLASS:
            replaced["_class_name"] = own
    return replaced


def respace_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return an UnCLIPScheduler as one that finds the previous timestep by itself; others as they are."""
    respaced = isinstance(scheduler, UnCLIPScheduler)
    return UnCLIPRespacedScheduler.from_config(scheduler.config) if respaced else scheduler


class SourceFolder:
    """A folder that a model is loaded from: a whole pipeline's, or that of one component alone. Each file is read once.

    Args:
        path: place of the folder.
        variant: suffix of the weight files, such as "fp16"; a component without files of it has the plain ones.
    """

    def __init__(self, path: Path, variant: str | None = None):
        self.path, self.variant = path, variant
        self.components: dict[str, Component] = {}

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json, normalised; empty without the file."""
        path = self.path / "model_index.json"
        return normalize_index(read_config(path)) if path.is_file() else {}

    @cached_property
    def class_name(self) -> Any:
        """The class that model_index.json names, or else config.json; None without both.

        Raises InputError for no folder, and for one with code or foreign links in it.
        """
        if not is_folder(self.path):
            raise InputError(f"no folder {str(self.path)!r:.200}")
        check_folder_files(self.path)
        if self.index:
            return self.index.get("_class_name")
        path = self.path / "config.json"
        return read_config(path).get("_class_name") if path.is_file() else None

    @property
    def layout(self) -> PublicLayout | None:
        """The public layout of the folder, None for any other folder."""
        return LAYOUTS_BY_CLASS.get(self.class_name) if isinstance(self.class_name, str) else None

    @property
    def pipeline_layout(self) -> PublicLayout | None:
        """The public layout that model_index.json names, None without the file. Looks at no other file."""
        name = self.index.get("_class_name")
        return LAYOUTS_BY_CLASS.get(name) if isinstance(name, str) else None

    @property
    def family(self) -> str:
        """The family of the decoder in a public layout, "" without a decoder."""
        return self.require_layout().family

    def require_layout(self) -> PublicLayout:
        """Return the public layout. Raises InputError for any other folder, with what was found and all layouts."""
        if self.layout is not None:
            return self.layout
        # Describe what was found
        folder = self.path
        if self.class_name is None:
            names = sorted(path.name for path in folder.iterdir())
            fault = f"has neither a model_index.json nor a config.json, but {', '.join(names[:8]) or 'nothing'}"
            if any(name.endswith(".pth") for name in names):
                fault += " (`t2i convert FILE.pth --config FILE.json FOLDER` is for those of DALLE2-pytorch)"
        else:
            fault = f"is of {self.class_name!r:.80}"
            index = SourceFolder(folder.absolute().parent).index
            if "_class_name" in index and folder.absolute().name in index:
                fault += f", a part of the pipeline in {str(folder.parent)!r}, which loads as a whole"
        known = "; ".join(f"{layout.name} ({', '.join(layout.classes)})" for layout in LAYOUTS)
        own = "this project's own (`t2i assemble` writes it)"
        raise InputError(f"{str(folder)!r} {fault}; the layouts that load are {own}, and {known}")

    # A pipeline in a public layout

    def check_public_parts(self) -> None:
        """Raise InputError, in one line, for an unknown layout, or a part that is missing or of another class."""
        layout = self.require_layout()
        places = layout.part_folders.values()
        # No class is imported by these names, but another library's would be foreign code.
        for name, entry in self.index.items():
            plain = name not in places and (entry is None or isinstance(entry, bool | int | float))
            if name.startswith("_") or plain:
                continue
            if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in (None, *KNOWN_LIBRARIES):
                known = f"a class of {', '.join(KNOWN_LIBRARIES)}"
                self.refuse(f"has in its model_index.json {name[:80]!r} = {str(entry)[:80]}, which is not {known}")
            if name not in places and entry[1] is not None:
                logger.warning("%s has %.80r, a %.80s, which is not used", self.path, name, entry[1])
        # A prior alone has no index, and no parts to look for.
        for part, place in layout.part_folders.items() if self.index else ():
            class_name = str(self.index.get(place, [None, None])[1])
            if class_name == "None":
                self.refuse(f"lacks {place!r} in its model_index.json")
            if part.endswith("scheduler"):
                fits = isinstance(getattr(diffusers, class_name, None), type) and class_name.endswith("Scheduler")
                allowed = "a scheduler of diffusers"
            else:
                fits, allowed = class_name in PART_CLASSES[part], " or ".join(PART_CLASSES[part])
            if not fits:
                self.refuse(f"has as {place} a {class_name[:80]!r}; it must be {allowed}")
            if not is_folder(self.path / place):
                self.refuse(f"lacks the folder {place!r}")

    def refuse(self, fault: str) -> None:
        layout = self.require_layout()
        names = ", ".join(dict.fromkeys(layout.part_folders.values()))
        raise InputError(f"{str(self.path)!r}, {layout.title}, {fault}; its parts are {names}")

    def __contains__(self, part: str) -> bool:
        return part in self.require_layout().part_folders

    def find_folder(self, part: str) -> Path | None:
        """Return the folder of a public part, None if it is not there."""
        folder = self.path / self.layout.part_folders[part] if self.layout and part in self else None
        return folder if folder is not None and is_folder(folder) else None

    def get_folder(self, part: str) -> Path:
        """Return the folder of a public part. Raises InputError if it is not there."""
        folder = self.find_folder(part)
        if folder is None:
            place = self.layout.part_folders.get(part, part) if self.layout else part
            raise InputError(
                f"{str(self.path)!r} goes with the folder {place!r} of its pipeline, which is not there; name the "
                "folder of a whole pipeline, or of a part in one"
            )
        return folder

    def open_component(self, part: str) -> Component:
        """Return a part's configuration and headers. Raises InputError for a model of another class."""
        if part not in self.components:
            component = Component(self.get_folder(part), self.path, self.variant, get_weight_stem(part))
            named = component.config.get("_class_name") or component.config.get("architectures")
            names = named if isinstance(named, list) else [named]
            # Configurations of towers may name the model that they were taken out of.
            older = ("CLIPModel", "CLIPTextModel", "CLIPVisionModel") if part.endswith("tower") else ()
            if named and not any(name in (*PART_CLASSES[part], *older) for name in names):
                place = self.require_layout().part_folders[part]
                self.refuse(f"holds in {place} a {str(names[0])[:80]!r}, not {PART_CLASSES[part][0]}")
            self.components[part] = component
        return self.components[part]

    def find_scheduler_class(self, part: str) -> Any:
        """Return the class of diffusers that the index names for a scheduler, after a check of its folder."""
        entry = self.index.get(self.require_layout().part_folders[part])
        class_name = entry[1] if isinstance(entry, list) else None
        check_scheduler_folder(self.get_folder(part), class_name, self.path)
        return getattr(diffusers, str(class_name))

    def load_scheduler(self, part: str) -> SchedulerMixin:
        """Load a scheduler; see `respace_scheduler`."""
        scheduler = load_or_explain(self.find_scheduler_class(part).from_pretrained, self.get_folder(part))
        scheduler = respace_scheduler(scheduler)
        check_scheduler_sampling(f"{part} in {str(self.get_folder(part))!r}", scheduler)
        return scheduler

    # A pipeline in this project's own layout

    def open_own_component(self, name: str) -> Component:
        """Return a component's configuration and headers; its folder has its name."""
        if name not in self.components:
            self.components[name] = Component(self.path / name, self.path, self.variant)
        return self.components[name]

    @property
    def has_public_parts(self) -> bool:
        """True if the index names components that came from a public model."""
        entries = [entry for entry in self.index.values() if isinstance(entry, list) and len(entry) == 2]
        return any(str(module).startswith(PUBLIC_MODULES) for module, _ in entries)

    def find_stored_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype that most values of each component are stored in, by the component's name."""
        dtypes = {}
        for name in self.index:
            if (self.path / name / "config.json").is_file():
                # A damaged component may be replaced by the caller's. If not, it is refused where it is loaded.
                with suppress(InputError):
                    dtype = self.open_own_component(name).find_stored_dtype()
                    if dtype is not None:
                        dtypes[name] = dtype
        return dtypes
