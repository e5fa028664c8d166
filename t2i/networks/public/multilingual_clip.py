"""The text encoder of Kandinsky 2.1: an XLM-RoBERTa with a projection into CLIP's space (Carlsson et al. 2022)."""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn.functional import pad

from t2i.checks import check_integer
from t2i.diffusion.condition import TokenStates
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.networks.encoder import Encoder
from t2i.networks.linear import Linear, use_onednn_linear
from t2i.networks.text_encoder import ENCODER_SETTINGS, check_encoder_settings
from t2i.networks.tokenizer import TextTokenizer, load_text_tokenizer
from t2i.runtime.hooks import find_compute_device, run_like_forward

CAPTION_LENGTH = 77  # tokens, which the decoder attends to with their padding
UNUSED_TENSORS = ("transformer.embeddings.position_ids", "transformer.embeddings.token_type_ids")  # in older files


class MultilingualCLIP(Encoder, ModelMixin):
    """An XLM-RoBERTa with a projection and its tokenizer; the contract is `t2i.networks.text_encoder.TextEncoder`'s.

    Args:
        model: transformers' configuration of the XLM-RoBERTa, limited to `t2i.networks.text_encoder.ENCODER_SETTINGS`.
        pooled_width: dimensions of the projection.
        context_length: tokens of a caption, special ones and padding included; longer captions are cut.
        fingerprint, rounded: digest of weights, vocabulary and context length; see `t2i.networks.encoder.Encoder`.
    """

    tokenizer: TextTokenizer
    _group_offload_block_modules: ClassVar[list[str]] = ["transformer", "encoder"]  # have layers, offloaded one by one

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        pooled_width: int = 768,
        context_length: int = CAPTION_LENGTH,
        fingerprint: str | None = None,
        rounded: bool = False,
    ):
        super().__init__()
        check_encoder_settings(model)
        config = transformers.XLMRobertaConfig(**model, attn_implementation="sdpa")
        # RoBERTa counts positions from the padding's number on.
        positions = config.max_position_embeddings - config.pad_token_id - 1
        check_integer(f"context_length of a text encoder with {positions} positions", context_length, 3, positions)
        self.transformer = use_onednn_linear(transformers.XLMRobertaModel(config))
        self.LinearTransformation = Linear(config.hidden_size, pooled_width)

    @classmethod
    def from_component(cls, part: Component, tokenizer: Path, dtype: torch.dtype | None = None) -> Self:
        """Load a public folder `text_encoder`, a Component with the stem "model", and the folder of its tokenizer.

        Raises InputError if it is not a complete MultilingualCLIP.
        """
        model = {key: value for key, value in part.config.items() if key in ENCODER_SETTINGS}
        width, pooled = model.get("hidden_size", 768), part.config.get("numDims", 768)
        kind, dims = part.config.get("model_type"), part.config.get("transformerDimensions", 1024)
        if kind != "M-CLIP" or dims != width:
            expected = f"it must be M-CLIP with transformerDimensions {width}, its hidden_size"
            raise InputError(f"{str(part.folder)!r} is {kind!r:.80} with {dims!r:.80}; {expected}")
        encoder = load_from_components(lambda: cls(model, pooled), {"": part}, dtype, unused=UNUSED_TENSORS)
        encoder.load_tokenizer_folder(tokenizer, tokenizer)
        return encoder

    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        pad, vocab_size = self.transformer.config.pad_token_id, self.transformer.config.vocab_size
        check_integer("pad_token_id", pad, 0, vocab_size - 1)
        self.tokenizer = load_text_tokenizer(folder, self.config.context_length, pad, vocab_size)

    def compute_fingerprint(self) -> str:
        """Return 16 hexadecimal digits for weights, vocabulary and context length, the same in fp32 and fp16."""
        return compute_weights_fingerprint(self, f"{self.config.context_length} {self.tokenizer.digest()}")

    @property
    def width(self) -> int:
        """Dimensions of a token's state."""
        return self.transformer.config.hidden_size

    def encode(self, texts: str | list[str], device: torch.device | None = None) -> TokenStates:
        """Encode captions to a state per token, (B, 77, width), and a pooled vector, (B, D).

        The mask is True everywhere. device: place where the encoder computes, if its weights are elsewhere now
        (offloading).
        """
        tokens, mask = (tensor.to(device or find_compute_device(self)) for tensor in self.tokenizer(texts))
        missing = (0, self.config.context_length - tokens.shape[1])
        tokens, mask = pad(tokens, missing, value=self.tokenizer.pad), pad(mask, missing)
        # The transformer masks the padding; only its states are read.
        states, pooled = self.encode_tokens(tokens, mask)
        return TokenStates(states, torch.ones_like(states[..., 0], dtype=torch.bool), pooled)

    @run_like_forward
    def encode_tokens(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return states, (B, L, width), and the projected mean of unpadded ones, (B, D), of tokens and mask, (B, L)."""
        states = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return states, self.LinearTransformation(mean)
