"""YAML files of settings: read within bounds of size and depth, and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from headstart.errors import UsageError, shorten
from headstart.fileio import read_bounded, write_text
from headstart.model.presets import preset

STRING_TAG = "tag:yaml.org,2002:str"
MAX_BYTES = 1 << 20
MAX_NODES = 10_000
"""Most nodes of a document; those that aliases and merges repeat count each time."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Most characters of a number, date or other scalar that is not text."""


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
    """Return the top level of a YAML file."""
    try:
        values = yaml.load(read_bounded(path, MAX_BYTES).decode("utf-8"), _BoundedLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name a YAML file you may read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = shorten(getattr(error, "problem", None) or "it is not text")
        raise UsageError(f"{path}{line}: not YAML ({problem}); fix that line") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no settings; write `key: value` lines, as in configs/smoke.yaml")
    return values


def write_mapping(path: Path, values: Mapping[str, Any]) -> None:
    """Write a YAML file."""
    write_text(path, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def to_plain(value: Any) -> Any:
    """Return settings as mappings, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def expand_preset(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the content of a run's file with the preset that its `model` names filled in; other settings override it.

    Raises UsageError for an unknown preset.
    """
    model = values.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return values
    try:
        sizes = to_plain(preset(str(model["preset"])))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    return {**values, "model": sizes | {key: value for key, value in model.items() if key != "preset"}}
