"""CodeContests' programs with their rewards, as texts to finetune on (paper section 3.6 and appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PYTHON = (1, 3, "PYTHON", "PYTHON3")
"""What the data set calls Python 2 and 3."""
REWARDS = {"correct": "solutions", "incorrect": "incorrect_solutions"}
"""The annotation, and the column in which such programs stand."""


def reward_conditioned(row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row of CodeContests: for each of its Python programs the problem, whether the program solves it,
    and the program, in the form in which `headstart evaluate --tasks codecontests` asks for one.

    The paper does not give its annotation; ours is the line `# correct` or `# incorrect`. Raises KeyError where `row`
    has no description.
    """
    for reward, column in REWARDS.items():
        programs = row.get(column) or {"language": [], "solution": []}
        for language, program in zip(programs["language"], programs["solution"]):
            if language in PYTHON:
                yield conditioned_on(row, reward) + str(program).strip() + "\n"


def conditioned_on(row: Mapping[str, Any], reward: str = "correct") -> str:
    """What stands before a program: at evaluation the model is asked for a correct one."""
    return f'"""\n{str(row["description"]).strip()}\n"""\n# {reward}\n'
