"""Texts of a call: prompts, or their encodings in place of them."""

from dataclasses import replace
from typing import Any, TypeAlias

import torch
from t2i.pipelines.argument_checks import check_tensor, list_prompts
from torch import Tensor

from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError

# A TextEncoding; or (states, pooled) or (states, pooled, mask), as weighting libraries make them. None of the mask is
# that all states are of tokens.
PromptEmbeds: TypeAlias = TextEncoding | tuple[Tensor, ...]
Texts: TypeAlias = list[str] | TextEncoding


def choose_texts(
    pipeline: Any,
    name: str,
    prompt: str | list[str] | None,
    embeds: PromptEmbeds | None,
    count: int | None = None,
    empty: bool = True,
) -> Texts:
    """Return the texts of an argument, or the encodings that are given in place of them; one is repeated `count` times.

    Raises InputError for both, and for those that `list_prompts` and `read_prompt_embeds` refuse.
    """
    if embeds is None:
        return list_prompts(name, prompt, count, empty)
    if prompt is not None:
        raise InputError(f"{name} and {name}_embeds are both given; leave one out")
    encoding = read_prompt_embeds(pipeline, f"{name}_embeds", embeds)
    if count is None or len(encoding) == count:
        return encoding
    if len(encoding) != 1:
        raise InputError(f"{name}_embeds has {len(encoding)} rows for {count} prompts")
    return encoding.repeat(count)


def choose_text_pair(
    pipeline: Any,
    count: int,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: PromptEmbeds | None,
    negative_prompt_embeds: PromptEmbeds | None,
    empty: bool = False,
) -> tuple[Texts, Texts]:
    """Return what `count` images are to show, and what the prior is guided away from, `count` each or none.

    empty: what they are to show may be a text without words.
    """
    prompts = choose_texts(pipeline, "prompt", prompt, prompt_embeds, count, empty)
    return prompts, choose_texts(pipeline, "negative_prompt", negative_prompt, negative_prompt_embeds, count)


def read_prompt_embeds(pipeline: Any, name: str, embeds: Any) -> TextEncoding:
    """Return encodings of captions as a checked TextEncoding on the device, of unit length if the CLIP's are.

    embeds: a TextEncoding; or a tuple of (B, L, W), token states after CLIP's last norm, (B, D), text embeddings, and,
    if not all states are of tokens, (B, L), bool.

    Raises InputError for states alone, without which z_t is not known, and for other shapes.
    """
    if isinstance(embeds, Tensor):
        raise InputError(
            f"{name} is a tensor {tuple(embeds.shape)}; the prior also reads the text's one embedding: give "
            "(states, pooled), (states, pooled, mask), or what encode_prompt returns"
        )
    # A tuple, as libraries that weight prompts return it
    if isinstance(embeds, list | tuple) and len(embeds) in (2, 3):
        states, pooled, *mask = embeds
        if not isinstance(states, Tensor) or states.ndim != 3:
            check_tensor(f"{name}[0]", states if isinstance(states, Tensor) else torch.empty(0), ("B", "L", "W"))
        full = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        embeds = TextEncoding(pooled, states, mask[0] if mask and mask[0] is not None else full)
    if not isinstance(embeds, TextEncoding):
        raise InputError(f"{name} must be a TextEncoding or a tuple (states, pooled), got {embeds!r:.80}")
    # An encoding of another CLIP may have other sizes
    clip = pipeline.clip
    check_tensor(f"{name} (states)", embeds.states, ("B", "L", clip.text_width))
    rows, length = embeds.states.shape[:2]
    check_tensor(f"{name} (pooled)", embeds.embedding, (rows, clip.embed_dim))
    check_tensor(f"{name} (mask)", embeds.mask, (rows, length))
    if length > clip.context_length:
        raise InputError(f"{name} has {length} tokens, this CLIP reads {clip.context_length} at most")
    if pipeline.text_encoder is not None and embeds.decoder_tokens is None:
        raise InputError(f"{name} lacks what this decoder's own text encoder makes; encode_prompt returns all of it")
    embeds = replace(embeds, embedding=pipeline.normalize_embeds(embeds.embedding.float()), mask=embeds.mask.bool())
    return embeds.to(pipeline._execution_device)
