"""Tiny text encoders of transformers with random weights, saved as transformers saves them, each with a tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [
    *("a", "an", "red", "green", "blue", "circle", "square", "drawing"),
    *("of", "the", "large", "small", "picture", "with", "two"),
]
SPECIAL = ["[PAD]", "[START]", "[END]", "[UNK]"]
SIZE = len(SPECIAL) + len(WORDS)
LAYERS = {"vocab_size": SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
T5 = {"vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MADE: dict[str, tuple[type, Any]] = {
    "t5": (transformers.T5EncoderModel, lambda: transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "mt5": (transformers.MT5EncoderModel, lambda: transformers.MT5Config(**T5)),
    "umt5": (transformers.UMT5EncoderModel, lambda: transformers.UMT5Config(**T5)),
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(**LAYERS)),
    "roberta": (transformers.RobertaModel, lambda: transformers.RobertaConfig(**LAYERS, **TOKENS)),
    "xlm-roberta": (transformers.XLMRobertaModel, lambda: transformers.XLMRobertaConfig(**LAYERS, **TOKENS)),
    "distilbert": (
        transformers.DistilBertModel,
        lambda: transformers.DistilBertConfig(
            vocab_size=SIZE, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40
        ),
    ),
    "clip_text_model": (transformers.CLIPTextModel, lambda: transformers.CLIPTextConfig(**LAYERS, **TOKENS)),
}


def make_tokenizer() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 2)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make(kind: str, folder: Path, seed: int = 0) -> Path:
    """A folder as transformers writes it, with weights that make every token's state depend on the others."""
    encoder, config = MADE[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = encoder(config())
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def reference(kind: str, folder: Path) -> torch.nn.Module:
    """What transformers itself loads from that folder."""
    return MADE[kind][0].from_pretrained(folder).eval()
