"""Induction: which tokens count, that test names are new, and the findings on made-up numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from studies.induction import STUDY, _tests, _two
from studies.stories import Stories
from studies.study import Result


def test_what_counts_is_every_second_token_of_a_name_mentioned_before() -> None:
    stories, rng = Stories(6, 6), np.random.default_rng(0)
    words = stories.words
    for write in (stories.story, stories.book):
        people = _two(stories.names(10, rng), rng)
        tokens, again = write(people, rng)
        seen, expected = [], []
        for at, (before, token) in enumerate(pairwise(tokens), start=1):
            if (before, token) in people:
                if (before, token) in seen:
                    expected.append(at)
                seen.append((before, token))
        assert again == expected and len(again) > 2
        assert all(token < len(words) for token in {*tokens} - {*people[0], *people[1]})
        assert tokens[-1] == words.index("<end>") and max(tokens) < stories.vocab_size


def test_names_of_tests_are_new_and_their_tokens_are_not() -> None:
    stories = Stories(8, 8)
    known = set(stories.names(30, np.random.default_rng(0)))
    assert len(known) == 30
    for tokens, again in _tests(stories, 15, known):
        for at in again:
            assert (tokens[at - 1], tokens[at]) not in known
            assert len(stories.words) <= tokens[at - 1] < len(stories.words) + 8 <= tokens[at]
    assert {first for first, _ in known} == set(range(len(stories.words), len(stories.words) + 8))


@pytest.mark.parametrize(
    "stories, books, verdict",
    [
        ({1: 0.1, 2: 0.6}, {1: 0.8, 2: 0.8}, "reproduced"),
        ({1: 0.1, 2: 0.6, "shallow": 0.6}, {1: 0.8, 2: 0.8}, "direction only"),  # all of it is depth
        ({1: 0.1, 2: 0.1}, {1: 0.8, 2: 0.7}, "direction only"),  # books help, and so does the smaller gap
        ({1: 0.8, 2: 0.2}, {1: 0.6, 2: 0.2}, "null"),
        ({1: 0.1, 2: 0.6}, {1: 0.4, 2: 0.4}, "out of reach"),  # the control fails: n=1 with books
        ({1: 0.02, 2: 0.04}, {1: 0.03, 2: 0.12}, "out of reach"),
    ],
)
def test_findings(stories: dict[int | str, float], books: dict[int | str, float], verdict: str) -> None:
    settings = replace(STUDY.scales["cpu"], sizes=("0.06M",))
    results = []
    for case in STUDY.cases(settings):
        found = stories if case.conditions["data"] == "stories" else books
        shallow = case.conditions["depth"] == "shallow"
        best = found.get("shallow", found[1]) if shallow else found[int(case.conditions["n"])]
        results.append(Result(case, {"best": best, "last": best, "losses": [1.0]}, 1.0))
    found = STUDY.findings(settings, results)
    assert found.verdict == verdict and "n=2 over n=1 on stories" in found.sentence and len(found.rows) == 6
