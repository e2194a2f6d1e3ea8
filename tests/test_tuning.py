"""`headstart tune` from end to end: what it writes, what decoding makes of it, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import headstart
from headstart import entry
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.inspection import inspect
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.storage.model_directory import save_model
from headstart.storage.tuning_file import TUNING_FILE, read_tuning

SMALL = ("--prompt-tokens", 8, "--new-tokens", 24, "--batches", 2, 1, "--seconds", 0.01, "--threads", 1)


def directory_of(path, heads: int):
    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=3, attention_heads=2, context=64, heads=heads, head_kind="replicated")
    save_model(Transformer(config), path, ByteTokenizer())
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(4)))
    return path


@pytest.fixture
def directory(tmp_path):
    return directory_of(tmp_path / "model", 3)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tune(*arguments: object) -> None:
    before, sys.argv = sys.argv, ["headstart", "tune", *map(str, arguments)]
    try:
        entry.main()
    finally:
        sys.argv = before


def test_all_of_it(directory, capsys) -> None:
    tune(directory, *SMALL)
    out = capsys.readouterr().out
    assert "head 3" in out and "batch 2, ms" in out
    content = json.loads((directory / TUNING_FILE).read_text())
    assert len(content["acceptance"]["greedy"]["mean"]) == 2
    assert content["costs"][0]["slots"] == [1, 2] and len(content["costs"][0]["drafting"][0]) == 3
    assert content["costs"][0]["setting"]["threads"] == 1 and content["costs"][0]["prompts"] == 4
    assert TUNING_FILE in inspect(directory)["files"]

    model = headstart.load(directory)
    policy = model.engine(exact=False).policy
    assert policy is not None and policy.tuning.costs.slots == (1, 2)
    assert model.engine(exact=False).policy is not policy  # it remembers how its own engine does
    chosen = model.generate("def f(", max_new_tokens=40, exact=False)
    plain = model.generate("def f(", max_new_tokens=40, heads=1, exact=False)
    assert chosen.tokens == plain.tokens
    # Measured with one thread, so it says nothing of two.
    torch.set_num_threads(2)
    assert model.engine(exact=False).policy is None

    # Again, with --json: this machine's entry is replaced, another one's stays.
    content["costs"][0]["setting"]["processor"] = "another"
    (directory / TUNING_FILE).write_text(json.dumps(content))
    tune(directory, *SMALL, "--json")
    assert json.loads(capsys.readouterr().out)["batches"][1]["batch"] == 2
    tune(directory, *SMALL)
    costs = json.loads((directory / TUNING_FILE).read_text())["costs"]
    assert [entry["setting"]["processor"] == "another" for entry in costs] == [True, False]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"mean"', '"mein"'),
        lambda text: text.replace('"slots"', '"sluts"'),
        lambda text: json.dumps({**json.loads(text), "costs": 3}),
    ],
)
def test_a_damaged_file_is_named_with_the_mend(directory, damage) -> None:
    tune(directory, *SMALL)
    file = directory / TUNING_FILE
    file.write_text(damage(file.read_text()))
    with pytest.raises(UsageError, match=f"{TUNING_FILE}.*(tune|again)"):
        headstart.load(directory).generate("def f(")


def test_a_tuning_of_another_model_is_refused(directory, tmp_path) -> None:
    tune(directory, *SMALL)
    other = directory_of(tmp_path / "other", 4)
    (other / TUNING_FILE).write_text((directory / TUNING_FILE).read_text())
    model = headstart.load(other).transformer
    with pytest.raises(UsageError, match="not of a model with 4 heads"):
        read_tuning(other, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", 0), "--seconds is 0"),
        (("--batches", 0), "--batches 0"),
        (("--temperature", 0), "--temperature is 0"),
        (("--prompt-tokens", 60, "--new-tokens", 60), "context 64"),
        (("--prompts", "nothing.txt"), "nothing.txt: cannot be read"),
    ],
)
def test_impossible_settings_are_refused(directory, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune(directory, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (directory / TUNING_FILE).exists()


def test_a_model_with_one_head_has_nothing_to_tune(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        tune(directory_of(tmp_path / "model", 1), *SMALL)
    assert "one head" in capsys.readouterr().err
