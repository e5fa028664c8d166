"""Tokenizers: captions to token numbers, by a vocabulary of the project's own or by that of a public model."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.known_words import KnownWords
from t2i.files.untrusted import MAX_HEADER_BYTES, MAX_TOKENIZER_BYTES, check_folder_files, check_size_limit, read_json
from t2i.texts import normalize_text, wrap_text

PAD, START, END = "<pad>", "<start>", "<end>"
# A pattern of a stranger may backtrack: the library bounds one attempt at a match, but not their number, and a caption
# of 400 characters can take minutes. So only patterns of known public tokenizers are accepted.
PLAIN_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_WORD_PATTERN = rf"<\|startoftext\|>|<\|endoftext\|>|{PLAIN_WORD_PATTERN}"
KNOWN_PATTERNS = {r"\s+", " {2,}", PLAIN_WORD_PATTERN, CLIP_WORD_PATTERN}
LENGTHENING_STEPS = ("Replace", "Prepend")  # steps of a tokenizer.json whose output may be longer than their input
MAX_SPECIAL_TOKENS = 8  # that a text encoder's tokenizer adds to a caption
PUBLIC_SETTINGS = {"clean", "strip_sep_token", "language"}  # keywords of open_clip's tokenizers that run no code


class BaseTokenizer:
    """Captions to rows of one length: start, the tokens of the caption, end, padding.

    The text of a special token, such as "<end>", is text like any other in a caption.

    Args:
        tokenizer: splits captions into tokens.
        context_length: tokens of a caption, start and end included; what is longer is cut.
        pad, start, end: numbers of the special tokens.
    """

    known_words: KnownWords | None = None  # the words of the captions that CLIP was trained on, if they are listed

    def __init__(self, tokenizer: Tokenizer, context_length: int, pad: int, start: int, end: int):
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.context_length = tokenizer, context_length
        self.pad, self.start, self.end = pad, start, end

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Return the tokens, (B, context_length), int64."""
        cleaned = [self.clean_text(text) for text in wrap_text(texts)]
        tokens = torch.full((len(cleaned), self.context_length), self.pad)
        for row, encoding in zip(tokens, self.tokenizer.encode_batch(cleaned, add_special_tokens=False)):
            ids = [self.start, *encoding.ids[: self.context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def clean_text(self, text: str) -> str:
        """Return a text as the tokenizer gets it."""
        return normalize_text(text)

    def count_tokens(self, texts: str | list[str]) -> list[int]:
        """Return the number of tokens of each text, start and end included, before anything is cut."""
        cleaned = [self.clean_text(text) for text in wrap_text(texts)]
        return [len(one.ids) + 2 for one in self.tokenizer.encode_batch(cleaned, add_special_tokens=False)]

    def find_truncated_text(self, text: str) -> str:
        """Return the end of a text that does not fit, empty if all of it does."""
        text = self.clean_text(text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        rest = encoding.offsets[self.context_length - 2 :]
        return text[rest[0][0] :].strip() if rest else ""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.tokenizer.save(str(folder / "tokenizer.json"))


class CaptionTokenizer(BaseTokenizer):
    """A byte-pair vocabulary trained on captions, so that a small text tower has no rows that it never uses.

    Captions are lower-cased. Every text can be encoded, since the vocabulary contains all single bytes.
    Token 0 pads, 1 starts, and the highest ends a caption, as open_clip's pooling expects.

    Args:
        known_words: the words of the captions; None if they are not known.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, known_words: KnownWords | None = None):
        self.known_words = known_words
        end = tokenizer.token_to_id(END)
        assert end is not None, "`train` adds it and `load_clip_tokenizer` checks it"
        super().__init__(tokenizer, context_length, pad=0, start=1, end=end)

    @classmethod
    def train(cls, captions: str | Iterable[str], vocab_size: int, context_length: int) -> "CaptionTokenizer":
        """Return a tokenizer with at most `vocab_size` tokens (at least 259) learned from captions."""
        tokenizer = build_untrained_tokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[PAD, START],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(normalize_text, wrap_text(captions)), trainer)
        tokenizer.add_special_tokens([END])  # after training, for the highest number
        return cls(tokenizer, context_length)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and `words.json` if the words are known."""
        super().save(folder)
        if self.known_words is not None:
            self.known_words.save(folder)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the vocabulary."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]


class TextTokenizer:
    """The tokenizer of a text encoder. Its file states which special tokens stand around a text (T5 has no start)."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, pad: int):
        tokenizer.encode_special_tokens = True  # as in BaseTokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(context_length)  # special tokens included
        self.tokenizer, self.context_length, self.pad = tokenizer, context_length, pad

    def __call__(self, texts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens, (B, L), int64, and a mask, (B, L), bool, False for padding.

        L is the number of tokens of the longest text, at least 1.
        """
        cleaned = [normalize_text(text) for text in wrap_text(texts)]
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(cleaned)]
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        tokens = torch.full(mask.shape, self.pad)
        tokens[mask] = torch.tensor([number for row in ids for number in row], dtype=torch.int64)
        return tokens, mask

    def count_tokens(self, texts: str | list[str]) -> list[int]:
        """Return the number of tokens of each text, special ones included, before anything is cut."""
        cleaned = [normalize_text(text) for text in wrap_text(texts)]
        counts = []
        for kept in self.tokenizer.encode_batch(cleaned):
            # Each further part has the special tokens once more
            rest = sum(len(part.ids) - sum(part.special_tokens_mask) for part in kept.overflowing)
            counts.append(len(kept.ids) + rest)
        return counts

    def find_truncated_text(self, text: str) -> str:
        text = normalize_text(text)
        for rest in self.tokenizer.encode(text).overflowing:
            starts = [start for (start, _), special in zip(rest.offsets, rest.special_tokens_mask) if not special]
            return text[starts[0] :].strip() if starts else ""
        return ""

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def digest(self) -> str:
        """Return 64 hexadecimal digits that identify the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()


class PublicTokenizer:
    """The tokenizer of an open_clip model, with the methods of a BaseTokenizer."""

    known_words: KnownWords | None = None  # open_clip lists none

    def __init__(self, tokenizer: SimpleTokenizer | HFTokenizer):
        self.tokenizer, self.context_length = tokenizer, tokenizer.context_length

    def __call__(self, texts: str | list[str]) -> Tensor:
        return self.tokenizer([normalize_text(text) for text in wrap_text(texts)])

    def encode(self, text: str) -> list[int]:
        """Return all tokens of a text, without start and end."""
        text = normalize_text(text)
        if isinstance(self.tokenizer, SimpleTokenizer):
            return self.tokenizer.encode(text)
        return self.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]

    def count_tokens(self, texts: str | list[str]) -> list[int]:
        return [len(self.encode(text)) + 2 for text in wrap_text(texts)]

    def find_truncated_text(self, text: str) -> str:
        decoder: Any = self.tokenizer if isinstance(self.tokenizer, SimpleTokenizer) else self.tokenizer.tokenizer
        # Two tokens of the context are for the start and the end
        return decoder.decode(self.encode(text)[self.context_length - 2 :]).strip()

    def save(self, folder: Path) -> None:
        if isinstance(self.tokenizer, HFTokenizer):  # CLIP's own vocabulary comes with open_clip
            self.tokenizer.tokenizer.save_pretrained(folder / "tokenizer")


def build_untrained_tokenizer() -> Tokenizer:
    """Return a tokenizer that turns captions into bytes, without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_public_tokenizer(name: str, text_cfg: dict[str, Any]) -> tuple[PublicTokenizer, str]:
    """Return the tokenizer of an open_clip model by the model's name, and the tokenizer's kind."""
    options = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    tokenizer = open_clip.get_tokenizer(name, **options)
    return PublicTokenizer(tokenizer), "clip" if isinstance(tokenizer, SimpleTokenizer) else "transformers"


# Loading


def load_clip_tokenizer(folder: Path, kind: str, text_cfg: dict[str, Any]) -> CaptionTokenizer | PublicTokenizer:
    """Load the tokenizer of a CLIP folder whose text tower has open_clip's configuration `text_cfg`.

    Raises InputError if its file is missing or damaged, or does not fit the text tower.
    """
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    check_integer("context_length", context_length, 3, 100_000)
    if kind == "clip":
        return PublicTokenizer(SimpleTokenizer(context_length=context_length))
    if kind == "transformers":
        folder = folder / "tokenizer"
        check_public_tokenizer(folder, text_cfg)
        options = {"tokenizer_mode": text_cfg.get("tokenizer_mode"), **text_cfg.get("tokenizer_kwargs", {})}
        return PublicTokenizer(HFTokenizer(str(folder), context_length, trust_remote_code=False, **options))

    # A vocabulary trained on captions
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"no {str(path)!r}; it is the vocabulary that this CLIP was trained with")
    check_size_limit(path, MAX_TOKENIZER_BYTES)
    with explain_tokenizer_errors(path):
        tokenizer = Tokenizer.from_file(str(path))
    rows, highest = text_cfg.get("vocab_size", 0), max(tokenizer.get_vocab().values(), default=0)
    if [tokenizer.token_to_id(token) for token in (PAD, START, END)] != [0, 1, highest] or highest != rows - 1:
        raise InputError(f"{str(path)!r} does not fit a text tower of {rows} tokens, whose last ends captions")
    # Other settings could pad to millions of tokens or run a pattern without end. They are checked after the numbers,
    # because the library takes memory up to the highest number when it writes its settings.
    settings, expected = (extract_tokenizer_settings(item) for item in (tokenizer, build_untrained_tokenizer()))
    if other := [key for key in expected if settings.get(key) != expected[key]]:
        raise InputError(f"{str(path)!r} has another {other[0]} than the vocabularies that `t2i train clip` writes")
    return CaptionTokenizer(tokenizer, context_length, KnownWords.load(folder))


def extract_tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return all of a tokenizer but its vocabulary."""
    settings = json.loads(tokenizer.to_str())
    model = settings["model"] | {"vocab": None, "merges": None}
    return settings | {"model": model, "added_tokens": None}


def load_text_tokenizer(folder: Path, context_length: int, pad: int, vocab_size: int) -> TextTokenizer:
    """Load the tokenizer.json in the folder of a text encoder with `vocab_size` tokens.

    Raises InputError if it is missing or damaged, does not fit, or does more than the known tokenizers do.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        how = "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) of transformers writes it"
        raise InputError(f"no 'tokenizer.json' in {str(folder)!r}; {how}")
    # The settings are read for a refusal alone: no value of them is used.
    if (folder / "tokenizer_config.json").is_file():
        read_tokenizer_config(folder / "tokenizer_config.json")
    check_text_tokenizer(path)
    with explain_tokenizer_errors(path):
        tokenizer = TextTokenizer(Tokenizer.from_file(str(path)), context_length, pad)
        tokenizer(["", "an image"])  # some damage shows only in use
    check_highest_token(path, tokenizer.tokenizer.get_vocab(), vocab_size)
    if (added := tokenizer.tokenizer.num_special_tokens_to_add(False)) > MAX_SPECIAL_TOKENS:
        raise InputError(f"{str(path)!r} adds {added} special tokens to a text; at most {MAX_SPECIAL_TOKENS} are taken")
    return tokenizer


def check_text_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json with unknown patterns, with steps that lengthen texts, or with random results."""
    content = read_json(path, MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("dropout"):
        raise InputError(f"{str(path)!r} has no model, or a model with dropout; a caption's tokens must not vary")
    steps = list(iterate_json_objects([content.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")]))
    for step in steps:
        if (pattern := step.get("Regex")) is not None and pattern not in KNOWN_PATTERNS:
            raise InputError(f"{str(path)!r} has the pattern {str(pattern)[:80]!r}; only those of T5, BERT and CLIP")
    # A step that replaces "a" by "aa" doubles the text, so their number is limited as well as their length.
    longer = [step for step in steps if step.get("type") in LENGTHENING_STEPS]
    if len(longer) > 3 or any(len(str(step.get("content", step.get("prepend", "")))) > 3 for step in longer):
        raise InputError(f"{str(path)!r} replaces text by much longer text; no tokenizer of T5, BERT or CLIP does")


def iterate_json_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every JSON object in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from iterate_json_objects(part)


def check_public_tokenizer(folder: Path, text_cfg: dict[str, Any]) -> None:
    """Refuse a public tokenizer's folder or settings that would run code."""
    if other := sorted(text_cfg.get("tokenizer_kwargs", {}).keys() - PUBLIC_SETTINGS):
        raise InputError(f"tokenizer_kwargs may have {', '.join(sorted(PUBLIC_SETTINGS))}, got {other[0]!r}")
    if folder.is_dir():
        check_folder_files(folder)
        for path in folder.glob("*.json"):
            check_size_limit(path, MAX_TOKENIZER_BYTES)
            if path.name in ("config.json", "tokenizer_config.json"):
                read_tokenizer_config(path)


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings. Raises InputError if it names code that transformers would run."""
    config = read_json(path, MAX_HEADER_BYTES)
    if "auto_map" in config:
        raise InputError(f"{str(path)!r} has 'auto_map'; only this project's own code is run")
    return config


def check_highest_token(path: Path, vocab: dict[str, int], vocab_size: int) -> None:
    """Refuse a vocabulary with a token for which the text encoder has no embedding."""
    if (highest := max(vocab.values(), default=0)) >= vocab_size:
        raise InputError(f"{str(path)!r} has a token {highest}; the text encoder has tokens from 0 to {vocab_size - 1}")


@contextmanager
def explain_tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn an error of the tokenizers library inside the block into an InputError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and its panics derive from BaseException
        raise InputError(f"{str(path)!r} is not a tokenizer ({str(error)[:200]})") from error
