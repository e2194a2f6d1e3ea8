"""Settings dataclasses from what a YAML or JSON file holds: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from headstart.errors import UsageError, shorten

Settings = TypeVar("Settings")


def load_settings(kind: type[Settings], values: Any, file: Path, prefix: str = "", advice: str = "") -> Settings:
    """Return a dataclass of type `kind` from a mapping; fields that the mapping lacks keep their defaults.

    Errors name the `file` and the key after `prefix`, and give `advice` about a key that is unknown or missing (empty:
    what fits a file that people write). Raises UsageError for such a key, a value of another type, or one that the
    dataclass refuses.
    """
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(
            f"{file}: {prefix.rstrip('.')} is {shorten(repr(values))}; it must hold settings, one `key: value` a line"
        )
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            fix = advice or _nearest(str(key), list(fields), prefix)
            raise UsageError(f"{file}: there is no setting {shorten(f'{prefix}{key}')}; {fix}")
        given[key] = _convert(hints[key], value, file, prefix + key, advice)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UsageError(f"{file}: {prefix}{name} is missing; {advice or f'add a line `{name}: ...`'}")
    try:
        return kind(**given)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _nearest(key: str, names: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"the settings here are {', '.join(names)}"


def _convert(hint: Any, value: Any, file: Path, key: str, advice: str) -> Any:
    """Return `value` as the type `hint`. Raises UsageError, naming the key, if it is something else."""

    def refusal(expected: str) -> UsageError:
        return UsageError(f"{file}: {key} is {shorten(repr(value))}; it must be {expected}")

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not NoneType), value, file, key, advice)
    if origin is Literal:
        if value not in arguments:
            raise refusal(f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise refusal("a list, such as [a, b]")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise refusal(f"a list of {len(arguments)}")
        items = enumerate(zip(arguments, value))
        return tuple(_convert(kind, item, file, f"{key}[{i}]", advice) for i, (kind, item) in items)
    if dataclasses.is_dataclass(hint):
        return load_settings(hint, value, file, f"{key}.", advice)  # type: ignore[arg-type]
    if hint is bool:
        if not isinstance(value, bool):
            raise refusal("true or false")
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise refusal("a whole number")
        return value
    if hint is float:
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)  # also of text: YAML 1.1 reads 3e-4 as text, because it has no dot
        except OverflowError:
            return value  # the dataclass knows the largest number
        except (TypeError, ValueError):
            raise refusal("a number") from None
    if hint is Path or hint is str:
        if not isinstance(value, str):
            raise refusal("text")
        return hint(value)
    raise TypeError(f"{key}: no reader for {hint}")
