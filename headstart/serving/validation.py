"""Errors of requests that do not fit the protocol: the field as the client sent it, what is wrong, and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headstart.serving.errors import ApiError

FORMS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string, or a list of at most 16 strings",
    "content": 'a string, or a list of parts {"type": "text", "text": "..."}',
    "messages": 'a list of messages {"role": "user", "content": "..."}',
    "arguments": "a string with JSON, or an object",
}
"""Forms of the fields that have several."""
WORDS = (
    ("Input should be a valid string", "must be a string"),
    ("Input should ", "must "),
    ("List should have ", "must have "),
    ("String should ", "must "),
    (" after validation", ""),
    ("Value error, ", ""),
)
NOT_JSON = "the body is not JSON in UTF-8; send an object of the fields that /openapi.json names"
NOT_OBJECT = "the body is not a JSON object; send one, with the header Content-Type: application/json"
Error = Mapping[str, Any]


def validation_error(errors: Sequence[Error], body: Any) -> ApiError:
    """Return the error to answer, from pydantic's and the body that they are about."""
    first = errors[0]
    # Of the alternatives of a field, the one that the value comes closest to tells most.
    field = _path(first, body)[:1]
    alternatives = [error for error in errors if _path(error, body)[:1] == field]
    closest = max(alternatives, key=lambda error: (not _is_of_type(error), len(_path(error, body))))
    path = _path(closest, body)
    if closest["type"] == "refused":
        path = [*path, closest["ctx"]["field"]]
        why = closest["ctx"]["why"]
    elif len(alternatives) > 1 and _is_of_type(closest) and (named := _last_name(path)) in FORMS:
        path, why = path[: len(path) - path[::-1].index(named)], f"must be {FORMS[named]}"
    else:
        why = _words(closest)
    param = path[:-1] if path and isinstance(path[-1], int) else path  # an item of a list of numbers or strings
    place = _joined(path)
    return ApiError(400, f"{place}: {why}" if place else why, param=_joined(param) or None)


def _last_name(path: Sequence[str | int]) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def _is_of_type(error: Error) -> bool:
    return str(error["type"]).endswith("_type")


def _path(error: Error, body: Any) -> list[str | int]:
    """Return where an error is in the body: without the names of pydantic's alternatives, which no body has."""
    path: list[str | int] = []
    value, location = body, error["loc"]
    for at, part in enumerate(location):
        if isinstance(value, Mapping):
            within = part in value
        else:  # `part in range(...)` would compare a name with every number
            within = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if within:
            value = value[part]
        if within or (error["type"] == "missing" and at == len(location) - 1):
            path.append(part)
    return path


def _words(error: Error) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return "this API has no such field; leave it out"
    message = str(error["msg"])
    for pydantic, plain in WORDS:
        message = message.replace(pydantic, plain)
    if error["type"] == "literal_error" and "content" in error["loc"]:
        return f"{message}; other parts are not read, leave them out"
    return message


def _joined(path: Sequence[str | int]) -> str:
    """Return a path as `messages[1].content`, on one line and not long."""
    text = ""
    for part in path:
        name = part if isinstance(part, int) else str(part)[:80]
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return " ".join(text.split()) or ("" if not path else "''")
