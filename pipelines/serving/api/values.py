"""Kinds of values that fields of the API take: how they are read, and what documents say of them.

A form's values are texts, which are read as the kind says. Every `read` returns None for what says nothing, and raises
ApiError, with the field, for a value that is not allowed.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from t2i.pipelines.serving.api.errors import build_field_error

from t2i.checks import MAX_TEXT_CHARACTERS, check_texts
from t2i.errors import InputError

MAX_LIST = 64  # entries of a list


class Kind(Protocol):
    """A kind of value. name: of the field."""

    def read(self, name: str, value: Any) -> Any: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """A text with words."""

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise build_field_error(name, f"{name} must be a text, got {describe_value(value)}")
        try:
            check_texts(name, [value], empty=False)
        except InputError as error:
            raise build_field_error(name, str(error)) from error
        return value

    def describe(self) -> str:
        return f"text of at most {MAX_TEXT_CHARACTERS} characters"


@dataclass(frozen=True)
class Texts:
    """One or several texts."""

    def read(self, name: str, value: Any) -> list[str]:
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_LIST:
            raise build_field_error(name, f"{name} must be at most {MAX_LIST} texts, got {len(values)}")
        return [Text().read(name, item) for item in values]

    def describe(self) -> str:
        return f"list of at most {MAX_LIST} texts"


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, name: str, value: Any) -> bool:
        # Forms have texts, JSON has true and false; 1 and 0 are more likely a mistake
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None or not isinstance(value, bool | str):
            raise build_field_error(name, f"{name} must be true or false, got {describe_value(value)}")
        return found

    def describe(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Number:
    """A number in a range. whole: an integer."""

    low: float
    high: float
    whole: bool = False

    def read(self, name: str, value: Any) -> float | int:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            # Large integers would lose digits as floats
            number = value if isinstance(value, int) else float(value)
            if isinstance(value, str) and re.fullmatch(r"-?\d{1,19}", value):
                number = int(value)
            if not math.isfinite(number) or self.whole and number != int(number):
                raise ValueError
            if not self.low <= number <= self.high:
                raise ValueError
        except (ValueError, OverflowError):
            shown = describe_value(value)
            raise build_field_error(name, f"{name} must be {self.describe()}, got {shown}") from None
        return int(number) if self.whole else float(number)

    def describe(self) -> str:
        return f"{'an integer' if self.whole else 'a number'} from {self.low:.16g} to {self.high:.16g}"


@dataclass(frozen=True)
class Numbers:
    """A number in a range, or a list of them: one image for each. A form may give the list with commas, or as JSON."""

    each: Number

    def read(self, name: str, value: Any) -> float | list[float]:
        values = parse_list(value)
        if not isinstance(values, list):
            return self.each.read(name, values)
        if len(values) > MAX_LIST:
            raise build_field_error(name, f"{name} must be at most {MAX_LIST} numbers, got {len(values)}")
        return [self.each.read(name, item) for item in values]

    def describe(self) -> str:
        return f"{self.each.describe()}, or a list of them, for an image of each"


@dataclass(frozen=True)
class Weights:
    """Numbers, one for each of several inputs, for one image; or a list of such lists, for an image of each."""

    def read(self, name: str, value: Any) -> list[float] | list[list[float]]:
        each, values = Number(0, 1e6), parse_list(value)
        values = [parse_list(item) for item in values] if isinstance(values, list) else values
        # One list of numbers is a single row
        rows = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
        if not all(isinstance(row, list) and 0 < len(row) <= MAX_LIST**2 for row in rows) or len(rows) > MAX_LIST:
            raise build_field_error(name, f"{name} must be {self.describe()}, got {describe_value(value)}")
        read = [[each.read(name, item) for item in row] for row in rows]
        return read if rows is values else read[0]

    def describe(self) -> str:
        return "a list of numbers, one for each input; or a list of such lists, for an image of each"


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]

    def read(self, name: str, value: Any) -> str:
        if value not in self.words:
            raise build_field_error(name, f"{name} must be one of {', '.join(self.words)}, got {describe_value(value)}")
        return value

    def describe(self) -> str:
        return " or ".join([", ".join(self.words[:-1]), self.words[-1]])


@dataclass(frozen=True)
class Size:
    """Width and height."""

    max_side: int

    def read(self, name: str, value: Any) -> tuple[int, int] | None:
        if value == "auto":
            return None
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
        if match is None or max(map(int, match.groups())) > self.max_side:
            raise build_field_error(name, f"{name} must be {self.describe()}, got {describe_value(value)}")
        return int(match[1]), int(match[2])

    def describe(self) -> str:
        return f"auto or WIDTHxHEIGHT, with sides of at most {self.max_side}"


@dataclass(frozen=True)
class Anything:
    """A field that clients send and that means nothing here."""

    def read(self, name: str, value: Any) -> None:
        return None

    def describe(self) -> str:
        return "anything"


def parse_list(value: Any) -> Any:
    """Return a list that a form gives as JSON or with commas; other values as they are."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        # What is no JSON is refused where its elements are read, with the name of the field
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value.split(",") if "," in value else value


def describe_value(value: Any) -> str:
    """Return a value as messages show it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
