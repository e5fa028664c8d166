"""Conditions of denoisers: batches of tensors, with an index of the stored row that each condition of the batch is.

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
    """A batch of B conditions. Fields are tensors, nested conditions, or None where a model takes no such input.

    `repeat`, `take_rows` and `cat` change the index alone, so that several images of one caption share its tensors.
    `expand` copies them, once, where a denoiser needs a row for each image. Nested conditions have their own index.

    rows: (B,), int64, on the CPU: the stored row of each condition. None: the B stored rows, in order.
    """

    rows: Tensor | None = field(default=None, kw_only=True)
    unindexed: ClassVar[tuple[str, ...]] = ()  # fields that always have B rows, because no two images share them

    @property
    def parts(self) -> dict[str, Any]:
        """The tensors and nested conditions by field, without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "rows"}

    @property
    def first_tensor(self) -> Tensor:
        return next(part for part in self.parts.values() if isinstance(part, Tensor))

    @property
    def device(self) -> torch.device:
        return self.first_tensor.device

    @property
    def index(self) -> Tensor:
        """The stored row of each condition, (B,), int64, on the CPU."""
        return count_up(len(self.first_tensor)) if self.rows is None else self.rows

    def __len__(self) -> int:
        return len(self.index)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every stored tensor."""
        parts = {
            name: part.map_tensors(function) if isinstance(part, Condition) else function(part)
            for name, part in self.parts.items()
        }
        return replace(self, **parts)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move to a device; convert floating-point tensors to a dtype, if one is given."""
        return self.map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeat(self, count: int) -> Self:
        """Repeat each of the B conditions `count` times in a row."""
        return self.take_rows(count_up(len(self)).repeat_interleave(count))

    def take_rows(self, rows: Tensor) -> Self:
        """Select conditions by their numbers in the batch, (N,), int64."""
        nested = {name: part.take_rows(rows) for name, part in self.parts.items() if isinstance(part, Condition)}
        # Unindexed fields have a row for each condition, so that these rows are taken themselves
        own = {name: self.parts[name] for name in self.unindexed if name in self.parts}
        own = {name: tensor[rows.to(tensor.device)] for name, tensor in own.items()}
        return replace(self, rows=self.index[rows.cpu()], **nested, **own)

    def expand(self) -> Self:
        """Return the same conditions with B rows in every tensor and without an index."""
        parts: dict[str, Any] = {}
        for name, part in self.parts.items():
            if isinstance(part, Condition):
                parts[name] = part.expand()
            elif self.rows is not None and name not in self.unindexed:
                parts[name] = part[self.rows.to(part.device)]
        return replace(self, rows=None, **parts)

    def find_unique_rows(self) -> tuple[Tensor, Tensor]:
        """Group equal conditions, those of the same stored rows, whose context can be computed once.

        Returns the number of the first of each group, (U,), on the CPU as all indexes, and the group of each condition,
        (B,), on the device of the tensors: int64. No tensor is compared but the indexes.
        """
        # Conditions are equal if all their indexes are, those of nested conditions included
        _, groups = torch.stack(self.collect_indexes(), dim=1).unique(dim=0, return_inverse=True)
        first = (groups == count_up(int(groups.max()) + 1)[:, None]).int().argmax(dim=1)
        return first, groups.to(self.device)

    def collect_indexes(self) -> list[Tensor]:
        """Return the index of this condition and of the nested ones."""
        nested = (part.collect_indexes() for part in self.parts.values() if isinstance(part, Condition))
        return [self.index, *(index for indexes in nested for index in indexes)]

    def pad_like(self, other: Self) -> Self:
        """Pad to the lengths of `other`, so that both fit into one batch."""
        return self

    def where(self, keep: Tensor, other: Self) -> Self:
        """Return this condition where `keep`, (B,), bool, is true, and `other` elsewhere."""

        def choose(mine: Tensor, others: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (mine.ndim - 1)), mine, others)

        return self.expand().combine(other.expand(), choose, lambda mine, others: mine.where(keep, others))

    def cat(self, other: Self) -> Self:
        """Join both into one batch."""
        both = self.combine(other, lambda mine, others: torch.cat([mine, others]), Condition.cat)
        if self.rows is None and other.rows is None:
            return both
        # The stored rows of the other follow those of this one
        return replace(both, rows=torch.cat([self.index, len(self.first_tensor) + other.index]))

    def combine(
        self,
        other: Self,
        of_tensors: Callable[[Tensor, Tensor], Tensor],
        of_conditions: Callable[["Condition", "Condition"], "Condition"],
    ) -> Self:
        """Apply functions to the pairs of padded fields. A field that one of the two lacks becomes None."""
        mine, others = self.pad_like(other).parts, other.pad_like(self).parts
        parts = dict.fromkeys(mine)
        for name in mine.keys() & others.keys():
            function: Any = of_conditions if isinstance(mine[name], Condition) else of_tensors
            parts[name] = function(mine[name], others[name])
        return replace(self, **parts)


def count_up(count: int) -> Tensor:
    """Return 0 to count - 1, int64, on the CPU also where memory is counted with meta as the default device."""
    return torch.arange(count, device="cpu")


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
    """The condition of the decoder. A TextEncoding is reduced to its `token_states`."""

    embedding: Tensor  # (B, D): z_i, as the decoder's `noise_image_embeds` returns it; zero or learned for the null
    text: TokenStates | TextEncoding | None = None  # captions, for decoders that read them
    masked_latents: Tensor | None = None  # (B, C + 1, h, w): kept latents and mask, for decoders that read them
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1]: control images, for decoders that read them
    unindexed: ClassVar[tuple[str, ...]] = ("masked_latents", "control")

    def __post_init__(self) -> None:
        if isinstance(self.text, TextEncoding):
            self.text = self.text.token_states

    def pad_like(self, other: Self) -> Self:
        text, others = self.text, other.text
        if not isinstance(text, TokenStates) or not isinstance(others, TokenStates):
            return self
        return replace(self, text=text.pad_like(others))
