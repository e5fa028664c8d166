"""The CLIP towers of the public models: transformers' classes behind the contract of `t2i.networks.clip.CLIP`.

A folder may lack one tower: Karlo's text-to-image repository has no image encoder, Stable unCLIP's no text encoder.
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.fingerprints import compute_tensors_fingerprint
from t2i.files.untrusted import check_folder_files, read_config
from t2i.networks.encoder import Encoder, check_image_batch
from t2i.networks.linear import use_onednn_linear
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.runtime.hooks import find_compute_device, run_like_forward

SIZE_KEYS = ("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads")
SHARED_KEYS = (*SIZE_KEYS, "hidden_act", "layer_norm_eps")
TEXT_KEYS = (*SHARED_KEYS, "vocab_size", "max_position_embeddings", "eos_token_id")
VISION_KEYS = (*SHARED_KEYS, "num_channels", "image_size", "patch_size")
TOWER_KINDS = {
    "clip_text_model": (TEXT_KEYS, transformers.CLIPTextConfig),
    "clip_vision_model": (VISION_KEYS, transformers.CLIPVisionConfig),
}
ACTIVATIONS = ("quick_gelu", "gelu")
HIGHEST_TOKEN = 2  # an eos_token_id of configurations before 2023, which stands for the highest token of a caption
POSITION_BUFFERS = (  # in old files; current versions of transformers compute them
    "text_encoder.text_model.embeddings.position_ids",
    "image_encoder.vision_model.embeddings.position_ids",
)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
MAX_IMAGE_SIDE = 4096  # pixels that an image may be resized to
RESAMPLING_MODES = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers


class TransformersCLIP(Encoder, ModelMixin):
    """A text tower, a vision tower, or both, as transformers' CLIP...ModelWithProjection.

    z_t and z_i are the raw projections, not of unit length, as the public priors and decoders were trained with.

    Args:
        text, vision: `TEXT_KEYS` and `VISION_KEYS` of the towers' configurations; None without that tower.
        preprocess: steps from an image to the vision tower, as `read_preprocess_config` returns them.
        context_length: tokens of a caption.
        fingerprint, rounded: digest of weights and preprocessing; see `t2i.networks.encoder.Encoder`.

    Whatever needs a tower that is missing raises InputError.
    """

    hub_files = ["*.json", "*.txt", "*.safetensors"]
    unit_length = False
    # Have layers that are offloaded one by one
    _group_offload_block_modules: ClassVar[list[str]] = [
        *("text_encoder", "text_model", "image_encoder", "vision_model", "encoder"),
    ]
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
        # Build the towers
        self.text_encoder: Any = None
        self.image_encoder: Any = None
        if text is not None:
            # transformers would compare the default pad and start tokens, which nothing reads, with the vocabulary.
            unused_tokens = {"bos_token_id": None, "pad_token_id": None}
            settings = transformers.CLIPTextConfig(**text, **unused_tokens, attn_implementation="sdpa")
            self.text_encoder = use_onednn_linear(transformers.CLIPTextModelWithProjection(settings))
        if vision is not None:
            settings = transformers.CLIPVisionConfig(**vision, attn_implementation="sdpa")
            self.image_encoder = use_onednn_linear(transformers.CLIPVisionModelWithProjection(settings))

        # Check that they fit each other
        if text is None and vision is None:
            raise InputError("no text encoder and no image encoder in the folder; a CLIP needs at least one of them")
        if text and vision and text["projection_dim"] != vision["projection_dim"]:
            dims = f"{text['projection_dim']} dimensions, the image encoder's {vision['projection_dim']}"
            raise InputError(f"the text encoder's embeddings have {dims}; they are not of one CLIP")
        if text:
            check_integer("context_length", context_length, 3, text["max_position_embeddings"])
        if preprocess is None:
            preprocess = build_default_preprocess(224 if vision is None else vision["image_size"])
            self.register_to_config(preprocess=preprocess)
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
    ) -> "TransformersCLIP":
        """Load the towers of a public pipeline's folder.

        Args:
            text, vision: the towers. tokenizer: folder of the text tower's tokenizer, needed with it.
            processor: folder of the image processor; without it, images are preprocessed as CLIP's usually are.
            dtype: None is that of the files.

        Raises InputError for files that are missing, damaged, or do not fit each other.
        """
        # The text tower with its tokenizer
        config: dict[str, Any] = {}
        parts: dict[str, Component] = {}
        if text is not None:
            parts["text_encoder."], config["text"] = text, read_tower_config(text, "clip_text_model")
            if tokenizer is None:
                raise InputError(f"{str(text.folder.parent)!r} has a text encoder, but no tokenizer")
            positions, vocab_size = config["text"]["max_position_embeddings"], config["text"]["vocab_size"]
            loaded_tokenizer = CLIPTokenizer.from_folder(tokenizer, positions, vocab_size, text.root)
            config["context_length"] = loaded_tokenizer.context_length
        # The vision tower with its preprocessing
        if vision is not None:
            parts["image_encoder."], config["vision"] = vision, read_tower_config(vision, "clip_vision_model")
            side = config["vision"]["image_size"]
            config["preprocess"] = build_default_preprocess(side)
            if processor is not None:
                config["preprocess"] = read_preprocess_config(processor, side, vision.root)
        if not parts:
            return cls(**config)  # raises InputError
        clip = load_from_components(lambda: cls(**config), parts, dtype, unused=POSITION_BUFFERS)
        if text is not None:
            clip.loaded_tokenizer = loaded_tokenizer
            clip.check_end_token()
        return clip

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        if self.config.text is not None:
            length, vocab_size = self.config.context_length, self.config.text["vocab_size"]
            self.loaded_tokenizer = CLIPTokenizer.from_folder(folder / "tokenizer", length, vocab_size, root)
            self.check_end_token()

    def save_tokenizer(self, folder: Path) -> None:
        if self.text_encoder is not None:
            self.tokenizer.save(folder / "tokenizer")

    def compute_fingerprint(self) -> str:
        """Return 16 hexadecimal digits for weights and preprocessing, the same in fp32 and fp16."""
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
        """True if there is a text encoder."""
        return self.text_encoder is not None

    @property
    def tokenizer(self) -> CLIPTokenizer:
        self.check_text_encoder()
        if self.loaded_tokenizer is None:
            raise InputError("this CLIP has no tokenizer; assign one to `loaded_tokenizer`, or load a model")
        return self.loaded_tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self.loaded_tokenizer is not None or self.text_encoder is None

    @property
    def size(self) -> int:
        """Side of the images that the vision tower takes, in pixels."""
        self.check_image_encoder()
        return self.config.vision["image_size"]

    @property
    def resize_settings(self) -> dict[str, Any]:
        """Resizing to `size`, with the keys of `t2i.networks.clip.CLIP.resize_settings`."""
        self.check_image_encoder()
        steps = self.config.preprocess
        side = tuple(steps["resize"] or ())
        return {"interpolation": steps["resample"], "side": side, "rounds_down": True}

    def check_text_encoder(self) -> None:
        if self.text_encoder is None:
            raise InputError("no text encoder in the folder: this model cannot read captions, only images")

    def check_image_encoder(self) -> None:
        if self.image_encoder is None:
            raise InputError("no image encoder in the folder: this model cannot encode images, only captions")

    def check_end_token(self) -> None:
        """Refuse a tokenizer with another end token than the text tower's, whose state becomes z_t."""
        end, expected = self.tokenizer.end, self.config.text["eos_token_id"]
        # transformers reads this number as "the highest token" and pools there.
        if expected == HIGHEST_TOKEN:
            highest = max(self.tokenizer.vocab.values())
            if end != highest:
                raise InputError(f"the tokenizer's end token is {end}, the text encoder takes the highest, {highest}")
        elif end != expected:
            raise InputError(f"the tokenizer's end token is {end}, the text encoder takes {expected}")

    @run_like_forward
    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, TextEncoding]:
        """Encode images and captions: z_i, (B, D), and a TextEncoding."""
        return self.encode_image(image), self.encode_tokens(tokens)

    @run_like_forward
    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images, (B, 3, H, W) in [-1, 1], to z_i, (B, D), of any length. Raises InputError for others."""
        check_image_batch(image)
        return self.image_encoder(pixel_values=self.preprocess(image)).image_embeds

    @run_like_forward
    def encode_zero_image(self) -> Tensor:
        """Return the embedding of pixel values of zero, (1, D): "no image" for Kandinsky's decoders."""
        zeros = torch.zeros(1, 3, self.size, self.size, device=find_compute_device(self), dtype=self.dtype)
        return self.image_encoder(pixel_values=zeros).image_embeds

    @run_like_forward
    def preprocess(self, image: Tensor) -> Tensor:
        """Preprocess images, (B, 3, H, W) in [-1, 1], to (B, 3, size, size), as CLIPImageProcessor does.

        A resized image is rounded to 8 bits as there, unless it requires a gradient.
        """
        self.check_image_encoder()
        steps, image = self.config.preprocess, (image.float() + 1) / 2
        side, crop = steps["resize"], steps["crop"]
        # An image of the right size is not resampled, and keeps its values.
        if side is not None and tuple(image.shape[-2:]) != (side[-1], side[-1]):
            mode = InterpolationMode(steps["resample"])
            if not image.requires_grad:
                image = (image * 255).round().clamp(0, 255).to(torch.uint8)
            image = resize(image, list(side), interpolation=mode, antialias=True)
            image = image if image.is_floating_point() else image.float() / 255
        if crop is not None:
            image = crop_image_center(image, crop)
        return ((image - self.mean) / self.std).to(self.dtype)

    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        return self.encode_tokens(self.tokenizer(texts).to(find_compute_device(self)))

    @run_like_forward
    def encode_tokens(self, tokens: Tensor) -> TextEncoding:
        """Encode tokens, (B, context_length), int64, to z_t of any length and a state per token."""
        # The tower is causal, so tokens after the end of the longest caption change nothing before it.
        end = (tokens == self.tokenizer.end).int().argmax(dim=-1)
        length = int(end.max()) + 1
        output = self.text_encoder(input_ids=tokens[:, :length])
        mask = torch.arange(length, device=tokens.device) <= end[:, None]
        return TextEncoding(output.text_embeds, output.last_hidden_state, mask)


def crop_image_center(image: Tensor, side: int) -> Tensor:
    """Crop images, (..., H, W), to the middle, (..., side, side); a smaller image gets a black frame."""
    # An odd remainder is rounded down above and to the left, as in transformers; torchvision rounds it.
    above, left = ((length - side) // 2 if length >= side else -((side - length) // 2) for length in image.shape[-2:])
    below, right = (image.shape[-2] - side - above, image.shape[-1] - side - left)
    return F.pad(image, (-left, -right, -above, -below))


def read_tower_config(part: Component, kind: str) -> dict[str, Any]:
    """Return the keys of a tower's configuration that decide its arithmetic, defaults included."""
    where = f"in {str(part.folder)!r}"
    check_choice(f"model_type {where}", part.config.get("model_type", kind), (kind,))
    keys, config_class = TOWER_KINDS[kind]
    defaults = inspect.signature(config_class).parameters
    settings = {key: part.config.get(key, defaults[key].default) for key in keys}
    if settings.get("eos_token_id", 0) is None:
        settings["eos_token_id"] = HIGHEST_TOKEN
    for key in keys:
        if key not in ("hidden_act", "layer_norm_eps"):
            check_integer(f"{key} {where}", settings[key], 0, 10**9)
    check_choice(f"hidden_act {where}", settings["hidden_act"], ACTIVATIONS)
    return settings


def build_default_preprocess(side: int) -> dict[str, Any]:
    return {"resize": [side], "crop": side, "resample": "bicubic", "mean": CLIP_MEAN, "std": CLIP_STD}


def read_preprocess_config(folder: Path, side: int, root: Path | None = None) -> dict[str, Any]:
    """Return the preprocessing in a CLIPImageProcessor's folder, for a vision tower of `side` x `side` pixels.

    Keys of the result: resize: [the shorter side], [height, width] or None. crop: the side of the square that is cut
    out of the middle, or None. resample: "bicubic" or "bilinear". mean, std: normalization for images in [0, 1]. root:
    the pipeline's folder, which links may lead into. Raises InputError for steps that CLIP's image processors do not
    have.
    """
    check_folder_files(folder, root)
    path = folder / "preprocessor_config.json"
    config = read_config(path)

    # The result must have the tower's size
    resizes, crops = config.get("do_resize", True), config.get("do_center_crop", True)
    size, crop = parse_image_size(config.get("size", side)), parse_image_size(config.get("crop_size", side))
    final: list[Any] = []  # sides that are the same for every image
    if crops:
        final = crop
    elif resizes and len(size) == 2:
        final = size
    valid = all(type(length) is int and 0 < length <= MAX_IMAGE_SIDE for length in size)
    if set(final) != {side} or not valid:
        raise InputError(f"{str(path)!r} makes images of size {size}, crop {crop}; the image encoder takes {side}")

    # Values: resampled, divided by 255, normalised
    mean, std = [0.0] * 3, [1.0] * 3
    if config.get("do_normalize", True):
        mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    numbers = [*mean, *std] if isinstance(mean, list) and isinstance(std, list) else []
    valid = len(numbers) == 6 and all(isinstance(value, int | float) for value in numbers) and 0 not in numbers[3:]
    factor, resample = config.get("rescale_factor", 1 / 255), RESAMPLING_MODES.get(config.get("resample", 3))
    rescales = config.get("do_rescale", True) and isinstance(factor, float)
    if not valid or resample is None or not rescales or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        expected = "bicubic or bilinear, values / 255, then three means and deviations"
        raise InputError(f"{str(path)!r} has other steps than CLIP's: {expected}")
    resize_to, crop_to = size if resizes else None, side if crops else None
    return {"resize": resize_to, "crop": crop_to, "resample": resample, "mean": mean, "std": std}


def parse_image_size(size: Any) -> list[Any]:
    """Return a size of an image processor as [the shorter side] or [height, width]."""
    if isinstance(size, dict):
        return [size["shortest_edge"]] if "shortest_edge" in size else [size.get("height"), size.get("width")]
    return [size]
