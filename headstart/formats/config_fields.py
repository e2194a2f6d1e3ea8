"""Fields of a `config.json`, checked when they are read, and rotary positions, which files describe in several ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.errors import UsageError, shorten
from headstart.model.bounds import LARGEST
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling

Content = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = {SLIDING, FULL}


class Fields:
    """The fields of a config.json, or of another file; errors name the file and the field."""

    def __init__(self, file: Path, content: Mapping[str, Any], again: str = "copy the model directory again") -> None:
        self.file, self.content, self.again = file, content, again

    def get(self, name: str, kind: type, default: object = None) -> Any:
        """Return a field of that type. Raises UsageError for another type, and for a missing field without default."""
        value: Any = self.content.get(name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"{self.file}: {name} is missing; {self.again}")
        check_type(self.file, name, value, kind)
        if kind in (int, float) and not abs(value) <= LARGEST:
            raise UsageError(f"{self.file}: {name} is larger than {LARGEST:.0e}; {self.again}")
        return float(value) if kind is float else value

    def optional(self, name: str, kind: type, default: object = None) -> Any:
        """Return a field that may be null; the default is for a missing one."""
        value = self.content.get(name, default)
        return None if value is None else self.get(name, kind, default)

    def numbers(self, name: str) -> list[int]:
        """Return a field that is a list of whole numbers, or of true and false."""
        value = self.content[name]
        if not isinstance(value, list) or not all(type(x) in (int, bool) for x in value):
            raise UsageError(f"{self.file}: {name} is {json.dumps(value)}; it must be a list of whole numbers")
        return [int(x) for x in value]

    def positive(self, name: str, default: int) -> int:
        """Return a field that is a whole number of at least 1."""
        value: int = self.get(name, int, default)
        if value < 1:
            raise UsageError(f"{self.file}: {name} is {value}; it must be at least 1")
        return value

    def mapping(self, name: str) -> Content:
        """Return a field that is an object; empty if it is missing."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, value, "an object")
        return dict(value or {})

    def refuse(self, name: str, value: object, supported: str) -> UsageError:
        """Return the error about a value that headstart does not compute."""
        return UsageError(
            f"{self.file}: {name} is {shorten(json.dumps(value))}, which headstart does not compute; "
            f"supported: {supported}"
        )

    def only(self, name: str, *supported: object) -> None:
        """Raise UsageError if the field is present and none of these."""
        value = self.content.get(name)
        if value is not None and value not in supported:
            raise self.refuse(name, value, " or ".join(map(json.dumps, supported)))


def check_type(file: Path, name: str, value: object, kind: type) -> None:
    """Raise UsageError for a value of another type; a whole number is a number too."""
    if type(value) not in ((int, float) if kind is float else (kind,)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UsageError(f"{file}: {name} is {value!r}; it must be {names[kind]}")


def read_rope(fields: Fields, default_theta: float, context: int) -> tuple[float, RopeScaling | None]:
    """Return base and scaling as transformers 5 takes them.

    A `rope_scaling` that is not empty replaces `rope_parameters` as a whole. A base outside of it is `rope_theta`, and
    `original_max_position_embeddings` outside of it takes precedence over the one inside.
    """
    name = "rope_scaling" if fields.content.get("rope_scaling") else "rope_parameters"
    rope = fields.content.get(name) or {}
    if isinstance(rope, dict):
        if LAYER_TYPES & rope.keys():
            raise fields.refuse(name, rope, "one object for all layers")
        original = fields.optional("original_max_position_embeddings", int)
        rope = rope if original is None else rope | {"original_max_position_embeddings": original}
    theta = fields.get("rope_theta", float, default_theta)
    if theta < 1:  # also if the object has another
        raise UsageError(f"{fields.file}: rope_theta is {theta}; it must be at least 1")
    return read_scaling(fields, name, rope, theta, context)


def read_scaling(
    fields: Fields, name: str, rope: object, theta: float, context: int
) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of the object `rope`; `theta` is the base if the object has none."""
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or kind not in ("default", "linear", "llama3", "yarn"):
        raise fields.refuse(name, rope, 'rope_type "default", "linear", "llama3" or "yarn"')
    own = Fields(fields.file, rope)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise fields.refuse(f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], "1")
    theta = own.get("rope_theta", float, theta)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", own.get("factor", float))
    original = own.get("original_max_position_embeddings", int, context)
    if kind == "llama3":
        low, high = own.get("low_freq_factor", float), own.get("high_freq_factor", float)
        return theta, RopeScaling("llama3", own.get("factor", float), original, low, high)
    factor = own.get("factor", float, context / max(1, original))
    attention = own.optional("attention_factor", float)
    if attention is None:
        m, all_dim = own.optional("mscale", float), own.optional("mscale_all_dim", float)
        attention = _mscale(factor, m) / _mscale(factor, all_dim) if m and all_dim else _mscale(factor, 1.0)
    return theta, RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=own.get("beta_fast", float, 32.0) or 32.0,
        beta_slow=own.get("beta_slow", float, 1.0) or 1.0,
        attention_factor=attention,
        truncate=own.get("truncate", bool, True),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def write_rope(config: ModelConfig) -> Content:
    """Return the fields about rotary positions."""
    scaling = written_scaling(config.rope_scaling)
    return {
        # transformers 5 reads the first, everything older and most other tools the others.
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def written_scaling(scaling: RopeScaling | None) -> Content | None:
    """Return the object that describes a scaling, without the base."""
    if scaling is None:
        return None
    content: Content = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        content["original_max_position_embeddings"] = scaling.original_context
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "linear": ()}.get(
        scaling.kind, ("beta_fast", "beta_slow", "attention_factor", "truncate")
    )
    return content | {name: getattr(scaling, name) for name in names}
