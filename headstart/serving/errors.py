"""Errors as OpenAI's API tells them, {"error": {"message", "type", "param", "code"}}: no path, no traceback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""By status; others are the request's fault below 500, the server's from there on."""
INTERNAL = "internal error; the server's log says more"


class ApiError(HTTPException):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one line: the thing, what is wrong with it, the mend.
        param: the field of the request that it is about.
        code: OpenAI's word for it, for programs.
        headers: of the answer.
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
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        return JsonResponse(self.content, self.status_code, self.headers)


def stopping() -> ApiError:
    """Return the error of a request that a stopping server does not answer."""
    return ApiError(503, "the server is stopping", headers={"Retry-After": "5"})


def too_many(busy: int, seconds: int) -> ApiError:
    """Return the error of a request that finds no room, or loses its place to a client with fewer requests."""
    return ApiError(
        429,
        f"{busy} texts are being written or wait; try again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Of every status from 400 on."""

    error: ErrorDetail


_WHY: dict[int | str, str] = {
    400: "The request is wrong, or more than is allowed.",
    401: "No valid key.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many wait; Retry-After says when to try again.",
    500: "The engine has failed.",
    503: "The server is stopping.",
    504: "The time is over.",
    "default": "Any other error.",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": why} for status, why in _WHY.items()
}
"""Of the OpenAPI document."""


class JsonResponse(Response):
    """JSON in ASCII: a lone surrogate out of a request has no UTF-8 form, and its answer must not fail of it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()
