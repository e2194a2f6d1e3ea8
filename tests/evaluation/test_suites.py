"""Suites of prompts: what their files hold, what is refused, and which questions a limit keeps."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from headstart.errors import UsageError
from headstart.evaluation.published import PUBLISHED
from headstart.evaluation.suites import FOLDER_VARIABLE, SUITES, Question, spread

MT, OTHER = ("writing", "math"), ("qa", "rag")


def write(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def spec_bench(path: Path, each: int = 4) -> Path:
    rows = []
    for category in (*MT, *OTHER):
        turns = ["first?", "second?"] if category in MT else ["only?"]
        rows += [{"question_id": len(rows) + i, "category": category, "turns": turns} for i in range(each)]
    return write(path, rows)  # type: ignore[arg-type]


def test_spec_bench_holds_all_and_mt_bench_its_part(tmp_path, monkeypatch) -> None:
    file = spec_bench(tmp_path / "spec_bench" / "question.jsonl")
    whole = SUITES["spec-bench"].questions(file)
    assert Counter(q.category for q in whole) == dict.fromkeys((*MT, *OTHER), 4)
    assert [len(q.turns) for q in whole] == [2] * 8 + [1] * 8
    assert whole[0].turns[1] == ({"role": "user", "content": "second?"},)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))  # the folder stands in for the flag
    assert SUITES["mt-bench"].questions(None) == whole[:8]
    assert {SUITES["spec-bench"].groups.get(q.category) for q in whole} == {"mt-bench", None}
    assert not SUITES["mt-bench"].groups


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ({"question_id": 1, "category": "qa", "turns": "only?"}, 'line 2: "turns" is no list of questions'),
        ({"question_id": 1, "category": "qa", "turns": []}, 'line 2: "turns" is no list of questions'),
        ({"question_id": 1, "category": "qa", "turns": ["a", " "]}, 'line 2: "turns" is no list of questions'),
        ({"category": "qa", "turns": ["a"]}, 'line 2: has no "question_id" and "category"'),
        ({"question_id": 0, "category": "qa", "turns": ["a"]}, "holds question 0 twice"),
        ('{"question_id": 1, "category": "qa", "turns": ["\\ud800"]}', "line 2: holds half of a surrogate pair"),
    ],
)
def test_broken_rows_are_named_by_line(tmp_path, row, words) -> None:
    file = write(tmp_path / "q.jsonl", [{"question_id": 0, "category": "qa", "turns": ["a?"]}, row])
    with pytest.raises(UsageError, match=words):
        SUITES["spec-bench"].questions(file)


def test_other_files(tmp_path) -> None:
    gsm = write(tmp_path / "g.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    assert SUITES["gsm8k"].questions(gsm) == [Question("gsm8k/1", "gsm8k", (({"role": "user", "content": "2 + 2?"},),))]
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    [code] = SUITES["humaneval-prompts"].questions(tmp_path / "h.jsonl.gz")
    assert code.text == "def f():\n" and "```python\ndef f():\n```" in str(code.turns[0][0]["content"])
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "Once"}, {"messages": said, "category": "chat"}, {"text": "Twice", "category": "tales"}]
    plain, chat, tales = SUITES["prompts"].questions(write(tmp_path / "p.jsonl", rows))  # type: ignore[arg-type]
    assert (plain.text, plain.category, plain.turns) == ("Once", "prompts", ())
    assert (chat.turns, chat.category) == (((said[0],),), "chat")  # up to the last question
    assert tales.category == "tales"


@pytest.mark.parametrize("name", ["{}", "MbppEval/{}"])  # the authors' form, and CodeT's
def test_mbpp_asks_only_the_test_split(tmp_path, capsys, name) -> None:
    ids = [n if name == "{}" else name.format(n) for n in (1, 10, 11, 510, 511, 974)]
    file = write(tmp_path / "m.jsonl", [{"task_id": i, "text": f"{i}?", "test_list": ["assert f()"]} for i in ids])
    found = SUITES["mbpp-prompts"].questions(file)
    assert [q.name for q in found] == [f"mbpp/{ids[2]}", f"mbpp/{ids[3]}"]
    assert "4 problems outside of the test split are left out" in capsys.readouterr().err
    training = write(tmp_path / "t.jsonl", [{"task_id": 601, "text": "?", "test_list": ["assert f()"]}])
    with pytest.raises(UsageError, match="holds no question of mbpp-prompts"):
        SUITES["mbpp-prompts"].questions(training)


def test_files_that_are_no_suites(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(UsageError, match="holds no question of mt-bench"):
        SUITES["mt-bench"].questions(write(tmp_path / "q", [{"question_id": 1, "category": "qa", "turns": ["a"]}]))
    with pytest.raises(UsageError, match='line 1: has no "question"'):
        SUITES["gsm8k"].questions(write(tmp_path / "g", [{"prompt": "a"}]))
    with pytest.raises(UsageError, match=r"holds no problem of mbpp; name its file with --suite.file"):
        SUITES["mbpp-prompts"].questions(write(tmp_path / "m", []))
    with pytest.raises(UsageError, match=r"needs a file; name it with --prompts"):
        SUITES["prompts"].questions(None)
    with pytest.raises(UsageError, match="cannot be read"):
        SUITES["spec-bench"].questions(tmp_path / "gone.jsonl")


def test_without_network_the_fix_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    suite = SUITES["spec-bench"]
    monkeypatch.setattr(suite, "url", (tmp_path / "gone.jsonl").as_uri(), raising=False)
    with pytest.raises(UsageError, match=r"spec-bench: cannot be fetched .*--suite.file, or put spec_bench/question"):
        suite.questions(None)
    file = spec_bench(tmp_path / "there.jsonl")
    monkeypatch.setattr(suite, "url", file.as_uri(), raising=False)
    found = suite.questions(None)
    file.unlink()  # the second time it comes from the cache
    assert suite.questions(None) == found and len(found) == 16


def test_the_first_questions_are_spread() -> None:
    questions = [Question(f"{c}{i}", c) for c, n in (("a", 100), ("b", 5), ("c", 5)) for i in range(n)]
    order = spread(questions)
    assert sorted(order) == list(range(110))
    assert Counter(questions[i].category for i in order[:12]) == {"a": 4, "b": 4, "c": 4}
    of_a = sorted(i for i in order[:12] if i < 100)
    assert min(b - a for a, b in pairwise(of_a)) >= 10  # not the first four
    assert spread(questions) == order


def test_published_results_belong_to_suites_and_name_their_source() -> None:
    assert {each.task for each in PUBLISHED} <= set(SUITES)
    for each in PUBLISHED:
        assert each.model and each.setting and each.source and (each.tau or each.speedup)
        assert re.search("arXiv|github|pull request|SpecBundle|README", each.source)


@pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"{FOLDER_VARIABLE} names no folder with files of suites")
def test_real_files() -> None:
    sizes = {name: len(suite.questions(None)) for name, suite in SUITES.items() if suite.file}
    assert sizes["spec-bench"] == 480 and sizes["mt-bench"] == 80 and sizes["gsm8k"] == 1319
    assert sizes["humaneval-prompts"] == 164 and sizes["mbpp-prompts"] == 500
    whole = SUITES["spec-bench"].questions(None)
    assert len({q.category for q in whole}) == 13
    assert len({SUITES["spec-bench"].groups.get(q.category, q.category) for q in whole}) == 6
    assert len({whole[i].category for i in spread(whole)[:13]}) == 13
