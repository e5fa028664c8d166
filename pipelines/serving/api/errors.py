"""Errors of the images API, in the one shape that its clients read."""

from typing import Any

# The type of an error by its status; clients choose the class of their exception by the status.
ERROR_TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error for the client.

    Args:
        status: of HTTP.
        code: a word that programs compare, such as "invalid_value".
        message: one sentence for people.
        param: the field that is at fault.
        headers: of the response, such as Retry-After.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = ERROR_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def build_field_error(field: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field with a value that is not allowed."""
    return ApiError(400, code, message, field)


def build_size_error(what: str, most: int, field: str | None = None) -> ApiError:
    """Return the error for something of too many bytes."""
    unit, size = ("MB", most / 2**20) if most >= 2**20 else ("KB", most / 2**10)
    return ApiError(413, "payload_too_large", f"{what} has more than {size:g} {unit}", field)
