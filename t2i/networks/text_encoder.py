"""A frozen text encoder of transformers (T5, BERT, CLIP, ...) that the decoder's caption tokens come from.

The prior reads CLIP's encoding always: only there do captions and pictures share a space. A decoder may read what a
language model says of the caption token by token instead (Saharia et al. 2022, section 2.1).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import safe_open
from torch import Tensor

from t2i.checks import check_choice, check_integer
from t2i.diffusion.condition import TokenStates
from t2i.errors import InputError
from t2i.files.fingerprints import EXACT_DTYPES, compute_tensors_fingerprint, compute_weights_fingerprint
from t2i.files.hub import find_or_download_folder
from t2i.files.untrusted import (
    CODE_KEYS,
    TensorSpec,
    bounded_meta_device,
    check_finite_weights,
    check_folder_files,
    check_tensor_specs,
    find_weight_files,
    read_config,
    read_safetensors_header,
)
from t2i.networks.encoder import Encoder
from t2i.networks.linear import use_onednn_linear
from t2i.networks.tokenizer import TextTokenizer, load_text_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TOKENS = 4096  # of a caption
HUB_FILES = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Architecture:
    """How to make the encoder of one of transformers' model types, and how to find it in the files of larger models.

    Classes are named, not imported: transformers takes its time for each, and a pipeline needs at most one.
    """

    class_names: tuple[str, str]  # in transformers, of the configuration's class and of the model's
    encoder: Callable[[Any, Any], torch.nn.Module]  # of the model's class and a configuration
    prefixes: tuple[str, ...]  # what its tensors' names may begin with
    tensor_aliases: tuple[tuple[str, str], ...] = ()  # ours, theirs: tensors that files may know by another name
    position_offset: int = 0  # positions in its table that no token has, beyond the number of the padding

    @property
    def config(self) -> Any:
        return getattr(transformers, self.class_names[0])

    def build_encoder_model(self, config: Any) -> torch.nn.Module:
        return self.encoder(getattr(transformers, self.class_names[1]), config)


EMBEDDING_ALIASES = (("embed_tokens.weight", "shared.weight"),)  # that T5's encoder and decoder share
LAYER_NORM_ALIASES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # files of 2018


def build_t5_architecture(name: str) -> Architecture:
    names = (f"{name}Config", f"{name}EncoderModel")
    return Architecture(names, lambda model, config: model(config).encoder, ("encoder.",), EMBEDDING_ALIASES)


def build_bert_architecture(name: str, prefix: str, offset: int = 0) -> Architecture:
    names = (f"{name}Config", f"{name}Model")
    return Architecture(
        names, lambda model, config: model(config, add_pooling_layer=False), ("", prefix), LAYER_NORM_ALIASES, offset
    )


def build_plain_architecture(config: str, model: str, prefix: str) -> Architecture:
    return Architecture((config, model), lambda model, config: model(config), ("", prefix))


ARCHITECTURES = {
    "t5": build_t5_architecture("T5"),
    "mt5": build_t5_architecture("MT5"),
    "umt5": build_t5_architecture("UMT5"),
    "bert": build_bert_architecture("Bert", "bert."),
    "roberta": build_bert_architecture("Roberta", "roberta.", 1),
    "xlm-roberta": build_bert_architecture("XLMRoberta", "roberta.", 1),
    "distilbert": build_plain_architecture("DistilBertConfig", "DistilBertModel", "distilbert."),
    "clip_text_model": build_plain_architecture("CLIPTextConfig", "CLIPTextModel", "text_model."),
}
# Settings of transformers that decide the states of an encoder; what only imports read is left out.
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
        model: its configuration, as far as `ENCODER_SETTINGS` name it.
        context_length: tokens of a caption at most, special ones included; what is longer is cut.
        fingerprint: of weights, vocabulary and context length; written on saving, checked on loading.
        rounded: the weights went through a dtype that does not keep the fingerprint, such as bfloat16.
        padded: captions are padded to the context length, and the padding is read as well, as in Stable Diffusion.
    """

    tokenizer: TextTokenizer
    has_warned = False  # of captions that do not fit: training says it once

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
        """A public encoder, or the encoder of a larger model: a folder as transformers writes it, or a name on the hub.

        Only its config.json, tokenizer.json and safetensors are read. The fingerprint is that of the weights in the
        files, whatever the dtype. `context_length` is less if the encoder knows fewer positions.
        """
        folder = find_or_download_folder(name, HUB_FILES)
        architecture, model = read_encoder_settings(folder)
        kind = ARCHITECTURES[architecture]
        context_length = min(context_length, count_token_positions(kind, kind.config(**model)) or context_length)
        headers = {path: read_safetensors_header(path) for path in find_weight_files(folder, stem="model")}
        files = {key: path for path, header in headers.items() for key in header}
        held = {key: stored for header in headers.values() for key, stored in header.items()}
        with bounded_meta_device(held, folder):
            build_text_encoder(architecture, model, context_length)
        with init_empty_weights(include_buffers=False):
            encoder = cls(architecture, model, context_length)
        wanted = encoder.net.state_dict()
        names = find_tensor_names(wanted, held, kind)
        check_tensor_specs(wanted, {ours: held[theirs] for ours, theirs in names.items()}, folder)

        def read(theirs: str) -> Tensor:
            with safe_open(files[theirs], "pt") as file:
                return file.get_tensor(theirs)

        tensors = {ours: read(theirs) for ours, theirs in names.items()}
        encoder.net.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, assign=True)
        check_finite_weights(encoder.net, folder)
        encoder.tokenizer = encoder.load_text_tokenizer(folder)
        encoder.register_to_config(
            fingerprint=compute_tensors_fingerprint(tensors, encoder.tokenizer_identity),
            rounded=dtype not in EXACT_DTYPES,
        )
        return encoder.eval().requires_grad_(False)

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        self.tokenizer = self.load_text_tokenizer(folder)

    def load_text_tokenizer(self, folder: Path) -> TextTokenizer:
        config = self.net.config
        pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
        check_integer("pad_token_id", pad, 0, config.vocab_size - 1)
        return load_text_tokenizer(folder, self.config.context_length, pad, config.vocab_size)

    @property
    def tokenizer_identity(self) -> str:
        """What decides the states beside the weights."""
        padding = f" padded with {self.tokenizer.pad}" if self.config.padded else ""
        return f"{self.config.context_length} {self.tokenizer.digest()}{padding}"

    def fingerprint(self) -> str:
        """16 hexadecimal digits for weights, vocabulary and context length, the same in fp32 and fp16."""
        return compute_weights_fingerprint(self.net, self.tokenizer_identity)

    @property
    def width(self) -> int:
        """Dimensions of a token's state."""
        return self.net.config.hidden_size

    def find_truncated_text(self, text: str) -> str:
        """The end of a text that does not fit, empty if all does."""
        return self.tokenizer.find_truncated_text(text)

    def encode(self, texts: list[str], device: torch.device | None = None) -> TokenStates:
        """Captions -> a state a token, (B, L, width), in the encoder's dtype; L is that of the longest caption, or
        the context length if the encoder is `padded`.

        A caption's states do not depend on the others, but for rounding. `device`: where the encoder computes, if it is
        elsewhere now (offloading). Raises ValueError if float16 overflows.
        """
        tokens, mask = self.tokenizer(texts)
        if self.config.padded:
            tokens = F.pad(tokens, (0, self.config.context_length - tokens.shape[1]), value=self.tokenizer.pad)
            mask = torch.ones_like(tokens, dtype=torch.bool)
        tokens, mask = (tensor.to(device or self.device) for tensor in (tokens, mask))
        return TokenStates(self.encode_tokens(tokens, mask), mask)

    @apply_forward_hook
    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, L) int64, (B, L) bool -> (B, L, width): the last layer's states, zero where the mask is False."""
        seen = mask.clone()
        seen[:, 0] = True  # a caption of no tokens sees the padding: attention to nothing is NaN
        states = self.net(input_ids=tokens, attention_mask=seen.long()).last_hidden_state
        states = states.masked_fill(~mask[..., None], 0)
        if self.dtype == torch.float16 and not states.isfinite().all():
            raise ValueError("the text encoder's states overflow float16; load it in bfloat16 or float32")
        return states


def build_text_encoder(architecture: str, model: dict[str, Any], context_length: int) -> torch.nn.Module:
    """The encoder of a configuration, with random weights."""
    check_encoder_architecture(architecture)
    check_integer("context_length", context_length, 3, MAX_TOKENS)
    if not isinstance(model, dict) or not all(isinstance(value, int | float | str | None) for value in model.values()):
        raise InputError(f"model must be a mapping of plain values, got {model!r:.80}")
    if unknown := sorted(set(model) - ENCODER_SETTINGS):
        raise InputError(
            f"model has {unknown[0]!r:.80}; a text encoder's may have {', '.join(sorted(ENCODER_SETTINGS))}"
        )
    kind = ARCHITECTURES[architecture]
    config = kind.config(**model, attn_implementation="sdpa")
    if (places := count_token_positions(kind, config)) is not None:
        check_integer(f"context_length of a {architecture} with {places} positions", context_length, 3, places)
    return kind.build_encoder_model(config)


def count_token_positions(kind: Architecture, config: Any) -> int | None:
    """How many tokens an encoder has positions for; None if there is no limit, as in T5."""
    places = getattr(config, "max_position_embeddings", None)
    return places if places is None or not kind.position_offset else places - kind.position_offset - config.pad_token_id


def check_encoder_architecture(name: Any) -> None:
    check_choice("architecture of a text encoder", name, tuple(ARCHITECTURES))


def read_encoder_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """The architecture and the settings in a folder of transformers'; refused, if its weights do not fit them."""
    check_folder_files(folder)
    return parse_encoder_settings(read_config(folder / "config.json"), folder)


def parse_encoder_settings(config: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """The same of a configuration that was read from a folder."""
    kind = config.get("model_type")
    if kind == "clip":  # both towers
        kind, config = "clip_text_model", config.get("text_config")
    if not isinstance(config, dict) or not isinstance(kind, str) or any(key in config for key in CODE_KEYS):
        raise InputError(f"{str(folder / 'config.json')!r} is of no text encoder")
    check_encoder_architecture(kind)
    model = {key: value for key, value in config.items() if key in ENCODER_SETTINGS}
    defaults = inspect.signature(ARCHITECTURES[kind].config).parameters  # later versions may have others
    return kind, {**{key: one.default for key, one in defaults.items() if key in ENCODER_SETTINGS}, **model}


def find_tensor_names(wanted: dict[str, Tensor], held: dict[str, TensorSpec], kind: Architecture) -> dict[str, str]:
    """Where each of the encoder's tensors is in the files of a model that holds it; those that are nowhere left out."""
    found = {}
    for ours in wanted:
        others = [ours.replace(new, old) for new, old in kind.tensor_aliases if new in ours]
        theirs = [prefix + name for name in (ours, *others) for prefix in (*kind.prefixes, "")]
        if there := [name for name in theirs if name in held]:
            found[ours] = there[0]
    return found
