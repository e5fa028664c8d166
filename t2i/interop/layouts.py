"""The table of public layouts: which pipelines of diffusers load here, and the folder of each of their parts."""

from dataclasses import dataclass

from t2i.files.untrusted import DIFFUSERS_STEM

# A part's name here -> the classes that an index may name for it. Schedulers may be any of diffusers'.
PART_CLASSES: dict[str, tuple[str, ...]] = {
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
TRANSFORMERS_PARTS = ("text_tower", "image_tower", "multilingual_clip", "text_encoder")
TRANSFORMERS_STEM = "model"  # of the names of weight files in transformers
WEIGHT_STEMS = (DIFFUSERS_STEM, TRANSFORMERS_STEM)
# The modules that an index may name: the two libraries, and diffusers' own folders of pipelines.
PIPELINE_LIBRARIES = ("unclip", "stable_diffusion", "kandinsky", "kandinsky2_2", "multilingual_clip")
KNOWN_LIBRARIES = ("diffusers", "transformers", *PIPELINE_LIBRARIES)


@dataclass(frozen=True)
class PublicLayout:
    """A public layout.

    name: value of `t2i convert --to`. title: the model family, for messages. classes: names of diffusers' pipelines in
    this layout. family: kind of the decoder; "" without a decoder. part_folders: the folder of each part, by the part's
    name.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    family: str
    part_folders: dict[str, str]


PRIOR_FOLDERS = {"prior": "prior", "prior_scheduler": "prior_scheduler"}
KANDINSKY_PRIOR_FOLDERS = {
    "prior": "prior",
    "prior_scheduler": "scheduler",
    "text_tower": "text_encoder",
    "tokenizer": "tokenizer",
    "image_tower": "image_encoder",
    "image_processor": "image_processor",
}
KANDINSKY_COMBINED_FOLDERS = {part: f"prior_{folder}" for part, folder in KANDINSKY_PRIOR_FOLDERS.items()}
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
MULTILINGUAL_FOLDERS = {"multilingual_clip": "text_encoder", "multilingual_tokenizer": "tokenizer"}
IMAGE_TOWER_FOLDERS = {"image_tower": "image_encoder", "image_processor": "feature_extractor"}
KARLO_VARIATION_FOLDERS = KARLO_FOLDERS | IMAGE_TOWER_FOLDERS
STABLE_FOLDERS = {
    "unet": "unet",
    "decoder_scheduler": "scheduler",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_tokenizer": "tokenizer",
    "normalizer": "image_normalizer",
    "noising_scheduler": "image_noising_scheduler",
}
STABLE_PRIOR_FOLDERS = PRIOR_FOLDERS | {"text_tower": "prior_text_encoder", "tokenizer": "prior_tokenizer"}
STABLE_IMAGE_FOLDERS, STABLE_TEXT_FOLDERS = STABLE_FOLDERS | IMAGE_TOWER_FOLDERS, STABLE_FOLDERS | STABLE_PRIOR_FOLDERS
STABLE = "Stable unCLIP"
CONTROLNET_CLASSES = ("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline")


def build_kandinsky_layouts(version: str, stem: str, folders: dict[str, str], priors: tuple[str, ...]) -> list:
    """Return the layouts of one version: decoder, prior, and both combined. stem: part of the pipelines' names."""
    title, name = f"Kandinsky {version}", f"kandinsky-{version.replace('.', '-')}"
    tasks = ("", "Img2Img", "Inpaint")
    decoder_classes = tuple(f"{stem}{task}Pipeline" for task in tasks)
    prior_classes = tuple(f"{stem}{prior}Pipeline" for prior in priors)
    combined_classes = tuple(f"{stem}{task}CombinedPipeline" for task in tasks)
    return [
        PublicLayout(name, title, decoder_classes, "kandinsky", folders),
        PublicLayout(f"{name}-prior", title, prior_classes, "", KANDINSKY_PRIOR_FOLDERS),
        PublicLayout(f"{name}-combined", title, combined_classes, "kandinsky", folders | KANDINSKY_COMBINED_FOLDERS),
    ]


LAYOUTS: tuple[PublicLayout, ...] = (
    PublicLayout("karlo", "Karlo", ("UnCLIPPipeline",), "karlo", PRIOR_FOLDERS | KARLO_FOLDERS),
    PublicLayout("karlo-variations", "Karlo", ("UnCLIPImageVariationPipeline",), "karlo", KARLO_VARIATION_FOLDERS),
    *build_kandinsky_layouts("2.2", "KandinskyV22", KANDINSKY_FOLDERS, ("Prior", "PriorEmb2Emb")),
    PublicLayout(
        "kandinsky-2-2-controlnet", "Kandinsky 2.2 ControlNet", CONTROLNET_CLASSES, "kandinsky", KANDINSKY_FOLDERS
    ),
    *build_kandinsky_layouts("2.1", "Kandinsky", KANDINSKY_FOLDERS | MULTILINGUAL_FOLDERS, ("Prior",)),
    PublicLayout("stable-unclip", STABLE, ("StableUnCLIPImg2ImgPipeline",), "stable", STABLE_IMAGE_FOLDERS),
    PublicLayout("stable-unclip-text", STABLE, ("StableUnCLIPPipeline",), "stable", STABLE_TEXT_FOLDERS),
    PublicLayout("prior-transformer", "a prior alone", ("PriorTransformer",), "", {"prior": "."}),
)
LAYOUTS_BY_CLASS = {class_name: layout for layout in LAYOUTS for class_name in layout.classes}
LAYOUTS_BY_NAME = {layout.name: layout for layout in LAYOUTS}
# Repositories that hold a decoder alone -> the repository of their CLIP and prior
DEFAULT_PRIORS = {
    "kandinsky-community/kandinsky-2-1": "kandinsky-community/kandinsky-2-1-prior",
    "kandinsky-community/kandinsky-2-1-inpaint": "kandinsky-community/kandinsky-2-1-prior",
    "kandinsky-community/kandinsky-2-2-decoder": "kandinsky-community/kandinsky-2-2-prior",
    "kandinsky-community/kandinsky-2-2-decoder-inpaint": "kandinsky-community/kandinsky-2-2-prior",
    "kandinsky-community/kandinsky-2-2-controlnet-depth": "kandinsky-community/kandinsky-2-2-prior",
    "stabilityai/stable-diffusion-2-1-unclip-small": "kakaobrain/karlo-v1-alpha",
}


def get_weight_stem(part: str) -> str:
    """Return the stem of a public part's weight files."""
    return TRANSFORMERS_STEM if part in TRANSFORMERS_PARTS else DIFFUSERS_STEM
