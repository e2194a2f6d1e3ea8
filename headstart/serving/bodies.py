"""Bodies of requests: their size is checked before they are parsed, and their fields are validated.

Parsing and validating hold Python's lock, in a thread too. So a body is first counted, in steps between which other
threads run, and one with too many values is refused.
"""

from __future__ import annotations

import json
import re
from typing import TypeVar

from pydantic import ValidationError

from headstart.serving.errors import ApiError
from headstart.serving.fields import HARMLESS, NEUTRAL
from headstart.serving.schemas import Asked
from headstart.serving.validation import NOT_JSON, NOT_OBJECT, validation_error

LARGE = 32768
"""Bytes of a body up to which it is read on the event loop."""
MAX_VALUES = 2**17
"""Most values in a body, in addition to the tokens of one full context."""
MAX_PARTS = 2**15
"""Most lists, objects and fields in a body: they take longer than numbers."""
STEP = 65536
"""Characters that are counted at once."""

Body = TypeVar("Body", bound=Asked)


def read_body(kind: type[Body], content: bytes, content_type: str, max_values: int) -> Body:
    """Return the request in a body. Raises ApiError for one that is no JSON object of the fields of `kind`, or that has
    more than `max_values` values."""
    subtype = content_type.partition(";")[0].strip().lower()
    if not content or not re.fullmatch(r"application/([^/]+\+)?json", subtype):  # curl's default is a form
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


def _check_counts(text: str, kind: type[Asked], max_values: int) -> None:
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


def _largest_field(text: str, kind: type[Asked]) -> str | None:
    """Return the field of a request that takes most of the text, quickly: the parts of its value are not looked at."""
    names = "|".join((*kind.model_fields, *NEUTRAL, *HARMLESS))
    places = [(each.start(), each[1]) for each in re.finditer(rf'"({names})"\s*:', text)]
    ends = [start for start, _ in places[1:]] + [len(text)]
    sizes = [(end - start, name) for end, (start, name) in zip(ends, places)]
    return max(sizes, default=(0, None))[1]
