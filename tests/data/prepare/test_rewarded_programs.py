"""CodeContests' programs with their rewards, prepared for finetuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.data.prepare.documents import rewarded_programs
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation.code.problems import load_problems

ROW: dict[str, Any] = {
    "name": "1_A",
    "description": "Print the sum.\n",
    "solutions": {"language": [3, 2, 1], "solution": ["print(1 + 1)\n", "int main() {}", "print 2"]},
    "incorrect_solutions": {"language": [3], "solution": ["\nprint(3)"]},
    "public_tests": {"input": [""], "output": ["2"]},
}
QUESTION = '"""\nPrint the sum.\n"""\n'
DOCUMENTS = [
    QUESTION + "# correct\nprint(1 + 1)\n",
    QUESTION + "# correct\nprint 2\n",
    QUESTION + "# incorrect\nprint(3)\n",
]
REWARDS = Selection(rewards=True)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_in(folder: Path, split: str) -> list[str]:
    shards = TokenShards.open(folder, split)
    return [bytes(shards.document(i)[:-1].tolist()).decode() for i in range(len(shards.documents))]


def test_python_programs_with_their_rewards() -> None:
    assert list(rewarded_programs(ROW, "here")) == DOCUMENTS
    assert list(rewarded_programs({"description": "x", "solutions": None}, "here")) == []


def test_the_prompt_of_evaluation_begins_such_a_text(tmp_path: Path) -> None:
    source = str(written(tmp_path / "problems.jsonl", ROW))
    (plain,) = load_problems("codecontests", source)
    (asked,) = load_problems("codecontests", source, rewarded=True)
    assert (plain.prompt, asked.prompt) == (QUESTION, QUESTION + "# correct\n")
    assert DOCUMENTS[0].startswith(asked.prompt)


def test_prepared_a_program_is_a_document_and_no_problem_is_in_two_splits(tmp_path: Path) -> None:
    rows = [{**ROW, "description": f"Problem {i}."} for i in range(20)]
    rows += [{"description": "In C alone.", "solutions": {"language": [2], "solution": ["int main() {}"]}}]
    source = written(tmp_path / "problems.jsonl", *rows)
    said: list[str] = []
    settings = Preparation(selection=REWARDS, validation_fraction=0.3)
    prepare([str(source)], tmp_path / "a", ByteTokenizer(), settings, report=said.append)
    train, validation = (texts_in(tmp_path / "a", split) for split in ("train", "validation"))
    problems = [{text.split("\n")[1] for text in documents} for documents in (train, validation)]
    assert len(train) + len(validation) == 60 and not problems[0] & problems[1]
    assert all(problems) and train[:3] == [
        text.replace("Print the sum.", train[0].split("\n")[1]) for text in DOCUMENTS
    ]
    assert "1 without a program in Python" in said[-1]


def test_from_parquet_and_from_a_folder_with_other_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "problems.parquet")
    (tmp_path / "notes.txt").write_text("no problem")
    prepare([str(tmp_path)], tmp_path / "out", ByteTokenizer(), Preparation(selection=REWARDS, validation_fraction=0))
    assert texts_in(tmp_path / "out", "train") == DOCUMENTS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, 'line 1: no text in field "description"; --rewards takes'),
        ({**ROW, "solutions": ["print(2)"]}, 'line 1: field "solutions" is not in the form'),
        ({**ROW, "solutions": {"language": [3], "solution": []}}, 'line 1: field "solutions" is not in the form'),
    ],
)
def test_rows_of_another_form_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = str(written(tmp_path / "problems.jsonl", row))
    with pytest.raises(UsageError, match=message):
        prepare([source], tmp_path / "out", ByteTokenizer(), Preparation(selection=REWARDS))
    with pytest.raises(UsageError, match="take --rewards without another field"):
        prepare([source], tmp_path / "out", ByteTokenizer(), Preparation(selection=Selection("body", rewards=True)))
