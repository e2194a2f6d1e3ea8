"""Load the problems of HumanEval, MBPP, APPS, CodeContests and GSM8K, from the hub or a file, as prompts and tests."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.console import say
from headstart.data.lines import parse_json, read_file_lines
from headstart.data.prepare.documents import plain_prompt, rewarded_prompt
from headstart.data.prepare.hub import load_rows
from headstart.errors import UsageError
from headstart.evaluation.code.sandbox import Program, Verdict

Row = Mapping[str, Any]

HUB = {
    "humaneval": ("hf:openai/openai_humaneval", None),
    "mbpp": ("hf:google-research-datasets/mbpp", "full"),
    "mbpp-sanitized": ("hf:google-research-datasets/mbpp", "sanitized"),
    "apps-introductory": ("hf:codeparrot/apps", "introductory"),
    "codecontests": ("hf:deepmind/code_contests", None),
    "gsm8k-answers": ("hf:openai/gsm8k", "main"),
}
"""Data set and configuration of each task on the Hugging Face hub. The split is "test"."""

FUNCTION_ENDS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ")
"""Strings that begin what follows the body of a function."""
SCRIPT_ENDS = ('\n"""', "\n'''", "\nQUESTION:", "\nassert ")
"""Strings that begin what follows a script."""


@dataclass(frozen=True)
class CodeProblem:
    """A problem: the prompt, and how a completion is judged."""

    name: str
    prompt: str
    stop: tuple[str, ...]
    head: str = ""
    """Beginning of the program: the prompt, if the model writes only a body."""
    tests: str = ""
    """Python source that runs after the program."""
    cases: tuple[tuple[str, str], ...] = ()
    """(standard input, expected output) of each case that a program must get right."""
    seconds: float = 3.0
    tested: bool = True
    """The problem has a test."""
    answer: str = ""
    """Number that a written solution must end with; then no program is run."""

    def programs(self, completion: str) -> list[Program]:
        """Return the programs to run; the completion is right if all of them pass and `agrees`."""
        if self.answer:
            return []
        source = self.head + completion + "\n"
        if not self.cases:
            return [Program(source, self.tests, seconds=self.seconds)]
        return [Program(source, stdin=given, seconds=self.seconds) for given, _ in self.cases]

    def status(self, completion: str, verdicts: Sequence[Verdict]) -> str:
        """Return "passed", or the reason why the completion is wrong, by the verdicts on its programs."""
        if self.answer:
            found = final_number(completion)
            return "passed" if found == self.answer else "wrong answer" if found else "no answer"
        status = next((verdict.status for verdict in verdicts if not verdict.passed), "passed")
        return "wrong output" if status == "passed" and not self.agrees(verdicts) else status

    def agrees(self, verdicts: Sequence[Verdict]) -> bool:
        """Return whether all programs passed and wrote the expected output of their cases."""
        if not all(verdict.passed for verdict in verdicts):
            return False
        return all(_same(verdict.stdout, expected) for verdict, (_, expected) in zip(verdicts, self.cases))


def final_number(solution: str) -> str:
    """Return the number that a solution ends with: behind "####", else the last one; "" for none.

    Numbers lose their commas and zeros after the point, so that equal ones are equal strings.
    """
    _, marked, behind = solution.partition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", behind if marked else solution)
    if not numbers:
        return ""
    number = numbers[0 if marked else -1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _same(written: str, expected_text: str) -> bool:
    """Compare like judges: line by line without trailing spaces, and numbers as numbers."""
    lines, expected = ([line.split() for line in text.strip().splitlines()] for text in (written, expected_text))
    return len(lines) == len(expected) and all(
        len(a) == len(b) and all(x == y or _close(x, y) for x, y in zip(a, b)) for a, b in zip(lines, expected)
    )


def _close(a: str, b: str) -> bool:
    if "." not in a + b:
        return False
    try:
        x, y = float(a), float(b)
    except ValueError:
        return False
    return abs(x - y) <= 1e-6 * max(1.0, abs(y))


def load_problems(
    task: str,
    source: str | None = None,
    limit: int | None = None,
    rewarded: bool = False,
    option: str = "--code.source",
    examples: str = "",
) -> list[CodeProblem]:
    """Load the problems of a task of HUB, at most the first `limit`.

    `source` is a .jsonl or .jsonl.gz file, or hf:NAME (None: the hub's). `rewarded`: prompts of codecontests ask for a
    correct program, with the annotation of `prepare --rewards`. `examples` is text before every
    prompt. Raises UsageError for a source that cannot be read or reached, and for a problem without the fields it
    needs, by its place; `option` names the source for users.
    """
    with any_number_of_digits():
        problems = _load(task, source, limit, rewarded, option)
    return [replace(problem, prompt=examples + problem.prompt) for problem in problems] if examples else problems


def load_shots(task: str, source: str | None, count: int) -> str:
    """Return the first `count` problems of the training split with their solutions, as text before a prompt.

    Raises UsageError for a task other than gsm8k-answers, and like `load_problems`.
    """
    if not count:
        return ""
    if task != "gsm8k-answers":
        raise UsageError(f"--code.shots are solved problems before those of gsm8k-answers; leave it out for {task}")
    name, rows = _rows(task, source, "--code.examples", "train")
    try:
        solved = [f"{_question(row)} {row['answer']}\n\n" for row in islice(rows, count)]
    except KeyError as error:
        raise UsageError(f"{name}: a problem has no field {error}; name a file of solved problems") from error
    if len(solved) < count:
        raise UsageError(f"{name}: holds {len(solved)} problems, not {count}; take fewer --code.shots")
    return "".join(solved)


def _load(task: str, source: str | None, limit: int | None, rewarded: bool, option: str) -> list[CodeProblem]:
    if task not in HUB:
        raise UsageError(f"there is no set of problems {task!r}; take one of {', '.join(HUB)}")
    name, rows = _rows(task, source, option)
    problems: list[CodeProblem] = []
    untested = 0
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(problems) >= limit:
            break
        try:
            problem = _problem(task, row, number, rewarded)
        except KeyError as error:
            raise UsageError(
                f"{name}, problem {number}: has no field {error}, which {task} needs; it has {', '.join(row)}"
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{name}, problem {number}: is not in the form of {task} ({error}); correct it") from error
        if problem is not None and not problem.tested:
            untested += 1
        elif problem is not None:
            problems.append(problem)
    if untested:
        say(f"{name}: {untested} problems without a test are left out, because every program would pass them")
    if not problems:
        raise UsageError(f"{name}: holds no problem of {task}; name its file with {option}")
    names = [problem.name for problem in problems]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UsageError(f"{name}: holds problem {twice} twice; results are kept by that name, so remove one")
    return problems


def _rows(task: str, source: str | None, option: str, split: str = "test") -> tuple[str, Iterator[Row]]:
    if source is not None and not source.startswith("hf:"):
        return source, _lines(Path(source))
    name, config = (source, None) if source is not None else HUB[task]
    try:
        return name, iter(load_rows(name, split, config))
    except UsageError as error:
        raise UsageError(f"{error}; or give the problems as a file: {option} {task}.jsonl") from error


@contextmanager
def any_number_of_digits() -> Iterator[None]:
    """Let Python read and write integers of any length: APPS has some of more than 4,300 digits."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def _lines(path: Path) -> Iterator[Row]:
    for number, line in read_file_lines(path):
        try:
            row = _parsed(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: is not JSON lines in UTF-8 ({error}); correct it") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number}: is not a JSON object; correct that line")
        yield row


def _parsed(text: str) -> Any:
    """Parse JSON with exact integers. Raises ValueError."""
    return parse_json(text, int)


def _problem(task: str, row: Row, number: int, rewarded: bool) -> CodeProblem | None:
    if task == "apps-introductory":
        return _apps(row, number)
    if task == "codecontests":
        return _codecontests(row, number, rewarded)
    if task == "gsm8k-answers":
        return _gsm8k(row, number)
    # CodeT publishes MBPP in the form of HumanEval.
    return _humaneval(row) if task == "humaneval" or "entry_point" in row else _mbpp(row)


def _humaneval(row: Row) -> CodeProblem:
    name, prompt, entry = str(row["task_id"]), str(row["prompt"]), str(row["entry_point"])
    return CodeProblem(name, prompt, FUNCTION_ENDS, prompt, f"{row['test']}\n\ncheck({entry})\n")


def _mbpp(row: Row) -> CodeProblem:
    """Prompt with the task and its tests as a docstring, like InCoder and the code evaluation harnesses.

    The paper does not give its prompts.
    """
    task = str(row["text"] if "text" in row else row["prompt"])
    tests = [str(test) for test in (row["test_list"] if "test_list" in row else row["test"])]
    prompt = f'"""\n{task}\n' + "\n".join(tests) + '\n"""\n'
    # Set-up code runs after the program, because in two problems of MBPP it uses the program's definitions.
    set_up = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    judged = "\n".join([*set_up, *tests])
    name = f"mbpp/{row['task_id']}"
    return CodeProblem(name, prompt, (*SCRIPT_ENDS, "\nprint("), "", judged, tested=any(map(str.strip, tests)))


def _apps(row: Row, number: int) -> CodeProblem | None:
    """Read a problem of APPS (Hendrycks et al. 2021) with its authors' prompt; skip other difficulties."""
    if row.get("difficulty", "introductory") != "introductory":
        return None
    examples = row["input_output"]
    if not examples:  # some problems of the data set have no test
        examples = {"inputs": [], "outputs": []}
    examples = _parsed(examples) if isinstance(examples, str) else examples
    called, starter = examples.get("fn_name"), str(row.get("starter_code") or "")
    prompt = f"\nQUESTION:\n{row['question']}\n{starter}\n"
    prompt += "\nUse Call-Based format" if called else "\nUse Standard Input format"
    prompt += "\nANSWER:\n"
    name = f"apps/{row.get('problem_id', row.get('id', number))}"
    inputs, outputs = examples["inputs"], examples["outputs"]
    _check_pairs(inputs, outputs)
    if called:
        # Solutions are functions, or methods of a class Solution. An expected answer may be wrapped in a list.
        tests = f"_called = Solution().{called} if 'Solution' in globals() else {called}\n"
        for given, expected in zip(inputs, outputs):
            tests += f"_got, _wanted = _called(*{_source(given)}), {_source(expected)}\n"
            tests += "_got = list(_got) if isinstance(_got, tuple) else _got\n"
            tests += "assert _got == _wanted or [_got] == _wanted\n"
        return CodeProblem(name, prompt, SCRIPT_ENDS, "", tests, seconds=4.0, tested=len(inputs) > 0)
    return CodeProblem(name, prompt, SCRIPT_ENDS, "", "", _cases(inputs, outputs), 4.0, len(inputs) > 0)


def _source(value: Any) -> str:
    """Return Python source of a JSON value; repr would write infinite numbers as undefined names."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, list):
        return "[" + ", ".join(map(_source, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_source(each)}" for key, each in value.items()) + "}"
    return repr(value)


def _gsm8k(row: Row, number: int) -> CodeProblem:
    """Read a problem of GSM8K (Cobbe et al. 2021); the number behind #### is the answer."""
    answer = final_number(str(row["answer"]))
    if not answer:
        raise ValueError("its answer has no number")
    return CodeProblem(f"gsm8k/{number}", _question(row), ("\nQuestion:", "\n\n"), answer=answer)


def _question(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _codecontests(row: Row, number: int, rewarded: bool = False) -> CodeProblem:
    """Read a problem of CodeContests (Li et al. 2022) with all its tests and its time limit."""
    cases: list[tuple[str, str]] = []
    for part in ("public_tests", "private_tests", "generated_tests"):
        tests = row.get(part) or {"input": [], "output": []}
        cases += _cases(tests["input"], tests["output"])
    if not cases:
        raise KeyError("public_tests")
    limit = row.get("time_limit") or {"seconds": 3}
    seconds = float(limit["seconds"]) + float(limit.get("nanos", 0)) / 1e9
    prompt = rewarded_prompt(row) if rewarded else plain_prompt(row)
    name = re.sub(r"\s+", " ", str(row.get("name", f"codecontests/{number}")))
    return CodeProblem(name, prompt, SCRIPT_ENDS, "", "", tuple(cases), max(1.0, seconds))


def _cases(inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    _check_pairs(inputs, outputs)
    return tuple((_text(given), _text(expected)) for given, expected in zip(inputs, outputs))


def _check_pairs(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) + "\n" if isinstance(value, list) else str(value)
