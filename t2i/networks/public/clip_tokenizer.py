"""CLIP's byte pairs from the files of transformers' CLIPTokenizer: only the vocabulary is taken from them.

How texts are split is the same for all of CLIP's tokenizers and is built here, so that a file cannot ask for anything
else. A special token's text is text like any other: transformers takes "!" out of captions where it is the padding, as
in Karlo's files, but the models were trained with tokenizers that have no such token.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.untrusted import MAX_TOKENIZER_BYTES, check_folder_files, check_size_limit, is_folder, read_json

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_CONTEXT_LENGTH = 4096  # tokens of a caption
Merges = list[tuple[str, str]]


class CLIPTokenizer:
    """Captions to tokens: start, byte pairs, end, padding.

    Args:
        vocab, merges: of the byte pairs.
        context_length: tokens of a caption, start and end included; what is longer is cut.
        pad: the token after the end: "!", which is 0, in Karlo and open_clip; the end token itself elsewhere.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Merges,
        context_length: int,
        pad: str = END_TOKEN,
        start: str = START_TOKEN,
        end: str = END_TOKEN,
    ):
        self.vocab, self.merges, self.context_length = vocab, merges, context_length
        self.names = {"pad_token": pad, "bos_token": start, "eos_token": end}
        self.pad, self.start, self.end = vocab[pad], vocab[start], vocab[end]
        self.tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=end, end_of_word_suffix="</w>"))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        self.tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
        self.tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def from_folder(
        cls, folder: Path, context_length: int, vocab_size: int, root: Path | None = None
    ) -> "CLIPTokenizer":
        """From vocab.json and merges.txt, or tokenizer.json, for a text tower of so many positions and tokens.

        root: the pipeline's folder, which links may lead into. Raises InputError for files that are missing or damaged
        or do not fit.
        """
        if not is_folder(folder):
            raise InputError(f"no folder {folder.name!r} in {str(folder.parent)!r}; a text encoder needs its tokenizer")
        check_folder_files(folder, root)
        vocab, merges = read_vocabulary(folder)
        about: dict[str, Any] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # of older folders the second counts, if any
            if (folder / name).is_file() and "added_tokens_decoder" not in about:
                about |= read_json(folder / name)
        if "auto_map" in about:
            raise InputError(f"{str(folder)!r} has 'auto_map'; only this project's own code is run")
        names = {"pad": about.get("pad_token") or END_TOKEN, "start": about.get("bos_token") or START_TOKEN}
        names["end"] = about.get("eos_token") or END_TOKEN
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
        if unknown := [value for value in names.values() if vocab.get(value) is None]:
            raise InputError(f"the vocabulary in {str(folder)!r} lacks the token {unknown[0]!r:.80}")
        if (highest := max(vocab.values())) >= vocab_size:
            raise InputError(f"{str(folder)!r} has a token {highest}; the text encoder knows {vocab_size}, from 0 on")
        longest = about.get("model_max_length", context_length)  # without one, transformers writes 1e30
        length = int(min(longest, context_length)) if isinstance(longest, int | float) else context_length
        check_integer(f"model_max_length in {str(folder)!r}", length, 3, MAX_CONTEXT_LENGTH)
        try:
            tokenizer = cls(vocab, merges, length, **names)
            tokenizer(["", "a picture"])
        except BaseException as error:  # the library raises nothing more specific, and panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise InputError(f"{str(folder)!r} holds no tokenizer of CLIP ({str(error)[:200]})") from error
        return tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, context_length), int64."""
        tokens = torch.full((len(texts), self.context_length), self.pad)
        for row, encoding in zip(tokens, self.tokenizer.encode_batch(texts)):
            ids = [self.start, *encoding.ids[: self.context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def find_truncated_text(self, text: str) -> str:
        """The end of a text that does not fit, empty if all does."""
        rest = self.tokenizer.encode(text).offsets[self.context_length - 2 :]
        return text[rest[0][0] :].strip() if rest else ""

    def save(self, folder: Path) -> None:
        """The files that transformers' CLIPTokenizer reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = self.names | {"unk_token": self.names["eos_token"]}
        about = special | {"model_max_length": self.context_length, "tokenizer_class": "CLIPTokenizer"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))

    def digest(self) -> str:
        """64 hexadecimal digits for the vocabulary."""
        return hashlib.sha256(json.dumps([sorted(self.vocab.items()), self.merges]).encode()).hexdigest()


def read_vocabulary(folder: Path) -> tuple[dict[str, int], Merges]:
    """The vocabulary and the merges in a tokenizer's folder."""
    single, merges_file = folder / "tokenizer.json", folder / "merges.txt"
    if single.is_file():
        model = read_json(single, MAX_TOKENIZER_BYTES).get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>" or model.get("dropout"):
            raise InputError(f"{str(single)!r} holds no byte pairs as CLIP has them")
        vocab, listed = model.get("vocab"), model.get("merges")
    else:
        vocab = read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
        check_size_limit(merges_file, MAX_TOKENIZER_BYTES)
        try:
            lines = merges_file.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(f"{str(merges_file)!r} is no text ({error})") from error
        listed = [line for line in lines if line.strip() and not line.startswith("#version")]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in listed or []]
    sound = isinstance(vocab, dict) and vocab and all(type(one) is int and one >= 0 for one in vocab.values())
    if not sound or any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in pairs):
        raise InputError(f"{str(folder)!r} holds no vocabulary: tokens with numbers, and merges in pairs")
    assert isinstance(vocab, dict)
    return vocab, [(first, second) for first, second in pairs]
