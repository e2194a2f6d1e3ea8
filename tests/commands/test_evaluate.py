"""`headstart evaluate` from end to end, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from chats import chat_tokenizer

import headstart
from headstart import cli
from headstart.commands import tune
from headstart.commands.evaluate import EvaluateSettings, evaluate
from headstart.commands.inspect import format_inspection, inspect
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Sampling
from headstart.evaluation.free_running import run_freely
from headstart.evaluation.inputs import FilePrompts
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(dim=16, layers=2, attention_heads=2, context=64, heads=3, head_kind="replicated")
    save_model(Transformer(config), tmp_path / "model", ByteTokenizer())
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    return tmp_path / "model"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "evaluate", *map(str, arguments)])
    cli.main()


def test_all_of_it(directory, tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "text"
    sizes = ("--prompt-tokens", 12, "--new-tokens", 20, "--prompt-count", 5, "--batch", 2)
    run(monkeypatch, directory, "--text", text, *sizes, "--out", tmp_path / "out", "--record", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["heads"]["documents"] == 3
    assert found["heads"]["bytes"] == sum(file.stat().st_size for file in text.iterdir())
    assert found["heads"]["tokens"] == found["heads"]["bytes"]  # a byte a token, and the first one is predicted too
    assert all(6 < bits < 10 for bits in found["heads"]["bits_per_byte"])  # it was not trained
    greedy = found["acceptance"]["greedy"]
    assert (found["acceptance"]["prompts"], greedy["tokens"]) == (5, 5 * 20)
    assert greedy["tokens_per_pass"] == pytest.approx(greedy["tokens"] / greedy["passes"])
    assert found["acceptance"]["temperature 0.8"]["tokens"] == 5 * 20
    page = (tmp_path / "out" / "results.md").read_text()
    assert "bits per byte" in page and "repeated 8-grams" in page and "heads 2..k right" in page
    shown = format_inspection(inspect(directory))
    assert "free-running, greedy" in shown and f"{greedy['tokens_per_pass']:.3f}" in shown


def test_a_suite_writes_tables_figures_and_records(directory, tmp_path, monkeypatch, capsys) -> None:
    rows = [{"question_id": i, "category": c, "turns": ["a?"] * n} for i, (c, n) in enumerate((("math", 2), ("qa", 1)))]
    (tmp_path / "spec_bench").mkdir()
    (tmp_path / "spec_bench" / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HEADSTART_SUITES", str(tmp_path))
    out = tmp_path / "out"
    suite = ("--tasks", "spec-bench", "--suite.raw", "--max-new-tokens", 8, "--limit", 2, "--out", out)
    run(monkeypatch, directory, *suite, "--json")
    found = json.loads(capsys.readouterr().out)
    overall = found["suites"]["spec-bench"]["temperatures"]["1"]["parts"][0]
    assert overall["equal"] == overall["answers"] == 3
    metrics = overall["speculative_decoding"]  # the names of vLLM
    assert {"draft_acceptance_rate", "num_accepted_draft_tokens", "num_draft_tokens", "num_spec_tokens"} <= set(metrics)
    assert {"mean_acceptance_length", "acceptance_histogram", "num_spec_steps"} <= set(metrics)
    run(monkeypatch, directory, *suite)  # made again from the records
    shown = capsys.readouterr().out
    for words in (
        "3 of 3 outputs equal",
        "mt-bench",
        "· math",
        "overall",
        "speed-up",
        "[1] 2.31 / 1.71x",
        "up to 3 heads, by",
    ):
        assert words in shown
    page = (out / "results.md").read_text()
    assert "| category | prompts | tokens per pass |" in page and "## spec-bench" in page
    if find_spec("matplotlib"):
        assert "(spec-bench.png)" in page and (out / "spec-bench.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "results.html").read_text()


def test_text_of_conversations_counts_answers_alone(tmp_path) -> None:
    """The score of a conversation is that of its text, read whole, with answers and ends of turns as targets."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=264, dim=16, layers=2, attention_heads=2, context=64, heads=2, head_kind="linear")
    save_model(Transformer(config), tmp_path / "model", tokenizer)
    said = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "he hello"}]
    rows = [{"messages": said}, {"text": "plain text"}, {"messages": said[:1]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(text=(str(tmp_path / "chats.jsonl"),), tasks=("heads",))
    found = evaluate(tmp_path / "model", settings)["heads"]

    written = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\nhe hello<|im_end|>\n"
    ids, plain = [*tokenizer.encode(written), tokenizer.end_id], tokenizer.encode("plain text")
    answer = len(tokenizer.encode(written[: written.index("he hello")]))
    targets = [answer <= i < len(ids) - 2 for i in range(len(ids))]
    assert found["documents"] == 2
    assert found["tokens"] == sum(targets) + len(plain) - 1
    assert found["bytes"] == len("he hello") + len("plain text")
    model = load_model(tmp_path / "model").eval()
    with torch.no_grad():
        logits = [model(torch.tensor([row]), heads=1)[0, :-1, 0].double().log_softmax(-1) for row in (ids, plain)]
    nats = -sum(float(logits[0][i - 1, ids[i]]) for i in range(len(ids)) if targets[i])
    nats -= sum(float(logits[1][i - 1, plain[i]]) for i in range(1, len(plain)))
    per_token = nats / math.log(2) / found["tokens"]  # the first token of the text, not predicted, counts as much
    assert found["bits_per_byte"][0] == pytest.approx(per_token * (found["tokens"] + 1) / found["bytes"], rel=1e-5)


def test_text_without_a_known_field_names_no_option_it_lacks(directory, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(SystemExit):
        run(monkeypatch, directory, "--text", tmp_path / "rows.jsonl")
    told = capsys.readouterr().err
    assert 'no field "text"' in told and "question" in told
    assert "--text-field" not in told or "headstart prepare" in told


def test_in_q8_it_is_nearly_the_same(directory, tmp_path) -> None:
    settings = EvaluateSettings(text=(str(tmp_path / "text"),), prompt_count=2, prompt_tokens=8, new_tokens=8)
    plain, q8 = (evaluate(directory, replace(settings, quantize=quantize)) for quantize in (None, "q8"))
    assert q8["quantize"] == "q8" and "quantize" not in plain
    bits = [found["heads"]["bits_per_byte"] for found in (plain, q8)]
    assert bits[0] != bits[1] and bits[1] == pytest.approx(bits[0], rel=0.01)
    assert q8["acceptance"]["greedy"]["tokens"] == 16


def test_free_running_counts_what_the_engine_counts(directory) -> None:
    model = pack(load_model(directory))
    prompts = [(1, 2, 3), (100, 32)]
    found = run_freely(Engine(model, EngineConfig(slots=1)), prompts, 16, 0.0)
    alone = generate_all(
        Engine(model, EngineConfig(slots=1)), [Request(p, 16, Sampling(0.0, seed=i)) for i, p in enumerate(prompts)]
    )
    assert found.passes == sum(g.stats.passes for g in alone)
    assert found.acceptance == [
        sum(g.stats.accepted[i] for g in alone) / sum(g.stats.drafted[i] for g in alone) for i in range(2)
    ]


def test_free_running_and_tune_end_at_the_end_of_a_turn(directory, monkeypatch) -> None:
    loaded = headstart.load(directory)
    prompt = (1, 2, 3)
    whole = generate_all(Engine(loaded.transformer, EngineConfig(slots=1)), [Request(prompt, 16, Sampling(0.0))])[
        0
    ].tokens
    turn_end = frozenset([whole[4]])
    kept = whole.index(whole[4]) + 1
    assert (
        run_freely(Engine(loaded.transformer, EngineConfig(slots=1)), [prompt], 16, 0.0, ends=[turn_end]).tokens
        <= kept
        < 16
    )
    asked: list[Request] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, request: (asked.append(request), submit(engine, request))[1])
    tune.measure_acceptance(loaded, FilePrompts([prompt, prompt], ends=[turn_end, frozenset()]), 4, 0.0, 0)
    assert [request.ends for request in asked] == [turn_end, frozenset()]


def test_its_own_prompts_come_first(directory, tmp_path) -> None:
    (directory / "prompts.jsonl").write_text('{"prompt": "abcdef"}\n')
    settings = EvaluateSettings(tasks=("acceptance",), prompt_tokens=4, new_tokens=5)
    assert evaluate(directory, settings)["acceptance"]["prompts"] == 1


def test_sizes_nobody_gave_fit_the_context(directory, tmp_path) -> None:
    settings = EvaluateSettings(text=(str(tmp_path / "text"),), tasks=("acceptance",), prompt_count=2)
    found = evaluate(directory, settings)["acceptance"]
    assert (found["prompt_tokens"], found["new_tokens"], found["greedy"]["tokens"]) == (32, 32, 64)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "name what to evaluate on"),
        (("--text", "gone"), "no such file or folder"),
        (
            ("--text", "text", "--tasks", "speed"),
            "no task 'speed'; take heads, acceptance, spec-bench, .*humaneval-prompts, .*humaneval",
        ),
        (("--text", "text", "--batch", 0), "--batch is 0"),
        (("--text", "text", "--quantize", "q4", "--record"), "leave --quantize out"),
        (("--text", "text", "--prompt-tokens", 900), "900 .* more than the model's context 64; ask for fewer"),
        (("--text", "text", "--prompt-tokens", 40, "--new-tokens", 25), "40 .* 25: more than the model's context 64"),
        (("--text", "text", "--length", 65), "between 2 and the model's context 64"),
        (("--tasks", "acceptance", "--prompts", "gone.txt"), "cannot be read"),
        (("--tasks", "spec-bench", "--limit", -1), r"--prompt-count \(--limit\) is -1"),
        (("--tasks", "spec-bench", "--max-new-tokens", 0), r"--new-tokens \(--max-new-tokens\) is 0"),
        (("--tasks", "spec-bench", "--suite.temperatures", -1), "temperature is -1"),
        (("--tasks", "spec-bench", "--suite.temperatures", 1, 1), "one or more different numbers"),
        (("--tasks", "spec-bench", "--suite.acceptance", "luck"), "there is no acceptance 'luck'"),
        (("--tasks", "spec-bench", "--suite.heads", 4), "heads is 4; this model has 3"),
        (("--tasks", "spec-bench", "--suite.file", "gone.jsonl"), "gone.jsonl: cannot be read"),
        (("--tasks", "spec-bench", "--suite.file", "q.jsonl"), "has no chat template.*--suite.raw"),
        (("--tasks", "spec-bench", "gsm8k", "--suite.file", "q.jsonl"), "--suite.file is for one set of prompts"),
        (("--tasks", "spec-bench", "--long-prompts", "start"), "--long-prompts start would cut off what a suite asks"),
        (("--tasks", "acceptance", "--url", "http://x/v1"), "the task acceptance needs the model itself"),
        (("--tasks", "gsm8k", "--url", "http://127.0.0.1:1/v1"), "http://127.0.0.1:1/v1: does not answer"),
        (("--tasks", "gsm8k", "--url", "http://127.0.0.1:1/v1", "--record"), "--url names none; leave it out"),
    ],
)
def test_wrong_use_is_one_line_and_2(directory, tmp_path, monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "qa", "turns": ["why?"]}\n')
    monkeypatch.setenv("HEADSTART_SUITES", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, directory, *arguments)
    assert end.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_model_of_one_head_has_no_drafts_to_accept(tmp_path, capsys, monkeypatch) -> None:
    """Nothing is written to measure what there is not; with --dtype."""
    torch.manual_seed(0)
    one = ModelConfig(dim=16, layers=2, attention_heads=2, context=64, heads=1)
    save_model(Transformer(one), tmp_path / "model", ByteTokenizer())
    (tmp_path / "a.py").write_text("x = 1\n" * 30)
    monkeypatch.setattr("headstart.evaluation.free_running.run_freely", None)
    settings = EvaluateSettings(text=(str(tmp_path / "a.py"),), dtype="float32")
    found = evaluate(tmp_path / "model", settings)
    assert found["dtype"] == "float32" and len(found["heads"]["bits_per_byte"]) == 1 and "acceptance" not in found
    assert "has no drafting head" in capsys.readouterr().err
    half = evaluate(tmp_path / "model", EvaluateSettings(text=settings.text, tasks=("heads",), dtype="bfloat16"))
    assert half["heads"]["bits_per_byte"] != found["heads"]["bits_per_byte"]


def test_what_was_measured_is_shown_before_what_takes_longer(directory, tmp_path, monkeypatch, capsys) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headstart.evaluation.free_running.run_freely", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(directory, EvaluateSettings(text=(str(tmp_path / "text"),), prompt_tokens=8, new_tokens=8))
    assert "bits per byte" in capsys.readouterr().err
