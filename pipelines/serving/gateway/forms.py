"""Fields and files in the bodies of requests: JSON, and forms with images."""

import re
from typing import Any

from starlette.requests import Request
from t2i.pipelines.serving.api.errors import ApiError, build_field_error
from t2i.pipelines.serving.api.fields import FILES, ROUTES
from t2i.pipelines.serving.api.uploads import Upload
from t2i.pipelines.serving.gateway.bodies import read_form, read_json
from t2i.pipelines.serving.gateway.limits import Limits


async def read_body(request: Request, route: str, limits: Limits) -> tuple[dict[str, Any], list[Upload], Upload | None]:
    """Return the fields, the images and the mask of a request. Raises ApiError for a body in another form."""
    if route == "generations":
        return await read_json(request, limits), [], None
    # A form: texts, images, and perhaps a mask
    given: dict[str, list[Any]] = {}
    files: dict[str, list[Upload]] = {"image": [], "mask": []}
    for part in await read_form(request, limits):
        name = part.name.removesuffix("[]")
        takes_file = ROUTES[route] in FILES.get(name, "")
        if part.file_name is None and takes_file:
            raise build_field_error(name, f"{name} must be a file, which has a file name in the form")
        if part.file_name is None:
            given.setdefault(part.name, []).append(part.text)
        elif takes_file:
            files[name].append(Upload(part.file_name or name, bytes(part.data)))
        else:
            what = f"{part.name[:60]} is no file that {request.url.path} takes"
            raise ApiError(400, "unknown_parameter", what, name[:60])
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
