"""Make problems over F_p[X]/(X^d) (paper section 4.2): negation, addition, multiplication and composition."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from studies.study import StudySettings
from studies.training import TrainingSettings, in_memory
from studies.verdicts import Control

Polynomial = tuple[int, ...]
"""Coefficients, the constant first."""
UNARY = "-"
BINARY = ("+", "*", "o")
MARKS = ("(", ")", UNARY, *BINARY, "=", "pause", "end")


@dataclass(frozen=True)
class Ring:
    """The ring F_p[X]/(X^d) with the vocabulary of its problems: the coefficients 0..p-1, then `MARKS`."""

    p: int = 7
    d: int = 5

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.p + len(MARKS)

    def mark(self, mark: str) -> int:
        """Return the token of a mark."""
        return self.p + MARKS.index(mark)

    def negate(self, f: Polynomial) -> Polynomial:
        """Return -f."""
        return tuple(-a % self.p for a in f)

    def add(self, f: Polynomial, g: Polynomial) -> Polynomial:
        """Return f + g."""
        return tuple((a + b) % self.p for a, b in zip(f, g))

    def multiply(self, f: Polynomial, g: Polynomial) -> Polynomial:
        """Return f g mod X^d."""
        product = [0] * self.d
        for i, a in enumerate(f):
            for j in range(self.d - i):
                product[i + j] += a * g[j]
        return tuple(a % self.p for a in product)

    def compose(self, f: Polynomial, g: Polynomial) -> Polynomial:
        """Return f(g(X)) mod X^d of the representatives of degree < d.

        On classes it would not be well defined: X^d composed with g is g^d, which is not 0 if g(0) is not 0.
        """
        total: Polynomial = (0,) * self.d
        for a in reversed(f):  # Horner
            total = self.add(self.multiply(total, g), (a,) + (0,) * (self.d - 1))
        return total

    def problem(self, operations: int, rng: np.random.Generator) -> tuple[list[int], Polynomial]:
        """Return an expression with so many operations, as tokens, and its value.

        Operators and coefficients are uniform; the other operations are split uniformly between the operands.
        """
        if operations == 0:
            value = tuple(rng.integers(self.p, size=self.d).tolist())
            return list(value), value
        operator = (UNARY, *BINARY)[rng.integers(1 + len(BINARY))]
        if operator == UNARY:
            tokens, value = self.problem(operations - 1, rng)
            return [self.mark("("), self.mark(UNARY), *tokens, self.mark(")")], self.negate(value)
        left = int(rng.integers(operations))
        first, f = self.problem(left, rng)
        second, g = self.problem(operations - 1 - left, rng)
        combine = {"+": self.add, "*": self.multiply, "o": self.compose}[operator]
        return [self.mark("("), *first, self.mark(operator), *second, self.mark(")")], combine(f, g)

    def question(self, tokens: Sequence[int], pauses: int) -> list[int]:
        """Return the previous problem's end token, the expression, pauses, and the equality sign before the answer."""
        return [self.mark("end"), *tokens, *[self.mark("pause")] * pauses, self.mark("=")]

    def documents(
        self,
        count: int,
        operations: int,
        pauses: int,
        seed: int,
        least: int = 1,
        unless: Collection[tuple[int, ...]] = (),
    ) -> list[list[int]]:
        """Return problems with `least` to `operations` operations, with answers and end tokens.

        Questions in `unless` are drawn anew. Raises UsageError if there are hardly any others.
        """
        rng = np.random.default_rng([seed, 0])
        sequences: list[list[int]] = []
        for _ in range(100 * count):
            tokens, value = self.problem(int(rng.integers(least, operations + 1)), rng)
            question = self.question(tokens, pauses)[1:]
            if tuple(question) not in unless:
                sequences.append([*question, *value, self.mark("end")])
            if len(sequences) == count:
                return sequences
        raise UsageError(
            f"the ring F_{self.p}[X]/(X^{self.d}) has hardly a problem that is not in the tests; take fewer --tests, "
            "or a larger --p or --d"
        )

    def tests(self, count: int, operations: int, pauses: int) -> tuple[list[list[int]], list[Polynomial]]:
        """Questions with exactly `operations` operations, and their answers: always the same."""
        rng = np.random.default_rng([operations, 1])
        problems = [self.problem(operations, rng) for _ in range(count)]
        return [self.question(tokens, pauses) for tokens, _ in problems], [value for _, value in problems]

    def longest(self, operations: int, pauses: int) -> int:
        """Tokens of the longest question with its answer."""
        return 1 + self.d + operations * (self.d + 3) + pauses + 1 + self.d + 1


@dataclass(frozen=True)
class RingSettings(StudySettings):
    """Settings of the studies that train on these problems."""

    p: int = 7
    d: int = 5
    operations: int = 5
    """Most operations of a problem for training; the least is 1."""
    problems: int = 100_000
    """Problems for training, read again and again if training takes longer."""
    tests: int = 2000
    """Test problems for each number of operations."""
    answers_only: bool = False
    """True: questions are no targets, for their random coefficients would dominate a short training. The paper does not
    say that it leaves them out."""
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def ring(self) -> Ring:
        """The ring of the problems."""
        return Ring(self.p, self.d)

    def shards(self, problems: Sequence[Sequence[int]]) -> TokenShards:
        """Return problems as `Ring.documents` makes them, as a split to train on."""
        answers_from = [len(problem) - self.d - 1 for problem in problems]
        return in_memory(problems, answers_from if self.answers_only else None)

    def learned(self, what: str, best: float, guessed: float) -> Control:
        """Return the control that an exact match is above that of the most frequent answer by three standard errors."""
        return Control(f"{what} over the most frequent answer", best, guessed + 3 * (guessed / self.tests) ** 0.5)
