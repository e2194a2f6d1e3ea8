"""Runs of suites with a small model: what is asked, compared, kept and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import chat_tokenizer

import headstart
from headstart.api import LanguageModel
from headstart.data.prompts import chat_ids
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation import suite_run
from headstart.evaluation.settings import SuiteSettings
from headstart.evaluation.suite_run import RECORDS, ModelSubject, Prompt, run_suite
from headstart.evaluation.suites import SUITES
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=264, dim=16, layers=2, attention_heads=2, context=128, heads=3, head_kind="replicated")
ROWS = [
    {"question_id": 1, "category": "writing", "turns": ["hello?", "and more?"]},
    {"question_id": 2, "category": "math", "turns": ["2 + 2?", "why?"]},
    {"question_id": 3, "category": "qa", "turns": ["who?"]},
    {"question_id": 4, "category": "qa", "turns": ["where is it that they all went?"]},
]
SETTINGS = SuiteSettings(lookup=3, heads=3)  # without the policy, which learns from times
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(2)  # a model whose answers do not end at once
    save_model(Transformer(CONFIG), folder / "model", chat_tokenizer(folder / "tokenizer"))
    return headstart.load(folder / "model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "q.jsonl"


def run(model: LanguageModel, settings: SuiteSettings, out: Path | None, limit: int | None = None, **more: Any) -> Any:
    subject = ModelSubject(model, settings, more.pop("new", NEW), more.pop("long", "skip"))
    return run_suite(SUITES["spec-bench"], subject, settings, limit, out, {"model": "m", **more})


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "spec-bench" / RECORDS).read_text().splitlines()]


def test_all_questions_at_both_temperatures(model, file, tmp_path) -> None:
    found = run(model, replace(SETTINGS, file=file), tmp_path)
    assert (found["questions"], found["of"], list(found["temperatures"])) == (4, 4, ["0", "1"])
    for way in found["temperatures"].values():
        parts = {part["name"]: part for part in way["parts"]}
        assert [(n, p["prompts"], p["group"]) for n, p in parts.items()] == [
            ("overall", 4, None),
            ("mt-bench", 2, None),
            ("writing", 1, "mt-bench"),
            ("math", 1, "mt-bench"),
            ("qa", 2, None),
        ]
        overall = parts["overall"]
        assert overall["answers"] == overall["compared"] == overall["equal"] == 6  # match: the tokens of plain decoding
        assert overall["speedup"]["value"] > 0 and overall["tokens"] == sum(
            parts[n]["tokens"] for n in ("mt-bench", "qa")
        )
    assert found["published"][0]["method"] == "Medusa"


def test_a_second_turn_follows_the_first_answer(model, file, tmp_path, monkeypatch) -> None:
    asked: list[Prompt] = []
    ask = ModelSubject.ask
    monkeypatch.setattr(
        ModelSubject, "ask", lambda self, prompt, *rest: (asked.append(prompt), ask(self, prompt, *rest))[1]
    )
    run(model, replace(SETTINGS, file=file, temperatures=(0.0,)), tmp_path, limit=1)
    first, second = asked
    [record] = records(tmp_path)
    answer = record["turns"][0]["drafted"]["text"]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert second.messages[:1] == first.messages and second.messages[1]["content"] == answer
    read = chat_ids(model.tokenizer, second.messages)
    assert model.tokenizer.decode(list(read)).endswith("and more?\nassistant\n")  # the answer's turn is open
    assert record["turns"][1]["drafted"]["prompt_tokens"] == len(read)
    alone = model.generate(list(first.messages), NEW, heads=1)
    assert isinstance(alone, headstart.api.Output) and alone.text == answer


def test_a_killed_run_resumes_and_equals_a_whole_one(model, file, tmp_path, monkeypatch, capsys) -> None:
    settings = replace(SETTINGS, file=file)
    run(model, settings, tmp_path / "whole")
    kept, ask = [], suite_run._ask

    def killed(*arguments: Any, **named: Any) -> Any:
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(ask(*arguments, **named))
        return kept[-1]

    monkeypatch.setattr(suite_run, "_ask", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, settings, tmp_path / "killed")
    monkeypatch.setattr(suite_run, "_ask", ask)
    with open(tmp_path / "killed" / "spec-bench" / RECORDS, "a") as lines:
        lines.write('{"question": "4", "temp')  # the kill cut a line short
    resumed = run(model, settings, tmp_path / "killed")
    assert "3 of 8 answers are there already" in capsys.readouterr().err
    both = [{(r["question"], r["temperature"]): r for r in records(tmp_path / name)} for name in ("whole", "killed")]
    for key, record in both[0].items():
        for ours, theirs in zip(record["turns"], both[1][key]["turns"]):
            for name in ("text", "per_step_drafted", "per_step_accepted"):
                assert ours["drafted"].get(name) == theirs["drafted"].get(name)
    assert len(both[0]) == len(both[1]) == 8
    # The report is made again without decoding, and a further temperature decodes only that.
    monkeypatch.setattr(suite_run, "_ask", None)
    assert run(model, settings, tmp_path / "killed") == resumed
    with pytest.raises(UsageError, match="holds samples with lookup 3, not 2; name another --out"):
        run(model, replace(settings, lookup=2), tmp_path / "killed")
    with pytest.raises(UsageError, match="holds samples with device None, not 'other'"):
        run(model, settings, tmp_path / "killed", device="other")


def test_long_prompts_are_left_out_or_cut_and_counted(model, file, tmp_path) -> None:
    settings = replace(SETTINGS, file=file, temperatures=(0.0,))
    new = 83  # 45 tokens are left for a prompt
    skipped = run(model, settings, tmp_path / "a", new=new)["temperatures"]["0"]
    assert skipped["skipped_prompts"] == 3  # both second turns, and the long question
    assert skipped["parts"][0]["answers"] == 3
    cut = run(model, settings, tmp_path / "b", new=new, long="middle")["temperatures"]["0"]
    assert (cut["skipped_prompts"], cut["cut_prompts"], cut["parts"][0]["answers"]) == (0, 3, 6)
    longest = max(turn["drafted"]["prompt_tokens"] for r in records(tmp_path / "b") for turn in r["turns"])
    assert longest == 128 - new
    with pytest.raises(UsageError, match="all prompts are longer than the model's context allows"):
        run(model, settings, None, new=116)
    with pytest.raises(UsageError, match="leaves no room for a prompt in the context 128"):
        run(model, settings, None, new=128)


def test_rejection_changes_sampled_tokens_and_feeds_back_the_plain_answer(model, file, tmp_path, monkeypatch) -> None:
    asked: list[Prompt] = []
    ask = ModelSubject.ask
    monkeypatch.setattr(
        ModelSubject, "ask", lambda self, prompt, *rest: (asked.append(prompt), ask(self, prompt, *rest))[1]
    )
    settings = replace(SETTINGS, file=file, acceptance="rejection", temperatures=(1.0,))
    run(model, settings, tmp_path, new=24)
    answers = [record["turns"][0] for record in records(tmp_path) if len(record["turns"]) == 2]
    assert any(turn["plain"]["text"] != turn["drafted"]["text"] and not turn["equal"] for turn in answers)
    fed_back = [prompt.messages[1]["content"] for prompt in asked if len(prompt.messages) == 3]
    assert fed_back == [turn["plain"]["text"] for turn in answers]


def test_plain_and_drafted_decoding_take_turns_at_being_first(model, file, monkeypatch) -> None:
    order: list[int] = []
    decode = ModelSubject._decode
    monkeypatch.setattr(
        ModelSubject, "_decode", lambda self, kind, requests: (order.append(kind), decode(self, kind, requests))[1]
    )
    run(model, replace(SETTINGS, file=file), None, limit=3)
    # Three questions, the first two with two turns, at two temperatures.
    assert order[::2] == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1]
    assert all(sorted(order[i : i + 2]) == [0, 1] for i in range(0, len(order), 2))
    order.clear()
    run(model, replace(SETTINGS, file=file, temperatures=(0.0,)), None, limit=3)
    assert order[::2] == [0, 0, 1, 1, 0]


def test_without_plain_nothing_is_compared(model, file, tmp_path) -> None:
    found = run(model, replace(SETTINGS, file=file, plain=False, temperatures=(0.0,), heads=2), tmp_path)
    overall = found["temperatures"]["0"]["parts"][0]
    assert "speedup" not in overall and "equal" not in overall and overall["tokens_per_pass"]["value"] >= 1
    assert overall["speculative_decoding"]["num_spec_tokens"] == 2 + 3


def test_a_model_without_template_continues_text(file, tmp_path) -> None:
    torch.manual_seed(0)
    save_model(Transformer(replace(CONFIG, vocab_size=256)), tmp_path / "model", ByteTokenizer())
    bare = headstart.load(tmp_path / "model")
    with pytest.raises(UsageError, match=r"has no chat template.*or continue the questions as text: --suite.raw"):
        run(bare, replace(SETTINGS, file=file), None)
    run(bare, replace(SETTINGS, file=file, raw=True, temperatures=(0.0,)), tmp_path / "out")
    first = next(record for record in records(tmp_path / "out") if record["question"] == "1")
    answer = first["turns"][0]["plain"]["text"]
    read = [turn["plain"]["prompt_tokens"] for turn in first["turns"]]
    assert read == [len(b"hello?\n\n"), len(f"hello?\n\n{answer}\n\nand more?\n\n".encode())]


def test_two_runs_are_compared_prompt_by_prompt(model, file, tmp_path) -> None:
    settings = replace(SETTINGS, file=file, temperatures=(0.0,))
    run(model, settings, tmp_path / "slow")
    lines = records(tmp_path / "slow")
    for record in lines:
        for turn in record["turns"]:
            turn["drafted"]["seconds"] *= 3
    lines = lines[:-1]  # an unfinished run: the questions that both have answered count
    (tmp_path / "slow" / "spec-bench" / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(tmp_path / "slow", tmp_path / "fast")
    for record in lines:
        for turn in record["turns"]:
            turn["drafted"]["seconds"] /= 3
    (tmp_path / "fast" / "spec-bench" / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run(model, replace(settings, against=tmp_path / "slow"), tmp_path / "fast")
    over = found["temperatures"]["0"]["parts"][0]["speedup_over_other"]
    assert (over["value"], over["low"], over["high"]) == pytest.approx((3, 3, 3))
    with pytest.raises(UsageError, match="holds no records; name the --out of a run of spec-bench"):
        run(model, replace(settings, against=tmp_path / "none"), None)


def test_something_must_draft(model) -> None:
    with pytest.raises(UsageError, match="nothing proposes drafts"):
        ModelSubject(model, SuiteSettings(heads=1), NEW, "skip")
