"""What clients get: descriptions of images, events while they are drawn, and errors."""

import logging
import secrets
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.fields import find_field
from t2i.pipelines.serving.api.images import encode_base64, encode_image
from t2i.pipelines.serving.drawing import DrawnImage, EngineLost
from t2i.pipelines.serving.engine import Cancelled
from t2i.pipelines.serving.events import Event
from t2i.pipelines.serving.service import Job

from t2i.errors import InputError

logger = logging.getLogger(__name__)

RESTART_SECONDS = 5  # in which a worker of a small model is there again
FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def build_stream_events(kind: str, event: Event, job: Job, values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and the data of the events that clients get for an event of a job."""
    if event.kind == "queued":
        return [("t2i.progress", {"stage": "queue", **event.data})]
    if event.kind == "step":
        return [("t2i.progress", event.data)] if job.request.progress else []
    if event.kind == "failed":
        return [("error", explain_failure(event.data["error"]).body)]
    # The images, whole or as previews
    output_format, compression = values.get("output_format", "png"), values.get("output_compression")
    if event.kind == "preview":
        previews = [DrawnImage(image, {}, 0) for image in event.data["images"]]
        numbered = {"partial_image_index": event.data["number"]}
        name, images, usage = f"{kind}.partial_image", previews, {}
    else:
        name, images, numbered = f"{kind}.completed", event.data["images"], {}
        usage = {"usage": count_usage()}
    events = []
    for index, drawn in enumerate(images):
        data: dict[str, Any] = {"b64_json": encode_base64(encode_image(drawn, output_format, compression))}
        data |= {"created_at": int(time.time()), "image_index": index, **describe_output(values, images)}
        seed = {"seed": drawn.seed} if event.kind == "done" else {}
        events.append((name, data | numbered | usage | seed))
    return events


def describe_output(values: dict[str, Any], images: list[DrawnImage]) -> dict[str, Any]:
    """Return the fields of a response that apply to all of its images."""
    width, height = images[0].image.size
    return {
        "size": f"{width}x{height}",
        "quality": values.get("quality", "auto"),
        "background": "opaque",
        "output_format": values.get("output_format", "png"),
    }


def count_usage() -> dict[str, Any]:
    """Return the tokens of a request, which are not counted here."""
    return {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    }


def explain_failure(error: BaseException) -> ApiError:
    """Return the error of the API for one that ended a job."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Cancelled):
        return ApiError(503, "cancelled", "the request was cancelled", headers={"x-should-retry": "true"})
    if isinstance(error, EngineLost):
        headers = {"x-should-retry": "true", "retry-after": str(RESTART_SECONDS)}
        return ApiError(503, "engine_lost", str(error), headers=headers)
    if isinstance(error, TimeoutError):
        return ApiError(503, "queue_timeout", str(error), headers={"retry-after": "10"})
    if isinstance(error, InputError):
        # Messages of pipelines begin with the name of what is at fault
        return ApiError(400, "invalid_value", str(error), find_field(str(error).split(" ", 1)[0]))
    number = secrets.token_hex(4)
    logger.error("error %s while drawing", number, exc_info=error)
    # Drawing the same again would fail again
    headers = {"x-should-retry": "false"}
    return ApiError(500, "internal", f"drawing failed; the server's log has it as error {number}", headers=headers)


async def send_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def send_framework_error(request: Request, error: Exception) -> Response:
    """Send an error that Starlette raises, in the API's shape."""
    assert isinstance(error, HTTPException)
    code = FRAMEWORK_CODES.get(error.status_code, "invalid_request")
    where = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {where}", 405: f"{where} is not allowed"}
    shown = ApiError(error.status_code, code, messages.get(error.status_code, str(error.detail)))
    return JSONResponse(shown.body, shown.status, headers=error.headers)


async def send_internal_error(request: Request, error: Exception) -> Response:
    """Send what clients see of an error that nobody expected; Starlette logs it."""
    shown = ApiError(500, "internal", "the server failed; its log has the reason", headers={"x-should-retry": "false"})
    return JSONResponse(shown.body, shown.status, headers=shown.headers)
