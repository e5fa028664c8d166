"""Bodies of requests: JSON, and forms with images."""

import json
import re
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.fields import FILES, ROUTES
from t2i.pipelines.serving.api.requests import Upload

# Bounds of a form: 16 images, as OpenAI's API takes, and a mask; 64 texts of at most 64 KiB
MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 17, 64, 65_536


async def read_body(request: Request, route: str) -> tuple[dict[str, Any], list[Upload], Upload | None]:
    """Return the fields, the images and the mask of a request. Raises ApiError for a body in another form."""
    if route == "generations":
        return await read_json_request(request), [], None
    check_content_type(request, "multipart/form-data")
    # A form: texts, images, and perhaps a mask
    given: dict[str, list[Any]] = {}
    files: dict[str, list[Upload]] = {"image": [], "mask": []}
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        for part, value in form.multi_items():
            name = part.removesuffix("[]")
            if not isinstance(value, UploadFile):
                given.setdefault(part, []).append(value)
            elif ROUTES[route] in FILES.get(name, ""):
                files[name].append(Upload(value.filename or name, await value.read()))
            else:
                raise ApiError(400, "unknown_parameter", f"{part[:60]} is no file that {request.url.path} takes", name)
    if len(files["mask"]) > 1:
        raise build_field_error("mask", f"mask must be one file, got {len(files['mask'])}")
    return read_form_values(given), files["image"], next(iter(files["mask"]), None)


def read_form_values(given: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the fields of a form. Those whose names end in [] are lists, as those that are given several times."""
    values: dict[str, Any] = {}
    for part, found in given.items():
        name = re.sub(r"(\[\])+$", "", part)
        # What clients make of a list of lists has no marks between the lists
        value: Any = [found] if part.endswith("[][]") else found if part.endswith("[]") or len(found) > 1 else found[0]
        if name in values:
            raise build_field_error(name, f"{name[:60]} is given twice, as one value and as a list")
        values[name] = value
    return values


async def read_json_request(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request has as its body. Raises ApiError for anything else."""
    check_content_type(request, "application/json")
    try:
        given = json.loads(await request.body(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}"[:200]) from error
    if not isinstance(given, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return given


def check_content_type(request: Request, needed: str) -> None:
    """Refuse a body of another content type. It also stops forms that pages of other sites send. Raises ApiError."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != needed:
        what = f"the content type must be {needed}, got {content_type[:60] or 'none'}"
        raise ApiError(415, "unsupported_media_type", what)


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")
