"""The layouts of public unCLIP models: which one a folder is, what is where in it, and what is refused of it.

A layout is a table from what a part is for to the name of its folder. Nothing is imported by a name that a file gives:
classes are compared with the ones that a part may be of.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin, UnCLIPScheduler

from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.samplers import check_scheduler_sampling
from t2i.diffusion.stored_schedulers import check_scheduler_folder
from t2i.errors import InputError
from t2i.files.component import Component, read_model_index
from t2i.files.model_folder import load_or_explain
from t2i.files.untrusted import check_folder_files, is_folder, read_config

logger = logging.getLogger(__name__)

# What an index may name as the home of a class: nothing is imported by it, but another one asks for other code. Beside
# the libraries, diffusers' own folders of pipelines.
KNOWN_LIBRARIES = (
    "diffusers",
    "transformers",
    "unclip",
    "stable_diffusion",
    "kandinsky",
    "kandinsky2_2",
    "multilingual_clip",
)
PART_CLASSES: dict[str, tuple[str, ...]] = {  # what each part may be; schedulers are any of diffusers'
    "prior": ("PriorTransformer",),
    "text_tower": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "image_tower": ("CLIPVisionModelWithProjection",),
    "image_processor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
    "unet": ("UNet2DConditionModel",),
    "projection": ("UnCLIPTextProjModel",),
    "super_res_first": ("UNet2DModel",),
    "super_res_last": ("UNet2DModel",),
    "movq": ("VQModel",),
    "vae": ("AutoencoderKL",),
    "normalizer": ("StableUnCLIPImageNormalizer",),
    "multilingual_clip": ("MultilingualCLIP",),
    "multilingual_tokenizer": ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "text_tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
TRANSFORMERS_PARTS = (
    "text_tower",
    "image_tower",
    "multilingual_clip",
    "text_encoder",
)  # their files are named otherwise


@dataclass(frozen=True)
class PublicLayout:
    """A public layout.

    name: as `t2i convert --to` calls it. title: of the family, in messages. classes: of the pipelines that it is of.
    family: of the decoder, "" if it has none. places: the folder of each part.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    family: str
    part_folders: dict[str, str]


PRIOR_FOLDERS = {name: name for name in ("prior", "prior_scheduler")}
KANDINSKY_PRIOR_FOLDERS = {
    "prior": "prior",
    "prior_scheduler": "scheduler",
    "text_tower": "text_encoder",
    "tokenizer": "tokenizer",
    "image_tower": "image_encoder",
    "image_processor": "image_processor",
}
KARLO_FOLDERS = {
    "text_tower": "text_encoder",
    "tokenizer": "tokenizer",
    "projection": "text_proj",
    "unet": "decoder",
    "decoder_scheduler": "decoder_scheduler",
    "super_res_first": "super_res_first",
    "super_res_last": "super_res_last",
    "super_res_scheduler": "super_res_scheduler",
}
KANDINSKY_FOLDERS = {"unet": "unet", "decoder_scheduler": "scheduler", "movq": "movq"}
KANDINSKY_2_1_FOLDERS = KANDINSKY_FOLDERS | {"multilingual_clip": "text_encoder", "multilingual_tokenizer": "tokenizer"}
STABLE_UNCLIP_FOLDERS = {
    "unet": "unet",
    "decoder_scheduler": "scheduler",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_tokenizer": "tokenizer",
    "normalizer": "image_normalizer",
    "noising_scheduler": "image_noising_scheduler",
}
STABLE_UNCLIP_PRIOR_FOLDERS = PRIOR_FOLDERS | {"text_tower": "prior_text_encoder", "tokenizer": "prior_tokenizer"}
IMAGE_TOWER_FOLDERS = {"image_tower": "image_encoder", "image_processor": "feature_extractor"}


def build_pipeline_names(stem: str, *kinds: str) -> tuple[str, ...]:
    return tuple(f"{stem}{kind}Pipeline" for kind in kinds)


def prefix_prior_folders(places: dict[str, str]) -> dict[str, str]:
    return {part: f"prior_{place}" for part, place in places.items()}


PIPELINE_TASKS = ("", "Img2Img", "Inpaint")
COMBINED_TASKS = ("Combined", "Img2ImgCombined", "InpaintCombined")
LAYOUTS = (
    PublicLayout("karlo", "Karlo", ("UnCLIPPipeline",), "karlo", PRIOR_FOLDERS | KARLO_FOLDERS),
    PublicLayout(
        "karlo-variations", "Karlo", ("UnCLIPImageVariationPipeline",), "karlo", KARLO_FOLDERS | IMAGE_TOWER_FOLDERS
    ),
    PublicLayout(
        "kandinsky-2-2",
        "Kandinsky 2.2",
        build_pipeline_names("KandinskyV22", *PIPELINE_TASKS),
        "kandinsky",
        KANDINSKY_FOLDERS,
    ),
    PublicLayout(
        "kandinsky-2-2-prior",
        "Kandinsky 2.2",
        build_pipeline_names("KandinskyV22Prior", "", "Emb2Emb"),
        "",
        KANDINSKY_PRIOR_FOLDERS,
    ),
    PublicLayout(
        "kandinsky-2-2-combined",
        "Kandinsky 2.2",
        build_pipeline_names("KandinskyV22", *COMBINED_TASKS),
        "kandinsky",
        KANDINSKY_FOLDERS | prefix_prior_folders(KANDINSKY_PRIOR_FOLDERS),
    ),
    PublicLayout(
        "kandinsky-2-1",
        "Kandinsky 2.1",
        build_pipeline_names("Kandinsky", *PIPELINE_TASKS),
        "kandinsky",
        KANDINSKY_2_1_FOLDERS,
    ),
    PublicLayout("kandinsky-2-1-prior", "Kandinsky 2.1", ("KandinskyPriorPipeline",), "", KANDINSKY_PRIOR_FOLDERS),
    PublicLayout(
        "kandinsky-2-1-combined",
        "Kandinsky 2.1",
        build_pipeline_names("Kandinsky", *COMBINED_TASKS),
        "kandinsky",
        KANDINSKY_2_1_FOLDERS | prefix_prior_folders(KANDINSKY_PRIOR_FOLDERS),
    ),
    PublicLayout(
        "stable-unclip",
        "Stable unCLIP",
        ("StableUnCLIPImg2ImgPipeline",),
        "stable",
        STABLE_UNCLIP_FOLDERS | IMAGE_TOWER_FOLDERS,
    ),
    PublicLayout(
        "stable-unclip-text",
        "Stable unCLIP",
        ("StableUnCLIPPipeline",),
        "stable",
        STABLE_UNCLIP_FOLDERS | STABLE_UNCLIP_PRIOR_FOLDERS,
    ),
    PublicLayout("prior-transformer", "a prior alone", ("PriorTransformer",), "", {"prior": "."}),
)
LAYOUTS_BY_CLASS = {name: layout for layout in LAYOUTS for name in layout.classes}
LAYOUTS_BY_NAME = {layout.name: layout for layout in LAYOUTS}
DEFAULT_PRIORS = {  # of decoders on the hub, the repository that holds the CLIP and the prior
    "kandinsky-community/kandinsky-2-1": "kandinsky-community/kandinsky-2-1-prior",
    "kandinsky-community/kandinsky-2-1-inpaint": "kandinsky-community/kandinsky-2-1-prior",
    "kandinsky-community/kandinsky-2-2-decoder": "kandinsky-community/kandinsky-2-2-prior",
    "kandinsky-community/kandinsky-2-2-decoder-inpaint": "kandinsky-community/kandinsky-2-2-prior",
    "stabilityai/stable-diffusion-2-1-unclip-small": "kakaobrain/karlo-v1-alpha",
}


def read_folder_class(folder: Path) -> Any:
    """What the folder says that it is: the class in its model_index.json, or in its config.json; None if neither."""
    if not is_folder(folder):
        raise InputError(f"no folder {str(folder)!r:.200}")
    check_folder_files(folder)
    if index := read_model_index(folder):
        return index.get("_class_name")
    path = folder / "config.json"
    return read_config(path).get("_class_name") if path.is_file() else None


def find_public_layout(folder: Path) -> PublicLayout:
    """The public layout of a folder. Raises InputError for any other, saying what was found and which there are."""
    name = read_folder_class(folder)
    if isinstance(name, str) and name in LAYOUTS_BY_CLASS:
        return LAYOUTS_BY_CLASS[name]
    if name is None:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        found = f"has neither a model_index.json nor a config.json, but {held}"
        if any(path.suffix == ".pth" for path in folder.iterdir()):
            found += " (`t2i convert FILE.pth --config FILE.json FOLDER` is for those of DALLE2-pytorch)"
    else:
        found = f"is of {name!r:.80}"
        home = read_model_index(folder.absolute().parent).get("_class_name")
        if home is not None and folder.absolute().name in read_model_index(folder.absolute().parent):
            found += f", a part of the pipeline in {str(folder.parent)!r}, which loads as a whole"
    known = "; ".join(f"{layout.name} ({', '.join(layout.classes)})" for layout in LAYOUTS)
    raise InputError(
        f"{str(folder)!r} {found}; the layouts that load are this project's own (`t2i assemble` writes it), and {known}"
    )


class PublicFolder:
    """A folder in a public layout, all of whose parts are there and of the classes that they should be of.

    Args:
        path: of the folder.
        variant: such as "fp16", of the weights' files.

    Raises InputError, in one line, for an unknown layout, and for a part that is missing or of another class.
    """

    def __init__(self, path: Path, variant: str | None = None):
        self.path, self.variant = path, variant
        self.layout = find_public_layout(path)
        index = read_model_index(path)
        if not index:
            return
        self.check_index_entries(index)
        for part, place in self.layout.part_folders.items():
            entry = index.get(place)
            kind = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "None"
            if kind == "None":
                self.refuse_folder(f"lacks {place!r} in its model_index.json")
            if part.endswith("scheduler"):
                fits = isinstance(getattr(diffusers, kind, None), type) and kind.endswith("Scheduler")
                wanted = "a scheduler of diffusers"
            else:
                fits, wanted = kind in PART_CLASSES[part], " or ".join(PART_CLASSES[part])
            if not fits:
                self.refuse_folder(f"has as {place} a {kind[:80]!r}; it must be {wanted}")
            if not is_folder(path / place):
                self.refuse_folder(f"lacks the folder {place!r}")

    def check_index_entries(self, index: dict[str, Any]) -> None:
        """Refuse classes of libraries that nobody knows; say in the log which other entries are passed over."""
        places = self.layout.part_folders.values()
        for name, entry in index.items():
            if name.startswith("_") or (
                name not in places and (entry is None or isinstance(entry, bool | int | float))
            ):
                continue
            if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in (None, *KNOWN_LIBRARIES):
                known = f"a class of {', '.join(KNOWN_LIBRARIES)}"
                self.refuse_folder(
                    f"has in its model_index.json {name[:80]!r} = {str(entry)[:80]}, which is not {known}"
                )
            if name not in places and entry[1] is not None:
                logger.warning("%s has %.80r, a %.80s, which is not used", self.path, name, entry[1])

    def refuse_folder(self, fault: str) -> None:
        names = ", ".join(dict.fromkeys(self.layout.part_folders.values()))
        raise InputError(f"{str(self.path)!r}, {self.layout.title}, {fault}; its parts are {names}")

    def __contains__(self, part: str) -> bool:
        return part in self.layout.part_folders

    def folder(self, part: str) -> Path:
        return self.path / self.layout.part_folders[part]

    def read_component(self, part: str) -> Component:
        """A model, checked but for its tensors. Raises InputError for one of another class."""
        stem = "model" if part in TRANSFORMERS_PARTS else "diffusion_pytorch_model"
        component = Component(self.folder(part), self.path, self.variant, stem)
        named = component.config.get("_class_name") or component.config.get("architectures")
        given = named if isinstance(named, list) else [named]
        if named and not any(name in (*PART_CLASSES[part], *self.list_old_classes(part)) for name in given):
            self.refuse_folder(
                f"holds in {self.layout.part_folders[part]} a {str(given[0])[:80]!r}, not {PART_CLASSES[part][0]}"
            )
        return component

    def list_old_classes(self, part: str) -> tuple[str, ...]:
        """Other names that public configurations have: of the model that a tower was taken out of."""
        return ("CLIPModel", "CLIPTextModel", "CLIPVisionModel") if part.endswith("tower") else ()

    def find_scheduler_class(self, part: str) -> Any:
        """The class of diffusers that the index names for a scheduler, whose folder is checked first."""
        entry = read_model_index(self.path).get(self.layout.part_folders[part])
        kind = entry[1] if isinstance(entry, list) else None
        check_scheduler_folder(self.folder(part), kind, self.path)
        return getattr(diffusers, str(kind))

    def load_scheduler(self, part: str) -> SchedulerMixin:
        """As the folder says; an UnCLIPScheduler becomes one that knows its own previous timestep."""
        made = load_or_explain(self.find_scheduler_class(part).from_pretrained, self.folder(part))
        if isinstance(made, UnCLIPScheduler):
            made = UnCLIPRespacedScheduler.from_config(made.config)
        check_scheduler_sampling(f"{part} in {str(self.folder(part))!r}", made)
        return made
