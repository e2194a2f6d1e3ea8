"""Constraints on the output: a JSON schema, a regular expression, a list of choices, a grammar.

A constraint allows a set of tokens after each prefix of the output; the logits of the others become -inf, before
temperature. Along a window the output grows row by row, so row j is masked by the state after the drafts before it:
constrained decoding with drafts is constrained plain decoding, token for token. llguidance keeps the states;
`drafters/constrained.py` chooses drafts under them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraint_vocabulary import Vocabulary, vocabulary_of
from headstart.errors import UsageError, needs_extra

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice", "lark": "Lark grammar"}
JSON_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Layout of JSON: one line, as `json.dumps` writes it. With free white space nothing is forced, and small models write
nothing else. A schema's own "x-guidance" takes precedence."""
KEPT_GRAMMARS = 64
"""Compiled grammars to keep for each tokenizer."""
LEXER_FUEL = 100_000
"""Work that llguidance does in advance for a regular expression; it does the rest when the output gets there. The
default, ten times as much, takes seconds and 150 MB for `a{99}` nested four times."""
UNWRITABLE = "no text of this model's tokens satisfies it; loosen it"
FORCED_TOKENS = 256
"""Most forced tokens to follow when checking that this model's tokens can satisfy a constraint."""


@dataclass(frozen=True)
class Constraint:
    """The form of a whole output. It is compiled when a request with it is submitted."""

    kind: str
    """One of json_schema, regex, choice and lark."""
    text: str
    """The schema as JSON; the regular expression (Rust's syntax, no look-around; the whole output matches it); the
    choices as a JSON list of strings; the grammar in llguidance's dialect of Lark, or in GBNF (llama.cpp's)."""

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise UsageError(f"there is no constraint {self.kind!r}; take one of {', '.join(NAMES)}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """Ask for JSON that satisfies `schema`, a mapping or JSON; `{"type": "object"}` allows any object."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Ask for an output that matches `pattern` from its beginning to its end."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Constraint:
        """Ask for one of `options`."""
        return cls("choice", json.dumps(list(options)))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Ask for a sentence of a grammar."""
        return cls("lark", grammar)

    @classmethod
    def named(cls, json_schema: str | None, regex: str | None) -> Constraint | None:
        """Return the constraint of a command line: a schema (JSON, or its file), a regular expression, or None."""
        if json_schema is None:
            return None if regex is None else cls.regex(regex)
        if regex is not None:
            raise UsageError("a JSON schema and a regular expression are given; give one of them")
        if not json_schema.lstrip().startswith("{"):
            try:
                json_schema = Path(json_schema).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8"
                raise UsageError(f"JSON schema {json_schema}: {why}; name a file, or write it out: {{...}}") from error
        return cls.json_schema(json_schema)

    def grammar(self, vocabulary: Vocabulary) -> str:
        """Return the grammar for llguidance, without choices and characters that these tokens cannot write.

        Raises UsageError for invalid JSON and for what is not a list of choices.
        """
        from llguidance import LLMatcher

        if self.kind == "regex":
            grammar = str(LLMatcher.grammar_from_regex(self.text))
            if vocabulary.writable is None:
                return grammar
            pattern = json.loads(grammar)["grammars"][0]["lark_grammar"].removeprefix("start: ")
            return str(LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {pattern} & /{vocabulary.writable}/"))
        if self.kind == "lark":
            return str(LLMatcher.grammar_from_lark(_from_gbnf(self.text) if "::=" in self.text else self.text))
        try:
            content = json.loads(self.text)
        except ValueError as error:
            raise UsageError(f"{NAMES[self.kind]}: not JSON ({error}); correct it there") from error
        if self.kind == "choice":
            if not isinstance(content, list) or not content or not all(isinstance(x, str) and x for x in content):
                raise UsageError(f"choice: {self.text} must be a list of strings, none of them empty")
            options = [option for option in content if vocabulary.can_write(option)]
            if not options:
                raise UsageError(f"choice: {UNWRITABLE}")
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, options))))
        if not isinstance(content, dict):
            raise UsageError(f"JSON schema: it must be an object {{...}}, not {self.text[:40]}")
        return str(LLMatcher.grammar_from_json_schema(self.text, defaults=JSON_LAYOUT))


def _from_gbnf(text: str) -> str:
    """Return a grammar of llama.cpp's form, which has `::=`, in Lark. Raises UsageError."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except (GbnfToLarkError, ValueError, RecursionError, KeyError) as error:
        raise UsageError(f"grammar in GBNF: {_gist(str(error))}; correct it, or write it in Lark") from error


class Matcher:
    """The state of one output in its constraint."""

    def __init__(self, beginning: LLMatcher, vocab_size: int, own: int, ends: Collection[int]) -> None:
        self._beginning, self._vocab_size, self._own = beginning, vocab_size, min(own, vocab_size)
        self._ends = [end for end in ends if 0 <= end < vocab_size]
        self._matcher = beginning.deep_copy()
        self._tokens: list[int] = []

    def restarted(self, ends: Collection[int]) -> Matcher:
        """Return a matcher at the beginning, for an output that each of the tokens `ends` ends."""
        return Matcher(self._beginning, self._vocab_size, self._own, ends)

    def allowed(self) -> np.ndarray:
        """Return which tokens (V,) bool may come next, with the end tokens where the output may end.

        All are False where the output is stuck: the grammar grew too complex, or the vocabulary has no allowed token.
        """
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=bool)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = np.zeros(self._vocab_size, dtype=bool)
        allowed[: min(self._own, len(bits))] = bits[: self._own]
        if self._matcher.is_error():  # computing the mask is where a grammar grows too complex
            allowed[:] = False
        else:
            allowed[self._ends] = self.may_end
        return allowed

    def push(self, token: int) -> bool:
        """Append `token`; return False where that is not allowed, after which no token is allowed."""
        if not self._matcher.consume_token(token):
            return False
        self._tokens.append(token)
        return True

    def back(self, count: int) -> None:
        """Take back the last `count` tokens, and any refusal after them."""
        del self._tokens[len(self._tokens) - count :]
        if not self._matcher.is_error():
            self._matcher.rollback(count)
        else:  # a matcher never leaves an error
            self._matcher = self._beginning.deep_copy()
            self._matcher.consume_tokens(self._tokens)

    @property
    def may_end(self) -> bool:
        """True if the output may end here."""
        return not self._matcher.is_error() and bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """True if the output must end here."""
        return self.may_end and bool(self._matcher.is_stopped())


class MinimumLength:
    """Forbid the tokens `ends` in the first `least` tokens of an output, in the interface of `Matcher`."""

    ended = False

    def __init__(self, least: int, vocab_size: int, ends: Collection[int]) -> None:
        self._least, self._count = least, 0
        self._ends = frozenset(ends)
        self._any = np.ones(vocab_size, dtype=bool)
        self._early = self._any.copy()
        self._early[[end for end in ends if 0 <= end < vocab_size]] = False

    @property
    def may_end(self) -> bool:
        """True if the output may end here."""
        return self._count >= self._least

    def allowed(self) -> np.ndarray:
        """Return which tokens (V,) bool may come next."""
        return self._any if self.may_end else self._early

    def push(self, token: int) -> bool:
        """Append `token`; return False where that is not allowed."""
        if token in self._ends and not self.may_end:
            return False
        self._count += 1
        return True

    def back(self, count: int) -> None:
        """Take back the last `count` tokens."""
        self._count -= count


_compiled: WeakKeyDictionary[Tokenizer, OrderedDict[tuple[Constraint, int], Matcher]] = WeakKeyDictionary()


def compiled(
    constraint: Constraint, tokenizer: Tokenizer | None, vocab_size: int, ends: Collection[int] | None = None
) -> Matcher:
    """Return a matcher at the beginning of `constraint`, for a model of `vocab_size` tokens.

    Each token of `ends` ends the output (None: the tokenizer's `end_ids`). The last `KEPT_GRAMMARS` of each tokenizer
    are kept. Raises UsageError if the constraint cannot be compiled, nothing satisfies it, llguidance does not support
    the tokenizer, or llguidance is not installed.
    """
    if tokenizer is None:
        raise UsageError("a constraint needs a tokenizer; this model directory has none")
    kept = _compiled.setdefault(tokenizer, OrderedDict())
    key = (constraint, vocab_size)
    matcher = kept.pop(key, None) or compile_constraint(constraint, tokenizer, vocab_size)
    kept[key] = matcher  # last; each line by itself is safe with several threads
    if len(kept) > KEPT_GRAMMARS:
        kept.popitem(last=False)
    return matcher.restarted(tokenizer.end_ids if ends is None else ends)


def compile_constraint(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
    """Return a new matcher of a constraint, without a look at those that `compiled` keeps."""
    with needs_extra("a constraint", "grammar"):
        from llguidance import LLMatcher, LLParserLimits
    try:
        vocabulary = vocabulary_of(tokenizer)
        grammar = constraint.grammar(vocabulary)
    except ValueError as error:  # NaN, say, which Python writes and JSON does not know
        raise UsageError(f"{NAMES[constraint.kind]}: {_gist(str(error))}; change or leave that") from error
    matcher = LLMatcher(vocabulary.ll, grammar, log_level=0, limits=LLParserLimits(initial_lexer_fuel=LEXER_FUEL))
    if matcher.is_error():
        raise UsageError(f"{NAMES[constraint.kind]}: {_gist(matcher.get_error())}; change or leave that")
    result = Matcher(matcher, vocab_size, vocabulary.size, tokenizer.end_ids)
    if not _satisfiable(result.restarted(tokenizer.end_ids), FORCED_TOKENS if vocabulary.lacking else 1):
        raise UsageError(f"{NAMES[constraint.kind]}: {UNWRITABLE}")
    return result


def _satisfiable(matcher: Matcher, most: int) -> bool:
    """Return whether the vocabulary has the tokens that the constraint forces, for at most `most` tokens."""
    for _ in range(most):
        if matcher.may_end:
            return True
        allowed = matcher.allowed()
        if np.count_nonzero(allowed) != 1:
            return bool(allowed.any())
        matcher.push(int(allowed.argmax()))
    return True


def _gist(message: str) -> str:
    """Return the line of llguidance's message that says what is wrong, else the first."""
    lines = message.splitlines() or ["unknown error"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class ConstraintRows:
    """The tokens that are forbidden in each row of all slots' windows, and the logits that drafts are chosen from.

    Nothing is allocated before a slot has a constraint.
    """

    def __init__(self, slots: int, width: int, vocab_size: int) -> None:
        self.has = [False] * slots
        self._shape = (slots, width, vocab_size)
        self.forbidden_SWV: Tensor | None = None
        """Forbidden tokens of every row, bool on the host; None before a slot has a constraint."""
        self.draft_logits: tuple[Tensor, int] | None = None
        """Logits of the last pass that `keep` got, and the slot of their first row."""

    def set(self, slot: int, constrained: bool) -> None:
        """Set whether the request that begins in `slot` is constrained."""
        if constrained and self.forbidden_SWV is None:
            self.forbidden_SWV = torch.zeros(self._shape, dtype=torch.bool)
        self.has[slot] = constrained

    def clear(self, slot: int) -> None:
        """Remove the constraint of `slot`."""
        if self.forbidden_SWV is not None and self.has[slot]:
            self.forbidden_SWV[slot] = False
        self.has[slot] = False

    def any(self, slots: slice) -> bool:
        """Return whether any of these slots is constrained."""
        return any(self.has[slots])

    def rows(self, slot: int) -> np.ndarray:
        """Return the forbidden tokens (W, V) bool of a constrained slot, on the host and for writing."""
        assert self.forbidden_SWV is not None
        return self.forbidden_SWV[slot].numpy()

    def apply(self, logits_SRV: Tensor, slots: slice) -> Tensor:
        """Return the logits (S, R, V) with those of forbidden tokens at -inf."""
        if not self.any(slots):
            return logits_SRV
        assert self.forbidden_SWV is not None
        forbidden = self.forbidden_SWV[slots, : logits_SRV.shape[1]].to(logits_SRV.device)
        return logits_SRV.masked_fill(forbidden, float("-inf"))

    def keep(self, drafts_SKV: Tensor, slots: slice) -> None:
        """Keep the logits (S, K-1, V) that drafts are chosen from, where any of these slots is constrained."""
        self.draft_logits = (drafts_SKV, slots.start) if self.any(slots) else None

    def kept(self, slot: int, head: int) -> Tensor:
        """Return the logits (V,) kept for one slot and head."""
        assert self.draft_logits is not None
        drafts_SKV, first = self.draft_logits
        return drafts_SKV[slot - first, head - 2]
