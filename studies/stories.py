"""Make stories from templates, with names of two tokens, in place of children's stories (paper section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Name = tuple[int, int]

OPENINGS = (
    "once there was a {role} called A .",
    "one day a {mood} {role} named A went to the {place} .",
    "in a {mood} little {place} lived a {role} . the name of the {role} was A .",
    "A was a {mood} {role} who had a {thing} .",
)
SENTENCES = (
    "A saw a {animal} near the {place} .",
    "then A met B .",
    '" hello " said A to B .',
    "B gave the {thing} to A .",
    "A and B played with the {thing} .",
    "the {animal} ran away and A was {mood} .",
    "B said that the {thing} was {mood} .",
    "A wanted to find the {thing} in the {place} .",
    "but B had a {mood} {animal} .",
    '" where is my {thing} ? " asked B .',
    "A helped B to carry the {thing} to the {place} .",
    "the {animal} looked at B and A laughed .",
    "so A went home to the {place} .",
    "everyone in the {place} liked A .",
)
CLOSINGS = (
    "A and B were {mood} and went home .",
    "from that day on A had a {mood} {animal} .",
    "B hugged A . the end .",
)
BOOK = (
    "it was in the {place} that A first heard of the {thing} .",
    "nobody but B knew what the {animal} had done to A .",
    "A , who had never seen a {animal} , was {mood} .",
    "for years the {thing} of B stood in the {place} , and A wrote of it .",
    "of all things in the {place} A feared the {animal} most , said B .",
    "when B came back from the {place} , A was gone with the {thing} .",
    "A answered that a {role} such as B was never {mood} .",
    "the letter of A to B told of a {mood} {animal} .",
)
WORDS = {
    "role": "girl boy king farmer baker child",
    "mood": "happy sad big small brave old kind tired",
    "place": "forest garden house river school park village",
    "thing": "ball book cake lamp key boat hat",
    "animal": "dog cat bird frog horse fox mouse",
}


@dataclass(frozen=True)
class Stories:
    """The vocabulary: words, then `first` tokens with which names begin and `second` with which they end."""

    first: int = 24
    second: int = 24

    @property
    def words(self) -> list[str]:
        """Words of all templates."""
        templates = [*OPENINGS, *SENTENCES, *CLOSINGS, *BOOK, *WORDS.values()]
        found = {word for text in templates for word in text.split() if word[0] != "{" and word not in "AB"}
        return ["<end>", *sorted(found)]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.words) + self.first + self.second

    def names(self, count: int, rng: np.random.Generator, without: set[Name] = frozenset()) -> list[Name]:  # type: ignore[assignment]
        """Return `count` different names, none of `without`. Several begin alike if they are more than `first`."""
        begin = len(self.words)
        every = [(begin + i, begin + self.first + j) for i in range(self.first) for j in range(self.second)]
        free = [name for name in every if name not in without]
        return [free[i] for i in rng.permutation(len(free))[:count]]

    def story(self, people: tuple[Name, Name], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return tokens with the end token, and the places of the second tokens of names mentioned before."""
        middle = [SENTENCES[i] for i in rng.integers(len(SENTENCES), size=rng.integers(6, 11))]
        return self._written([_one(OPENINGS, rng), *middle, _one(CLOSINGS, rng)], people, rng)

    def book(self, people: tuple[Name, Name], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return what `story` does, for a page of prose more complex than a story."""
        return self._written([_one(BOOK, rng) for _ in range(rng.integers(7, 12))], people, rng)

    def _written(
        self, sentences: list[str], people: tuple[Name, Name], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        ids = {word: i for i, word in enumerate(self.words)}
        chosen = {kind: _one(words.split(), rng) for kind, words in WORDS.items()}
        tokens: list[int] = []
        known, again = set(), []
        for word in " ".join(sentences).split():
            if word in ("A", "B"):
                name = people[word == "B"]
                tokens += name
                if name in known:
                    again.append(len(tokens) - 1)
                known.add(name)
            else:
                tokens.append(ids[chosen.get(word.strip("{}"), word)])
        return [*tokens, ids["<end>"]], again


def _one(choices: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
