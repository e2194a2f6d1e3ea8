"""Read the questions of named benchmarks of speculative decoding, from a file, a folder of files or the network.

A suite is a class with a line in `SUITES`. Nothing of the data is part of the project.
"""

from __future__ import annotations

import json
import os
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.console import say
from headstart.data.conversations import ASSISTANT
from headstart.data.lines import read_placed_records
from headstart.data.prepare.hub import load_rows
from headstart.data.prompts import SURROGATE, Message, read_prompt_file
from headstart.errors import UsageError, first_line
from headstart.evaluation.code.problems import load_problems
from headstart.fileio import cache_folder, replacing_file

FOLDER_VARIABLE = "HEADSTART_SUITES"
"""Environment variable with a folder that holds the files of suites, by the names of `Suite.file`."""
SECONDS = 60.0
"""Longest wait for a file from the network."""
GOLDEN = 0.6180339887498949
MBPP_TEST = range(11, 511)
"""Task ids of MBPP's test split. Files of all problems hold those of training, which models may be trained on."""


@dataclass(frozen=True)
class Question:
    """A prompt of a suite.

    Attributes:
        name: unique in the suite.
        category: the kind of task.
        turns: for each answer the messages before it, without those of earlier turns; empty for `text`.
        text: text to continue without a chat template (empty: the contents of `turns`).
        tools: tools that the messages offer.
    """

    name: str
    category: str
    turns: tuple[tuple[Message, ...], ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()


class Suite(ABC):
    """A named set of questions."""

    name: str
    file: str = ""
    """Place of its file in the folder that FOLDER_VARIABLE names."""
    groups: Mapping[str, str] = {}
    """Group of each category that is part of a larger one."""

    def questions(self, file: Path | None) -> list[Question]:
        """Return all questions, from `file`, the folder of files, or the network.

        Raises UsageError for a file that cannot be read, with its line, for no file and no network, and for two
        questions of one name.
        """
        folder = os.environ.get(FOLDER_VARIABLE)
        if file is None and folder and self.file and (Path(folder) / self.file).is_file():
            file = Path(folder) / self.file
        found = self.read(file)
        if not found:
            raise UsageError(f"{file or self.name}: holds no question of {self.name}; name its file with --suite.file")
        names = [question.name for question in found]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise UsageError(f"{file or self.name}: holds question {twice} twice; give each its own name")
        return found

    @abstractmethod
    def read(self, file: Path | None) -> list[Question]:
        """Return the questions of a file, or those on the network without one."""

    def unreachable(self, error: BaseException) -> UsageError:
        """Return the error for a suite that the network does not give."""
        where = f", or put {self.file} into the folder that {FOLDER_VARIABLE} names" if self.file else ""
        return UsageError(
            f"{self.name}: cannot be fetched ({first_line(error)}); give its file with --suite.file{where}"
        )


class SpecBench(Suite):
    """Spec-Bench (Xia et al. 2024): 480 questions of 13 categories in 6 groups, with MT-bench's two turns."""

    name, file = "spec-bench", "spec_bench/question.jsonl"
    url = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
    groups = dict.fromkeys(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "mt-bench"
    )

    def read(self, file: Path | None) -> list[Question]:
        """Return the questions of a file with question_id, category and turns in each line."""
        return [question for question in self._rows(file or self._fetched()) if self.takes(question.category)]

    def takes(self, category: str) -> bool:
        """Return whether a category is part of this suite."""
        return True

    def _rows(self, file: Path) -> Iterator[Question]:
        for place, row in _objects(file):
            turns, name, category = row.get("turns"), row.get("question_id"), row.get("category")
            if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
                raise UsageError(f'{place}: "turns" is no list of questions; correct that line')
            if not isinstance(category, str) or not isinstance(name, (int, str)):
                raise UsageError(f'{place}: has no "question_id" and "category"; correct that line')
            yield Question(str(name), category, tuple((_user(turn),) for turn in turns))

    def _fetched(self) -> Path:
        """Return the file in the cache, fetched once."""
        path = cache_folder() / "suites" / self.file
        if not path.is_file():
            say(f"{self.name}: fetching {self.url}")
            try:
                with urllib.request.urlopen(self.url, timeout=SECONDS) as answer:
                    content = answer.read()
            except OSError as error:
                raise self.unreachable(error) from error
            with replacing_file(path) as temporary:
                temporary.write_bytes(content)
        return path


class MTBench(SpecBench):
    """MT-bench (Zheng et al. 2023): the 80 two-turn questions that Spec-Bench begins with."""

    name = "mt-bench"
    subset, groups = SpecBench.groups, {}

    def takes(self, category: str) -> bool:
        """Return whether a category is part of this suite."""
        return category in self.subset


class GSM8K(Suite):
    """GSM8K (Cobbe et al. 2021): the questions of the test split, grade-school mathematics."""

    name, file = "gsm8k", "gsm8k/test.jsonl"

    def read(self, file: Path | None) -> list[Question]:
        """Return the questions of a file with `question` in each line."""
        found = []
        for number, (place, row) in enumerate(_objects(file) if file else self._hub(), start=1):
            question = row.get("question")
            if not isinstance(question, str) or not question.strip():
                raise UsageError(f'{place}: has no "question"; correct that line')
            found.append(Question(f"gsm8k/{number}", self.name, ((_user(question),),)))
        return found

    def _hub(self) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for number, row in enumerate(load_rows("hf:openai/gsm8k", "test", "main"), start=1):
                yield f"gsm8k, row {number}", row
        except UsageError as error:
            raise self.unreachable(error) from error
        except Exception as error:  # a stream raises errors of many kinds
            raise self.unreachable(error) from error


class CodePrompts(Suite):
    """The prompts of a task of pass@k as questions, for how fast a model writes programs, not how good they are."""

    def __init__(self, task: str, file: str, test: range | None = None) -> None:
        self.task, self.file, self.test = task, file, test
        self.name = f"{task}-prompts"

    def read(self, file: Path | None) -> list[Question]:
        """Return the prompts of the task's problems of the test split, each as a question for a program."""
        ask = "Write a solution to the following problem and make sure that it passes the tests:"
        problems = load_problems(self.task, None if file is None else str(file), option="--suite.file")
        asked = [problem for problem in problems if self.test is None or _number(problem.name) in self.test]
        if len(asked) < len(problems):
            say(f"{self.name}: {len(problems) - len(asked)} problems outside of the test split are left out")
        return [
            Question(
                problem.name,
                self.task,
                ((_user(f"{ask}\n```python\n{problem.prompt.rstrip()}\n```"),),),
                text=problem.prompt,
            )
            for problem in asked
        ]


class FilePrompts(Suite):
    """Prompts of a file: text to continue, or conversations; each line may name its `category`."""

    name = "prompts"

    def read(self, file: Path | None) -> list[Question]:
        """Return the prompts of a file in the form of `read_prompt_file`."""
        if file is None:
            raise UsageError("the task prompts needs a file; name it with --prompts")
        found = []
        for number, prompt in enumerate(read_prompt_file(file), start=1):
            name, category = str(number), prompt.category or self.name
            if prompt.conversation is None:
                found.append(Question(name, category, text=prompt.text))
                continue
            messages = list(prompt.conversation.messages)
            while messages and messages[-1]["role"] == ASSISTANT:
                messages.pop()
            if not messages:
                raise UsageError(f"{prompt.place}: asks nothing; remove it")
            found.append(Question(name, category, (tuple(messages),), tools=prompt.conversation.tools))
        return found


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        SpecBench(),
        MTBench(),
        GSM8K(),
        CodePrompts("humaneval", "humaneval/HumanEval.jsonl.gz"),
        CodePrompts("mbpp", "mbpp/mbpp.jsonl", MBPP_TEST),
        FilePrompts(),
    )
}
"""All suites by name."""


def spread(questions: Sequence[Question]) -> list[int]:
    """Return the order in which questions are asked: the first N of it are spread over all categories.

    Categories take turns. Within one, a number multiplied by the golden ratio orders the questions, so that any first
    ones lie apart, and more of them include fewer.
    """
    of_category: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        of_category.setdefault(question.category, []).append(number)
    ranked = []
    for turn, numbers in enumerate(of_category.values()):
        order = sorted(range(len(numbers)), key=lambda i: i * GOLDEN % 1)
        ranked += [(rank, turn, numbers[i]) for rank, i in enumerate(order)]
    return [number for _, _, number in sorted(ranked)]


def _number(name: str) -> int:
    """Return the number at the end of a problem's name, -1 without one."""
    last = name.rpartition("/")[2]
    return int(last) if last.isdecimal() else -1


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line. Raise UsageError, naming the line, for anything else."""
    for place, row in read_placed_records(file):
        if SURROGATE.search(json.dumps(row, ensure_ascii=False)):
            raise UsageError(f"{place}: holds half of a surrogate pair, which is not text; correct that line")
        yield place, row
