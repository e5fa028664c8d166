"""The CLIP towers of the public models, as transformers has them, behind the contract of `t2i.networks.clip.CLIP`.

A folder may hold one of the two: Karlo's text-to-image repository has no image encoder, Stable unCLIP's no text encoder
that shares its space.
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.fingerprints import compute_tensors_fingerprint
from t2i.files.untrusted import check_folder_files, read_config
from t2i.networks.encoder import Encoder
from t2i.networks.linear import use_onednn_linear
from t2i.networks.public.clip_tokenizer import CLIPTokenizer

SIZE_KEYS = ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads")
SHARED_KEYS = (*SIZE_KEYS, "hidden_act", "layer_norm_eps")
TEXT_KEYS = (*SHARED_KEYS, "vocab_size", "max_position_embeddings", "eos_token_id")
VISION_KEYS = (*SHARED_KEYS, "num_channels", "image_size", "patch_size")
TOWER_KINDS = {
    "clip_text_model": (TEXT_KEYS, transformers.CLIPTextConfig),
    "clip_vision_model": (VISION_KEYS, transformers.CLIPVisionConfig),
}
ACTIVATIONS = ("quick_gelu", "gelu")
HIGHEST_TOKEN = 2  # as eos_token_id: configurations of before 2023 mean the highest number by it
POSITION_BUFFERS = (  # that old files hold
    "text_encoder.text_model.embeddings.position_ids",
    "image_encoder.vision_model.embeddings.position_ids",
)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
MAX_IMAGE_SIDE = 4096  # of a picture that a vision tower sees
RESAMPLING_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class TransformersCLIP(Encoder, ModelMixin):
    """transformers' CLIPTextModelWithProjection, CLIPVisionModelWithProjection, or both.

    z_t and z_i are the projections as they are, not of unit length: so the public models were trained.

    Args:
        text, vision: the towers' configurations, as far as `TEXT_KEYS` and `VISION_KEYS` name them; None where there
        is none.
        preprocess: how pictures come to the vision tower, see `read_preprocess_config`.
        context_length: tokens of a caption.
        fingerprint: of weights and preprocessing; written on saving, checked on loading.
        rounded: the weights went through a dtype that does not keep the fingerprint, such as bfloat16.
    """

    hub_files = ["*.json", "*.txt", "*.safetensors"]
    unit_length = False
    loaded_tokenizer: CLIPTokenizer | None = None

    @register_to_config
    def __init__(
        self,
        text: dict | None = None,
        vision: dict | None = None,
        preprocess: dict | None = None,
        context_length: int = 77,
        fingerprint: str | None = None,
        rounded: bool = False,
    ):
        super().__init__()
        self.text_encoder: Any = None if text is None else use_onednn_linear(build_text_tower(text))
        self.image_encoder: Any = None if vision is None else use_onednn_linear(build_vision_tower(vision))
        if text is None and vision is None:
            raise InputError("no text encoder and no image encoder in the folder; a CLIP is at least one of them")
        if text and vision and text["projection_dim"] != vision["projection_dim"]:
            found = f"{text['projection_dim']} dimensions, the image encoder's {vision['projection_dim']}"
            raise InputError(f"the text encoder's embeddings have {found}; they are not of one CLIP")
        if text:
            check_integer("context_length", context_length, 3, text["max_position_embeddings"])
        preprocess = build_default_preprocess(224) if preprocess is None else preprocess
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    @classmethod
    def from_components(
        cls,
        text: Component | None = None,
        tokenizer: Path | None = None,
        vision: Component | None = None,
        processor: Path | None = None,
        dtype: torch.dtype | None = None,
        root: Path | None = None,
    ) -> "TransformersCLIP":
        """The towers of a public pipeline.

        tokenizer: the folder of the text tower's. processor: that of the image processor; without one, pictures are
        made ready as CLIP's usually are. dtype: None is that of the files. root: the pipeline's folder,
        if it is not that of the components.
        """
        parts = {
            name: part for name, part in {"text_encoder.": text, "image_encoder.": vision}.items() if part is not None
        }
        config: dict[str, Any] = {}
        if text is not None:
            config["text"] = read_tower_config(text, "clip_text_model")
            if tokenizer is None:
                raise InputError(f"{str(text.folder.parent)!r} has a text encoder, but no tokenizer")
            places, words = config["text"]["max_position_embeddings"], config["text"]["vocab_size"]
            tokens = CLIPTokenizer.from_folder(tokenizer, places, words, root or text.root)
            config["context_length"] = tokens.context_length
        if vision is not None:
            config["vision"] = read_tower_config(vision, "clip_vision_model")
            side = config["vision"]["image_size"]
            config["preprocess"] = build_default_preprocess(side)
            if processor is not None:
                config["preprocess"] = read_preprocess_config(processor, side, root or vision.root)
        if not parts:
            return cls(**config)  # which refuses it
        held = {prefix + name for prefix, part in parts.items() for name in part.tensor_specs}
        unused = tuple(name for name in POSITION_BUFFERS if name in held)
        clip = load_from_components(lambda: cls(**config), parts, dtype, unused=unused)
        if text is not None:
            clip.loaded_tokenizer = tokens
            clip.check_end_token()
        return clip

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        if self.config.text is not None:
            words = self.config.text["vocab_size"]
            self.loaded_tokenizer = CLIPTokenizer.from_folder(
                folder / "tokenizer", self.config.context_length, words, root
            )
            self.check_end_token()

    def save_tokenizer(self, folder: Path) -> None:
        if self.text_encoder is not None:
            self.tokenizer.save(folder / "tokenizer")

    def fingerprint(self) -> str:
        """16 hexadecimal digits for these weights and this preprocessing, the same in fp32 and fp16."""
        return compute_tensors_fingerprint(self.state_dict(), json.dumps(self.config.preprocess, sort_keys=True))

    @property
    def embed_dim(self) -> int:
        return (self.config.text or self.config.vision)["projection_dim"]

    @property
    def text_width(self) -> int:
        self.check_text_encoder()
        return self.config.text["hidden_size"]

    @property
    def context_length(self) -> int:
        self.check_text_encoder()
        return self.config.context_length

    @property
    def reads_captions(self) -> bool:
        """Whether it has a text encoder."""
        return self.text_encoder is not None

    @property
    def tokenizer(self) -> CLIPTokenizer:
        self.check_text_encoder()
        assert self.loaded_tokenizer is not None, "set by what loads a text encoder"
        return self.loaded_tokenizer

    @property
    def size(self) -> int:
        """The side of the pictures that the vision tower sees."""
        self.check_image_encoder()
        return self.config.vision["image_size"]

    @property
    def resize_settings(self) -> dict[str, str]:
        """How a picture comes to that size, as `t2i.networks.clip.CLIP` says it."""
        steps = self.config.preprocess
        mode = "squash" if steps["crop"] is None else "shortest"
        return {"interpolation": steps["resample"], "resize_mode": mode}

    def check_text_encoder(self) -> None:
        if self.text_encoder is None:
            raise InputError("no text encoder in the folder: this model cannot read captions, only pictures")

    def check_image_encoder(self) -> None:
        if self.image_encoder is None:
            raise InputError("no image encoder in the folder: this model cannot encode pictures, only captions")

    def check_end_token(self) -> None:
        """Refuse a tokenizer that ends captions with another token than the text tower looks for."""
        end, theirs = self.tokenizer.end, self.config.text["eos_token_id"]
        if theirs == HIGHEST_TOKEN and end != max(self.tokenizer.vocab.values()) or theirs not in (HIGHEST_TOKEN, end):
            wanted = "the highest" if theirs == HIGHEST_TOKEN else theirs
            raise InputError(f"the tokenizer ends captions with token {end}, the text encoder looks for {wanted}")

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, TextEncoding]:
        """z_i, (B, D), and what is said of captions: both towers."""
        return self.encode_image(image), self.encode_tokens(tokens)

    @apply_forward_hook
    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D), of any length: z_i. Raises InputError without an image encoder."""
        self.check_image_encoder()
        return self.image_encoder(pixel_values=self.preprocess(image)).image_embeds

    @apply_forward_hook
    def encode_zero_image(self) -> Tensor:
        """(1, D): the embedding of pixel values of zero, which Kandinsky's decoders take for no picture at all."""
        self.check_image_encoder()
        zeros = torch.zeros(1, 3, self.size, self.size, device=self.device, dtype=self.dtype)
        return self.image_encoder(pixel_values=zeros).image_embeds

    def preprocess(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, size, size), as CLIPImageProcessor makes pictures ready.

        Like there, a resized picture is rounded to 8 bits; not one that is to have a gradient.
        """
        self.check_image_encoder()
        steps, image = self.config.preprocess, (image.float() + 1) / 2
        side, crop = steps["resize"], steps["crop"]
        if side is not None and tuple(image.shape[-2:]) != (side[-1], side[-1]):
            mode = InterpolationMode(steps["resample"])
            if not image.requires_grad:
                image = (image * 255).round().clamp(0, 255).to(torch.uint8)
            image = resize(image, list(side), interpolation=mode, antialias=True)
            image = image if image.is_floating_point() else image.float() / 255
        if crop is not None:
            image = crop_image_center(image, crop)
        return ((image - self.mean) / self.std).to(self.dtype)

    def encode_text(self, texts: list[str]) -> TextEncoding:
        self.check_text_encoder()
        return self.encode_tokens(self.tokenizer(texts).to(self.device))

    @apply_forward_hook
    def encode_tokens(self, tokens: Tensor) -> TextEncoding:
        """(B, context_length), int64 -> z_t, of any length, and a state per token.

        Causal: what comes after the end of a caption changes nothing before it, so the batch is trimmed first.
        """
        self.check_text_encoder()
        end = (tokens == self.tokenizer.end).int().argmax(dim=-1)
        length = int(end.max()) + 1
        found = self.text_encoder(input_ids=tokens[:, :length])
        mask = torch.arange(length, device=tokens.device) <= end[:, None]
        return TextEncoding(found.text_embeds, found.last_hidden_state, mask)


def crop_image_center(image: Tensor, side: int) -> Tensor:
    """(..., H, W) -> (..., side, side); what is left over is rounded down above and to the left, where torchvision's
    rounds. A smaller picture gets a black frame."""
    above, left = ((length - side) // 2 if length >= side else -((side - length) // 2) for length in image.shape[-2:])
    below, right = (image.shape[-2] - side - above, image.shape[-1] - side - left)
    return F.pad(image, (-left, -right, -above, -below))


def build_text_tower(config: dict[str, Any]) -> torch.nn.Module:
    # Its own padding and start are not read, and would be compared with the vocabulary's size.
    ours = {"bos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa"}
    settings = transformers.CLIPTextConfig(**config, **ours)
    return transformers.CLIPTextModelWithProjection(settings)


def build_vision_tower(config: dict[str, Any]) -> torch.nn.Module:
    settings = transformers.CLIPVisionConfig(**config, attn_implementation="sdpa")
    return transformers.CLIPVisionModelWithProjection(settings)


def read_tower_config(part: Component, kind: str) -> dict[str, Any]:
    """Of a tower's configuration what decides its arithmetic, with the library's defaults written out."""
    if (found := part.config.get("model_type", kind)) != kind:
        raise InputError(f"{str(part.folder)!r} holds a {found!r:.80}; it must be a {kind}")
    names, model = TOWER_KINDS[kind]
    usual = inspect.signature(model).parameters
    settings = {key: part.config.get(key, usual[key].default) for key in names}
    if settings.get("eos_token_id", 0) is None:
        settings["eos_token_id"] = HIGHEST_TOKEN
    wrong = [key for key in names if key not in ("hidden_act", "layer_norm_eps") and type(settings[key]) is not int]
    if wrong:
        raise InputError(f"{str(part.folder)!r} has {wrong[0]} = {settings[wrong[0]]!r:.80}; it must be a whole number")
    check_choice(f"hidden_act in {str(part.folder)!r}", settings["hidden_act"], ACTIVATIONS)
    return settings


def build_default_preprocess(side: int) -> dict[str, Any]:
    return {"resize": [side], "crop": side, "resample": "bicubic", "mean": CLIP_MEAN, "std": CLIP_STD}


def read_preprocess_config(folder: Path, side: int, root: Path | None = None) -> dict[str, Any]:
    """What a CLIPImageProcessor's preprocessor_config.json says, for a vision tower that sees `side` x `side` pixels.

    resize: [the shorter side] or [height, width]; None is not at all. crop: the side that is cut out of the middle, or
    None. resample: "bicubic" or "bilinear". mean, std: of pictures in [0, 1]. root: the pipeline's folder.
    Raises InputError for what CLIP's image processors do not do.
    """
    check_folder_files(folder, root)
    path = folder / "preprocessor_config.json"
    config = read_config(path)
    resizes, crops = config.get("do_resize", True), config.get("do_center_crop", True)
    size, crop = parse_image_size(config.get("size", side)), parse_image_size(config.get("crop_size", side))
    left = crop if crops else size if resizes and len(size) == 2 else []  # what is sure of the picture's sides
    if not left or set(left) != {side} or not all(type(one) is int and 0 < one <= MAX_IMAGE_SIDE for one in size):
        raise InputError(f"{str(path)!r} makes pictures of size {size}, crop {crop}; the image encoder sees {side}")
    normalizes, factor = config.get("do_normalize", True), config.get("rescale_factor", 1 / 255)
    mean, std = (
        (config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD))
        if normalizes
        else ([0.0] * 3, [1.0] * 3)
    )
    numbers = [*mean, *std] if isinstance(mean, list) and isinstance(std, list) else []
    sound = len(numbers) == 6 and all(isinstance(one, int | float) for one in numbers) and 0 not in numbers[3:]
    resample = RESAMPLING_MODES.get(config.get("resample", 3))
    scaled = (
        config.get("do_rescale", True) and isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-4)
    )
    if not sound or resample is None or not scaled:
        wanted = "bicubic or bilinear, values / 255, then three means and deviations"
        raise InputError(f"{str(path)!r} asks for other steps than CLIP's: {wanted}")
    resize = size if resizes else None
    return {"resize": resize, "crop": side if crops else None, "resample": resample, "mean": mean, "std": std}


def parse_image_size(size: Any) -> list[Any]:
    """A size of an image processor: [the shorter side] or [height, width]."""
    if isinstance(size, dict):
        return [size["shortest_edge"]] if "shortest_edge" in size else [size.get("height"), size.get("width")]
    return [size]
