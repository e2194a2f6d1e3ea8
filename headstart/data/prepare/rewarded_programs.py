"""CodeContests' programs with their rewards, as texts to finetune on (paper section 3.6 and appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headstart.errors import UsageError

PYTHON = (1, 3, "PYTHON", "PYTHON3")
"""What the data set calls Python 2 and 3."""
REWARDS = {"correct": "solutions", "incorrect": "incorrect_solutions"}
"""The annotation, and the column in which such programs stand."""
PROBLEM = "description"


def rewarded_programs(row: Mapping[str, Any], place: str) -> Iterator[str]:
    """The texts of a row of CodeContests: for each of its Python programs the problem, whether the program solves it,
    and the program, in the form in which `headstart evaluate --tasks codecontests --code.rewarded` asks for one.

    The paper does not give its annotation; ours is the line `# correct` or `# incorrect`. Raises UsageError, naming
    `place`, where the row is not in the form of CodeContests.
    """
    if not isinstance(row.get(PROBLEM), str):
        raise UsageError(f'{place}: no text in field "{PROBLEM}"; --rewards takes problems in the form of CodeContests')
    for reward, column in REWARDS.items():
        programs = row.get(column) or {"language": [], "solution": []}
        try:
            pairs = list(zip(programs["language"], programs["solution"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f'{place}: field "{column}" is not in the form of CodeContests, '
                '{"language": [3], "solution": ["print(1)"]}; mend it'
            ) from None
        prompt = rewarded_prompt(row, reward)
        yield from (f"{prompt}{str(program).strip()}\n" for language, program in pairs if language in PYTHON)


def rewarded_prompt(row: Mapping[str, Any], reward: str = "correct") -> str:
    """What stands before a program: at evaluation the model is asked for a correct one."""
    return f"{plain_prompt(row)}# {reward}\n"


def plain_prompt(row: Mapping[str, Any]) -> str:
    """The problem alone. Raises KeyError where `row` has none."""
    return f'"""\n{str(row[PROBLEM]).strip()}\n"""\n'
