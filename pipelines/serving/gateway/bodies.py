"""Bodies of requests: JSON objects and forms, read within limits that are counted as the bytes come."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from t2i.pipelines.serving.api.errors import ApiError, build_field_error, build_size_error
from t2i.pipelines.serving.gateway.limits import Limits

# It logs every fault of a form, which clients get to know
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass
class FormPart:
    """A text of a form, or a file: its name, the name of the file, and its bytes. A text has no name of a file."""

    name: str = ""
    file_name: str | None = None
    data: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def text(self) -> str:
        """The value of a text. Raises ApiError if it is not UTF-8."""
        return decode_text(bytes(self.data), self.name)


def check_content_type(request: Request, expected: str) -> None:
    """Refuse a body of another type."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != expected:
        what = f"the content type must be {expected}, got {found[:60] or 'none'}"
        raise ApiError(415, "unsupported_media_type", what)


# JSON


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object of a body. Raises ApiError for anything else."""
    check_content_type(request, "application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.json_bytes:
            raise build_size_error("a JSON body", limits.json_bytes)
    try:
        given = json.loads(bytes(body), parse_constant=refuse_constant, object_pairs_hook=collect_pairs)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}"[:200]) from error
    if not isinstance(given, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    check_json(given, limits.json_depth)
    return given


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")


def collect_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError for one that has a name twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def check_json(given: dict[str, Any], max_depth: int) -> None:
    """Refuse values that are nested too deeply, and texts with half a character, which no encoding has."""
    for name, value in given.items():
        level = [name, value]
        for _ in range(max_depth):
            if any(isinstance(item, str) and not is_encodable(item) for item in level):
                raise ApiError(400, "invalid_json", "a text of the body has half a surrogate pair", quote_name(name))
            level = [child for item in level for child in list_children(item)]
            if not level:
                break
        else:
            what = f"the body's lists and objects are nested deeper than {max_depth}"
            raise ApiError(400, "invalid_json", what, quote_name(name))


def list_children(value: Any) -> Iterable[Any]:
    """Return what a JSON value contains."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def is_encodable(text: str) -> bool:
    """Return True if a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def quote_name(name: str) -> str:
    """Return a name as an answer can have it."""
    return name.encode("ascii", "backslashreplace").decode()[:60]


# Forms


async def read_form(request: Request, limits: Limits) -> list[FormPart]:
    """Return the parts of a form, in their order. Raises ApiError for a body that is none, or goes beyond limits."""
    check_content_type(request, "multipart/form-data")
    _, options = parse_options_header(request.headers["content-type"])
    reader = FormReader(limits)
    try:
        if not options.get(b"boundary"):
            raise ValueError("its content type names no boundary")
        parser = MultipartParser(options[b"boundary"], reader.callbacks)
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise ApiError(400, "invalid_form", f"the body is not a valid form: {error}"[:200]) from error
    if not reader.is_complete:
        raise ApiError(400, "invalid_form", "the body is not a valid form: it ends before its last boundary")
    return reader.parts


class FormReader:
    """Collects the parts of a form from what a `MultipartParser` reports."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.parts: list[FormPart] = []
        self.files = 0
        self.header, self.value, self.disposition = b"", b"", b""
        self.is_complete = False
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        self.callbacks: Any = {f"on_{name}": getattr(self, f"on_{name}") for name in names}

    def on_part_begin(self) -> None:
        self.parts.append(FormPart())
        self.disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def on_header_end(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.disposition = self.value
        self.header, self.value = b"", b""

    def on_headers_finished(self) -> None:
        """Read the names of a part, and count it."""
        _, options = parse_options_header(self.disposition)
        part, limits = self.parts[-1], self.limits
        part.name = decode_text(options.get(b"name", b""), "the name of a part")
        if not part.name:
            raise ApiError(400, "invalid_form", "a part of the form has no name")
        if b"filename" in options:
            part.file_name = options[b"filename"].decode(errors="replace")
            self.files += 1
        if self.files > limits.files:
            raise build_field_error(part.name[:60], f"a form takes at most {limits.files} files", "too_many_files")
        if len(self.parts) - self.files > limits.fields:
            raise build_field_error(part.name[:60], f"a form takes at most {limits.fields} fields", "too_many_fields")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        most = self.limits.field_bytes if part.file_name is None else self.limits.file_bytes
        if len(part.data) + end - start > most:
            raise build_size_error(part.name[:60], most, part.name[:60])
        part.data += data[start:end]

    def on_end(self) -> None:
        self.is_complete = True


def decode_text(data: bytes, name: str) -> str:
    """Return a text of a form. Raises ApiError if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_form", f"{name[:60]} is not UTF-8 text", name[:60]) from error
