"""What is slow the first time, done before anybody asks."""

from __future__ import annotations

from contextlib import suppress

from headstart.console import say
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.settings import Request
from headstart.errors import UsageError

PROMPT = 8
"""Tokens of the text that is written, before those of two windows."""


def warm_up(engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Prepares the policy, writes a text that nobody sees, and compiles a constraint. An engine that does not work
    raises here, so that it is told at the start."""
    policy, slots = engine.policy, len(engine.state.length_S)
    if policy is not None:
        if policy.calibration.online:
            say("the model is not tuned: passes are timed first (headstart tune would keep what it finds)")
        policy.prepare(slots)
    written = min(2 * engine.width, engine.context - PROMPT)
    if written > 0:
        # Plainly where there is a policy, or it would learn of a text that nobody writes.
        generate_all(engine, [Request((0,) * PROMPT, written, heads=None if policy is None else 1)])
    with suppress(UsageError):  # no tokenizer, or no llguidance: a request with a constraint is told
        compiled(Constraint.choice(["a"]), tokenizer, engine.model.config.vocab_size)
