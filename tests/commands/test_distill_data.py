"""A model's answers for its own heads do not depend on the batch, the heads and where a run was stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chats import BARE, CHATML, chat_tokenizer

import headstart
from headstart.cli import main
from headstart.commands.self_distillation import (
    DistillSettings,
    distill,
    fingerprint,
    read_prompts,
    write_self_prompts,
)
from headstart.data.chat_template import need_chat_template
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.decoding.settings import GenerationSettings
from headstart.errors import UsageError
from headstart.fileio import take_lock
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

LIVELY = GenerationSettings(max_new_tokens=40, temperature=1.5, seed=3)
PROMPTS = ["hello", "a", *(f"prompt {i} ÿ" for i in range(7)), "z" * 30]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilling")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=4, attention_heads=2, heads=3, vocab_size=264, context=300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
        model.unembedding.weights[0][262] *= 4  # <|im_end|> is likely, at times
    save_model(model, folder / "model", chat_tokenizer(folder / "tokenizer"), dtype=torch.float32)
    return folder / "model"


@pytest.fixture(scope="module")
def model(saved) -> headstart.LanguageModel:
    return headstart.load(saved)


def write_prompts(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_answer_is_what_the_model_writes_alone(model, saved, tmp_path):
    prompts = write_prompts(tmp_path)
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    for settings in (
        DistillSettings(prompts, one, replace(LIVELY, heads=1), slots=1),
        DistillSettings(prompts, four, LIVELY, slots=4),
    ):
        found = distill(model, saved, settings)
        assert found["written"] == found["prompts"] == len(PROMPTS) and found["too_long"] == 0
    lines = lines_of(one)
    assert lines == lines_of(four)
    reasons = {line["finish_reason"] for line in lines}
    assert reasons == {"length", "end"}
    for place, (prompt, line) in enumerate(zip(PROMPTS, lines)):
        digest = hashlib.sha256(f"3\0{place}\0{0}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big", signed=True)
        alone = model.generate(prompt, 40, temperature=1.5, seed=seed, heads=1)
        assert line == {
            "place": place,
            "prompt": prompt,
            "text": prompt + alone.text,
            "finish_reason": alone.finish_reason,
        }
    distill(model, saved, DistillSettings(prompts, tmp_path / "short.jsonl", LIVELY, drop_unfinished=True))
    assert lines_of(tmp_path / "short.jsonl") == [line for line in lines if line["finish_reason"] == "end"]


def test_a_stopped_run_goes_on(model, saved, tmp_path):
    prompts, out, whole, said = write_prompts(tmp_path), tmp_path / "out.jsonl", tmp_path / "whole.jsonl", []
    distill(model, saved, DistillSettings(prompts, whole, LIVELY))

    def stop(done, total, **numbers):
        assert total == len(PROMPTS)
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, saved, DistillSettings(prompts, out, LIVELY, slots=2), progress=stop, report=said.append)
    growing = tmp_path / ".out.jsonl.distilling" / "lines.jsonl"
    kept = growing.read_bytes()
    assert not out.exists()  # it would look whole
    assert whole.read_bytes().startswith(kept) and 4 <= kept.count(b"\n") < len(PROMPTS)
    assert "are kept: the same command resumes" in said[-1]
    growing.write_bytes(kept + b'{"place": 4, "prom')  # as a kill in the middle of a line leaves it
    found = distill(model, saved, DistillSettings(prompts, out, LIVELY, slots=3), report=said.append)
    assert out.read_bytes() == whole.read_bytes()
    assert found["written"] == len(PROMPTS) - kept.count(b"\n") and "resuming after prompt" in said[-1]
    assert distill(model, saved, DistillSettings(prompts, out, LIVELY))["written"] == 0
    assert out.read_bytes() == whole.read_bytes() and not growing.exists()


def test_a_file_has_one_writer_and_one_kind_of_settings(model, saved, tmp_path):
    prompts, out = write_prompts(tmp_path), tmp_path / "out.jsonl"
    distill(model, saved, DistillSettings(prompts, out, LIVELY))
    before = out.read_bytes()
    with pytest.raises(UsageError, match=r"was written with temperature 1.5 \(now 0.3\), seed 3 \(now 0\)"):
        distill(model, saved, DistillSettings(prompts, out, GenerationSettings(40, 0.3)))
    with (tmp_path / ".out.jsonl.distilling" / "lock").open("a") as lock:
        assert take_lock(lock)
        with pytest.raises(UsageError, match="another process is writing it"):
            distill(model, saved, DistillSettings(prompts, out, LIVELY))
    prompts.write_text("others")
    with pytest.raises(UsageError, match="was written with prompts"):
        distill(model, saved, DistillSettings(prompts, out, LIVELY))
    (tmp_path / "mine.jsonl").write_text("notes\n")
    with pytest.raises(UsageError, match="nothing says how it was written"):
        distill(model, saved, DistillSettings(prompts, tmp_path / "mine.jsonl", LIVELY))
    assert out.read_bytes() == before and (tmp_path / "mine.jsonl").read_text() == "notes\n"
    other = Transformer(model.config)
    save_model(other, tmp_path / "model", model.tokenizer)
    assert fingerprint(tmp_path / "model") != fingerprint(saved)


def test_other_ends_of_a_text_or_turn_are_other_settings(model, saved, tmp_path, monkeypatch):
    prompts, out = write_prompts(tmp_path), tmp_path / "out.jsonl"
    prompts.write_text("hello")
    distill(model, saved, DistillSettings(prompts, out, LIVELY))
    with pytest.raises(UsageError, match=r"was written with chat None \(now True\)"):
        distill(model, saved, DistillSettings(prompts, out, LIVELY, chat=True))
    monkeypatch.setattr(model.tokenizer, "end_ids", model.tokenizer.end_ids | {5})
    with pytest.raises(UsageError, match=r"was written with end_ids None \(now \[5, \d+\]\)"):
        distill(model, saved, DistillSettings(prompts, out, LIVELY))


CONVERSATIONS = [
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who?"}]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "OLD"}] * 3},
    {"messages": [{"role": "user", "content": "well " * 120}]},  # longer than the context
    {"messages": [{"role": "user", "content": "he " * 50}, {"role": "assistant", "content": "OLD"}] * 2},
]


def test_conversations_are_answered_turn_by_turn(model, saved, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in CONVERSATIONS))
    settings = GenerationSettings(max_new_tokens=80, temperature=1.0, seed=1)
    found = distill(model, saved, DistillSettings(prompts, out, settings, slots=3))
    assert found["too_long"] == 1 and found["written"] == 3
    lines = lines_of(out)
    assert [line["place"] for line in lines] == [0, 1, 3]
    assert "OLD" not in out.read_text()
    asked = [[message["content"] for message in line["messages"] if message["role"] != "assistant"] for line in lines]
    assert asked[0] == ["be kind", "who?"] and asked[1] == ["hello"] * len(asked[1])
    assert [message["role"] for message in lines[1]["messages"]] == ["user", "assistant"] * len(asked[1])
    # An answer ends with the token that the template puts behind one, which is not the tokenizer's end token.
    assert [line["finish_reason"] for line in lines] == ["end", "end", "length"] and len(asked[1]) == 3
    for line in lines[:2]:
        rendered = chatml_prompt(line["messages"][:-1])
        answer = line["messages"][-1]["content"]
        seed = hashlib.sha256(f"1\0{line['place']}\0{len(line['messages']) // 2 - 1}".encode()).digest()[:8]
        alone = model.generate(rendered, 80, temperature=1.0, seed=int.from_bytes(seed, "big", signed=True), heads=1)
        assert 262 in alone.tokens and model.tokenizer.decode(alone.tokens[: alone.tokens.index(262)]) == answer
    manifest = prepare(
        [str(out)],
        tmp_path / "shards",
        model.tokenizer,
        Preparation(selection=Selection(conversations=True), validation_fraction=0),
    )
    assert manifest["splits"]["train"]["documents"] == 3
    assert TokenShards.open(tmp_path / "shards", "train").targets[:].any()
    # With another seed the last conversation has no room for its second question, and keeps its first answer.
    distill(model, saved, DistillSettings(prompts, tmp_path / "b.jsonl", GenerationSettings(80, 1.0, seed=2), slots=3))
    last = lines_of(tmp_path / "b.jsonl")[-1]
    assert last["finish_reason"] == "context" and [each["role"] for each in last["messages"]] == ["user", "assistant"]


def chatml_prompt(messages: list[dict]) -> str:
    assert "<|im_start|>assistant" in CHATML
    said = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(said) + "<|im_start|>assistant\n"


def test_what_is_no_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, said in (
        ('{"prompt": "a"}\n{"question": "b"}', 'prompt 2: no JSON object with "prompt"'),
        ("{", "prompt 1: not JSON"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "prompt 1: asks nothing"),
        ('{"messages": [{"role": "tool", "content": "7"}]}', "a message of tool"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "calls a tool"),
        ("", "holds no prompt"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=said):
            read_prompts(file)


def test_the_command(saved, tmp_path, monkeypatch, capsys):
    prompts, out = write_prompts(tmp_path), tmp_path / "out.jsonl"
    command = ["headstart", "distill-data", str(saved), "--prompts", str(prompts), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--max-new-tokens", "5", "--slots", "4", "--json"])
    main()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["written"] == len(lines_of(out)) == len(PROMPTS)
    assert "10 were not at an end after 5 tokens, and kept" in captured.err


def test_the_model_writes_its_own_prompts(model, saved, tmp_path):
    generation = GenerationSettings(max_new_tokens=60, temperature=1.0, seed=5)

    def write(name: str, *counts: int, slots: int = 3) -> tuple[list[str], int]:
        settings = DistillSettings(tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl", generation, slots=slots)
        for count in counts:
            kept = write_self_prompts(model, saved, settings, count)
        return [line["prompt"] for line in lines_of(settings.prompts)], kept

    opening, ends = need_chat_template(model.tokenizer).user_turn(model.tokenizer)
    assert opening == "<|im_start|>user\n" and ends == {262}
    expected = []
    for place in range(12):
        seed = int.from_bytes(hashlib.sha256(f"5\0{place}\0{0}".encode()).digest()[:8], "big", signed=True)
        alone = model.generate(opening, 60, temperature=1.0, seed=seed, heads=1)
        if 262 in alone.tokens or alone.finish_reason == "end":
            message = [*alone.tokens, 262][: [*alone.tokens, 262].index(262)]
            expected.append(model.tokenizer.decode(message).strip())
    expected = [message for message in expected if message]
    assert 2 < len(expected) < 12  # some have no end, and are left out
    found, kept = write("whole", 12)
    assert found == list(dict.fromkeys(expected)) and kept == len(found)
    assert write("grown", 5, 12, slots=1) == (found, kept)


def test_more_prompts_of_its_own_continue_both_files(saved, tmp_path, monkeypatch):
    def write(name: str, *counts: int) -> tuple[bytes, bytes]:
        out = tmp_path / f"{name}.jsonl"
        for count in counts:
            options = ["--self-prompts", str(count), "--max-new-tokens", "40", "--seed", "5"]
            monkeypatch.setattr("sys.argv", ["headstart", "distill-data", str(saved), "--out", str(out), *options])
            main()
        return out.with_suffix(".prompts.jsonl").read_bytes(), out.read_bytes()

    first, both, whole = write("first", 6), write("grown", 6, 12), write("whole", 12)
    assert both == whole
    assert all(longer.startswith(shorter) and longer != shorter for shorter, longer in zip(first, whole))


def test_prompts_that_differ_in_case_and_white_space_alone_are_kept_once(model, saved, tmp_path, monkeypatch):
    said = iter(["Name three rivers.", "name  three rivers. ", "Name three lakes.", "Name three rivers."])

    def write(writer, lines, progress):
        for place in range(len(writer.prompts)):
            lines.give(place, {"prompt": next(said)})

    monkeypatch.setattr("headstart.commands.self_distillation._Writer.run", write)
    settings = DistillSettings(tmp_path / "prompts.jsonl", tmp_path / "out.jsonl")
    assert write_self_prompts(model, saved, settings, 4) == 2
    assert [line["prompt"] for line in lines_of(settings.prompts)] == ["Name three rivers.", "Name three lakes."]


def test_a_template_without_a_special_token_after_a_question_is_refused(model, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", lambda: BARE)
    settings = DistillSettings(tmp_path / "prompts.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="no special token after a user's message"):
        write_self_prompts(model, saved, settings, 4)


@pytest.mark.parametrize("more", [[], ["--prompts", "a.txt", "--self-prompts", "3"], ["--self-prompts", "-1"]])
def test_the_command_takes_one_source_of_prompts(saved, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(
        "sys.argv", ["headstart", "distill-data", str(saved), "--out", str(tmp_path / "o.jsonl"), *more]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "either --prompts FILE or --self-prompts N" in capsys.readouterr().err
