"""CLIP: captions and images in one embedding space (Radford et al. 2021). open_clip's model, saved as by diffusers.

A prior and a decoder store the fingerprint of their CLIP, of its weights and preprocessing, which is defined here.
"""

import copy
import functools
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.hub import find_or_download_folder
from t2i.files.untrusted import (
    PICKLE_FILE_TYPES,
    bounded_meta_device,
    check_finite_weights,
    check_folder_files,
    is_folder,
    read_config,
    read_safetensors_header,
)
from t2i.networks.encoder import Encoder, check_image_batch
from t2i.networks.linear import use_onednn_linear
from t2i.networks.tokenizer import (
    CaptionTokenizer,
    PublicTokenizer,
    build_public_tokenizer,
    check_public_tokenizer,
    load_clip_tokenizer,
)
from t2i.runtime.hooks import borrow_weights, find_compute_device, run_like_forward

DEFAULT_RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest"}  # CLIP's own
OPEN_CLIP_BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock)
READING_LAYERS = {  # that read the weights of the layers in them
    *("torch.nn.modules.activation.MultiheadAttention", "open_clip.modified_resnet.AttentionPool2d"),
    *("timm.models.beit.Attention", "timm.models.eva.EvaAttention", "timm.models.mobilevit.LinearSelfAttention"),
    *("timm.models.eva.Eva", "timm.models.swin_transformer_v2.WindowAttention"),
}
OPEN_CLIP_FILES = ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer*.json"]
MAX_LOGIT_SCALE = torch.tensor(math.log(100)).item()  # of the weight, a float32: a weight at the bound is not beyond it
MAX_POSITION_VALUES = 2**26  # values of a table of positions, which open_clip computes in NumPy even on meta


class CLIP(Encoder, ModelMixin):
    """An open_clip model with its preprocessing and its tokenizer.

    Args:
        model: open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...).
        preprocess: `size`, `mean` and `std` of the vision tower's input, and how images are resized, if not as CLIP
            does it: `interpolation` "bicubic" or "bilinear", `resize_mode` "shortest" (then cropped) or "squash".
        tokenizer_kind: "captions" (a vocabulary trained on them), "clip" (open_clip's) or "transformers".
        fingerprint, rounded: digest of weights and preprocessing; see `t2i.networks.encoder.Encoder`.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules: ClassVar[list[str]] = ["net", "visual", "text", "transformer"]  # have layers
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [r"resblocks\.0\.mlp\.c_fc$"]  # whose dtype open_clip reads
    is_trainable = True
    unit_length = True  # z_t and z_i have length 1
    reads_captions = True
    tokenizer: CaptionTokenizer | PublicTokenizer

    @register_to_config
    def __init__(
        self,
        model: dict,
        preprocess: dict,
        tokenizer_kind: str = "captions",
        fingerprint: str | None = None,
        rounded: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.net = use_hooked_attention(use_onednn_linear(build_open_clip_model(model)))
        # FSDP shards each block of open_clip's own towers as a unit.
        blocks = {type(layer).__name__ for layer in self.net.modules() if isinstance(layer, OPEN_CLIP_BLOCKS)}
        self._no_split_modules = sorted(blocks)
        if tokenizer_kind == "clip":  # comes with open_clip
            self.tokenizer = PublicTokenizer(SimpleTokenizer(context_length=self.context_length))
        interpolation, mode = (preprocess.get(key, default) for key, default in DEFAULT_RESIZING.items())
        check_choice("preprocess.interpolation", interpolation, ("bicubic", "bilinear"))
        check_choice("preprocess.resize_mode", mode, ("shortest", "squash"))
        size = preprocess["size"]
        self.size = size if isinstance(size, int) else size[0]
        check_integer("preprocess.size", self.size, 1, 4096)
        # side: the new short side, or the new height and width
        side = (self.size,) if mode == "shortest" else (self.size, self.size)
        self.resize_settings: dict[str, Any] = {"interpolation": interpolation, "side": side}
        # Constants of the configuration, so no weights to save
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    @classmethod
    def from_open_clip(cls, name: str, tag: str | None = None) -> "CLIP":
        """Load a public model: an open_clip name and tag, "hf-hub:org/name" or "local-dir:/path".

        Raises InputError for an unknown name or tag, and for weights that are not safetensors.
        """
        # Check the name, the tag, and that the weights can be loaded
        source, config = find_open_clip_source(name)
        weights = open_clip.get_pretrained_cfg(name, tag) if tag else {}
        if tag and not weights:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
            raise InputError(f"open_clip has no weights {tag!r} for {name!r}; it has {tags}")
        # A tower with the other activation loads without an error, and its embeddings are useless.
        if weights and weights.get("quick_gelu", False) != config.get("quick_gelu", False):
            other = name + "-quickgelu" if weights.get("quick_gelu") else name.removesuffix("-quickgelu")
            raise InputError(f"{name!r} with {tag!r} mixes GELU and QuickGELU, which ruins embeddings; use {other!r}")
        path = Path(open_clip.download_pretrained(weights)) if tag else None
        if path is not None and path.suffix != ".safetensors":
            raise InputError(f"the weights {tag!r} of {name!r} are in {path.name!r}; only .safetensors is loaded")

        # Load, and take over the weights, the tokenizer and the preprocessing
        import_timm_for(config)
        net = open_clip.create_model(source, pretrained=tag, require_pretrained=True)
        check_finite_weights(net, name)
        tokenizer, kind = build_public_tokenizer(name, config["text_cfg"])
        preprocess = {key: net.visual.preprocess_cfg[key] for key in ("size", "mean", "std")}
        preprocess |= {key: net.visual.preprocess_cfg.get(key, default) for key, default in DEFAULT_RESIZING.items()}
        clip = cls(config, preprocess, kind)
        clip.net.load_state_dict(net.state_dict())
        clip.tokenizer = tokenizer
        return clip

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        self.tokenizer = load_clip_tokenizer(folder, self.config.tokenizer_kind, self.config.model["text_cfg"])

    def compute_fingerprint(self) -> str:
        """Return 16 hexadecimal digits for the weights and the preprocessing, the same in fp32 and fp16."""
        return compute_weights_fingerprint(self.net, json.dumps(self.config.preprocess, sort_keys=True))

    @property
    def embed_dim(self) -> int:
        return self.config.model["embed_dim"]

    @property
    def context_length(self) -> int:
        return self.config.model["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)

    @property
    def text_width(self) -> int:
        tower = self.text_tower
        return tower.ln_final.normalized_shape[0] if hasattr(tower, "ln_final") else tower.config.hidden_size

    @property
    def text_tower(self) -> torch.nn.Module:
        return getattr(self.net, "text", self.net)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        """Pass on the switch of `enable_gradient_checkpointing` and its reverse to that of open_clip."""
        self.gradient_checkpointing = enable
        self.net.set_grad_checkpointing(enable)

    @run_like_forward
    def forward(self, image: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return z_i and z_t, (B, D), and the scale of the logits, (), at most 100 as in CLIP (section 2.5).

        z_i is None without an image.
        """
        z_i = None if image is None else self.encode_image(image)
        return z_i, self.encode_tokens(tokens).embedding, self.compute_logit_scale()

    def compute_logit_scale(self) -> Tensor:
        """Return the factor of cosines in logits, (), at most 100 as in CLIP (section 2.5)."""
        with borrow_weights(self.net):
            weight = self.net.logit_scale
            # Not `clamp`, which has no gradient at the bound itself
            return torch.where(weight > MAX_LOGIT_SCALE, MAX_LOGIT_SCALE, weight).exp()

    @torch.no_grad()
    def bound_logit_scale(self) -> None:
        """Bound the weight itself, as CLIP's training does after every step, so that it does not drift beyond."""
        self.net.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    @run_like_forward
    def encode_image(self, image: Tensor) -> Tensor:
        """Return z_i, (B, D), unit length, of images (B, 3, H, W) in [-1, 1]. Raises InputError for other tensors."""
        check_image_batch(image)
        return self.net.encode_image(self.preprocess(image), normalize=True)

    @run_like_forward
    def preprocess(self, image: Tensor) -> Tensor:
        """Bring images, (B, 3, H, W) in [-1, 1], to the size and the values of the vision tower's training."""
        if image.shape[-2:] != (self.size, self.size):
            side, mode = self.resize_settings["side"], InterpolationMode(self.resize_settings["interpolation"])
            image = center_crop(resize(image, list(side), interpolation=mode, antialias=True), [self.size])
        return (((image + 1) / 2 - self.mean) / self.std).to(self.mean.dtype)

    def encode_text(self, texts: str | list[str]) -> TextEncoding:
        """Return z_t and the token states of B captions; what does not fit in the context length is cut."""
        return self.encode_tokens(self.tokenizer(texts).to(find_compute_device(self)))

    @run_like_forward
    def encode_tokens(self, tokens: Tensor) -> TextEncoding:
        """Return z_t, (B, D), of unit length, and states, (B, L, width), of tokens (B, context_length), int64."""
        tower = self.text_tower
        if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
            return self.encode_padded_tokens(tokens)
        with borrow_weights(tower):
            return self.encode_causal_tokens(tokens)

    def encode_causal_tokens(self, tokens: Tensor) -> TextEncoding:
        """Encode tokens with a causal tower, whose weights are in place."""
        tower = self.text_tower
        # Under a causal mask, tokens after the end of a caption change nothing before it. So the batch is trimmed to
        # its longest caption, and the tower's own forward, which needs all positions, is written out here.
        # z_t is the state of the token with the highest number, or of a tower's own end token.
        pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
        end_token = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        end = (tokens if pooling == "argmax" else (tokens == end_token).int()).argmax(dim=-1)
        length = int(end.max()) + 1
        tokens = tokens[:, :length]
        states = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        states = tower.ln_final(tower.transformer(states, attn_mask=tower.attn_mask[:length, :length]))  # (B, L, width)
        z_t = states[torch.arange(len(states), device=states.device), end]
        projection = tower.text_projection
        if projection is not None:
            z_t = projection(z_t) if isinstance(projection, torch.nn.Module) else z_t @ projection
        mask = torch.arange(length, device=tokens.device) <= end[:, None]
        return TextEncoding(F.normalize(z_t, dim=-1), states, mask)

    def encode_padded_tokens(self, tokens: Tensor) -> TextEncoding:
        """Encode tokens with a tower that attends to padding (SigLIP, CoCa, those of transformers)."""
        tower = self.text_tower
        tower.output_tokens = True
        pooled, states = tower(tokens)
        mask = tokens != getattr(tower, "pad_id", getattr(getattr(tower, "config", None), "pad_token_id", 0))
        length = int(mask.sum(dim=1).max())
        return TextEncoding(F.normalize(pooled, dim=-1), states[:, :length], mask[:, :length])


class ReadsChildren(torch.nn.Module):
    """A layer that reads the weights of the layers in it, without calling these."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with borrow_weights(*self.children()):
            return super().forward(*args, **kwargs)


@functools.cache
def build_reading_class(layer_class: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(layer_class.__name__, (ReadsChildren, layer_class), {})


def use_hooked_attention(model: torch.nn.Module) -> torch.nn.Module:
    """Let hooks reach all weights of a model's attention layers, in place."""
    for layer in model.modules():
        layer_class: Any = type(layer)
        if f"{layer_class.__module__}.{layer_class.__name__}" in READING_LAYERS:
            layer.__class__ = build_reading_class(layer_class)
    return model


def build_open_clip_model(config: dict) -> torch.nn.Module:
    """Build the open_clip model of a configuration with random weights, without fetching anything."""
    config = copy.deepcopy(dict(config))
    text, vision = config["text_cfg"], config["vision_cfg"]
    check_tower_settings(text, vision)
    import_timm_for(config)
    # In open_clip's plain CLIP the layers of the text tower are the model's own; in others the tower is `text`.
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    # By default open_clip would download weights for towers of other libraries.
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def import_timm_for(config: dict) -> None:
    """Import timm if a configuration of open_clip needs it and `t2i.commands.imports.speed_up_imports` left it out."""
    if "timm_model_name" in config["vision_cfg"] and open_clip.timm_model.timm is None:
        importlib.reload(open_clip.timm_model)


def check_tower_settings(text: dict, vision: dict) -> None:
    """Refuse names of towers that are paths, and tables of positions that would not fit in memory."""
    for key, name, form in (
        ("hf_model_name", text.get("hf_model_name", ""), r"([\w.-]+/)?[\w.-]*"),
        ("timm_model_name", vision.get("timm_model_name", ""), r"[\w.-]*"),
    ):
        if not isinstance(name, str) or not re.fullmatch(form, name) or name.startswith("."):
            raise InputError(f"{key} must be the name of a public model, got {name!r:.80}")
    if vision.get("pos_embed_type") == "sin_cos_2d":
        grid = vision["image_size"] // vision["patch_size"]
        check_integer("values of the table of positions", grid**2 * vision["width"], 1, MAX_POSITION_VALUES)


def find_open_clip_source(name: str) -> tuple[str, dict]:
    """Return the name by which open_clip creates a model, and the model's configuration.

    Of a repository ("hf-hub:") only JSON and safetensors are downloaded; a folder ("local-dir:") is checked. Raises
    InputError for an unknown name and for a folder that is not a whole model.
    """
    if name.startswith("hf-hub:"):
        folder = find_or_download_folder(name.removeprefix("hf-hub:"), OPEN_CLIP_FILES)
    elif name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
    elif config := open_clip.get_model_config(name):
        return name, config
    else:
        raise InputError(f"open_clip has no model {name!r:.200}; `open_clip.list_models()` lists them")
    if not is_folder(folder) or not (folder / "open_clip_config.json").exists():
        raise InputError(f"no open_clip_config.json in {str(folder)!r:.200}; a local-dir: or hf-hub: model has one")
    check_folder_files(folder)
    config = read_config(folder / "open_clip_config.json").get("model_cfg")
    if not isinstance(config, dict):
        raise InputError(f"{str(folder / 'open_clip_config.json')!r} has no model_cfg")
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLE_FILE_TYPES))
    # Of several files of weights open_clip reads the one with its own name, so that is the one to check.
    if [path.suffix for path in weights] != [".safetensors"]:
        weights = [folder / "open_clip_model.safetensors"]
    with bounded_meta_device(read_safetensors_header(weights[0]), folder):
        build_open_clip_model(config)
    check_public_tokenizer(folder, config["text_cfg"])
    return f"local-dir:{folder}", config
