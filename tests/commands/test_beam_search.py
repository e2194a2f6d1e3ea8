"""Beam search: the most probable continuation of all, greedy decoding with one beam, and as data for distillation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headstart
from headstart.cli import run_command
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.beam_search import ALPHA, search_beams
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

V, NEW, END = 4, 4, 3
TABLE = torch.randn(NEW + 1, V, V, generator=torch.Generator().manual_seed(3)) * 2


def logits_of(tokens_BT: Tensor) -> Tensor:
    """Scores by the length and the last token alone."""
    return TABLE[tokens_BT.shape[1] - 1, tokens_BT[:, -1]]


def score(tokens: tuple[int, ...]) -> float:
    """The log-probability of tokens behind the prompt [0], divided by the penalty of their length."""
    rows = [0, *tokens]
    total = sum(float(logits_of(torch.tensor([rows[:at]])).log_softmax(-1)[0, rows[at]]) for at in range(1, len(rows)))
    return total / ((5 + len(tokens)) / 6) ** ALPHA


def test_with_beams_enough_it_finds_the_best_continuation_that_ends() -> None:
    ended = [
        (*tokens, END) for length in range(NEW) for tokens in itertools.product(range(END), repeat=length)
    ]  # fmt: skip
    best = max(ended, key=score)
    assert search_beams(logits_of, [0], V**NEW, NEW, {END}) == (list(best[:-1]), True)
    greedy, tokens = [0], []
    while len(greedy) <= NEW and (token := int(logits_of(torch.tensor([greedy])).argmax())) != END:
        greedy.append(token)
        tokens.append(token)
    assert score(best) > score((*tokens, END)[:NEW])  # so greedy decoding would have missed it
    open_ended, finished = search_beams(logits_of, [0], 1, NEW, set())
    assert not finished and len(open_ended) == NEW
    row = [0]
    for token in open_ended:
        assert token == int(logits_of(torch.tensor([row])).argmax())
        row.append(token)


def test_answers_of_distill_data_are_those_of_the_search(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved, prompts, out = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    save_model(
        Transformer(ModelConfig(dim=16, layers=3, attention_heads=2, context=48, heads=2)), saved, ByteTokenizer()
    )
    prompts.write_text("abc\nde\n")
    command = ["distill-data", str(saved), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "6"]
    run_command([*command, "--beams", "3"])
    model = headstart.load(saved)
    for line, text in zip(map(json.loads, out.read_text().splitlines()), ("abc", "de"), strict=True):
        ids = model.tokenizer.encode(text)
        ends = model.tokenizer.end_ids
        tokens, finished = search_beams(lambda rows: model.logits(rows, 1)[:, -1, 0], ids, 3, 6, ends)
        assert line["text"] == text + model.tokenizer.decode(tokens)
        assert line["finish_reason"] == ("end" if finished else "length")
    for beams, words in (("2", "was written with beams 3"), ("0", "--beams is 1 or more")):
        with pytest.raises(UsageError, match=words):
            run_command([*command, "--beams", beams])
