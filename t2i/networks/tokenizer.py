"""Captions to token numbers: a byte-pair vocabulary of the project's own, or the tokenizer of a public model."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.untrusted import MAX_HEADER_BYTES, MAX_TOKENIZER_BYTES, check_folder_files, check_size_limit, read_json

PAD, START, END = "<pad>", "<start>", "<end>"
KNOWN_PATTERNS = {  # of public tokenizers; any other may take for ever
    r"\s+",
    " {2,}",
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
}
LENGTHENING_STEPS = ("Replace", "Prepend")  # steps that may put more in the place of less
PUBLIC_SETTINGS = {"clean", "strip_sep_token", "language"}  # of a public tokenizer, that a configuration may choose


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
        tokenizer = build_untrained_tokenizer()
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

    def find_truncated_text(self, text: str) -> str:
        """The end of a text that does not fit, empty if all does."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        rest = encoding.offsets[self.context_length - 2 :]
        return text[rest[0][0] :].strip() if rest else ""

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def digest(self) -> str:
        """16 hexadecimal digits for the vocabulary."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]


def build_untrained_tokenizer() -> Tokenizer:
    """How captions become bytes; without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def collect_tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
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

    def find_truncated_text(self, text: str) -> str:
        if isinstance(self.tokenizer, SimpleTokenizer):
            return self.tokenizer.decode(self.tokenizer.encode(text)[self.context_length - 2 :]).strip()
        ids = self.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer.tokenizer.decode(ids[self.context_length - 2 :]).strip()

    def save(self, folder: Path) -> None:
        if isinstance(self.tokenizer, HFTokenizer):  # CLIP's own vocabulary comes with open_clip
            self.tokenizer.tokenizer.save_pretrained(folder / "tokenizer")


def load_clip_tokenizer(folder: Path, kind: str, text_cfg: dict[str, Any]) -> CaptionTokenizer | PublicTokenizer:
    """The tokenizer saved in a CLIP folder, for a text tower of open_clip's configuration `text_cfg`.

    Raises InputError if its file is missing or damaged, or does not fit the text tower.
    """
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    check_integer("context_length", context_length, 3, 100_000)
    if kind == "clip":
        return PublicTokenizer(SimpleTokenizer(context_length=context_length))
    if kind == "transformers":
        check_public_tokenizer(folder / "tokenizer", text_cfg)
        options = {"tokenizer_mode": text_cfg.get("tokenizer_mode"), **text_cfg.get("tokenizer_kwargs", {})}
        folder = folder / "tokenizer"
        return PublicTokenizer(HFTokenizer(str(folder), context_length, trust_remote_code=False, **options))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"no {str(path)!r}; it is the vocabulary that this CLIP was trained with")
    check_size_limit(path, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise InputError(f"{str(path)!r} is not a tokenizer ({error})") from error
    rows, highest = text_cfg.get("vocab_size", 0), max(tokenizer.get_vocab().values(), default=0)
    if [tokenizer.token_to_id(token) for token in (PAD, START, END)] != [0, 1, highest] or highest != rows - 1:
        raise InputError(f"{str(path)!r} is not the vocabulary of a text tower with {rows} tokens, the end the last")
    found = collect_tokenizer_settings(tokenizer)  # after the numbers: the library counts up to the highest
    if other := [
        key for key, value in collect_tokenizer_settings(build_untrained_tokenizer()).items() if found.get(key) != value
    ]:
        # such as a padding to millions of tokens, or a pattern that takes for ever
        raise InputError(f"{str(path)!r} has another {other[0]} than a vocabulary of captions has")
    return CaptionTokenizer(tokenizer, context_length)


def check_public_tokenizer(folder: Path, text_cfg: dict[str, Any]) -> None:
    """Refuse a public tokenizer's folder or settings that would run code."""
    if other := sorted(text_cfg.get("tokenizer_kwargs", {}).keys() - PUBLIC_SETTINGS):
        raise InputError(f"tokenizer_kwargs has {other[0]!r}; only {', '.join(sorted(PUBLIC_SETTINGS))} are taken")
    if folder.is_dir():
        check_folder_files(folder)
        for path in folder.glob("*.json"):
            check_size_limit(path, MAX_TOKENIZER_BYTES)
            if path.name in ("config.json", "tokenizer_config.json") and "auto_map" in read_json(
                path, MAX_HEADER_BYTES
            ):
                raise InputError(f"{str(path)!r} has 'auto_map'; only this project's own code is run")


def build_public_tokenizer(name: str, text_cfg: dict[str, Any]) -> tuple[PublicTokenizer, str]:
    """The tokenizer of an open_clip model by its name, and its kind."""
    options = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    tokenizer = open_clip.get_tokenizer(name, **options)
    return PublicTokenizer(tokenizer), "clip" if isinstance(tokenizer, SimpleTokenizer) else "transformers"


class TextTokenizer:
    """The tokenizer of a text encoder, from its tokenizer.json, with the special tokens that it puts around a text."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, pad: int):
        tokenizer.no_padding()
        tokenizer.enable_truncation(context_length)
        tokenizer.encode_special_tokens = True  # in a caption they are text like any other
        self.tokenizer, self.context_length, self.pad = tokenizer, context_length, pad

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> tokens, (B, L), int64, and which are not padding, (B, L), bool; L is that of the longest, at least 1."""
        found = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        lengths = torch.tensor([len(ids) for ids in found])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        tokens = torch.full(mask.shape, self.pad)
        tokens[mask] = torch.tensor([number for ids in found for number in ids], dtype=torch.int64)
        return tokens, mask

    def find_truncated_text(self, text: str) -> str:
        """The end of a text that does not fit, empty if all does."""
        for rest in self.tokenizer.encode(text).overflowing:
            starts = [start for (start, _), special in zip(rest.offsets, rest.special_tokens_mask) if not special]
            return text[starts[0] :].strip() if starts else ""
        return ""

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def digest(self) -> str:
        """64 hexadecimal digits for the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()


def load_text_tokenizer(folder: Path, context_length: int, pad: int, vocab_size: int) -> TextTokenizer:
    """The tokenizer.json in the folder of a text encoder with `vocab_size` tokens.

    Raises InputError if it is missing or damaged, does not fit, or asks for more than the known tokenizers do.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        how = "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) of transformers writes it"
        raise InputError(f"no 'tokenizer.json' in {str(folder)!r}; {how}")
    about = folder / "tokenizer_config.json"
    if about.is_file() and "auto_map" in read_json(about, MAX_HEADER_BYTES):
        raise InputError(f"{str(about)!r} has 'auto_map'; only this project's own code is run")
    check_text_tokenizer(path)
    try:
        tokenizer = TextTokenizer(Tokenizer.from_file(str(path)), context_length, pad)
        tokenizer(["", "a picture"])
    except BaseException as error:  # the library raises nothing more specific, and panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"{str(path)!r} is not a tokenizer ({str(error)[:200]})") from error
    if (highest := max(tokenizer.tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise InputError(f"{str(path)!r} has a token {highest}; the text encoder knows {vocab_size}, from 0 on")
    if (added := tokenizer.tokenizer.num_special_tokens_to_add(False)) > 8:
        raise InputError(f"{str(path)!r} adds {added} tokens to every text; no text encoder needs more than 8")
    return tokenizer


def check_text_tokenizer(path: Path) -> None:
    """Refuse a tokenizer with patterns that nobody knows, with steps that blow texts up, or with dice."""
    content = read_json(path, MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("dropout"):
        raise InputError(f"{str(path)!r} has no model, or one with dropout; captions must give the same tokens always")
    steps = list(
        iterate_json_objects([content.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor")])
    )
    for step in steps:
        if (pattern := step.get("Regex")) is not None and pattern not in KNOWN_PATTERNS:
            raise InputError(f"{str(path)!r} has the pattern {str(pattern)[:80]!r}; only those of T5, BERT and CLIP")
    longer = [step for step in steps if step.get("type") in LENGTHENING_STEPS]
    if len(longer) > 3 or any(len(str(step.get("content", step.get("prepend", "")))) > 3 for step in longer):
        raise InputError(f"{str(path)!r} replaces text by much longer text; no tokenizer of T5, BERT or CLIP does")


def iterate_json_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from iterate_json_objects(part)
