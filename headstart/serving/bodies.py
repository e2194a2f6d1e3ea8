"""Read the bodies of requests: check their size, parse them, validate their fields, and say what is wrong.

Parsing and validating hold Python's lock, in a thread too. So the values of a body are counted first, in steps that let
other threads run, and a body with too many of them is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from headstart.serving.errors import ApiError
from headstart.serving.fields import IGNORED, NEUTRAL
from headstart.serving.schemas import Open

LARGE = 32768
"""Largest body in bytes that is read on the event loop."""
MAX_VALUES = 2**17
"""Most values in a body, in addition to the tokens of one full context."""
MAX_PARTS = 2**15
"""Most lists, objects and fields in a body: they take longer than numbers."""
STEP = 65536
"""Number of characters that are counted at once."""
NOT_JSON = "the body is not JSON in UTF-8; send an object of the fields that /openapi.json names"
NOT_OBJECT = "the body is not a JSON object; send one, with the header Content-Type: application/json"
FORMS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string, or a list of at most 16 strings",
    "content": 'a string, or a list of parts {"type": "text", "text": "..."}',
    "input": 'a string, or a list of items {"role": "user", "content": "..."}',
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
"""Phrases of pydantic's messages, and their replacements."""

Body = TypeVar("Body", bound=Open)
Error = Mapping[str, Any]


def read_body(kind: type[Body], content: bytes, content_type: str, max_values: int) -> Body:
    """Return the request in a body.

    Raises ApiError for a body that is not a JSON object of the fields of `kind`, or has more than `max_values` values.
    """
    subtype = content_type.partition(";")[0].strip().lower()
    if not content or not re.fullmatch(r"application/([^/]+\+)?json", subtype):  # curl sends a form by default
        raise ApiError(400, NOT_OBJECT)
    try:
        text = content.decode("utf-8-sig", "surrogatepass")
        if len(text) > LARGE:
            _check_counts(text, kind, max_values)
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, NOT_JSON) from None
    if not isinstance(body, dict):
        raise ApiError(400, NOT_OBJECT)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), body) from None


def _check_counts(text: str, kind: type[Open], max_values: int) -> None:
    values, parts, quoted, carried = 1, 0, 0, ""
    for at in range(0, len(text), STEP):
        step = carried + text[at : at + STEP]
        carried = "\\" if (len(step) - len(step.rstrip("\\"))) % 2 else ""  # its other half is in the next step
        pieces = step.removesuffix(carried).replace("\\\\", "").replace('\\"', "").split('"')
        outside = "".join(pieces[quoted::2])
        quoted = (quoted + len(pieces) - 1) % 2
        values += outside.count(",")
        parts += sum(map(outside.count, "[{:"))
        if values > max_values or parts > MAX_PARTS:
            bound = f"{max_values} values in {MAX_PARTS} lists, objects and fields"
            field = _largest_field(text[: at + STEP], kind)
            message = f"the body is not read, for it has more than {bound}; send less"
            raise ApiError(400, f"{field}: {message}" if field else message, param=field)


def _largest_field(text: str, kind: type[Open]) -> str | None:
    """Return the field of a request that takes most of the text, without parsing its value."""
    names = "|".join((*kind.model_fields, *NEUTRAL, *IGNORED))
    places = [(each.start(), each[1]) for each in re.finditer(rf'"({names})"\s*:', text)]
    ends = [start for start, _ in places[1:]] + [len(text)]
    sizes = [(end - start, name) for end, (start, name) in zip(ends, places)]
    return max(sizes, default=(0, None))[1]


def validation_error(errors: Sequence[Error], body: Any) -> ApiError:
    """Return the error for pydantic's errors about a body: the field as it was sent, what is wrong, and the fix."""
    first = errors[0]
    # A field with several forms has an error for each; the most useful one is of the form that the value is closest to.
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
        why = _reword(closest)
    param = path[:-1] if path and isinstance(path[-1], int) else path  # the list, for an item of it
    place = _join(path)
    return ApiError(400, f"{place}: {why}" if place else why, param=_join(param) or None)


def _last_name(path: Sequence[str | int]) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def _is_of_type(error: Error) -> bool:
    return str(error["type"]).endswith("_type")


def _path(error: Error, body: Any) -> list[str | int]:
    """Return the place of an error in the body, without pydantic's names of alternatives."""
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


def _reword(error: Error) -> str:
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


def _join(path: Sequence[str | int]) -> str:
    """Return a path as `messages[1].content`, short and on one line."""
    text = ""
    for part in path:
        name = part if isinstance(part, int) else str(part)[:80]
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return " ".join(text.split()) or ("" if not path else "''")
