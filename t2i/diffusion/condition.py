"""What denoisers are conditioned on. "Nothing" is a value of the same type (a denoiser's `null`), never a switch:
dropping a condition in training chooses between two values, guidance extrapolates from one to the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Condition:
    """Tensors, or other conditions, that agree in their first dimension, B. None where a model takes no such thing.

    Of two conditions together, what one of them lacks is None.
    """

    def __len__(self) -> int:
        return next(len(value) for value in vars(self).values() if value is not None)

    def zip_tensors(self, other: Self, function: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """`function` of each pair of tensors."""

        def one(mine: Any, theirs: Any) -> Any:
            if mine is None or theirs is None:
                return None
            return mine.zip_tensors(theirs, function) if isinstance(mine, Condition) else function(mine, theirs)

        return replace(self, **{f.name: one(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """`function` of every tensor."""
        return self.zip_tensors(self, lambda tensor, _: function(tensor))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """On a device, floating-point tensors in a dtype, if one is given."""
        return self.map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeat(self, count: int) -> Self:
        """Each of the B conditions `count` times in a row."""
        return self.map_tensors(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def take_rows(self, rows: Tensor) -> Self:
        """The conditions of these rows, (N,)."""
        return self.map_tensors(lambda tensor: tensor[rows.to(tensor.device)])

    def pad_like(self, other: Self) -> Self:
        """Padded so that it can stand in one batch with `other`."""
        return self

    def where(self, keep: Tensor, other: Self) -> Self:
        """(B,) bool: this condition where `keep`, else `other`."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        return self.pad_like(other).zip_tensors(other.pad_like(self), choose)

    def cat(self, other: Self) -> Self:
        """One batch of both."""
        return self.pad_like(other).zip_tensors(other.pad_like(self), lambda mine, theirs: torch.cat([mine, theirs]))


@dataclass
class TextEncoding(Condition):
    """What CLIP says of B captions, trimmed to the longest: the condition of the prior."""

    embedding: Tensor  # (B, D): z_t, of unit length if the CLIP's `unit_length`
    states: Tensor  # (B, L, W): one vector a token, after the last norm
    mask: Tensor  # (B, L), bool: True where there is a token
    decoder_tokens: "TokenStates | None" = None  # of a decoder's own text encoder

    @property
    def token_states(self) -> "TokenStates":
        """What a decoder reads."""
        return (
            TokenStates(self.states, self.mask, self.embedding) if self.decoder_tokens is None else self.decoder_tokens
        )

    def pad_like(self, other: Self) -> Self:
        mine, theirs = self.decoder_tokens, other.decoder_tokens
        mine = mine if mine is None or theirs is None else mine.pad_like(theirs)
        return replace(pad_encoding(self, other), decoder_tokens=mine)


def pad_encoding(text: Any, other: Any) -> Any:
    """An encoding with as many tokens as another, if that has more."""
    extra = max(0, other.mask.shape[1] - text.mask.shape[1])
    return replace(text, states=F.pad(text.states, (0, 0, 0, extra)), mask=F.pad(text.mask, (0, extra)))


@dataclass
class TokenStates(Condition):
    """What a text encoder says of B captions, token by token: what a decoder reads of them."""

    states: Tensor  # (B, L, W): one vector a token
    mask: Tensor  # (B, L), bool: True where there is a token
    pooled: Tensor | None = None  # (B, D): one vector for the caption, for decoders that read it

    def pad_like(self, other: Self) -> Self:
        return pad_encoding(self, other)


@dataclass
class ImageCondition(Condition):
    """What a picture is to show: the condition of the decoder. Of a TextEncoding it keeps what a decoder reads."""

    embedding: Tensor  # (B, D), unit length (if the CLIP's `unit_length`) or zero: z_i
    text: TokenStates | TextEncoding | None = None  # the caption, for decoders that read it too
    masked_latents: Tensor | None = (
        None  # (B, C + 1, h, w): the latents that stay and the mask, for decoders that read them
    )

    def __post_init__(self) -> None:
        if isinstance(self.text, TextEncoding):
            self.text = self.text.token_states

    def pad_like(self, other: Self) -> Self:
        mine, theirs = self.text, other.text
        if not isinstance(mine, TokenStates) or not isinstance(theirs, TokenStates):
            return self
        return replace(self, text=mine.pad_like(theirs))


def find_unique_consecutive(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of tensors with B rows: which rows are not the same as the one before, (P,); and which of them each is, (B,).

    Neighbours are the same where several pictures are drawn of a caption, and where guidance repeats the null: what
    depends on them is computed once. On the meta device, where values are not known, none are.
    """
    if columns[0].is_meta:
        every = torch.arange(len(columns[0]), device="meta")
        return every, every
    new = torch.stack([(one[1:] != one[:-1]).flatten(1).any(dim=1) for one in columns]).any(dim=0)
    new = torch.cat([new.new_ones(1), new])
    return new.nonzero()[:, 0], new.cumsum(dim=0) - 1
