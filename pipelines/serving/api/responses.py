"""Responses: descriptions of images, events while they are drawn, and errors."""

import logging
import secrets
import time
from collections.abc import Callable
from math import ceil
from typing import Any

from PIL import Image
from t2i.pipelines.memory_needed import BatchTooLargeError
from t2i.pipelines.serving.admission import Draining, KeyLimit, QueueFull
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.fields import name_field
from t2i.pipelines.serving.api.images import MEDIA_TYPES, encode_base64, encode_image
from t2i.pipelines.serving.drawing import DrawnImage, EngineLost
from t2i.pipelines.serving.engine import Cancelled
from t2i.pipelines.serving.events import Event
from t2i.pipelines.serving.pace import Forecast

from t2i.errors import InputError
from t2i.files.known_words import KnownWords, UnknownWord, split_words
from t2i.runtime.memory import is_out_of_memory
from t2i.texts import wrap_text

logger = logging.getLogger(__name__)

MAX_RETRY_SECONDS = 60  # after which clients ask a full queue again
SHORT_MEMORY_SECONDS = 15  # after which a request that found no memory may be sent again
RESTART_SECONDS = 5  # in which a worker of a small model is there again
# Clients ask for the tokens of a request, which are not counted here
NO_USAGE = {
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0),
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


class Answer:
    """The answer to one request: a response with all images, or events while they are drawn.

    Args:
        route: of the request.
        values: of its fields.
        forecast: of its end.
        keep: returns the url of an image that it stores; by its bytes and its media type.
        facts: further fields of the response: the model, unknown words, what has no effect.
    """

    def __init__(
        self,
        route: str,
        values: dict[str, Any],
        forecast: Forecast,
        keep: Callable[[bytes, str], str],
        facts: dict[str, Any],
    ):
        self.values, self.forecast, self.keep, self.facts = values, forecast, keep, facts
        self.event_name = "image_generation" if route == "generations" else "image_edit"
        self.output_format = values.get("output_format", "png")
        self.arrived = time.monotonic()

    def build_body(self, images: list[DrawnImage]) -> dict[str, Any]:
        """Return the response with all images."""
        data = [self.describe_image(drawn) | {"seed": drawn.seed} for drawn in images]
        return {"created": int(time.time()), "data": data, **self.describe_output(images), **self.describe_request()}

    def describe_image(self, drawn: DrawnImage, in_event: bool = False) -> dict[str, Any]:
        """Return an image as responses have it: its bytes, or a link to them; events have its bytes in any case."""
        content = encode_image(drawn, self.output_format, self.values.get("output_compression"))
        link = self.values.get("response_format") == "url"
        url = {"url": self.keep(content, MEDIA_TYPES[self.output_format])} if link else {}
        return url | ({} if link and not in_event else {"b64_json": encode_base64(content)})

    def describe_output(self, images: list[DrawnImage]) -> dict[str, Any]:
        """Return what applies to all images."""
        width, height = images[0].image.size
        return {
            "size": f"{width}x{height}",
            "quality": self.values.get("quality", "auto"),
            "background": "opaque",
            "output_format": self.output_format,
            "usage": NO_USAGE,
        }

    def describe_request(self) -> dict[str, Any]:
        """Return what applies to the request as a whole."""
        return self.facts | {"timings": {"total_seconds": round(time.monotonic() - self.arrived, 3)}}

    def build_events(self, event: Event) -> list[tuple[str, dict[str, Any]]]:
        """Return the names and the data of the events that a client gets for an event of its job."""
        if event.kind in ("queued", "step"):
            return [("t2i.progress", self.describe_progress(event))] if self.values.get("progress") else []
        if event.kind == "failed":
            return [("error", explain_failure(event.data["error"]).body)]
        if event.kind == "preview":
            return self.build_previews(event.data["number"], event.data["images"])
        images, events = event.data["images"], []
        for index, drawn in enumerate(images):
            data = self.describe_image(drawn, in_event=True) | {"seed": drawn.seed, "image_index": index}
            data |= {"created_at": int(time.time()), **self.describe_output(images), **self.describe_request()}
            events.append((f"{self.event_name}.completed", data))
        return events

    def build_previews(self, number: int, images: list[Image.Image]) -> list[tuple[str, dict[str, Any]]]:
        """Return the events of the previews of all images at one step."""
        previews, events = [DrawnImage(image, {}, 0) for image in images], []
        for index, drawn in enumerate(previews):
            content = encode_image(drawn, self.output_format, self.values.get("output_compression"))
            data = {"b64_json": encode_base64(content), "partial_image_index": number, "image_index": index}
            data |= {"created_at": int(time.time()), **self.describe_output(previews)}
            events.append((f"{self.event_name}.partial_image", data))
        return events

    def describe_progress(self, event: Event) -> dict[str, Any]:
        """Return the stage of a request, its place in the queue, and the seconds left, null while they are unknown."""
        if event.kind == "queued":
            place = {"position": event.data["position"], "seconds_left": event.data["seconds"]}
            return {"stage": "queued", "step": 0, "steps": 0, **place}
        left = self.forecast.report_step(**event.data)
        return {**event.data, "position": 0, "seconds_left": None if left is None else round(left, 2)}


def describe_unknown_words(words: list[UnknownWord]) -> list[dict[str, Any]]:
    """Return words that a model never saw, as responses list them.

    near: a word that is spelled much like it; of a word in keywords alone, the caption whose keyword it is.
    """
    return [
        {"word": word.word, "near": [word.nearest] if word.nearest else [], "is_keyword": word.is_keyword}
        for word in words
    ]


def check_each_text(known: KnownWords | None, texts: str | list[str]) -> list[dict[str, Any]]:
    """Return each text with its unknown words; none if those that the model knows are not known.

    All are sought at once, so that many texts take no longer than one.
    """
    unknown = [] if known is None else known.find_unknown_words(*wrap_text(texts))
    found = {word["word"]: word for word in describe_unknown_words(unknown)}
    checked = []
    for text in wrap_text(texts):
        words = dict.fromkeys(split_words(text))
        checked.append({"text": text, "unknown_words": [found[word] for word in words if word in found]})
    return checked


def explain_failure(error: BaseException) -> ApiError:
    """Return the error of the API for one that ended a job."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        seconds = min(MAX_RETRY_SECONDS, max(1, ceil(error.retry_after)))
        code = "key_limit" if isinstance(error, KeyLimit) else "queue_full"
        return ApiError(429, code, str(error), headers={"retry-after": str(seconds)})
    if isinstance(error, Draining):
        # Another server, or this one after its start, can draw it
        return ApiError(503, "shutting_down", str(error), headers={"x-should-retry": "true", "retry-after": "1"})
    if isinstance(error, Cancelled):
        return ApiError(503, "cancelled", "the request was cancelled", headers={"x-should-retry": "true"})
    if isinstance(error, EngineLost):
        headers = {"x-should-retry": "true", "retry-after": str(RESTART_SECONDS)}
        return ApiError(503, "engine_lost", str(error), headers=headers)
    if isinstance(error, TimeoutError):
        return ApiError(503, "queue_timeout", str(error), headers={"retry-after": "10"})
    if isinstance(error, BatchTooLargeError):
        return ApiError(400, "out_of_memory", str(error), "n" if error.fitting_count else "size")
    if isinstance(error, InputError):
        # Messages of pipelines begin with the name of what is at fault
        field, message = name_field(str(error))
        return ApiError(400, "invalid_value", message, field)
    if is_out_of_memory(error):
        # Its batches were halved already; what else draws, or another program, may need less in a while
        logger.error("memory does not suffice for one image: %s", error)
        message = "memory does not suffice at the moment; ask for a smaller size, or try again later"
        return ApiError(503, "out_of_memory", message, headers={"retry-after": str(SHORT_MEMORY_SECONDS)})
    number = secrets.token_hex(4)
    logger.error("error %s while drawing", number, exc_info=error)
    # Drawing the same again would fail again
    headers = {"x-should-retry": "false"}
    return ApiError(500, "internal", f"drawing failed; the server's log has it as error {number}", headers=headers)
