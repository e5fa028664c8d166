"""Captions to token numbers: a byte-pair vocabulary of the project's own, or the tokenizer of a public CLIP."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from t2i.config import check_integer
from t2i.errors import InputError
from t2i.untrusted import MAX_TABLE, MAX_TOKENIZER, check_files, check_size, read_json

PAD, START, END = "<pad>", "<start>", "<end>"
SETTINGS = {"clean", "strip_sep_token", "language"}  # of a public tokenizer, that a configuration may choose


class CaptionTokenizer:
    """A byte-pair vocabulary trained on captions, so that a small text tower has no rows that it never uses.

    Lower-cased; any text can be encoded, for single bytes are in the vocabulary. The text of a special token is text.
    Token 0 pads, 1 starts, and the highest ends a caption, as open_clip's pooling expects.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.tokenizer.encode_special_tokens = True  # in a caption they are text like any other
        self.end = tokenizer.token_to_id(END)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int) -> "CaptionTokenizer":
        tokenizer = untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[PAD, START],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        tokenizer.add_special_tokens([END])
        return cls(tokenizer, context_length)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, context_length), int64; what does not fit is cut."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, encoding in zip(tokens, self.tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = [1, *encoding.ids[: self.context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def cut(self, text: str) -> str:
        """The end of a text that does not fit, empty if all does."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        rest = encoding.offsets[self.context_length - 2 :]
        return text[rest[0][0] :].strip() if rest else ""

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def digest(self) -> str:
        """16 hexadecimal digits for the vocabulary."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]


def untrained() -> Tokenizer:
    """How captions become bytes; without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """All of a tokenizer but its vocabulary."""
    found = json.loads(tokenizer.to_str())
    model = found.pop("model")
    found.pop("added_tokens")
    return {**found, **{f"model.{key}": value for key, value in model.items() if key not in ("vocab", "merges")}}


class PublicTokenizer:
    """The tokenizer of an open_clip model, with the same three methods."""

    def __init__(self, tokenizer: SimpleTokenizer | HFTokenizer):
        self.tokenizer, self.context_length = tokenizer, tokenizer.context_length

    def __call__(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def cut(self, text: str) -> str:
        if isinstance(self.tokenizer, SimpleTokenizer):
            return self.tokenizer.decode(self.tokenizer.encode(text)[self.context_length - 2 :]).strip()
        ids = self.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer.tokenizer.decode(ids[self.context_length - 2 :]).strip()

    def save(self, folder: Path) -> None:
        if isinstance(self.tokenizer, HFTokenizer):  # CLIP's own vocabulary comes with open_clip
            self.tokenizer.tokenizer.save_pretrained(folder / "tokenizer")


def load_tokenizer(folder: Path, kind: str, text_cfg: dict[str, Any]) -> CaptionTokenizer | PublicTokenizer:
    """The tokenizer saved in a CLIP folder, for a text tower of open_clip's configuration `text_cfg`.

    Raises InputError if its file is missing or damaged, or does not fit the text tower.
    """
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    check_integer("context_length", context_length, 3, 100_000)
    if kind == "clip":
        return PublicTokenizer(SimpleTokenizer(context_length=context_length))
    if kind == "transformers":
        check_tokenizer(folder / "tokenizer", text_cfg)
        options = {"tokenizer_mode": text_cfg.get("tokenizer_mode"), **text_cfg.get("tokenizer_kwargs", {})}
        folder = folder / "tokenizer"
        return PublicTokenizer(HFTokenizer(str(folder), context_length, trust_remote_code=False, **options))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"no {str(path)!r}; it is the vocabulary that this CLIP was trained with")
    check_size(path, MAX_TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise InputError(f"{str(path)!r} is not a tokenizer ({error})") from error
    rows, highest = text_cfg.get("vocab_size", 0), max(tokenizer.get_vocab().values(), default=0)
    if [tokenizer.token_to_id(token) for token in (PAD, START, END)] != [0, 1, highest] or highest != rows - 1:
        raise InputError(f"{str(path)!r} is not the vocabulary of a text tower with {rows} tokens, the end the last")
    found = settings(tokenizer)  # after the numbers: the library counts up to the highest
    if other := [key for key, value in settings(untrained()).items() if found.get(key) != value]:
        # such as a padding to millions of tokens, or a pattern that takes for ever
        raise InputError(f"{str(path)!r} has another {other[0]} than a vocabulary of captions has")
    return CaptionTokenizer(tokenizer, context_length)


def check_tokenizer(folder: Path, text_cfg: dict[str, Any]) -> None:
    """Refuse a public tokenizer's folder or settings that would run code."""
    if other := sorted(text_cfg.get("tokenizer_kwargs", {}).keys() - SETTINGS):
        raise InputError(f"tokenizer_kwargs has {other[0]!r}; only {', '.join(sorted(SETTINGS))} are taken")
    if folder.is_dir():
        check_files(folder)
        for path in folder.glob("*.json"):
            check_size(path, MAX_TOKENIZER)
            if path.name in ("config.json", "tokenizer_config.json") and "auto_map" in read_json(path, MAX_TABLE):
                raise InputError(f"{str(path)!r} has 'auto_map'; only this project's own code is run")


def public_tokenizer(name: str, text_cfg: dict[str, Any]) -> tuple[PublicTokenizer, str]:
    """The tokenizer of an open_clip model by its name, and its kind."""
    options = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    tokenizer = open_clip.get_tokenizer(name, **options)
    return PublicTokenizer(tokenizer), "clip" if isinstance(tokenizer, SimpleTokenizer) else "transformers"
