"""Define errors in the form of OpenAI's API, {"error": {"message", "type", "param", "code"}}, without internals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Types of errors by status; other statuses are the request's fault below 500, and the server's from 500 on."""
INTERNAL = "internal error; the server's log says more"


class ApiError(HTTPException):
    """Answer a request with an error: a status, and a line with the thing, what is wrong with it, and the fix.

    `param` is the field of the request that the error is about, `code` OpenAI's name of the error, for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def content(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """Return the response."""
        return JsonResponse(self.content, self.status_code, self.headers)


def internal_error() -> ApiError:
    """Return the error of a request that failed by a fault of the server; no other request uses its connection."""
    return ApiError(500, INTERNAL, headers={"Connection": "close"})


def stopping() -> ApiError:
    """Return the error of a request that a stopping server does not answer."""
    return ApiError(503, "the server is stopping", headers={"Retry-After": "5"})


def too_many(busy: int, seconds: int) -> ApiError:
    """Return the error of a request that finds no room, or loses its place to a client with fewer requests."""
    return ApiError(
        429,
        f"{busy} requests are running or wait; try again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


class ErrorDetail(BaseModel):
    """Describe an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Hold the body of every response with a status of 400 or more."""

    error: ErrorDetail


_REASONS: dict[int | str, str] = {
    400: "The request is wrong, or asks for more than the server allows.",
    401: "The request has no valid key.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "The engine has failed.",
    503: "The server is stopping.",
    504: "The request has taken too long.",
    "default": "Any other error.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": reason} for status, reason in _REASONS.items()
}
"""Responses of the OpenAPI document."""


class JsonResponse(Response):
    """Send JSON in ASCII: a lone surrogate of a request has no form in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, separators=(",", ":")).encode()
