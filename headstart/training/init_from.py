"""A run that starts from a trained model: the shape of its model, and its first values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.console import say
from headstart.errors import UsageError
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.model.heads import HEAD_KINDS
from headstart.model.presets import preset
from headstart.model.shape import Wiring
from headstart.training.adapt.new_heads import HEAD_FIELDS, config_with_heads, new_parameters, with_heads

FREE = frozenset({"context", "rope_theta", "rope_scaling"})
"""Fields of the shape that no weight depends on: the run may choose them anew."""
OF_HEADS = ("heads", "head_kind", "wiring")
"""Fields by which a run asks for other heads than those of the model that it starts from."""
FOLLOW = ("layers", "extra_layers", "offsets", *HEAD_FIELDS)
"""Fields that follow from the model and the heads."""
SIZES = ("dim", "layers", "attention_heads")
"""Fields that a preset names; the others are defaults there."""
EFFECTIVE = {"hidden_dim": "hidden", "kv_heads": "key_value_heads", "head_dim": "dim_per_head"}
"""Fields that may be None, and the properties with the numbers that they then stand for."""


def fill_settings(values: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Complete the settings of a run with the shape and the tokenizer of the model that it starts from, if it does.

    Args:
        values: the content of the run's file.
        arguments: the command line, whose settings override it.

    Raises:
        UsageError: no such model, or a shape in `values` that does not fit it.
    """
    named, given = _option(arguments, "init_from") or values.get("init_from"), values.get("model") or {}
    if named is None or not isinstance(given, dict) or {field.name for field in fields(ModelConfig)} <= given.keys():
        return values  # config.yaml of a run is complete, and must be readable without the model
    if "preset" in given:
        sizes = preset(str(given["preset"]))
        given = {name: getattr(sizes, name) for name in SIZES} | {k: v for k, v in given.items() if k != "preset"}
    asked = {**given, **{name: text for name in OF_HEADS if (text := _option(arguments, f"model.{name}"))}}
    heads, kind, wiring = (asked.get(name) for name in OF_HEADS)
    if not str(heads or 1).isdecimal() or kind not in (None, *HEAD_KINDS):
        return values  # reported where settings are read
    old = load_config(str(named))
    model = shape_from(old, None if heads is None else int(heads), kind, wiring)
    for name, value in given.items():
        if hasattr(old, name) and name not in (*FREE, *OF_HEADS):
            fits = {_number(old, name), getattr(old, name)} | ({getattr(model, name)} if name in FOLLOW else set())
            if (tuple(value) if isinstance(value, list) else value) not in fits:
                raise _misfit(named, name, value, _number(old, name))
    shape = model.to_dict() | {name: given[name] for name in FREE if name in given}
    data = {"tokenizer": str(named)} | (values.get("data") or {})
    return {
        **values,
        "model": shape | {name: value for name, value in given.items() if name not in shape},
        "data": data,
    }


def shape_from(old: ModelConfig, heads: int | None, kind: str | None, wiring: Wiring | None) -> ModelConfig:
    """Return the shape `old` with other heads; None keeps their number, kind or wiring.

    The trunk keeps its blocks: fewer heads drop the last ones, and further heads are added on top. Raises UsageError
    for heads without which head 1 would be another.
    """
    heads, kind = heads or old.heads, kind or old.head_kind
    if wiring is None and kind == old.head_kind and old.heads > 1:
        wiring = old.wiring
    if heads == old.heads and (heads == 1 or (kind, wiring) == (old.head_kind, old.wiring)):
        return old
    if not old.kind.plain_decoder:
        raise UsageError(
            f"head 1 of the model is no plain decoder ({old.head_kind} heads wired {old.wiring}); keep its "
            f"{old.heads} heads"
        )
    if heads == 1:
        return old.next_token_decoder
    if heads > old.heads or (kind, wiring) != (old.head_kind, old.wiring):
        own = {name: getattr(old, name) for name in HEAD_FIELDS} if kind == old.head_kind else {}
        return config_with_heads(old, heads, kind, wiring, replace_heads=True, **own)
    if old.wiring == "anticausal":
        raise UsageError(f"head 1 of the model reads heads {old.heads} to 2; take model.heads 1 or {old.heads}")
    extra = min(old.extra_layers, heads - 1)
    layers = old.trunk_layers + heads - extra if old.kind.takes_layers else old.layers
    offsets = None if old.offsets is None else old.offsets[:heads]
    return replace(old, heads=heads, layers=layers, extra_layers=extra, offsets=offsets)


def check_fits(named: Path, old: ModelConfig, model: ModelConfig) -> None:
    """Raise UsageError unless a run on `model` can start from the weights of `named`, whose shape is `old`."""
    expected = shape_from(old, model.heads, model.head_kind, model.wiring)
    for field in fields(ModelConfig):
        if field.name not in FREE and _number(model, field.name) != _number(expected, field.name):
            raise _misfit(named, field.name, _number(model, field.name), _number(expected, field.name))


def first_values(named: Path, model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return the first values of all parameters of a model of shape `model`, and report what is new and what dropped.

    Every weight of the model at `named` that fits is taken over: the path to head 1, and heads of the same kind. Others
    begin as `with_heads` describes.
    """
    old = load_model(named)
    check_fits(named, old.config, model)
    model = replace(model, **{name: getattr(old.config, name) for name in FREE})
    kept = own = new_parameters(old)
    if model == old.config:
        state, new = old.state_dict(), set[str]()
    else:
        made = with_heads(old, model, seed)
        state, new = made.state_dict(), new_parameters(made)
        before = old.state_dict() if model.head_kind == old.config.head_kind else {}
        kept = {name for name in new & before.keys() if before[name].shape == state[name].shape}
        state |= {name: before[name] for name in kept}
    news = _heads_of(new - kept) if model != old.config else "nothing"
    say(f"starting from {named}: {len(state) - len(new - kept):,} of {len(state):,} tensors are its own; new: {news}; "
        f"dropped: {_heads_of(own - kept)}")  # fmt: skip
    return dict(state)


def _heads_of(names: Iterable[str]) -> str:
    """Return the heads that parameters belong to, in words."""
    first = {"heads": 1, "weights": 1, "maps": 2, "outputs": 2}
    found: dict[str, None] = {}
    for name in sorted(names):
        match = re.match(r"(?:unembedding\.(?:residuals\.)?)?(heads|weights|maps|outputs)\.(\d+)\.?", name)
        found[name if match is None else f"head {int(match[2]) + first[match[1]]}"] = None
    return ", ".join(found) or "nothing"


def _number(config: ModelConfig, name: str) -> Any:
    return getattr(config, EFFECTIVE.get(name, name))


def _misfit(named: str | Path, name: str, ours: object, theirs: object) -> UsageError:
    return UsageError(f"{named}: does not fit, its {name} is {theirs} and model.{name} {ours}; leave model.{name} out")


def _option(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option on a command line."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None]):
        option, equals, value = argument.partition("=")
        if option.replace("-", "_") == f"__{name}":
            found = value if equals else following
    return found
