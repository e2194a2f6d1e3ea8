"""Constraints on the text: a JSON schema, a regular expression, a list of choices, a grammar.

A constraint allows a set of tokens after each text; the others lose their logits, before temperature. Along a window
the text grows row by row, so row j is masked by the state after the drafts before it, as with penalties: constrained
decoding with drafts is constrained plain decoding, token for token. The states are llguidance's; how drafts are chosen
under them is in `constrained_drafts.py`.
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
from headstart.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice", "lark": "Lark grammar"}
JSON_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as `json.dumps` writes it: where any white space goes, nothing is forced, and small models write
nothing else. A schema's own "x-guidance" goes before it."""
KEPT_GRAMMARS = 64
LEXER_FUEL = 100_000
"""Work that llguidance does in advance for a regular expression; the rest is done as the output reaches it. The
default, ten times as much, takes seconds and 150 MB for `a{99}` nested four times."""
UNWRITABLE = "no text of this model's tokens satisfies it; loosen it"
FORCED_TOKENS = 256
"""How far a text that leaves no choice is followed to see whether this model's tokens can write it."""


@dataclass(frozen=True)
class Constraint:
    """What a text must be, from its first token to its end. Compiled when a request with it is submitted."""

    kind: str
    """json_schema, regex, choice or lark."""
    text: str
    """The schema as JSON; the regular expression (Rust's syntax, no look-around; the whole text matches it); the
    choices as a JSON list of strings; the grammar in llguidance's dialect of Lark."""

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise UsageError(f"there is no constraint {self.kind!r}; take one of {', '.join(NAMES)}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON that satisfies `schema`, a mapping or JSON; `{"type": "object"}` for any object."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Constraint:
        return cls("choice", json.dumps(list(options)))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        return cls("lark", grammar)

    @classmethod
    def named(cls, json_schema: str | None, regex: str | None) -> Constraint | None:
        """Of a command line: a schema, as JSON or the file that holds it, or a regular expression, or neither."""
        if json_schema is None:
            return None if regex is None else cls.regex(regex)
        if regex is not None:
            raise UsageError("there is both a JSON schema and a regular expression; give one of them")
        if not json_schema.lstrip().startswith("{"):
            try:
                json_schema = Path(json_schema).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8"
                raise UsageError(f"JSON schema {json_schema}: {why}; name a file, or write it out: {{...}}") from error
        return cls.json_schema(json_schema)

    def grammar(self, vocabulary: Vocabulary) -> str:
        """In the words of llguidance, without what these tokens cannot write as far as that shows: choices, and in a
        regular expression characters. Raises UsageError for what is no JSON, or no list of choices."""
        from llguidance import LLMatcher

        if self.kind == "regex":
            grammar = str(LLMatcher.grammar_from_regex(self.text))
            if vocabulary.writable is None:
                return grammar
            pattern = json.loads(grammar)["grammars"][0]["lark_grammar"].removeprefix("start: ")
            return str(LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {pattern} & /{vocabulary.writable}/"))
        if self.kind == "lark":
            return str(LLMatcher.grammar_from_lark(self.text))
        try:
            content = json.loads(self.text)
        except ValueError as error:
            raise UsageError(f"{NAMES[self.kind]}: not JSON ({error}); mend it there") from error
        if self.kind == "choice":
            if not isinstance(content, list) or not content or not all(isinstance(x, str) and x for x in content):
                raise UsageError(f"choice: {self.text} must be a list of texts, none of them empty")
            options = [option for option in content if vocabulary.can_write(option)]
            if not options:
                raise UsageError(f"choice: {UNWRITABLE}")
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, options))))
        if not isinstance(content, dict):
            raise UsageError(f"JSON schema: it must be an object {{...}}, not {self.text[:40]}")
        return str(LLMatcher.grammar_from_json_schema(self.text, defaults=JSON_LAYOUT))


class Matcher:
    """Where one text stands in its constraint."""

    def __init__(self, beginning: LLMatcher, vocab_size: int, own: int, ends: Collection[int]) -> None:
        self._beginning, self._vocab_size, self._own = beginning, vocab_size, min(own, vocab_size)
        self._ends = [end for end in ends if 0 <= end < vocab_size]
        self._matcher = beginning.deep_copy()
        self._tokens: list[int] = []

    def restarted(self, ends: Collection[int]) -> Matcher:
        """Another one, at the beginning, for a text that each of the tokens `ends` ends."""
        return Matcher(self._beginning, self._vocab_size, self._own, ends)

    def allowed(self) -> np.ndarray:
        """Which tokens (V,) bool may come next, the end tokens among them where the text may end. None where a text has
        got stuck: its grammar grew too complex, or the model's vocabulary has no token to go on with."""
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
        """The text goes on with `token`; False where that is not allowed, and then nothing is any more."""
        if not self._matcher.consume_token(token):
            return False
        self._tokens.append(token)
        return True

    def back(self, count: int) -> None:
        """Takes the last `count` tokens back, and what was refused or got stuck after them."""
        del self._tokens[len(self._tokens) - count :]
        if not self._matcher.is_error():
            self._matcher.rollback(count)
        else:  # which a matcher never leaves
            self._matcher = self._beginning.deep_copy()
            self._matcher.consume_tokens(self._tokens)

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return not self._matcher.is_error() and bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Whether the text must end here."""
        return self.may_end and bool(self._matcher.is_stopped())


_compiled: WeakKeyDictionary[Tokenizer, OrderedDict[tuple[Constraint, int], Matcher]] = WeakKeyDictionary()


def compiled(
    constraint: Constraint, tokenizer: Tokenizer | None, vocab_size: int, ends: Collection[int] | None = None
) -> Matcher:
    """A matcher at the beginning of `constraint`, for a model of `vocab_size` tokens. The last `KEPT_GRAMMARS` are kept
    for each tokenizer. Each token of `ends` ends a text (None: the tokenizer's `end_ids`).

    Raises UsageError: it cannot be compiled, nothing satisfies it, the tokenizer is of no kind that llguidance knows,
    or llguidance is not there.
    """
    if tokenizer is None:
        raise UsageError("a constraint needs a tokenizer; this model directory has none")
    kept = _compiled.setdefault(tokenizer, OrderedDict())
    key = (constraint, vocab_size)
    matcher = kept.pop(key, None) or _compile(constraint, tokenizer, vocab_size)
    kept[key] = matcher  # last; each line by itself is safe beside other threads, which servers have
    if len(kept) > KEPT_GRAMMARS:
        kept.popitem(last=False)
    return matcher.restarted(tokenizer.end_ids if ends is None else ends)


def _compile(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError as error:
        raise UsageError(
            "a constraint needs llguidance, which is not installed: pip install 'headstart[grammar]'"
        ) from error
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
    """Return whether tokens can follow wherever the constraint leaves one choice, for at most so many tokens."""
    for _ in range(most):
        if matcher.may_end:
            return True
        allowed = matcher.allowed()
        if np.count_nonzero(allowed) != 1:
            return bool(allowed.any())
        matcher.push(int(allowed.argmax()))
    return True


def _gist(message: str) -> str:
    """One line of llguidance's several: what is wrong, else the first."""
    lines = message.splitlines() or ["unknown error"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class ConstraintRows:
    """Which tokens each row of all slots' windows must not choose, and what drafts are chosen from. Nothing is
    allocated before a slot has a constraint."""

    def __init__(self, slots: int, width: int, vocab_size: int) -> None:
        self.has = [False] * slots
        self._shape = (slots, width, vocab_size)
        self._forbidden: Tensor | None = None
        self._drafts: tuple[Tensor, int] | None = None

    def set(self, slot: int, constrained: bool) -> None:
        """A request begins in `slot`."""
        if constrained and self._forbidden is None:
            self._forbidden = torch.zeros(self._shape, dtype=torch.bool)
        self.has[slot] = constrained

    def clear(self, slot: int) -> None:
        """The request in `slot` has ended."""
        if self._forbidden is not None and self.has[slot]:
            self._forbidden[slot] = False
        self.has[slot] = False

    def any(self, slots: slice) -> bool:
        """Whether any of these slots is constrained."""
        return any(self.has[slots])

    def rows(self, slot: int) -> np.ndarray:
        """The rows (W, V) bool of a constrained slot, to be written; on the host."""
        assert self._forbidden is not None
        return self._forbidden[slot].numpy()

    def apply(self, logits_SRV: Tensor, slots: slice) -> Tensor:
        """Logits (S, R, V) of the windows' rows, without those of forbidden tokens; free slots keep theirs as they
        are."""
        if not self.any(slots):
            return logits_SRV
        assert self._forbidden is not None
        forbidden = self._forbidden[slots, : logits_SRV.shape[1]].to(logits_SRV.device)
        return logits_SRV.masked_fill(forbidden, float("-inf"))

    def keep(self, drafts_SKV: Tensor, slots: slice) -> None:
        """Keeps what a pass chooses the drafts of its heads from, where any of these slots is constrained."""
        self._drafts = (drafts_SKV, slots.start) if self.any(slots) else None

    def kept(self, slot: int, head: int) -> Tensor:
        """Of those kept, the logits (V,) of one slot and head."""
        assert self._drafts is not None
        drafts_SKV, first = self._drafts
        return drafts_SKV[slot - first, head - 2]
