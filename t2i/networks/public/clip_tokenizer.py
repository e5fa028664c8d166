"""CLIP's byte pairs from the files of transformers' CLIPTokenizer: only the vocabulary is taken from them.

How texts are split is built here, so a file cannot change it. A special token's text is text like any
other: transformers takes "!" out of captions where it is the padding, as in Karlo's files, but the models were trained
without such a token.
"""

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import basic_clean
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.untrusted import MAX_TOKENIZER_BYTES, check_folder_files, check_size_limit, is_folder, read_json
from t2i.networks.tokenizer import (
    CLIP_WORD_PATTERN,
    BaseTokenizer,
    check_highest_token,
    explain_tokenizer_errors,
    read_tokenizer_config,
)
from t2i.texts import split_lines

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
MAX_CONTEXT_LENGTH = 4096  # tokens of a caption
Merges = list[tuple[str, str]]


class CLIPTokenizer(BaseTokenizer):
    """Captions to tokens: start, byte pairs, end, padding.

    Args:
        vocab, merges: tables of the byte pairs.
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
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=end, end_of_word_suffix="</w>"))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(CLIP_WORD_PATTERN), "removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
        tokenizer.decoder = decoders.ByteLevel()
        super().__init__(tokenizer, context_length, vocab[pad], vocab[start], vocab[end])
        self.vocab, self.merges = vocab, merges
        self.names = {"pad_token": pad, "bos_token": start, "eos_token": end}

    def clean_text(self, text: str) -> str:
        """Return a text as CLIP's own tokenizer cleans it: encodings repaired, HTML's entities resolved.

        The models were trained with texts that were cleaned so; diffusers' pipelines leave it out.
        """
        return super().clean_text(basic_clean(text))

    @classmethod
    def from_folder(
        cls, folder: Path, context_length: int, vocab_size: int, root: Path | None = None
    ) -> "CLIPTokenizer":
        """Load vocab.json and merges.txt, or tokenizer.json, for a text tower of `vocab_size` tokens.

        context_length: positions of the text tower, which bound the length in the files. root: the pipeline's folder,
        which links may lead into. Raises InputError for files that are missing or damaged or do not fit.
        """
        if not is_folder(folder):
            raise InputError(f"no folder {folder.name!r} in {str(folder.parent)!r}; a text encoder needs its tokenizer")
        check_folder_files(folder, root)
        vocab, merges = read_vocabulary(folder)
        check_highest_token(folder, vocab, vocab_size)
        config: dict[str, Any] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            # In older folders the second file counts, if it exists; newer ones have this key in the first.
            if (folder / name).is_file() and "added_tokens_decoder" not in config:
                config |= read_tokenizer_config(folder / name)
        # The special tokens, which may be stored as objects
        special: dict[str, Any] = {"pad": END_TOKEN, "start": START_TOKEN, "end": END_TOKEN}
        for name, key in (("pad", "pad_token"), ("start", "bos_token"), ("end", "eos_token")):
            token = config.get(key) or special[name]
            special[name] = token.get("content") if isinstance(token, dict) else token
            if vocab.get(special[name]) is None:
                raise InputError(f"the vocabulary in {str(folder)!r} lacks the token {special[name]!r:.80}")
        # The length of a caption
        longest = config.get("model_max_length", context_length)  # transformers writes 1e30 for no limit
        length = int(min(longest, context_length)) if isinstance(longest, int | float) else context_length
        check_integer(f"model_max_length in {str(folder)!r}", length, 3, MAX_CONTEXT_LENGTH)
        with explain_tokenizer_errors(folder):
            tokenizer = cls(vocab, merges, length, **special)
            tokenizer(["", "an image"])  # some damage shows only in use
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write the files that transformers' CLIPTokenizer reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = self.names | {"unk_token": self.names["eos_token"]}
        config = special | {"model_max_length": self.context_length, "tokenizer_class": "CLIPTokenizer"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def read_vocabulary(folder: Path) -> tuple[dict[str, int], Merges]:
    """Return the vocabulary and the merges in a tokenizer's folder."""
    # transformers writes either one file or two, and versions of it store a merge as "a b" or as ["a", "b"].
    # One file, as fast tokenizers have it, or two, as CLIP was published
    single, merges_file = folder / "tokenizer.json", folder / "merges.txt"
    if single.is_file():
        model = read_json(single, MAX_TOKENIZER_BYTES).get("model")
        model = model if isinstance(model, dict) else {}
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>" or model.get("dropout"):
            raise InputError(f"{str(single)!r} has no byte pairs of CLIP's kind")
        vocab, merges = model.get("vocab"), model.get("merges")
    else:
        vocab = read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
        check_size_limit(merges_file, MAX_TOKENIZER_BYTES)
        try:
            lines = split_lines(merges_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{str(merges_file)!r} is not a text file ({error})") from error
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    # A library would index by these numbers and join these texts without a check
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges or []]
    sound = isinstance(vocab, dict) and vocab and all(type(row) is int and row >= 0 for row in vocab.values())
    if not sound or any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in pairs):
        raise InputError(f"{str(folder)!r} has no vocabulary: tokens with numbers, and merges in pairs")
    assert isinstance(vocab, dict)
    return vocab, [(first, second) for first, second in pairs]
