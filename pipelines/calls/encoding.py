"""Encoding of prompts, by the pipelines that have a CLIP."""

import logging
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from t2i.pipelines.argument_checks import check_tensor, list_prompts
from torch import Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.texts import wrap_text

logger = logging.getLogger(__name__)


class PromptEncoding:
    """Base of pipelines that encode prompts by their CLIP, and by the decoder's own text encoder if it has one."""

    clip: Any
    prior: Any
    text_encoder: Any = None
    refuses_unknown_words = False  # of texts; if not, they are logged. See `t2i.pipelines.calls.unknown_words`
    reports_texts = True  # False where the caller itself tells of unknown words and of texts that are cut
    _execution_device: torch.device

    @cached_property
    def logged_texts(self) -> set[str]:
        """The texts whose unknown words were logged already."""
        return set()

    @torch.no_grad()
    def encode_prompt(self, prompt: str | list[str] | TextEncoding) -> TextEncoding:
        """Encode prompts by CLIP, for the prior, and by the decoder's own text encoder, if it has one.

        Each different prompt is encoded once; `expand` of the result has a row for each prompt. Logs what of a prompt
        does not fit. An encoding is returned as it is. Raises InputError for what is no text, for no prompts, and for
        a CLIP without a text tower.
        """
        if isinstance(prompt, TextEncoding):
            return prompt
        prompts = list_prompts("prompt", prompt)
        if not prompts:
            raise InputError("prompt is missing; give a text or a list of texts")
        if not self.clip.reads_captions:
            lacks = "no text encoder of its CLIP" if self.prior else "no prior and no text encoder of its CLIP"
            raise InputError(f"this model has {lacks}: it draws from images or image_embeds, not from texts")
        different, rows = find_unique_prompts(prompts)
        for line in self.list_cut_texts(different) if self.reports_texts else []:
            logger.warning("%s", line)
        # Encode
        self.offload_all_but("clip")
        encoding = self.clip.encode_tokens(self.clip.tokenizer(different).to(self._execution_device))
        if self.text_encoder is not None:
            encoding = replace(encoding, decoder_tokens=self.text_encoder.encode(different, self._execution_device))
        return encoding if rows is None else encoding.take_rows(rows)

    def list_cut_texts(self, texts: str | list[str]) -> list[str]:
        """Return a line for each text whose end the encoders do not read."""
        lines = []
        for text in wrap_text(texts):
            if cut := self.clip.tokenizer.find_truncated_text(text):
                # The tokens of start and end take two places
                longest = self.clip.context_length - 2
                lines.append(f"a prompt is longer than {longest} tokens; this was cut: {cut!r}")
            if self.text_encoder is not None and (cut := self.text_encoder.find_truncated_text(text)):
                longest = self.text_encoder.config.context_length
                lines.append(f"a prompt has more than the text encoder's {longest} tokens; this was cut: {cut!r}")
        return lines

    @torch.no_grad()
    def encode_decoder_prompt(self, prompt: str | list[str] | TextEncoding) -> Any:
        """Encode captions for the decoder. If it has its own text encoder, a CLIP without a text tower will do."""
        if isinstance(prompt, TextEncoding) or self.clip.reads_captions or self.text_encoder is None:
            return self.encode_prompt(prompt)
        prompts = list_prompts("prompt", prompt)
        self.offload_all_but("text_encoder")
        different, rows = find_unique_prompts(prompts)
        tokens = self.text_encoder.encode(different, self._execution_device)
        return tokens if rows is None else tokens.take_rows(rows)

    def normalize_embeds(self, z_i: Tensor) -> Tensor:
        """Normalize z_i, (N, D), if the models were trained on embeddings of unit length; others raise InputError."""
        check_tensor("z_i", z_i, ("N", self.clip.embed_dim))
        return F.normalize(z_i, dim=-1) if self.clip.unit_length else z_i

    def offload_all_but(self, *names: str) -> None:
        """Take the other components off the device, under `enable_model_cpu_offload`, until they are used again.

        Its hooks offload the component before in a caption's order alone. That is not enough where CLIP is followed by
        the autoencoder or the decoder.
        """
        kept = [getattr(self, name) for name in names]
        for hook in getattr(self, "_all_hooks", []):
            if not any(hook.model is model for model in kept):
                hook.offload()


def find_unique_prompts(prompts: list[str]) -> tuple[list[str], Tensor | None]:
    """Return the different prompts, and the number among them of each, (N,); None if all are different."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rows = None if len(numbers) == len(prompts) else torch.tensor([numbers[prompt] for prompt in prompts])
    return list(numbers), rows
