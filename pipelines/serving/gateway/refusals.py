"""Handlers of the errors that routes raise: responses in the API's shape, whose codes the log has."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from t2i.pipelines.serving.api.errors import ApiError
from t2i.pipelines.serving.gateway.log import find_entry

FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


async def send_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    find_entry(request).error = error.code
    return JSONResponse(error.body, error.status, headers=error.headers)


async def send_framework_error(request: Request, error: Exception) -> Response:
    """Send an error that Starlette raises, in the API's shape."""
    assert isinstance(error, HTTPException)
    code = FRAMEWORK_CODES.get(error.status_code, "invalid_request")
    where = f"{request.method} {request.url.path}"
    messages = {404: f"there is no {where}", 405: f"{where} is not allowed"}
    shown = ApiError(error.status_code, code, messages.get(error.status_code, str(error.detail)))
    find_entry(request).error = code
    return JSONResponse(shown.body, shown.status, headers=error.headers)
