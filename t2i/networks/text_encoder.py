"""A frozen text encoder of transformers (T5, BERT, CLIP, ...) whose token states a decoder reads (Saharia et al. 2022,
section 2.1). The prior always reads CLIP's encoding: only there do captions and images share a space."""

import inspect
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import TokenStates
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.fingerprints import EXACT_DTYPES, compute_weights_fingerprint
from t2i.files.hub import find_or_download_folder
from t2i.files.untrusted import CODE_KEYS, bounded_meta_device
from t2i.networks.encoder import Encoder
from t2i.networks.linear import use_onednn_linear
from t2i.networks.tokenizer import TextTokenizer, load_text_tokenizer
from t2i.runtime.hooks import find_compute_device, run_like_forward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TOKENS = 4096  # of a caption
HUB_FILES = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers: how to build its encoder, and how to find it in the files of larger models."""

    config_class: str
    model_class: str
    prefix: str  # of its tensors' names in larger models
    model_options: dict[str, Any] = field(default_factory=dict)
    has_wrapper: bool = False  # the encoder is `model.encoder`
    tensor_aliases: tuple[tuple[str, str], ...] = ()  # its own name, another name in files
    position_offset: int = 0  # rows of the position table that no token uses, beside those up to the padding's number

    def build_config(self, **settings: Any) -> Any:
        return getattr(transformers, self.config_class)(**settings)


# T5's encoder and decoder share their embeddings; files of 2018 have the old names of LayerNorm's parameters.
T5: dict[str, Any] = {
    "prefix": "encoder.",
    "has_wrapper": True,
    "tensor_aliases": (("embed_tokens.weight", "shared.weight"),),
}
BERT: dict[str, Any] = {
    "model_options": {"add_pooling_layer": False},
    "tensor_aliases": (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
}
ARCHITECTURES = {
    "t5": Architecture("T5Config", "T5EncoderModel", **T5),
    "mt5": Architecture("MT5Config", "MT5EncoderModel", **T5),
    "umt5": Architecture("UMT5Config", "UMT5EncoderModel", **T5),
    "bert": Architecture("BertConfig", "BertModel", "bert.", **BERT),
    "roberta": Architecture("RobertaConfig", "RobertaModel", "roberta.", **BERT, position_offset=1),
    "xlm-roberta": Architecture("XLMRobertaConfig", "XLMRobertaModel", "roberta.", **BERT, position_offset=1),
    "distilbert": Architecture("DistilBertConfig", "DistilBertModel", "distilbert."),
    "clip_text_model": Architecture("CLIPTextConfig", "CLIPTextModel", "text_model."),
}
# The settings of transformers' configurations that decide an encoder's states. No other is passed on, because some make
# transformers import code.
ENCODER_SETTINGS = {
    *("vocab_size", "pad_token_id", "max_position_embeddings", "type_vocab_size"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("d_model", "num_layers", "num_heads", "d_kv", "d_ff", "feed_forward_proj", "layer_norm_epsilon"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("dim", "n_layers", "n_heads", "hidden_dim", "activation"),
}


class TextEncoder(Encoder, ModelMixin):
    """An encoder of transformers with its tokenizer.

    Args:
        architecture: transformers' model type, one of `ARCHITECTURES`.
        model: its configuration, limited to `ENCODER_SETTINGS`.
        context_length: tokens of a caption at most, special ones included; what is longer is cut.
        fingerprint, rounded: digest of weights, vocabulary and context length; see `t2i.networks.encoder.Encoder`.
        padded: captions are padded to the context length, and the encoder and the decoder read the padding as well, as
            in Stable Diffusion.
    """

    tokenizer: TextTokenizer
    # Have layers that are offloaded one by one, in one of these architectures
    _group_offload_block_modules: ClassVar[list[str]] = ["net", "encoder", "transformer", "text_model"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [r"\bwo$"]  # T5 reads the dtype of these weights

    @register_to_config
    def __init__(
        self,
        architecture: str,
        model: dict,
        context_length: int = 128,
        fingerprint: str | None = None,
        rounded: bool = False,
        padded: bool = False,
    ):
        super().__init__()
        self.net = use_onednn_linear(build_text_encoder(architecture, model, context_length))

    @classmethod
    def from_transformers(
        cls, name: str | Path, context_length: int = 128, dtype: torch.dtype = torch.float32
    ) -> "TextEncoder":
        """Load a public encoder, or the encoder of a larger model: a folder that transformers wrote, or a hub name.

        The fingerprint is that of the weights in the files, whatever the dtype. `context_length` is reduced to the
        positions that the encoder has.
        """
        folder = find_or_download_folder(name, HUB_FILES)
        part = Component(folder, stem="model")
        architecture, model = parse_encoder_settings(part.config, folder)
        kind = ARCHITECTURES[architecture]
        context_length = min(context_length, count_token_positions(kind, kind.build_config(**model)) or context_length)

        # Find the encoder's tensors among those of a larger model
        with bounded_meta_device(part.tensor_specs, folder):
            expected = build_text_encoder(architecture, model, context_length).state_dict()
        own_names = find_tensor_names(expected, part.tensor_specs, kind)
        unused = tuple("net." + stored for stored in part.tensor_specs if stored not in own_names)

        # Load them as they are stored, for the fingerprint is that of the files
        encoder = load_from_components(
            lambda: cls(architecture, model, context_length),
            {"net.": part},
            rename=lambda stored: "net." + own_names[stored.removeprefix("net.")],
            unused=unused,
        )
        encoder.load_tokenizer_folder(folder, folder)
        encoder.register_to_config(fingerprint=encoder.compute_fingerprint(), rounded=dtype not in EXACT_DTYPES)
        encoder.net.to(dtype)
        return encoder

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        config = self.net.config
        pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
        check_integer("pad_token_id", pad, 0, config.vocab_size - 1)
        self.tokenizer = load_text_tokenizer(folder, self.config.context_length, pad, config.vocab_size)

    def compute_fingerprint(self) -> str:
        """Return 16 hexadecimal digits for weights, vocabulary and context length, the same in fp32 and fp16."""
        padding = f" padded with {self.tokenizer.pad}" if self.config.padded else ""
        tokens = f"{self.config.context_length} {self.tokenizer.digest()}{padding}"
        return compute_weights_fingerprint(self.net, tokens)

    @property
    def width(self) -> int:
        """Dimensions of a token's state."""
        return self.net.config.hidden_size

    def encode(self, texts: str | list[str], device: torch.device | None = None) -> TokenStates:
        """Return the states of captions, (B, L, width), in the encoder's dtype, with the mask of their tokens.

        L is the length of the longest caption, or the context length if the encoder is `padded`. device: where it
        computes, if it is elsewhere now (offloading). Raises ValueError if float16 overflows.
        """
        tokens, mask = self.tokenizer(texts)
        if self.config.padded:
            tokens = F.pad(tokens, (0, self.config.context_length - tokens.shape[1]), value=self.tokenizer.pad)
            mask = torch.ones_like(tokens, dtype=torch.bool)
        tokens, mask = (tensor.to(device or find_compute_device(self)) for tensor in (tokens, mask))
        return TokenStates(self.encode_tokens(tokens, mask), mask)

    @run_like_forward
    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the last layer's states, (B, L, width), zero where the mask is False, of tokens and mask, (B, L)."""
        attended = mask.clone()
        attended[:, 0] = True  # a caption of no tokens attends to padding, for attention to nothing is NaN
        states = self.net(input_ids=tokens, attention_mask=attended.long()).last_hidden_state
        states = states.masked_fill(~mask[..., None], 0)
        if self.dtype == torch.float16 and not states.isfinite().all():
            raise ValueError("the text encoder's states overflow float16; load it in bfloat16 or float32")
        return states


def build_text_encoder(architecture: str, model: dict[str, Any], context_length: int) -> torch.nn.Module:
    """Build the encoder of a configuration with random weights. Raises InputError for an invalid argument."""
    check_choice("architecture of a text encoder", architecture, tuple(ARCHITECTURES))
    check_integer("context_length", context_length, 3, MAX_TOKENS)
    if not isinstance(model, dict) or not all(isinstance(value, int | float | str | None) for value in model.values()):
        raise InputError(f"model must be a mapping of plain values, got {model!r:.80}")
    check_encoder_settings(model)
    kind = ARCHITECTURES[architecture]
    config = kind.build_config(**model, attn_implementation="sdpa")
    if (positions := count_token_positions(kind, config)) is not None:
        check_integer(f"context_length of a {architecture} with {positions} positions", context_length, 3, positions)
    encoder = getattr(transformers, kind.model_class)(config, **kind.model_options)
    return encoder.encoder if kind.has_wrapper else encoder


def check_encoder_settings(model: dict[str, Any]) -> None:
    """Raise InputError for a setting that is not passed on to transformers."""
    if unknown := sorted(set(model) - ENCODER_SETTINGS):
        allowed = ", ".join(sorted(ENCODER_SETTINGS))
        raise InputError(f"model has {unknown[0]!r:.80}; a text encoder's may have {allowed}")


def count_token_positions(kind: Architecture, config: Any) -> int | None:
    """Return for how many tokens an encoder has positions; None if there is no limit, as in T5."""
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None or not kind.position_offset:
        return rows
    return rows - kind.position_offset - config.pad_token_id  # RoBERTa counts positions from the padding's number on


def parse_encoder_settings(config: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the architecture and the settings in a configuration that was read from a folder."""
    kind = config.get("model_type")
    if kind == "clip":  # both towers
        kind, config = "clip_text_model", config.get("text_config")
    if not isinstance(config, dict) or not isinstance(kind, str) or any(key in config for key in CODE_KEYS):
        raise InputError(f"{str(folder / 'config.json')!r} is not the configuration of a text encoder")
    check_choice("architecture of a text encoder", kind, tuple(ARCHITECTURES))
    # Write the library's defaults out, for later versions may have others.
    parameters = inspect.signature(getattr(transformers, ARCHITECTURES[kind].config_class)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key in ENCODER_SETTINGS}
    return kind, defaults | {key: value for key, value in config.items() if key in ENCODER_SETTINGS}


def find_tensor_names(expected: Iterable[str], stored: Container[str], kind: Architecture) -> dict[str, str]:
    """Return the encoder's tensors by their names in the files; those that no file has are left out."""
    # A name may stand with or without the larger model's prefix, and under an older name.
    own_names = {}
    for name in expected:
        aliases = [name.replace(own, other) for own, other in kind.tensor_aliases if own in name]
        candidates = [prefix + alias for alias in (name, *aliases) for prefix in (kind.prefix, "")]
        if present := [candidate for candidate in candidates if candidate in stored]:
            own_names[present[0]] = name
    return own_names
