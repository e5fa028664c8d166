"""Bodies of requests: JSON, and forms with images."""

import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.api.requests import Upload

# Bounds of a form: 16 images, as OpenAI's API takes, and a mask; 64 texts of at most 64 KiB
MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 17, 64, 65_536


async def read_body(request: Request, route: str) -> tuple[dict[str, Any], list[Upload], Upload | None]:
    """Return the fields, the images and the mask of a request. Raises ApiError for a body in another form."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if route == "generations":
        if content_type != "application/json":
            what = f"the content type must be application/json, got {content_type or 'none'}"
            raise ApiError(415, "unsupported_media_type", what)
        return await read_json_body(request), [], None
    if content_type != "multipart/form-data":
        what = f"the content type must be multipart/form-data, got {content_type or 'none'}"
        raise ApiError(415, "unsupported_media_type", what)
    # A form: texts, images, and perhaps a mask
    given: dict[str, Any] = {}
    images, mask = [], None
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                # A list comes as several fields with the name and brackets
                if name.endswith("[]"):
                    given.setdefault(name.removesuffix("[]"), []).append(value)
                else:
                    given[name] = value
            elif name in ("image", "image[]"):
                images.append(Upload(value.filename or "image", await value.read()))
            elif name == "mask":
                mask = Upload(value.filename or "mask", await value.read())
            else:
                raise ApiError(400, "unknown_parameter", f"{name[:60]} is no file that /v1/images/{route} takes", name)
    return given, images, mask


async def read_json_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body. Raises ApiError for anything else."""
    try:
        given = json.loads(await request.body(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}"[:200]) from error
    if not isinstance(given, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return given


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")
