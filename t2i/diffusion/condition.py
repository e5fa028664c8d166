"""Conditions of denoisers: batches of tensors with an index that says which of the stored rows each condition is.

"No condition" is a value of the same type (a denoiser's `null`), never a switch: dropping a condition in training
chooses between two values, guidance extrapolates from one to the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Condition:
    """A batch of B conditions: fields are tensors, nested conditions, or None where a model takes no such input.

    `repeat`, `take_rows` and `cat` change the index alone, so that several pictures of one caption share its tensors.
    `expand` copies them, once, where a denoiser needs a row for each picture. Nested conditions have their own index.

    rows: (B,), int64, on the CPU: the stored row of each condition. None: the B stored rows in order.
    """

    rows: Tensor | None = field(default=None, kw_only=True)
    unindexed: ClassVar[tuple[str, ...]] = ()  # tensors that always have B rows, for each picture has its own

    def __len__(self) -> int:
        return self.stored_count if self.rows is None else len(self.rows)

    @property
    def parts(self) -> dict[str, Any]:
        """The tensors and nested conditions that are not None, by field."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "rows"}

    @property
    def first_tensor(self) -> Tensor:
        return next(value for value in self.parts.values() if isinstance(value, Tensor))

    @property
    def device(self) -> torch.device:
        return self.first_tensor.device

    @property
    def stored_count(self) -> int:
        return len(self.first_tensor)

    @property
    def index(self) -> Tensor:
        """(B,), int64: the stored row of each condition."""
        return torch.arange(self.stored_count) if self.rows is None else self.rows

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every stored tensor."""
        nested = {name: part.map_tensors(function) for name, part in self.parts.items() if isinstance(part, Condition)}
        own = {name: function(part) for name, part in self.parts.items() if isinstance(part, Tensor)}
        return replace(self, **own, **nested)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move to a device; floating-point tensors also to a dtype, if one is given."""
        return self.map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeat(self, count: int) -> Self:
        """Return each of the B conditions `count` times in a row."""
        return self.take_rows(torch.arange(len(self)).repeat_interleave(count))

    def take_rows(self, rows: Tensor) -> Self:
        """Return the conditions with these numbers, (N,), int64, of the B."""
        nested = {name: part.take_rows(rows) for name, part in self.parts.items() if isinstance(part, Condition)}
        own = {name: getattr(self, name) for name in self.unindexed}
        own = {name: part if part is None else part[rows.to(part.device)] for name, part in own.items()}
        return replace(self, rows=self.index[rows.cpu()], **own, **nested)

    def expand(self) -> Self:
        """Return the same conditions with B rows in every tensor and without an index."""

        def copy_rows(name: str, part: Any) -> Any:
            if isinstance(part, Condition):
                return part.expand()
            if self.rows is None or name in self.unindexed:
                return part
            return part[self.rows.to(part.device)]

        return replace(self, rows=None, **{name: copy_rows(name, part) for name, part in self.parts.items()})

    def find_unique_rows(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the first of each group of equal conditions, (U,), and the group of each, (B,).

        Both int64, on the device of the tensors. Conditions are equal if they have the same stored rows: what depends
        on the condition alone is computed once for each group.
        """
        keys = list(zip(*(index.tolist() for index in self.collect_indexes())))
        first: dict[tuple[int, ...], int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        groups = {key: group for group, key in enumerate(first)}
        return (
            torch.tensor(list(first.values()), device=self.device),
            torch.tensor([groups[key] for key in keys], device=self.device),
        )

    def collect_indexes(self) -> list[Tensor]:
        """Return the index of this condition and those of the nested ones."""
        nested = [part.collect_indexes() for part in self.parts.values() if isinstance(part, Condition)]
        return [self.index, *(index for indexes in nested for index in indexes)]

    def pad_like(self, other: Self) -> Self:
        """Pad to the lengths of `other`, so that both can stand in one batch."""
        return self

    def where(self, keep: Tensor, other: Self) -> Self:
        """Return this condition where `keep`, (B,), bool, is true, and `other` elsewhere."""

        def choose(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (mine.ndim - 1)), mine, others)

        return self.expand().combine(other.expand(), choose, lambda mine, others: mine.where(keep, others))

    def cat(self, other: Self) -> Self:
        """Return one batch of both."""
        both = self.combine(
            other, lambda mine, others: torch.cat([mine, others]), lambda mine, others: mine.cat(others)
        )
        if self.rows is None and other.rows is None:
            return both
        return replace(both, rows=torch.cat([self.index, self.stored_count + other.index]))

    def combine(
        self,
        other: Self,
        of_tensors: Callable[[Tensor, Tensor], Tensor],
        of_conditions: Callable[["Condition", "Condition"], "Condition"],
    ) -> Self:
        """Apply functions to the pairs of padded fields. A field that one of the two lacks becomes None."""
        padded, others = self.pad_like(other), other.pad_like(self)
        parts = dict.fromkeys(self.parts)
        for name in self.parts.keys() & others.parts.keys():
            mine, its = padded.parts[name], others.parts[name]
            parts[name] = of_conditions(mine, its) if isinstance(mine, Condition) else of_tensors(mine, its)
        return replace(padded, **parts)


@dataclass
class TextEncoding(Condition):
    """The encoding of B captions by CLIP, trimmed to the longest: the condition of the prior."""

    embedding: Tensor  # (B, D): z_t, of unit length if the CLIP's `unit_length`
    states: Tensor  # (B, L, W): one vector a token, after the last norm
    mask: Tensor  # (B, L), bool: True where there is a token
    decoder_tokens: "TokenStates | None" = None  # of a decoder's own text encoder

    @property
    def token_states(self) -> "TokenStates":
        """The token states that a decoder reads."""
        if self.decoder_tokens is not None:
            return self.decoder_tokens
        return TokenStates(self.states, self.mask, self.embedding, rows=self.rows)

    def pad_like(self, other: Self) -> Self:
        tokens = self.decoder_tokens
        if tokens is not None and other.decoder_tokens is not None:
            tokens = tokens.pad_like(other.decoder_tokens)
        return replace(pad_encoding(self, other), decoder_tokens=tokens)


def pad_encoding(text: Any, other: Any) -> Any:
    """Pad an encoding to the tokens of another, if that has more."""
    extra = max(0, other.mask.shape[1] - text.mask.shape[1])
    return replace(text, states=F.pad(text.states, (0, 0, 0, extra)), mask=F.pad(text.mask, (0, extra)))


@dataclass
class TokenStates(Condition):
    """The encoding of B captions token by token, as decoders read it."""

    states: Tensor  # (B, L, W): one vector a token
    mask: Tensor  # (B, L), bool: True where there is a token
    pooled: Tensor | None = None  # (B, D): one vector for the caption, for decoders that read it

    def pad_like(self, other: Self) -> Self:
        return pad_encoding(self, other)


@dataclass
class ImageCondition(Condition):
    """Condition of the decoder: z_i, the caption, the known latents. A TextEncoding becomes its `token_states`."""

    embedding: Tensor  # (B, D), unit length (if the CLIP's `unit_length`) or zero: z_i
    text: TokenStates | TextEncoding | None = None  # the caption, for decoders that read it too
    masked_latents: Tensor | None = None  # (B, C + 1, h, w): kept latents and mask, for decoders that read them
    unindexed: ClassVar[tuple[str, ...]] = ("masked_latents",)

    def __post_init__(self) -> None:
        if isinstance(self.text, TextEncoding):
            self.text = self.text.token_states

    def pad_like(self, other: Self) -> Self:
        text, others = self.text, other.text
        if not isinstance(text, TokenStates) or not isinstance(others, TokenStates):
            return self
        return replace(self, text=text.pad_like(others))
