"""lm-eval's tasks over a model of ours: likelihoods as a slow loop has them, outputs as the engine writes them."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import headstart
from headstart import cli
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'headstart[eval]'")
from lm_eval.api.instance import Instance

from headstart.evaluation.lm_eval_model import HeadstartLM
from headstart.evaluation.lm_eval_tasks import run_lm_eval
from headstart.evaluation.settings import LmEvalSettings

CONTEXT = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(dim=16, layers=2, attention_heads=2, context=CONTEXT, heads=3, head_kind="replicated")
    raw = Transformer(config)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    save_model(raw, tmp_path_factory.mktemp("lm") / "model", ByteTokenizer())
    return tmp_path_factory.getbasetemp() / "lm0" / "model"


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def slow(model: headstart.LanguageModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """One token at a time, every prefix read anew, at most a context of it."""
    total, greedy, known = 0.0, True, list(before)
    for token in after:
        chances = model.logits([known[-CONTEXT:]])[0, -1, 0].float().log_softmax(-1)
        total += float(chances[token])
        greedy &= int(chances.argmax()) == token
        known.append(token)
    return total, greedy


def test_likelihoods_are_those_of_a_slow_loop(directory) -> None:
    model = headstart.load(directory)
    judged = HeadstartLM(model, batch_size=2)
    greedy = model.generate("abc", max_new_tokens=3, heads=1).tokens
    written = bytes(greedy).decode("latin-1")
    pairs = [("abc", " de"), ("", "xyz"), ("a longer context", "!"), ("ab ", "c")]
    if max(greedy) < 128:  # as text it would be other bytes
        pairs.append(("abc", written))
    for (before, after), (chance, best) in zip(pairs, judged.loglikelihood(requests("loglikelihood", *pairs))):
        # lm-eval counts spaces at the end of a context with what follows.
        whole, known = before + after, before.rstrip()
        ids = list(known.encode()) or [judged.eot_token_id]
        expected, wanted = slow(model, ids, list(whole[len(known) :].encode()))
        assert chance == pytest.approx(expected, abs=1e-4) and best == wanted
    assert judged.cut == 0
    long = "y" * 40
    ((chance, _),) = judged.loglikelihood(requests("loglikelihood", (long, "zz")))
    assert judged.cut == 1
    row = list((long + "zz").encode())[-(CONTEXT + 1) :]
    logits = model.logits([row[:-1]])[0, -2:, 0].float().log_softmax(-1)
    assert chance == pytest.approx(float(logits[0, row[-2]] + logits[1, row[-1]]), abs=1e-4)


def test_a_rolling_likelihood_counts_each_token_once(directory) -> None:
    model = headstart.load(directory)
    judged = HeadstartLM(model, batch_size=3)
    text = "the quick brown fox jumps over the lazy dog, twice. " * 2
    (total,) = judged.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    ids, expected = list(text.encode()), 0.0
    for start in range(0, len(ids), CONTEXT):
        piece = ids[start : start + CONTEXT]
        # lm-eval's windows: whole ones, and a last one that is filled up from before.
        known = ids[max(0, start + len(piece) - CONTEXT - 1) : start] if start else [judged.eot_token_id]
        expected += slow_window(model, known, piece)
    assert total == pytest.approx(expected, abs=1e-3)


def slow_window(model: headstart.LanguageModel, known: list[int], piece: list[int]) -> float:
    row = [*known, *piece]
    chances = model.logits([row[:-1]])[0, :, 0].float().log_softmax(-1)
    return sum(float(chances[len(known) - 1 + i, token]) for i, token in enumerate(piece))


def test_texts_are_the_engines(directory) -> None:
    model = headstart.load(directory)
    judged = HeadstartLM(model, batch_size=2)
    options = {"until": ["\n"], "max_gen_toks": 8}
    outputs = judged.generate_until(requests("generate_until", ("abc", options), ("x" * 40, options), ("", options)))
    end = judged.eot_token_id
    for text, prompt in zip(outputs, (b"abc", b"x" * (CONTEXT - 8), bytes([end]))):
        assert text == model.generate(list(prompt), max_new_tokens=8, stop=["\n"]).text
    assert judged.cut == 1 and judged.tokens >= judged.passes > 0
    with pytest.raises(UsageError, match="asks for 32 new tokens, the model's context is 32"):
        judged.generate_until(requests("generate_until", ("abc", {"max_gen_toks": 32})))


TASK = """
task: made_up
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_a_task_of_a_local_file_from_the_command_line(directory, tmp_path, monkeypatch, capsys) -> None:
    model = headstart.load(directory)
    rows = []
    for i in range(4):
        choices = ["aa", "zq", "!?"]
        chances = [slow(model, list(b"q%d" % i), list(b" " + c.encode()))[0] for c in choices]
        best = chances.index(max(chances))
        rows.append({"question": f"q{i}", "choices": choices, "answer": best if i < 3 else (best + 1) % 3})
    (tmp_path / "made.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made.yaml").write_text(TASK.replace("FILE", str(tmp_path / "made.json")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    more = ("--lm-eval.include-path", tmp_path / "tasks", "--lm-eval.no-defaults")
    arguments = (directory, "--tasks", "lm-eval:made_up", *more, "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["headstart", "evaluate", *map(str, arguments)])
    cli.main()
    assert "made_up" in (tmp_path / "out" / "results.md").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["lm_eval"]
    assert found["results"]["made_up"]["acc"] == 0.75 and found["cut_requests"] == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:4], "lm-eval:other", *map(str, more)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and re.search("lm-eval knows no task 'other'", capsys.readouterr().err)


def test_folders_and_data_that_are_not_there(directory, tmp_path) -> None:
    model = headstart.load(directory)
    with pytest.raises(UsageError, match="no such folder; name one that holds task files"):
        run_lm_eval(model, ["a"], LmEvalSettings(include_path=tmp_path / "gone"), 2)
    (tmp_path / "made.yaml").write_text(TASK.replace("FILE", str(tmp_path / "gone.json")))
    with pytest.raises(UsageError, match="made_up: the data cannot be reached"):
        run_lm_eval(model, ["made_up"], LmEvalSettings(include_path=tmp_path, defaults=False), 2)


def test_texts_begin_as_the_model_knows_them(directory) -> None:
    """The start token once: before contexts and documents without one, kept where only the end of a context fits."""
    model = headstart.load(directory)
    model.tokenizer.start_ids = (7,)
    judged = HeadstartLM(model)
    assert judged.prefix_token_id == 7
    assert judged.tok_encode("ab") == judged.tok_encode("\x07ab") == [7, 97, 98]
    assert judged.tok_encode("ab", add_special_tokens=False) == [97, 98]
    for before, after in (("abc", " de"), ("", "xyz"), ("y" * 40, "zz")):
        ((chance, _),) = judged.loglikelihood(requests("loglikelihood", (before, after)))
        row = [7, *(before + after).encode()[-CONTEXT:]]
        logits = model.logits([row[:-1]])[0, -len(after) :, 0].float().log_softmax(-1)
        assert chance == pytest.approx(sum(float(x[i]) for x, i in zip(logits, after.encode())), abs=1e-4)
    (chance,) = judged.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcd",)))
    logits = model.logits([[7, *b"abc"]])[0, :, 0].float().log_softmax(-1)
    assert chance == pytest.approx(sum(float(x[i]) for x, i in zip(logits, b"abcd")), abs=1e-4)
    for text in ("abc", "y" * 50):
        (written,) = judged.generate_until(requests("generate_until", (text, {"max_gen_toks": 8})))
        prompt = [7, *text.encode()][-(CONTEXT - 8) :]
        assert written == model.generate([7, *prompt[1:]], max_new_tokens=8).text


def test_questions_go_through_the_chat_template_as_in_transformers(tmp_path) -> None:
    from chats import CHATML, INSTRUCTIONS, chat_tokenizer
    from transformers import AutoTokenizer

    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    begun = [*said, {"role": "assistant", "content": "the answer is"}]
    config = ModelConfig(vocab_size=264, dim=8, layers=2, attention_heads=1, context=CONTEXT)
    for name, template in (("chatml", CHATML), ("instructions", INSTRUCTIONS)):
        tokenizer = chat_tokenizer(tmp_path / name, template)
        save_model(Transformer(config), tmp_path / f"{name} model", tokenizer)
        judged, theirs = HeadstartLM(str(tmp_path / f"{name} model")), AutoTokenizer.from_pretrained(tmp_path / name)
        known = slice(0 if template == CHATML else 1, None)  # this one takes no system message
        assert judged.chat_template(True) == judged.chat_template("default") == template
        assert judged.apply_chat_template(said) == theirs.apply_chat_template(
            said[known], tokenize=False, add_generation_prompt=True
        )
        assert judged.apply_chat_template(begun, add_generation_prompt=False) == theirs.apply_chat_template(
            begun[known], tokenize=False, continue_final_message=True
        )
        assert judged.chat_template(False) is None
        with pytest.raises(UsageError, match="only the default template"):
            judged.chat_template("tool_use")


def test_a_chat_template_that_is_not_there_is_one_line(directory) -> None:
    judged = HeadstartLM(headstart.load(directory))
    for ask in (lambda: judged.chat_template(True), lambda: judged.apply_chat_template([])):
        with pytest.raises(UsageError, match="has no chat template"):
            ask()
