"""Decoding by the number of heads: a trained model, and random weights at the acceptance of the paper's models."""

from __future__ import annotations

from functools import partial

import pytest

from bench import decode
from bench.decode import KINDS, SIZES, Settings
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation.inputs import load_prompts
from headstart.model.config import ModelConfig

TINY = ModelConfig(vocab_size=300, dim=32, layers=9, attention_heads=2, context=128)


def settings(**changes):
    return Settings(**{"repetitions": 1, "prompt_tokens": 4, "new_tokens": 6, "dtype": "float32", **changes})


def by_name(result):
    return {row["what"]: row for row in result["measurements"]}


def test_model_part(in_process, model_directory, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(x):\n\nabcabcabc\nhello\n")
    result = decode.run(
        settings(parts=("model",), model=model_directory, prompts=prompts, new_tokens=12, batches=(1, 2), out=tmp_path)
    )
    rows = by_name(result)
    identical = [row for what, row in rows.items() if "differs from K = 1" in what]
    assert [row["median"] for row in identical] == [0] * 4 and all(row["met"] for row in identical)
    for where in ("greedy, batch 1", "temperature 0.8, batch 2"):
        # Plain, then K = 1, 2, 4: the model has no 8 heads.
        variants = [what for what, row in rows.items() if what.startswith(where) and row["unit"] == "tokens/s"]
        assert variants == [f"{where}, {name}" for name in ("plain", "K = 1", "K = 2", "K = 4")]
    assert rows["greedy, batch 1, K = 1"]["details"]["tokens_per_pass"] == 1
    details = rows["greedy, batch 1, K = 4"]["details"]
    assert len(details["acceptance"]) == 3 and details["tokens_per_pass"] == 12 / 4  # 1 + 4 + 4 + 3 tokens
    assert rows["greedy, batch 1, K = 4 / plain over its tokens per pass"]["bar"]["value"] == 0.88
    assert rows["greedy, batch 2, K = 4 / plain over its tokens per pass"]["bar"] is None


def test_a_trained_model_decodes_in_blocks(in_process, model_directory, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abcabc\n")
    found = decode.run(
        settings(
            parts=("model",), dtype="bfloat16", quantize="q4", new_tokens=8, temperatures=(0.0,), batches=(1,),
            model=model_directory, prompts=prompts, out=tmp_path,
        )
    )  # fmt: skip
    assert by_name(found)["greedy, batch 1: numbers of heads whose output differs from K = 1"]["median"] == 0
    assert any("parallel, q4, 1 thread" in note for note in found["notes"])


def test_sweep(in_process, monkeypatch):
    monkeypatch.setitem(SIZES, "12M", TINY)
    result = decode.run(
        settings(parts=("sweep",), sizes=("12M",), batches=(1, 3), prompt_tokens=6, new_tokens=12, tune_seconds=0.0)
    )
    rows = by_name(result)
    identical = [row for what, row in rows.items() if "differs from K = 1" in what]
    assert len(identical) == 2 * 2 and all(row["met"] for row in identical)
    base = "12M, 4 parallel transformer heads (Table S2), batch"
    assert rows[f"{base} 1, K = 4 / plain over its tokens per pass"]["bar"]["value"] == 0.85
    assert rows[f"{base} 3, K = 4 / plain over its tokens per pass"]["bar"] is None
    assert 2 < rows[f"{base} 3, K = 4"]["details"]["tokens_per_pass"] <= 4
    assert rows[f"{base} 1, K = 1"]["details"]["tokens_per_pass"] == 1
    policies = [row for what, row in rows.items() if "policy" in what and row["bar"] and "over its" not in what]
    assert all(row["bar"]["value"] == 0.97 for row in policies)  # none where shapes are fixed
    assert "k = 8 6.39 and 7.04" in result["notes"][0]


def test_shapes_are_those_the_bars_speak_of():
    for name, least, most in (("12M", 11e6, 13e6), ("105M", 100e6, 110e6), ("235M", 225e6, 245e6)):
        assert least < SIZES[name].parameters()["total"] < most
    four = KINDS["tokens"].put_on(SIZES["105M"])
    assert (four.trunk_layers, four.heads) == (28, 4)
    assert KINDS["bytes"].put_on(SIZES["105M"]).vocab_size == 256


def test_prompts_from_jsonl_and_from_the_data_of_the_run(model_directory, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "abc"}\n{"text": "de"}\n')
    found = load_prompts(model_directory, prompts=file, data=None, count=8, tokens=2, room=4)
    assert found == [(97, 98), (100, 101)]

    (tmp_path / "documents").mkdir()
    for i in range(20):
        (tmp_path / "documents" / f"{i}.txt").write_text(f"document {i} " * 5)
    data = tmp_path / "shards"
    prepare([str(tmp_path / "documents")], data, ByteTokenizer(), Preparation(validation_fraction=0.5, seed=0))
    found = load_prompts(model_directory, prompts=None, data=data, count=3, tokens=11, room=8)
    assert [len(prompt) for prompt in found] == [11, 11, 11] and len(set(found)) > 1
    assert set(sum(found, ())) <= set(b"document 0123456789")
    (model_directory / "prompts.jsonl").write_text('{"prompt": "its own"}\n')
    found = load_prompts(model_directory, prompts=None, data=None, count=3, tokens=3, room=8)
    assert found == [tuple(b"its")]
    (model_directory / "prompts.jsonl").unlink()


def test_wrong_use_is_one_line(model_directory, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("not json\n")
    (tmp_path / "empty.txt").write_text("\n")
    prompts_of = partial(load_prompts, model_directory, data=None, count=1, tokens=2, room=1)
    cases = [
        lambda: decode.run(settings(heads=(2,))),
        lambda: prompts_of(prompts=file),
        lambda: prompts_of(prompts=tmp_path / "empty.txt"),
        lambda: prompts_of(prompts=tmp_path / "gone"),
        lambda: prompts_of(prompts=None),
    ]
    for case in cases:
        with pytest.raises(UsageError) as error:
            case()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": ()}, "--batches is empty"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"parts": ("peers",), "device": "cuda"}, "peers runs on a CPU"),
        ({"peer_python": ("llama-cpp",)}, "give PEER=FILE"),
        ({"peer_python": ("other=/bin/sh",)}, "give PEER=FILE, PEER one of transformers, llama-cpp, vllm"),
        ({"parts": ("model",), "heads": (9,)}, "--heads lacks 1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        decode.run(settings(**changes))
