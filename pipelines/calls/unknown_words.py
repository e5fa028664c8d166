"""Words of prompts that a CLIP never saw in training: each text with one is logged once, or refused."""

import logging
from collections.abc import Mapping
from typing import Any

from t2i.pipelines.calls.arguments import TEXT_ARGUMENTS

from t2i.errors import InputError
from t2i.files.known_words import UnknownWord
from t2i.texts import wrap_text

MAX_LOGGED_TEXTS = 1_000  # that a pipeline remembers, so that each is logged once

logger = logging.getLogger(__name__)


def collect_texts(arguments: Mapping[str, Any]) -> list[str]:
    """Return the texts among the arguments of a call, each once."""
    values = [arguments.get(name) for name in TEXT_ARGUMENTS]
    texts = [text for value in values if isinstance(value, str | list | tuple) for text in wrap_text(value)]
    anchors = arguments.get("anchors")
    texts += anchors if isinstance(anchors, list | tuple) else []
    return list(dict.fromkeys(text for text in texts if isinstance(text, str)))


def report_unknown_words(pipeline: Any, texts: str | list[str]) -> list[UnknownWord]:
    """Return the words of the texts that are in no caption; log those of each text, once for each pipeline.

    pipeline: a `PromptEncoding`, unless there are no texts. For a CLIP without the list of its captions' words, such
    as a public one, no word is unknown. Raises InputError for a word that is no keyword either, if the pipeline's
    `refuses_unknown_words` is set. No word is sought if its `reports_texts` is not.
    """
    if not texts or not pipeline.reports_texts:
        return []
    if not pipeline.clip.reads_captions or pipeline.clip.tokenizer.known_words is None:
        return []
    known, logged = pipeline.clip.tokenizer.known_words, pipeline.logged_texts
    found: dict[UnknownWord, None] = {}
    for text in wrap_text(texts):
        words = known.find_unknown_words(text)
        found |= dict.fromkeys(words)
        unknown = [word for word in words if not word.is_keyword]
        if unknown and pipeline.refuses_unknown_words:
            raise InputError(f"prompt {text!r:.200}: {'. '.join(map(str, unknown))}")
        if words and text not in logged:
            if len(logged) >= MAX_LOGGED_TEXTS:
                logged.clear()
            logged.add(text)
            # A keyword is known a little, which calls for no warning
            for level, part in ((logging.WARNING, unknown), (logging.INFO, [one for one in words if one.is_keyword])):
                if part:
                    logger.log(level, "prompt %.200r: %s", text, ". ".join(map(str, part)))
    return list(found)
