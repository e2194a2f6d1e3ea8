"""Requests that are wrong in one way or another, or just odd, without end: for a server that must not mind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

COMPLETION: dict[str, Any] = {"prompt": "def f(", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
FIELDS = (
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "temperature",
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "speculative", "prompt",
    "echo", "logprobs", "best_of", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens",
    "skip_special_tokens", "suffix", "messages", "top_logprobs", "tools", "tool_choice", "user",
)  # fmt: skip
INSIDE = (
    "type", "json_schema", "schema", "enabled", "heads", "policy", "acceptance", "origins", "include_usage", "role",
    "content", "text", "name",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -0.0, float("nan"), float("inf"), 2**31, 2**63, -(2**64), 10**400,
    "", "x", "\ud800", "\0", "é" * 50, "a" * 3000, "(", "[a-z]{1,9}", "(?=x)", "text", "json_object", "json_schema",
    "auto", "block", "lossy-typical", "rejection", "user", [], {}, [[]], [{}], ["x"], [""], [1, 2], [[1, 2]], [-1],
    [255], [256], [1.5], ["x", 1], {"x": 1}, {"1": 1}, {"1": "x"}, {"1": -100.0}, {"type": "object"}, {"$ref": "#"},
    {"enum": []}, {"type": "array", "items": {"$ref": "#"}}, {"pattern": "(", "type": "string"}, {"anyOf": []},
)  # fmt: skip


def bodies(dice: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies: fields set to odd values, taken out, nested; and JSON that is cut, doubled or stirred."""
    for _ in range(count):
        chat = dice.random() < 0.3
        asked = dict(CHAT if chat else COMPLETION)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            dice.choice(CHANGES)(dice, asked)
        body = json.dumps(asked).encode()
        if dice.random() < 0.25:
            body = _stirred(dice, body)
        yield "/v1/chat/completions" if chat else "/v1/completions", body


def _odd(dice: random.Random, depth: int = 0) -> Any:
    if depth < 4 and dice.random() < 0.3:
        if dice.random() < 0.5:
            return [_odd(dice, depth + 1) for _ in range(dice.randrange(4))]
        return {dice.choice(FIELDS + INSIDE): _odd(dice, depth + 1) for _ in range(dice.randrange(4))}
    return dice.choice(ODD)


def _set(dice: random.Random, asked: dict[str, Any]) -> None:
    asked[dice.choice(FIELDS)] = _odd(dice)


def _set_inside(dice: random.Random, asked: dict[str, Any]) -> None:
    outside = dice.choice(("speculative", "response_format", "stream_options", "guided_json"))
    asked[outside] = {dice.choice(INSIDE): _odd(dice) for _ in range(dice.randrange(1, 4))}


def _drop(dice: random.Random, asked: dict[str, Any]) -> None:
    if asked:
        del asked[dice.choice(list(asked))]


CHANGES: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (_set, _set, _set_inside, _drop)


def _stirred(dice: random.Random, body: bytes) -> bytes:
    at = dice.randrange(len(body) + 1)
    return dice.choice(
        (
            body[:at],
            body + body,
            body[:at] + bytes([dice.randrange(256)]) + body[at:],
            body[:at] + body[at + 1 :],
            body.replace(b'"', b"'"),
            b"[" * dice.randrange(5000) + body,
        )
    )
