from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import headstart
from headstart.cli import run_command
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.quantization_loss import pack_and_measure, token_bits
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from tests.models import random_model

CONFIG = ModelConfig(vocab_size=256, dim=32, layers=2, attention_heads=2, context=48)


def test_bits_are_those_of_each_token_after_what_its_window_holds() -> None:
    model, tokens = random_model(CONFIG), torch.randint(0, 256, (100,)).tolist()
    with torch.no_grad():
        bits = token_bits(model, tokens, start=[7])
        assert len(bits) == 100
        # Windows of 47 tokens behind the start token: the third begins at 94.
        for at, window in ((0, []), (46, tokens[:46]), (47, []), (99, tokens[94:99])):
            expected = -model(torch.tensor([[7, *window]]))[0, -1].log_softmax(-1)[tokens[at]] / math.log(2)
            assert float(bits[at]) == pytest.approx(float(expected), rel=1e-5)
        assert len(token_bits(model, tokens)) == 97  # the first token of each of three windows is not predicted


def test_the_loss_is_that_of_the_quantized_model() -> None:
    text = "the cat sat on the mat, and the dog looked on. " * 4
    losses = {}
    for quantize in ("q4", "q8"):
        model = random_model(CONFIG, scale=0.3)
        packed, losses[quantize] = pack_and_measure(model, quantize, ByteTokenizer(), text)
        assert losses[quantize].after == pytest.approx(float(token_bits(packed, list(text.encode())).mean()))
    q4, q8 = losses["q4"], losses["q8"]
    assert q4.before == q8.before and q4.tokens == q8.tokens == len(text) - 4
    assert 0 < abs(q8.after - q8.before) < 0.3 * abs(q4.after - q4.before) and 0 < q8.error < q4.error
    with pytest.raises(UsageError, match="fewer than two tokens"):
        pack_and_measure(random_model(CONFIG), "q4", ByteTokenizer(), "a")


def test_commands_report_the_loss_and_the_library_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(random_model(CONFIG), tmp_path / "model", ByteTokenizer())
    assert headstart.load(tmp_path / "model", quantize="q4").quantization_loss is None
    loss = headstart.load(tmp_path / "model", quantize="q4", measure_loss=True).quantization_loss
    assert loss is not None and capsys.readouterr().err == ""
    generate = ["generate", str(tmp_path / "model"), "--prompt", "a", "--max-new-tokens", "1"]
    run_command([*generate, "--quantize", "q4"])
    assert str(loss) in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    run_command([*generate, "--quantize", "q4", "--loss-text", str(tmp_path / "text.txt")])
    assert "; 21 tokens)" in capsys.readouterr().err
    for more, wrong in (
        (["--loss-text", "x"], "--loss-text is for --quantize"),
        (["--quantize", "q4", "--loss-text", "x"], "x: No such file"),
    ):
        with pytest.raises(UsageError, match=wrong):
            run_command([*generate, *more])
