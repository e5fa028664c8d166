"""Messages between the server and its workers: JSON, and the pixels of its images behind it."""

import json
from typing import Any

from PIL import Image
from t2i.pipelines.memory_needed import BatchTooLargeError
from t2i.pipelines.serving.engine import Cancelled

from t2i.errors import InputError
from t2i.runtime.memory import is_out_of_memory

IMAGE_KEY = "\0image"  # no field of a request has this name
LENGTH_BYTES = 8
# That a worker's drawing may end with, by name; a kind stands before those that it is one of
EXPECTED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (BatchTooLargeError, InputError, Cancelled, MemoryError)
}


def encode_message(kind: str, **data: Any) -> bytes:
    """Return a message: values of JSON, among which may be images."""
    pixels: list[bytes] = []

    def refer_to_image(value: Any) -> dict[str, Any]:
        if not isinstance(value, Image.Image):
            raise TypeError(f"a message takes no {type(value).__name__}")
        pixels.append(value.tobytes())
        return {IMAGE_KEY: [value.mode, value.size, len(pixels[-1])]}

    head = json.dumps({"kind": kind, "data": data}, default=refer_to_image).encode()
    return b"".join([len(head).to_bytes(LENGTH_BYTES, "big"), head, *pixels])


def decode_message(message: bytes) -> tuple[str, dict[str, Any]]:
    """Return the kind and the data of a message."""
    start = LENGTH_BYTES + int.from_bytes(message[:LENGTH_BYTES], "big")

    def find_image(value: dict[str, Any]) -> Any:
        nonlocal start
        if IMAGE_KEY not in value:
            return value
        mode, size, length = value[IMAGE_KEY]
        # JSON is read in the order in which it was written, so that the pixels follow one another
        image = Image.frombytes(mode, tuple(size), message[start : start + length])
        start += length
        return image

    content = json.loads(message[LENGTH_BYTES:start], object_hook=find_image)
    return content["kind"], content["data"]


def pack_error(error: BaseException) -> dict[str, Any]:
    """Return an error as data of a message."""
    kind = next((kind for kind in EXPECTED_ERRORS.values() if isinstance(error, kind)), None)
    if isinstance(error, BatchTooLargeError):
        arguments: list[Any] = [error.reason, error.fitting_count]
    elif kind is None and is_out_of_memory(error):  # devices have kinds of their own
        kind, arguments = MemoryError, [str(error)]
    else:
        arguments = [repr(error) if kind is None else str(error)]
    return {"error": "" if kind is None else kind.__name__, "arguments": arguments}


def unpack_error(data: dict[str, Any]) -> Exception:
    """Return the error that `pack_error` packed; a RuntimeError for one that nobody expected."""
    return EXPECTED_ERRORS.get(data["error"], RuntimeError)(*data["arguments"])
