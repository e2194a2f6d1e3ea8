"""The text written in the middle of training changes nothing about the training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from chats import chat_tokenizer

from headstart.data.mixture import MixturePart, open_sources
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.config import RunConfig, ValidationConfig
from headstart.training.loop import train
from headstart.training.trackers import WatchConfig
from headstart.training.validation import decode_sample, describe_sample, sample_prompts


def made(config: RunConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config.model)


def test_training_with_and_without_is_the_same(tiny, metrics, weights) -> None:
    plain, watched = tiny("plain"), tiny("watched", watch=WatchConfig(sample_tokens=8))
    train(plain)
    train(watched)
    lines = metrics(watched.run_dir)
    samples = [line.pop("sample") for line in lines if "sample" in line]
    assert len(samples) == 3 and metrics(plain.run_dir) == lines
    first, second = weights(plain.run_dir), weights(watched.run_dir)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_only_read(tiny, tied) -> None:
    model_config = ModelConfig(dim=16, layers=3, attention_heads=2, context=24, heads=2, tied=tied)
    config = tiny(model=model_config, watch=WatchConfig(sample_tokens=8, sample_prompt="the cat"))
    model = made(config)
    model.unembedding.weights[0].grad = gradient = torch.ones_like(model.unembedding.weights[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, random = list(model.modules()), torch.get_rng_state()
    sample = decode_sample(model, ByteTokenizer(), [tuple(b"the cat")], config)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(a is b for a, b in zip(modules, model.modules()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.unembedding.weights[0].grad is gradient
    # What it says is what the engine says of the same weights.
    engine = Engine(pack(model), tokenizer=ByteTokenizer())
    generation = generate_all(engine, [Request(tuple(b"the cat"), 8)])[0]
    assert sample["text"] == generation.text and sample["tokens"] == generation.stats.tokens
    assert sample["passes"] == generation.stats.passes and sample["acceptance"] == generation.stats.acceptance


def test_bf16_training_decodes_in_bf16(tiny) -> None:
    config = tiny(dtype="bfloat16", watch=WatchConfig(sample_tokens=8))
    sample = decode_sample(made(config), ByteTokenizer(), [(104,)], config)
    assert 1 <= sample["tokens"] <= 8 and 1 <= sample["tokens_per_pass"] <= 2


def test_a_prompt_that_fills_the_context_is_told_before_the_first_step(tiny) -> None:
    config = tiny(watch=WatchConfig(sample_prompt="x" * 24))
    with pytest.raises(UsageError, match=r"sample_prompt has 24 tokens, model.context is 24; shorten"):
        train(config)
    assert not (config.run_dir / "metrics.jsonl").exists()
    shorter = replace(config, watch=WatchConfig(sample_prompt="x" * 23))
    assert sample_prompts([], ByteTokenizer(), shorter) == [tuple(b"x" * 23)]


def test_without_a_prompt_it_begins_a_document(tiny) -> None:
    assert sample_prompts([], ByteTokenizer(), tiny(watch=WatchConfig())) == [(ByteTokenizer().end_id,)]


def test_it_continues_held_out_documents(tiny, shards, tmp_path) -> None:
    config = tiny(watch=WatchConfig(sample_tokens=4, sample_documents=3))
    config = replace(config, model=replace(config.model, context=200))
    split = TokenShards.open(shards, "validation")
    documents = [split.document(index).tolist() for index in range(len(split.documents))]
    quarters = {tuple(document[: len(document) // 4]) for document in documents}
    prompts = sample_prompts(open_sources([MixturePart(shards)]), ByteTokenizer(), config)
    assert len(set(prompts)) == 3 and set(prompts) < quarters
    # Documents without room for the sample are left out.
    shortest = min(map(len, quarters))
    short = replace(config, model=replace(config.model, context=shortest + 4))
    assert sample_prompts(open_sources([MixturePart(shards)]), ByteTokenizer(), short) == [(ByteTokenizer().end_id,)]
    said = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"messages": [said[0], {**said[1], "content": f"me {i}"}]}) + "\n" for i in range(40))
    )
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    chosen = Preparation(selection=Selection(conversations=True), validation_fraction=0.5)
    prepare([str(chats)], tmp_path / "chats", tokenizer, chosen)
    prompts = sample_prompts(open_sources([MixturePart(tmp_path / "chats")]), tokenizer, config)
    assert prompts == 3 * [tuple(tokenizer.encode("<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"))]


def test_a_run_ends_when_its_drafts_stop_to_improve(tiny, metrics, monkeypatch, capsys) -> None:
    measured = iter([1.2, 1.5, 1.4, 1.5, 1.6, 1.3, 1.2, 1.1])
    monkeypatch.setattr(
        "headstart.training.loop.decode_sample", lambda *_: {"text": "", "tokens_per_pass": next(measured)}
    )
    config = tiny(steps=20, watch=WatchConfig(sample_tokens=4), validation=ValidationConfig(2, 8, patience=2))
    result = train(config)
    assert max(line["step"] for line in metrics(config.run_dir)) == 8 and (result / "config.json").is_file()
    train(config)
    assert "already trained for 8 steps" in capsys.readouterr().err
    # With more patience it resumes where it stopped, and a gain starts the count anew.
    train(replace(config, validation=ValidationConfig(2, 8, patience=3)))
    steps = [line["step"] for line in metrics(config.run_dir) if "sample" in line]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16]
    with pytest.raises(UsageError, match=r"validation\.patience waits .* set watch\.sample_tokens above 0"):
        tiny(validation=ValidationConfig(2, 8, patience=1))


def test_the_line_about_it_is_one_line() -> None:
    line = describe_sample({"text": "a\nb" + "c" * 200, "tokens_per_pass": 1.256})
    assert line.startswith(r"sample, 1.26 tokens per pass: a\nbccc") and "\n" not in line and len(line) < 130


def test_fewer_than_no_tokens() -> None:
    with pytest.raises(UsageError, match=r"watch.sample_tokens is -1"):
        WatchConfig(sample_tokens=-1)
