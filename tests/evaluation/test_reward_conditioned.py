"""CodeContests' programs with their rewards."""

from __future__ import annotations

from headstart.evaluation.code_problems import _codecontests
from headstart.evaluation.reward_conditioned import conditioned_on, reward_conditioned

ROW = {
    "name": "1_A",
    "description": "Print the sum.\n",
    "solutions": {"language": [3, 2, 1], "solution": ["print(1 + 1)\n", "int main() {}", "print 2"]},
    "incorrect_solutions": {"language": [3], "solution": ["\nprint(3)"]},
    "public_tests": {"input": [""], "output": ["2"]},
}


def test_python_programs_with_their_rewards() -> None:
    question = '"""\nPrint the sum.\n"""\n'
    assert list(reward_conditioned(ROW)) == [
        question + "# correct\nprint(1 + 1)\n",
        question + "# correct\nprint 2\n",
        question + "# incorrect\nprint(3)\n",
    ]
    assert list(reward_conditioned({"description": "x", "solutions": None})) == []


def test_the_prompt_of_evaluation_begins_such_a_text() -> None:
    assert conditioned_on(ROW) == _codecontests(ROW, 0).prompt + "# correct\n"
    assert next(reward_conditioned(ROW)).startswith(conditioned_on(ROW))
