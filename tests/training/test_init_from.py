"""A run that starts from a trained model: which weights it takes over, which shapes it refuses, and how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.commands.train import TrainSettings
from headstart.data.prepare.bpe import NewBpe
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model, load_model_tokenizer
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.config import DataConfig, RunConfig
from headstart.training.init_from import first_values, shape_from
from headstart.training.loop import train
from headstart.training.step import Learner
from tests.models import every_wiring, random_model, with_heads_of

BASE = ModelConfig(vocab_size=256, dim=16, layers=6, attention_heads=2, context=24, heads=4)


def stored(folder: Path, config: ModelConfig = BASE) -> Path:
    save_model(random_model(config), folder / "model", load_tokenizer("bytes"))
    return folder / "model"


def started(model: Path, shape: ModelConfig) -> Transformer:
    new = Transformer(shape)
    new.load_state_dict(first_values(model, shape, seed=0))
    return new


def logits(model: Transformer, heads: int) -> torch.Tensor:
    tokens_BT = torch.arange(20)[None]
    return model(tokens_BT, heads=heads).nan_to_num()


@every_wiring
def test_heads_are_kept_dropped_or_added(kind: str, wiring: str, tmp_path: Path) -> None:
    config = with_heads_of(BASE, kind, wiring)
    path = stored(tmp_path, config)
    old = load_model(path)
    assert torch.equal(logits(started(path, old.config), 4), logits(old, 4))
    if old.config.kind.plain_decoder:
        alone = started(path, shape_from(old.config, 1, None, None))
        assert alone.config.heads == 1
        torch.testing.assert_close(logits(alone, 1), logits(old, 1))
    else:
        with pytest.raises(UsageError, match="no plain decoder"):
            shape_from(old.config, 1, None, None)
    if wiring != "anticausal":
        fewer = started(path, shape_from(old.config, 2, None, None))
        same = 1 if kind == "stern" else 2  # the layer that Stern's heads share is narrower
        torch.testing.assert_close(logits(fewer, same), logits(old, same))
        more = started(path, shape_from(old.config, 5, None, None))
        same = 1 if kind == "stern" else 4
        torch.testing.assert_close(logits(more, same), logits(old, same))


def test_what_is_new_and_what_is_dropped_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path)
    started(path, shape_from(BASE, 2, None, None))
    started(path, shape_from(BASE, 3, "medusa", None))
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("27 of 27 tensors are its own; new: nothing; dropped: head 3, head 4")
    assert second.endswith("21 of 25 tensors are its own; new: head 2, head 3; dropped: head 2, head 3, head 4")


def arguments(tmp_path: Path, shards: Path, lines: str, *more: str) -> list[str]:
    file = tmp_path / "run.yaml"
    text = f"steps: 6\nrun_dir: {tmp_path / 'run'}\ndata: {{path: {shards}}}\nbatch: {{rows: 2, length: 16}}\n{lines}\n"
    file.write_text(text)
    return [str(file), *more]


def test_the_model_gives_the_sizes(tmp_path: Path, shards: Path) -> None:
    path = stored(tmp_path, replace(BASE, kv_heads=1, hidden_dim=64, tied=True))
    parse = TrainSettings.parse
    run = parse(arguments(tmp_path, shards, f"init_from: {path}", "--model.heads=1")).run
    assert run.model == replace(load_model(path).config, heads=1, layers=3)
    assert run.data.tokenizer == str(path)
    run = parse(arguments(tmp_path, shards, "model: {context: 99, heads: 2}", "--init-from", str(path))).run
    assert (run.model.heads, run.model.layers, run.model.context, run.model.tied) == (2, 4, 99, True)
    # Sizes that say the same fit, and so do those of the model before it lost heads.
    parse(
        arguments(tmp_path, shards, "model: {dim: 16, layers: 6, heads: 1, hidden_dim: 64}", "--init-from", str(path))
    )


@pytest.mark.parametrize(
    ("lines", "more", "told"),
    [
        ("model: {dim: 32}", [], "its dim is 16 and model.dim 32; leave model.dim out"),
        ("model: {preset: 1M}", [], "its dim is 16 and model.dim 128"),
        ("", ["--model.dim", "32"], "its dim is 16 and model.dim 32"),
        ("", ["--model.vocab-size", "300"], "its vocab_size is 256 and model.vocab_size 300"),
        ("", ["--model.family", "qwen3"], "its family is None and model.family qwen3"),
        ("", ["--model.layers", "8"], "its layers is 6 and model.layers 8"),
        ("", ["--model.wiring", "anticausal"], "head 1 would read the new heads"),
        ("", ["--init-from", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_what_does_not_fit_is_told(lines: str, more: list[str], told: str, tmp_path: Path, shards: Path) -> None:
    given = arguments(tmp_path, shards, lines, "--init-from", str(stored(tmp_path)), *more)
    with pytest.raises(UsageError, match=told) as error:
        TrainSettings.parse(given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(tiny: Callable[..., RunConfig], tmp_path: Path, corpus: Path) -> None:
    prepare([str(corpus)], tmp_path / "data", NewBpe(270), Preparation())
    config = tiny("run", init_from=stored(tmp_path), model=BASE, data=DataConfig(path=tmp_path / "data"))
    with pytest.raises(UsageError, match=r"the 270 of the tokenizer 'bpe-270' .* encoded with the tokenizer of"):
        train(config)


class Killed(BaseException):
    pass


def test_it_resumes_exactly(
    tiny: Callable[..., RunConfig], tmp_path: Path, metrics: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"init_from": stored(tmp_path), "model": shape_from(BASE, 2, None, None)}
    whole, broken = tiny("whole", **changes), tiny("broken", **changes)
    train(whole)
    update, steps = Learner.update, iter(range(6))

    def dying(*args: Any) -> Any:
        if next(steps) == 3:
            raise Killed
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Learner, "update", dying)
        train(broken)
    train(broken)
    assert metrics(whole.run_dir) == metrics(broken.run_dir)
    first, second = weights(whole.run_dir), weights(broken.run_dir)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_that_began_otherwise_is_refused(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(tiny("run", steps=2, model=BASE))
    with pytest.raises(UsageError, match=r"holds a run with init_from None, not .*; give another --run-dir"):
        train(tiny("run", steps=4, model=BASE, init_from=stored(tmp_path)))


def test_the_result_stops_where_the_model_stopped(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = stored(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [10, 13]}')
    config = tiny("run", steps=1, model=BASE, init_from=path)
    train(config)
    tokenizer = load_model_tokenizer(config.run_dir / "model")
    assert tokenizer is not None and tokenizer.end_ids >= {10, 13}
