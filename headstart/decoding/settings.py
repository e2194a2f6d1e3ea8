"""Everything a caller may ask of a generation: length, sampling, penalties, the acceptance rule, where text ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import torch

from headstart.arguments import any_whole_number, number, token_ids, whole_number
from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Constraint, Matcher
from headstart.decoding.stopping import stop_strings
from headstart.errors import UsageError
from headstart.model.config import ModelConfig

COLDEST, HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Bounds of a temperature above 0: the kernels compute in float32."""
MOST_REPETITION, MOST_PENALTY, MOST_BIAS = 1e6, 1e9, 1e30
"""Bounds of penalties: within them no penalised logit overflows float32."""
RULES: dict[str, tuple[float, ...]] = {
    "match": (),
    "rejection": (),
    "block": (),
    "lossy-typical": (0.09, 0.3),
    "lossy-top-k": (2,),
    "lossy-distance": (2,),
    "lossy-minimum": (2,),
}
"""Kinds of acceptance rules, with the default numbers of each."""
TREE_RULES = tuple(kind for kind in RULES if kind != "block")
"""Kinds of acceptance rules that can verify draft trees."""
MOST_RULE_NUMBER = 1e9
"""Largest number of an acceptance rule."""


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens from logits. The order is temperature, top_k, top_p, min_p."""

    temperature: float = 0.0
    """Divisor of the logits; 0 is greedy. Less than the smallest normal number of float32 counts as 0."""
    top_k: int = 0
    """Number of most probable tokens to keep (0: all). Tokens tied with the k-th are kept too."""
    top_p: float = 1.0
    """Probability that the most probable tokens kept reach together (1: all are kept)."""
    min_p: float = 0.0
    """Least probability of a token kept, relative to the most probable one (0: all are kept)."""
    seed: int = 0
    """Key of the sampling noise. The same seed gives the same text."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        object.__setattr__(self, "seed", any_whole_number("seed", self.seed))
        if not 0 <= self.temperature <= HOTTEST:
            raise UsageError(f"temperature is {self.temperature}; it must lie between 0 (greedy) and {HOTTEST:.2g}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}; it must lie in [0, 1]")


@dataclass(frozen=True)
class Penalties:
    """Changes of the logits before temperature, by the tokens generated so far. The defaults change nothing."""

    repetition: float = 1.0
    """Divisor of positive logits of tokens in prompt or output, and factor of negative ones (Keskar et al.
    1909.05858)."""
    presence: float = 0.0
    """Amount subtracted once from the logits of tokens in the output, as in OpenAI's API; the prompt does not count."""
    frequency: float = 0.0
    """Amount subtracted from the logit of a token for each time that it is in the output."""
    bias: tuple[tuple[int, float], ...] = ()
    """Pairs (token, number added to its logit)."""

    def __post_init__(self) -> None:
        for name in ("repetition", "presence", "frequency"):
            object.__setattr__(self, name, number(f"{name} penalty", getattr(self, name)))
        if not 0 < self.repetition < math.inf:
            raise UsageError(f"repetition penalty is {self.repetition}; it must be a positive number, 1 for none")
        for name in ("presence", "frequency"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} penalty is {getattr(self, name)}; it must be a number, 0 for none")
        try:
            pairs = [(token, value) for token, value in _pairs(self.bias)]
        except (TypeError, ValueError) as error:
            raise UsageError("the logit bias is no list of (token, number); write it as ((101, -5.0),)") from error
        bias = tuple((any_whole_number("token of a logit bias", t), number("logit bias", b)) for t, b in pairs)
        for token, value in bias:
            if token < 0 or math.isnan(value) or value == math.inf:
                raise UsageError(f"logit bias {token}: {value}: name a token, and a number or -inf (never)")
        object.__setattr__(self, "bias", bias)

    def check_size(self) -> None:
        """Raise UsageError for numbers that would overflow float32, in which logits are penalised."""
        if not 1 / MOST_REPETITION <= self.repetition <= MOST_REPETITION:
            least = 1 / MOST_REPETITION
            raise UsageError(
                f"repetition penalty is {self.repetition}; it must lie between {least:g} and {MOST_REPETITION:g}"
            )
        for name in ("presence", "frequency"):
            if abs(getattr(self, name)) > MOST_PENALTY:
                bounds = f"{-MOST_PENALTY:g} and {MOST_PENALTY:g}"
                raise UsageError(f"{name} penalty is {getattr(self, name)}; it must lie between {bounds}")
        for token, value in self.bias:
            if value > MOST_BIAS:
                raise UsageError(f"logit bias of token {token} is {value}; it must be at most {MOST_BIAS:g}")

    @property
    def none(self) -> bool:
        """True if these penalties change nothing."""
        return self == Penalties()


def _pairs(bias: Any) -> Iterable[Any]:
    return bias.items() if isinstance(bias, Mapping) else bias


@dataclass(frozen=True)
class Rule:
    """The rule that accepts drafts.

    Lossless, token for token: `match` accepts the token of plain decoding. Lossless in distribution: `rejection`
    accepts with probability min(1, p / q), else draws a token of the residual; `block` judges the drafts of a window
    together and never accepts fewer. Lossy: `lossy-typical` accepts where p > min(epsilon, delta exp(-entropy of p)),
    as Medusa; `lossy-top-k` among the k best of p; `lossy-distance` where the token id is within d of the best one's,
    as Stern for tokens that are intensities; `lossy-minimum` as `match`, but at least m tokens a pass, Stern's minimum
    block size.
    """

    kind: str = "match"
    numbers: tuple[float, ...] = ()
    """Numbers of the kind (empty: its defaults): epsilon and delta of typical, k of top-k, d of distance, m of
    minimum."""

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise UsageError(f"there is no acceptance {self.kind!r}; take one of {', '.join(RULES)}")
        count = len(RULES[self.kind])
        if self.numbers and len(self.numbers) != count:
            raise UsageError(f"acceptance {self.kind} takes {count} numbers after it, not {len(self.numbers)}")
        given = tuple(number(f"a number of acceptance {self.kind}", x) for x in self.numbers)
        if any(not 0 <= x <= MOST_RULE_NUMBER for x in given):
            shown, most = ", ".join(f"{x:g}" for x in given), f"{MOST_RULE_NUMBER:g}"
            raise UsageError(f"acceptance {self.kind} has the numbers {shown}; they must lie between 0 and {most}")
        object.__setattr__(self, "numbers", given or RULES[self.kind])

    @classmethod
    def parse(cls, text: str | Rule) -> Rule:
        """Parse "block", "lossy-top-k:3" or "lossy-typical:0.09:0.3". Raises UsageError for anything else."""
        if isinstance(text, Rule):
            return text
        if not isinstance(text, str):
            raise UsageError(f"acceptance is {text!r}; give text, one of {', '.join(RULES)}")
        kind, *numbers = text.split(":")
        try:
            return cls(kind, tuple(map(float, numbers)))
        except ValueError as error:
            raise UsageError(f"acceptance {text!r}: {error}; write it as {kind}:NUMBER") from error

    @property
    def lossless(self) -> bool:
        """True if the output follows the law of plain decoding."""
        return not self.kind.startswith("lossy")

    @property
    def weighs(self) -> bool:
        """True if the rule needs the distribution that drafts were drawn from."""
        return self.kind in ("rejection", "block")

    @property
    def verifies_trees(self) -> bool:
        """True if the rule can verify draft trees."""
        return self.kind in TREE_RULES


@dataclass(frozen=True)
class Request:
    """A prompt with checked settings, ready for an engine; see `GenerationSettings` for the fields both have."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    heads: int | None = None
    acceptance: Rule = field(default_factory=Rule)
    penalties: Penalties = field(default_factory=Penalties)
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    """End tokens in addition to the tokenizer's `end_ids`, such as the end of a turn of a chat."""
    stop_tokens: frozenset[int] = frozenset()
    ignore_ends: bool = False
    min_new_tokens: int = 0
    keep_stop: bool = False
    shown: frozenset[int] = frozenset()
    cache_salt: str = ""
    """Salt of the cached keys and values: only requests with the same salt reuse each other's."""
    matcher: Matcher | None = field(default=None, compare=False, repr=False)
    """The constraint, compiled by the caller; without it the engine compiles, and other requests wait meanwhile."""

    def check(self, config: ModelConfig, context: int) -> None:
        """Raise UsageError if a model, with so many positions for a request, cannot decode this one."""
        drafting, vocab_size = config.drafting_heads, config.vocab_size
        if config.ahead and self.masked and self.acceptance.kind == "block":
            # Each later q was computed after drafts that the mask may have replaced: it would not be their law.
            what = f"{config.head_kind} heads with a constraint or min_new_tokens"
            raise UsageError(f"acceptance block is not lossless for {what}; take rejection")
        if self.heads is not None and not 1 <= self.heads <= drafting:
            gap = "" if drafting == config.heads else " before a gap in its offsets"
            raise UsageError(
                f"heads is {self.heads}; this model has {drafting}{gap}, take 1 (plain decoding) to that many"
            )
        if not self.prompt:
            raise UsageError("the prompt is empty; give at least one token (to start a document, its end token)")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if len(self.prompt) >= context:
            raise UsageError(
                f"the prompt has {len(self.prompt)} tokens; the context is {context}, which must also hold "
                "what is generated: shorten the prompt"
            )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= vocab_size:
                raise UsageError(f"{name} is {count}; ask for 0 to {vocab_size} alternatives")
        beyond = next((token for token, _ in self.penalties.bias if token >= vocab_size), None)
        if beyond is not None:
            raise UsageError(f"logit bias names token {beyond}; the vocabulary has {vocab_size} tokens")
        for token in (min(self.prompt), max(self.prompt)):
            if not 0 <= token < vocab_size:
                raise UsageError(f"the prompt holds token {token}; this model's vocabulary has {vocab_size} tokens")

    @property
    def masked(self) -> bool:
        """True if some tokens are not allowed at some places of the output."""
        return self.constraint is not None or self.matcher is not None or self.min_new_tokens > 0

    def text_stream(self, tokenizer: Tokenizer) -> TextStream:
        """Return a stream that decodes the output."""
        return TextStream(tokenizer, self.prompt, keep_space=self.constraint is not None, shown=self.shown)

    def all_ends(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """Return the tokens that end the output and are not part of it."""
        if self.ignore_ends:
            return frozenset()
        return self.ends if tokenizer is None else self.ends | tokenizer.end_ids

    def __post_init__(self) -> None:
        """Convert NumPy numbers, arrays and tensors. Raises UsageError for values of another kind."""
        object.__setattr__(self, "prompt", token_ids(self.prompt))
        for name in ("max_new_tokens", "min_new_tokens", "heads", "logprobs"):
            value = getattr(self, name)
            if value is not None or name.endswith("new_tokens"):
                object.__setattr__(self, name, any_whole_number(name, value))
        object.__setattr__(self, "stop", stop_strings(self.stop))
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise UsageError(f"constraint is {type(self.constraint).__name__}; make one, as Constraint.regex(...)")
        if not isinstance(self.penalties, Penalties):
            raise UsageError(f"penalties is {type(self.penalties).__name__}; make them, as Penalties(repetition=1.1)")
        self.penalties.check_size()
        if self.ignore_ends and self.constraint is not None:
            raise UsageError("ignore_ends: a constraint ends the output where it is satisfied; take one of them")
        if self.min_new_tokens < 0 or (self.min_new_tokens and self.constraint is not None):
            why = "a constraint ends the output where it is satisfied" if self.min_new_tokens > 0 else "it is negative"
            raise UsageError(f"min_new_tokens is {self.min_new_tokens}: {why}; take 0")


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a generation, by the names that callers use; what depends on the model is checked in an engine.

    Raises UsageError for a value of a wrong kind or a number out of range.
    """

    max_new_tokens: int = 256
    """Most tokens to generate; the model's context may end the output before."""
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy. This and the next four fields: see `Sampling`."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0
    """Key of the sampling noise; for a list of prompts also a list. The same seed gives the same text."""
    heads: int | None = None
    """Number of heads to decode with, head 1 included; 1 is plain decoding (None: as many as pay, by the engine's
    policy). The output does not depend on it."""
    acceptance: str | Rule = "match"
    """Rule that accepts drafts, see `Rule`: "match" gives the tokens of plain decoding, "rejection" and "block" its
    distribution, "lossy-..." neither."""
    penalties: Penalties | None = None
    """Penalties on tokens generated before, and biases of logits."""
    constraint: Constraint | None = None
    """Form of the output: `Constraint.json_schema(...)`, `.regex(...)`, `.choice(...)` or `.lark(...)`."""
    logprobs: int | None = None
    """Number of most probable tokens whose log-probabilities to keep, in addition to that of each token generated
    (None: keep none)."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then read whole: no cached keys and values are reused."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the output; they are not part of it."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the output and are part of it."""
    ignore_ends: bool = False
    """True: end tokens are tokens like others. A constraint needs them, and does not allow this."""
    min_new_tokens: int = 0
    """Number of tokens before which no end token, stop token or stop string ends the output: the tokens are not
    generated there, and the strings are not looked for."""
    keep_stop: bool = False
    """True: the stop string that ends the output is part of it."""
    shown: frozenset[int] = frozenset()
    """Special tokens that appear in the text by their names; it leaves out all others."""

    def __post_init__(self) -> None:
        for seed in self._seeds or ():
            any_whole_number("seed", seed)
        self.request((), seed=0 if self._seeds is not None else None)

    @classmethod
    def with_fields(cls, settings: GenerationSettings | None, values: Mapping[str, Any]) -> GenerationSettings:
        """Return `settings` (None: the defaults) with some fields replaced. Raises UsageError for an unknown field."""
        names = [each.name for each in fields(cls)]
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            nearest = get_close_matches(unknown, names, 1, 0)[0]
            raise UsageError(f"there is no setting {unknown!r}; the nearest is {nearest!r}")
        return replace(settings or cls(), **values)

    @classmethod
    def named_in(cls, options: object, **values: Any) -> GenerationSettings:
        """Return settings from the attributes of `options` that have the same names, and from `values`."""
        shared = {each.name: getattr(options, each.name) for each in fields(cls) if hasattr(options, each.name)}
        return cls(**shared, **values)

    @property
    def _seeds(self) -> list[int] | None:
        """The seeds, if there are several."""
        several = isinstance(self.seed, Sequence) or getattr(self.seed, "ndim", 0) == 1
        return list(self.seed) if several else None  # type: ignore[arg-type]

    def seeds(self, prompts: int) -> list[int]:
        """Return one seed for each of so many prompts. Raises UsageError for a list of another length."""
        seeds: list[int] = [self.seed] * prompts if self._seeds is None else self._seeds  # type: ignore[list-item]
        if len(seeds) != prompts:
            raise UsageError(f"{len(seeds)} seeds for {prompts} prompts; give one seed, or one per prompt")
        return seeds

    def request(
        self,
        prompt: Sequence[int],
        *,
        seed: int | None = None,
        ends: frozenset[int] = frozenset(),
        cache_salt: str = "",
        matcher: Matcher | None = None,
    ) -> Request:
        """Return the request for a prompt of token ids; see `Request` for what settings do not hold."""
        key: Any = self.seed if seed is None else seed
        return Request(
            prompt=tuple(prompt),
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_k, self.top_p, self.min_p, key),
            heads=self.heads,
            acceptance=Rule.parse(self.acceptance),
            penalties=self.penalties or Penalties(),
            constraint=self.constraint,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stop=self.stop,  # type: ignore[arg-type]  # it becomes a tuple there
            ends=ends,
            stop_tokens=self.stop_tokens,
            ignore_ends=self.ignore_ends,
            min_new_tokens=self.min_new_tokens,
            keep_stop=self.keep_stop,
            shown=self.shown,
            cache_salt=cache_salt,
            matcher=matcher,
        )
