"""YAML into settings dataclasses and back: unknown keys and wrong types are refused, at any depth, by name."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from headstart.errors import UsageError, shorten
from headstart.fileio import read_bounded, write_text
from headstart.model.config import ModelConfig
from headstart.model.presets import preset

Settings = TypeVar("Settings")
STRING_TAG = "tag:yaml.org,2002:str"


MAX_BYTES = 1 << 20
MAX_NODES = 10_000
"""Nodes of a document, those that aliases and merges repeat counted each time."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Characters of a number, date or other scalar that is not text."""


class _BoundedLoader(yaml.SafeLoader):
    """Refuse documents that are small in bytes and large in memory or time, with the line."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        before = self._nodes
        self._nodes += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:
                raise ComposerError(None, None, "an anchor that holds itself", mark)
            self._nodes = before + self._sizes[id(node)]
        else:
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES:,} values", mark)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag != STRING_TAG and len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"a number or date of over {MAX_DIGITS} characters", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # int(), date() and tags that do not fit raise several kinds
            raise ConstructorError(None, None, f"{shorten(repr(node.value))}: {error}", node.start_mark) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The top level of a YAML file."""
    try:
        values = yaml.load(read_bounded(path, MAX_BYTES).decode("utf-8"), _BoundedLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name a YAML file you may read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = shorten(getattr(error, "problem", None) or "it is not text")
        raise UsageError(f"{path}{line}: not YAML ({problem}); mend that line") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no settings; write `key: value` lines, as in configs/smoke.yaml")
    return values


def write_mapping(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def to_plain(value: Any) -> Any:
    """Settings as what YAML knows: mappings, lists, strings, numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(kind: type[Settings], values: Any, file: Path, prefix: str = "") -> Settings:
    """A `kind` from a mapping; what is not in it keeps its default. `prefix` is the key that holds the mapping."""
    if values is None:  # `model:` with nothing below it
        values = {}
    if not isinstance(values, dict):
        raise UsageError(
            f"{file}: {prefix.rstrip('.')} is {shorten(repr(values))}; it must hold settings, one `key: value` a line"
        )
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = list(fields) + (["preset"] if kind is ModelConfig else [])
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(
                f"{file}: there is no setting {shorten(f'{prefix}{key}')}; {_advice(str(key), known, prefix)}"
            )
        given[key] = value if key == "preset" else _convert(hints[key], value, file, prefix + key)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UsageError(f"{file}: {prefix}{name} is missing; add a line `{name}: ...`")
    try:
        if "preset" in given:
            return preset(str(given.pop("preset")), **given)  # type: ignore[return-value]
        return kind(**given)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _advice(key: str, known: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"the settings here are {', '.join(known)}"


def _convert(hint: Any, value: Any, file: Path, key: str) -> Any:
    """`value` as the type `hint`; raises UsageError that names the key where it is something else."""

    def refuse(wanted: str) -> UsageError:
        return UsageError(f"{file}: {key} is {shorten(repr(value))}; it must be {wanted}")

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, file, key)
    if origin is Literal:
        if value not in arguments:
            raise refuse(f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise refuse("a list, such as [a, b]")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise refuse(f"a list of {len(arguments)}")
        return tuple(_convert(a, item, file, f"{key}[{i}]") for i, (a, item) in enumerate(zip(arguments, value)))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, file, f"{key}.")  # type: ignore[arg-type]
    if hint is bool:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise refuse("a whole number")
        return value
    if hint is float:
        # YAML 1.1 reads 3e-4 as text, because it has no dot.
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            raise refuse("a number") from None
    if hint is Path or hint is str:
        if not isinstance(value, str):
            raise refuse("text")
        return hint(value)
    raise TypeError(f"{key}: no reader for {hint}")
