"""Problems in every format, and `headstart evaluate --tasks humaneval` from end to end: kept, resumed, refused."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from headstart import cli
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation.code import seccomp
from headstart.evaluation.code.problems import CodeProblem, final_number, load_problems, load_shots
from headstart.evaluation.code.sandbox import Sandbox
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not seccomp.is_available(), reason="this system has no filter of system calls")
DATA = Path(__file__).parents[4] / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2) as sandbox:
        yield sandbox


def right(sandbox: Sandbox, problem: CodeProblem, completion: str) -> bool:
    return problem.agrees(sandbox.run(problem.programs(completion)))


HUMANEVAL = {
    "task_id": "made/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {
    "text": "Write add.",
    "task_id": 7,
    "test_setup_code": "p = P(1)",
    "test_list": ["assert add(p.x, 2) == 3"],
}
APPS = {"problem_id": 3, "difficulty": "introductory", "question": "Add.", "starter_code": ""}
CASES = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}
CALLED = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]}
CONTEST = {
    "name": "1_A. Add",
    "description": "Add two numbers.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["3 4\n"], "output": ["7.0\n"]},
    "generated_tests": None,
    "time_limit": {"seconds": 2, "nanos": 500000000},
}
SUM = "print(sum(map(int, open(0).read().split())))"
ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    "task, row, good, bad",
    [
        ("humaneval", HUMANEVAL, "    return a + b", "    return a - b"),
        ("mbpp", HUMANEVAL, "    return a + b", "    return a"),  # CodeT's form
        ("mbpp", MBPP, f"class P:\n    def __init__(self, x): self.x = x\n{ADD}", ADD),
        ("apps-introductory", APPS | {"input_output": json.dumps(CASES)}, SUM, "print(3)"),
        ("apps-introductory", APPS | {"input_output": CALLED}, ADD, "def add(a, b): return 3"),
        ("apps-introductory", APPS | {"input_output": CALLED}, f"class Solution:\n {ADD}".replace("(a", "(s, a"), "x"),
        ("codecontests", CONTEST, SUM, "print(3)"),
    ],
)
def test_every_format_tells_right_from_wrong(tmp_path, sandbox, task, row, good, bad) -> None:
    (problem,) = load_problems(task, write(tmp_path / "made.jsonl", row))
    good = good.replace("\n    return", "\n     return") if "Solution" in good else good
    assert right(sandbox, problem, good) and not right(sandbox, problem, bad) and not right(sandbox, problem, "")
    if task == "codecontests":
        assert problem.seconds == 2.5 and len(problem.cases) == 2


def test_other_difficulties_are_passed_over_and_a_limit_is_kept(tmp_path) -> None:
    rows = [APPS | {"problem_id": i, "input_output": CASES} for i in range(4)]
    rows[1]["difficulty"] = "interview"
    file = write(tmp_path / "apps.jsonl", *rows)
    assert [p.name for p in load_problems("apps-introductory", file)] == ["apps/0", "apps/2", "apps/3"]
    assert len(load_problems("apps-introductory", file, limit=2)) == 2


@pytest.mark.parametrize(
    "lines, words",
    [
        (
            ['{"task_id": 1, "prompt": "x"}'],
            "problem 1: has no field 'entry_point', which humaneval needs; it has task_id, pr",
        ),
        (["[1]"], "line 1: is not a JSON object"),
        (["{"], "is not JSON lines in UTF-8"),
        ([], "holds no problem of humaneval"),
        ([json.dumps(HUMANEVAL)] * 2, "holds problem made/0 twice"),
    ],
)
def test_a_file_that_is_wrong_is_named_by_its_place(tmp_path, lines, words) -> None:
    (tmp_path / "made.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UsageError, match=re.escape(words)):
        load_problems("humaneval", str(tmp_path / "made.jsonl"))


def test_numbers_of_any_length_and_infinite_ones_are_tests(sandbox, tmp_path) -> None:
    """APPS holds numbers of 9,131 digits, which Python's json refuses to read and repr to write by themselves."""
    digits, before = "1" + "0" * 9000, sys.get_int_max_str_digits()
    one = APPS | {"problem_id": 1, "input_output": f'{{"fn_name": "f", "inputs": [[{digits}]], "outputs": [{digits}]}}'}
    infinite = {"fn_name": "f", "inputs": [[float("inf"), [{"a": -float("inf")}]]], "outputs": [float("inf")]}
    two = APPS | {"problem_id": 2, "input_output": json.dumps(infinite)}
    row = json.dumps(APPS | {"problem_id": 3, "input_output": "PLACE"})
    three = row.replace('"PLACE"', f'{{"inputs": [[{digits}]], "outputs": [[{digits}]]}}')
    (tmp_path / "apps.jsonl").write_text("\n".join([json.dumps(one), json.dumps(two), three]), encoding="utf-8-sig")
    problems = load_problems("apps-introductory", str(tmp_path / "apps.jsonl"))
    assert sys.get_int_max_str_digits() == before
    programs = ["inf = 7\ndef f(x):\n    return x\n", "inf = 7\ndef f(x, y):\n    return x + inf - 7\n"]
    programs.append("print(int(input()))\n")
    for problem, program in zip(problems, programs, strict=True):
        verdicts = sandbox.run(problem.programs(program))
        assert problem.agrees(verdicts), (problem.name, verdicts)


@pytest.mark.parametrize(
    "empty", ["", None, '{"inputs": [], "outputs": []}', {"fn_name": "f", "inputs": [], "outputs": []}]
)
def test_problems_without_a_test_are_left_out_and_counted(tmp_path, capsys, empty) -> None:
    rows = [APPS | {"problem_id": 0, "input_output": empty}, APPS | {"problem_id": 1, "input_output": CASES}]
    assert [p.name for p in load_problems("apps-introductory", write(tmp_path / "a.jsonl", *rows))] == ["apps/1"]
    assert "1 problems without a test are left out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="holds no problem"):
        load_problems("mbpp", write(tmp_path / "m.jsonl", {"task_id": 1, "text": "x", "test_list": []}))


def test_unequal_numbers_of_inputs_and_outputs_of_a_function_are_refused(tmp_path) -> None:
    row = APPS | {"input_output": {"fn_name": "f", "inputs": [[1], [2]], "outputs": [1]}}
    with pytest.raises(UsageError, match="2 inputs and 1 outputs"):
        load_problems("apps-introductory", write(tmp_path / "apps.jsonl", row))


def test_what_cannot_be_had_says_how_else(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"gone.jsonl: cannot be read \(No such file or directory\)"):
        load_problems("mbpp", str(tmp_path / "gone.jsonl"))
    with pytest.raises(UsageError, match=r"or give the problems as a file: --code.source mbpp.jsonl"):
        load_problems("mbpp", f"hf:{tmp_path}/gone")
    wrong = APPS | {"input_output": {"inputs": ["1"], "outputs": []}}
    with pytest.raises(
        UsageError, match=r"problem 1: is not in the form of apps-introductory \(1 inputs and 0 outputs"
    ):
        load_problems("apps-introductory", write(tmp_path / "apps.jsonl", wrong))


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_solutions_of_the_real_ones_pass(sandbox, name) -> None:
    file = DATA / {"humaneval": "humaneval/HumanEval.jsonl.gz", "mbpp": "mbpp/mbpp.jsonl"}[name]
    if not file.is_file():
        pytest.skip(f"{name} is not here")
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        rows = [json.loads(line) for line in lines]
    problems = load_problems(name, str(file))
    # Of MBPP a few, among them the two that need their set-up code behind the program.
    chosen = range(len(rows)) if name == "humaneval" else [*range(0, len(rows), 40), 366, 926]
    solutions = [rows[i]["canonical_solution" if name == "humaneval" else "code"] for i in chosen]
    programs = [problems[i].programs(solution)[0] for i, solution in zip(chosen, solutions)]
    assert [v for v in sandbox.run(programs) if not v.passed] == []


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(dim=16, layers=2, attention_heads=2, context=64, heads=3, head_kind="replicated")
    save_model(Transformer(config), tmp_path / "model", ByteTokenizer())
    return tmp_path / "model"


def evaluate(monkeypatch, directory, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "evaluate", *map(str, (directory, *arguments))])
    cli.main()


def test_an_evaluation_is_kept_and_gone_on_from(directory, tmp_path, monkeypatch, capsys) -> None:
    rows = [HUMANEVAL | {"task_id": f"made/{i}"} for i in range(3)]
    out = tmp_path / "out"
    arguments = ("--tasks", "humaneval", "--code.source", write(tmp_path / "made.jsonl", *rows), "--out", out)
    arguments += ("--code.samples", 4, "--code.k", 1, 4, 10, "--code.new-tokens", 12, "--batch", 5)
    arguments += ("--code.temperatures", 0, 1, "--code.compare-plain", "--json")
    # An earlier run was killed in the middle of a line: it wrote right programs, and one that is not.
    (out / "humaneval").mkdir(parents=True)
    samples = [("made/0", 0, "    return a + b"), ("made/0", 2, "    return b + a"), ("made/1", 1, "    return a")]
    lines = [json.dumps({"problem": p, "sample": i, "completion": c, "finish": "stop"}) for p, i, c in samples]
    (out / "humaneval" / "samples-1.jsonl").write_text("\n".join(lines) + '\n{"problem": "made/2", "sam')
    evaluate(monkeypatch, directory, *arguments)
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    code = found["code"]["humaneval"]
    greedy, sampled = code["temperatures"]["0"], code["temperatures"]["1"]
    assert greedy["samples"] == 1 and greedy["written"] == 3 and greedy["plain_differs"] == 0
    assert sampled["samples"] == 4 and sampled["written"] == 9 and sampled["plain_differs"] == 0
    assert sampled["verdicts"] == {"failed": 10, "passed": 2}  # a random model writes no program
    assert sampled["pass@1"]["value"] == pytest.approx(2 / 12) and sampled["pass@4"]["value"] == pytest.approx(1 / 3)
    assert "pass@4" not in greedy and "pass@10" not in sampled and code["oracle"]["pass@4"]["temperature"] == 1
    first = {file.name: file.read_text() for file in (out / "humaneval").iterdir()}
    assert (
        first["samples-1.jsonl"].startswith("\n".join(lines) + "\n")
        and len(first["samples-1.jsonl"].splitlines()) == 12
    )

    # Again: nothing is written or run anew. In other batches: the same programs.
    evaluate(monkeypatch, directory, *arguments)
    assert json.loads(capsys.readouterr().out) == found
    assert first == {file.name: file.read_text() for file in (out / "humaneval").iterdir()}
    (out / "humaneval" / "samples-1.jsonl").write_text("\n".join(lines) + "\n")
    evaluate(monkeypatch, directory, *arguments, "--batch", 1)
    again = (out / "humaneval" / "samples-1.jsonl").read_text()
    assert sorted(again.splitlines()) == sorted(first["samples-1.jsonl"].splitlines())
    for name in ("results.md", "results.html"):
        assert "33.3%" in (out / name).read_text() and "best of them" in (out / name).read_text()


def test_what_it_refuses(directory, tmp_path, monkeypatch, capsys) -> None:
    file = write(tmp_path / "made.jsonl", HUMANEVAL | {"prompt": "# " + "x" * 60 + "\n"})
    usual = ("--tasks", "humaneval", "--code.source", file, "--out", tmp_path / "out", "--code.new-tokens", 8)

    def refused(words: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as end:
            evaluate(monkeypatch, directory, *arguments)
        assert end.value.code == 2
        assert re.search(words, error := capsys.readouterr().err), error

    refused("humaneval keeps what the model writes; name a folder for it with --out", *usual[:4])
    refused("1 of 1 prompts are longer than the 56 tokens that the context 64 leaves next to 8 new ones", *usual)
    refused("--code.new-tokens 64 leaves no room for a prompt", *usual, "--code.new-tokens", 64)
    refused("--code.samples is 0", *usual, "--code.samples", 0)
    refused("--code.temperatures must be one or more different", *usual, "--code.temperatures", 1, 1)
    refused("--code.k must be", *usual, "--code.k", 0)
    refused("--code.source is for one set", *usual, "--tasks", "humaneval", "mbpp")
    cut = (*usual, "--code.cut-prompts", "--code.samples", 1)
    evaluate(monkeypatch, directory, *cut)
    assert "of 1 prompts only the end fits" in capsys.readouterr().out
    refused("holds samples with top_p 0.95, not 0.5; name another --out", *cut, "--code.top-p", 0.5)
    with (tmp_path / "out" / "humaneval" / ".lock").open("a") as lock:
        from headstart.fileio import take_lock

        assert take_lock(lock)
        refused("another run is writing there", *cut)


GSM8K = [
    {"question": f"{a} + {b}?", "answer": f"Add <<{a}+{b}={a + b}>>.\n#### {a + b:,}"} for a, b in ((1, 2), (900, 334))
]


@pytest.mark.parametrize(
    "solution, number",
    [
        ("He has 2 + 1,200 = 1,202.50 dollars", "1202.5"),
        ("#### 1,234\nQuestion 7", "1234"),
        ("It is -3.", "-3"),
        ("#### 5.00", "5"),
        ("none", ""),
    ],
)
def test_final_numbers_of_solutions(solution: str, number: str) -> None:
    assert final_number(solution) == number


def test_answers_of_gsm8k_are_judged_by_their_last_number(directory, tmp_path, monkeypatch, capsys) -> None:
    file, out = write(tmp_path / "test.jsonl", *GSM8K), tmp_path / "out"
    arguments = ("--tasks", "gsm8k-answers", "--code.source", file, "--out", out, "--code.new-tokens", 8, "--json")
    arguments += ("--code.samples", 3, "--code.k", 1, 3, "--code.temperatures", 0.5, 1, "--code.cut-prompts")
    (out / "gsm8k-answers").mkdir(parents=True)
    for temperature, samples in {0.5: ["#### 3", "so 3", "4", "#### 1,234.0", "x", "y"], 1: ["3"] * 6}.items():
        lines = [
            {"problem": f"gsm8k/{1 + i // 3}", "sample": i % 3, "completion": text, "finish": "stop"}
            for i, text in enumerate(samples)
        ]
        write(out / "gsm8k-answers" / f"samples-{temperature:g}.jsonl", *lines)
    examples = ("--code.shots", 2, "--code.examples", write(tmp_path / "train.jsonl", *GSM8K))
    evaluate(monkeypatch, directory, *arguments, *examples)
    code = json.loads(capsys.readouterr().out)["code"]["gsm8k-answers"]
    cool, warm = code["temperatures"]["0.5"], code["temperatures"]["1"]
    assert cool["verdicts"] == {"passed": 3, "no answer": 2, "wrong answer": 1}
    assert cool["pass@1"]["value"] == pytest.approx((2 / 3 + 1 / 3) / 2) and cool["pass@3"]["value"] == 1
    assert warm["pass@1"]["value"] == warm["pass@3"]["value"] == 0.5
    assert code["oracle"]["pass@3"]["temperature"] == 0.5


def test_shots_of_gsm8k_precede_every_question(tmp_path) -> None:
    file = write(tmp_path / "train.jsonl", *GSM8K)
    shots = load_shots("gsm8k-answers", file, 1)
    (first, _) = load_problems("gsm8k-answers", file, examples=shots)
    assert first.prompt == f"Question: 1 + 2?\nAnswer: {GSM8K[0]['answer']}\n\nQuestion: 1 + 2?\nAnswer:"
    with pytest.raises(UsageError, match="holds 2 problems, not 8; take fewer"):
        load_shots("gsm8k-answers", file, 8)
    with pytest.raises(UsageError, match="leave it out for humaneval"):
        load_shots("humaneval", file, 1)
    with pytest.raises(UsageError, match="its answer has no number"):
        load_problems("gsm8k-answers", write(tmp_path / "bad.jsonl", {"question": "?", "answer": "yes"}))
