"""Methods of docs/methods.md in a run: switched on in its YAML, exact when it resumes, absent from the saved model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import chat_tokenizer

from headstart.data.batches import IGNORE, evaluation_batches
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.objective.head_weights import HeadWeights
from headstart.training.adapt.config import AdaptConfig
from headstart.training.auxiliary.masked_inputs import MaskConfig
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.auxiliary.token_order import TokenOrderConfig, linear_token_order
from headstart.training.config import BatchConfig, DataConfig, ValidationConfig, load_config
from headstart.training.estimate import estimate_run
from headstart.training.loop import train
from headstart.training.new_model import build_model
from headstart.training.processes import Processes
from headstart.training.step import Learner
from headstart.training.trackers import WatchConfig
from headstart.training.validation import validate

ALONE = Processes(torch.device("cpu"))
SHAPE: dict[str, Any] = {"dim": 16, "layers": 3, "attention_heads": 2, "context": 24, "heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "masked_inputs": {"model": ModelConfig(**SHAPE, vocab_size=257), "masked_inputs": MaskConfig("random")},
    "token_order": {"model": ModelConfig(**SHAPE), "token_order": TokenOrderConfig(weight=1.0)},
    "registers": {"model": ModelConfig(**SHAPE, vocab_size=257), "registers": RegisterConfig(weight=0.5, share=0.5)},
}


class Killed(BaseException):
    pass


def die_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original, calls = Learner.update, [0]

    def dying(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise Killed
        return original(*args)

    monkeypatch.setattr(Learner, "update", dying)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_died_goes_on_exactly(tiny, metrics, weights, monkeypatch, method) -> None:
    """And micro-batches change nothing: what is drawn belongs to the row."""
    changes = METHODS[method]
    whole, broken = tiny("whole", **changes), tiny("broken", **changes)
    train(whole)
    with monkeypatch.context() as patch:
        die_in_step(patch, 4)
        with pytest.raises(Killed):
            train(broken)
    train(broken)
    assert metrics(whole.run_dir) == metrics(broken.run_dir)
    first, second = weights(whole.run_dir), weights(broken.run_dir)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    split = tiny("split", batch=BatchConfig(rows=1, accumulate=4), **changes)
    train(split)
    losses = [[line["loss/head1"] for line in metrics(run.run_dir) if "loss/head1" in line] for run in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_the_run_and_leaves_an_ordinary_model(tiny, metrics, method) -> None:
    watch = WatchConfig(sample_tokens=4)
    on = tiny("on", steps=2, watch=watch, **METHODS[method])
    off = tiny("off", steps=2, watch=watch, model=METHODS[method]["model"])
    for config in (on, off):
        train(config)
    assert metrics(on.run_dir) != metrics(off.run_dir)
    names = [{str(file.relative_to(run.run_dir)) for file in (run.run_dir / "model").rglob("*")} for run in (on, off)]
    assert {name.replace("on/", "off/") for name in names[0]} == names[1]
    assert load_model(on.run_dir / "model").config == off.model
    auxiliary = {f"loss/{method}"} - {"loss/masked_inputs"}
    first = metrics(on.run_dir)[0]
    assert {name for name in first if name.startswith("loss/")} == {"loss/head1", "loss/head2"} | auxiliary
    assert all(4.5 < first[name] < 7 for name in auxiliary)  # of a model that knows nothing


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of conversations, in which answers are marked."""
    folder = tmp_path_factory.mktemp("answers")
    talks = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}" * 3}] for i in range(40)
    ]
    source = folder / "talks.jsonl"
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chosen = Selection(conversations=True)
    prepare(
        [str(source)], folder / "data", chat_tokenizer(folder), Preparation(selection=chosen, validation_fraction=0.3)
    )
    return folder / "data"


def test_a_teacherless_model_is_trained_and_scored_without_its_answers(tiny, answers, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    config = tiny(
        data=DataConfig(path=answers),
        model=ModelConfig(**SHAPE, vocab_size=265),
        masked_inputs=MaskConfig("teacherless"),
        validation=ValidationConfig(every=1, rows=8),
        steps=1,
    )
    for module, name in (("headstart.training.step", "walk_step"), ("headstart.training.validation", "score_step")):
        original = getattr(sys.modules[module], name)

        def record(model, inputs, *rest, original=original):  # type: ignore[no-untyped-def]
            tokens, targets = inputs.tokens, inputs.targets
            is_answer = targets[:, :-1, 0] != -100
            assert is_answer.any() and (tokens[:, 1:][is_answer] == 264).all() and not (tokens == 264).all()
            seen.append(tokens)
            return original(model, inputs, *rest)

        monkeypatch.setattr(f"{module}.{name}", record)
    train(config)
    assert len(seen) >= 2


def test_what_a_method_needs_is_told(tiny, shards, tmp_path) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(UsageError) as error:
            train(tiny(**changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    random = {"masked_inputs": MaskConfig("random")}
    assert "256 of the tokenizer 'bytes'" in said(**random)
    assert "and 1 for masked_inputs; leave model.vocab_size out, or take 257" in said(**random)
    told = said(masked_inputs=MaskConfig("random", token=256), model=ModelConfig(**SHAPE))
    assert told.startswith("masked_inputs.token 256 is no id of a vocabulary of 256; take a smaller one")
    told = said(masked_inputs=MaskConfig("teacherless"), model=ModelConfig(**SHAPE, vocab_size=257))
    assert "does not say which tokens are answers" in told and "take kind random" in told
    sequential = ModelConfig(**SHAPE, vocab_size=257, head_kind="sequential", wiring="causal")
    assert said(model=sequential, **random).startswith("masked_inputs does not go with sequential heads")
    adapt = AdaptConfig(model=Path("model"))
    assert said(adapt=adapt, **METHODS["registers"]).startswith(
        "registers does not go with headstart adapt, whose model"
    )
    told = said(token_order=TokenOrderConfig(1.0), head_weights=HeadWeights(sampled=True))
    assert told.startswith("token_order is part of head 1's loss")


def test_methods_are_in_a_run_together(tiny, metrics) -> None:
    """Each with a token of its own."""
    config = tiny(
        steps=1,
        model=ModelConfig(**SHAPE, vocab_size=258),
        masked_inputs=MaskConfig("random"),
        token_order=TokenOrderConfig(0.5),
        registers=RegisterConfig(0.5),
    )
    assert (config.token_of("masked_inputs"), config.token_of("registers")) == (256, 257)
    train(config)
    assert {"loss/token_order", "loss/registers"} < metrics(config.run_dir)[0].keys()


def test_validation_scores_what_is_learnt_beside_heads(tiny, shards) -> None:
    config = tiny(
        model=ModelConfig(**SHAPE, vocab_size=257),
        token_order=TokenOrderConfig(0.5),
        registers=RegisterConfig(0.5),
        batch=BatchConfig(rows=3),
        validation=ValidationConfig(rows=8),
    )
    held_out, model = TokenShards.open(shards, "validation"), build_model(config, ALONE)[0]
    record = validate(model, held_out, config, ALONE)
    at_once = validate(model, held_out, replace(config, batch=BatchConfig(rows=8)), ALONE)
    assert record == pytest.approx(at_once, rel=1e-5)
    (batch,) = evaluation_batches(held_out, rows=8, length=24, heads=2, limit_rows=8)
    x = model.unembedding(model.latents(batch.tokens, [1])[1], using=lambda x, weight: x)
    total = linear_token_order(x, model.unembedding.order, batch.targets[..., 0], batch.documents)
    mean = total.item() / (batch.targets[..., 0] != IGNORE).sum().item()
    assert record.pop("validation/loss/token_order") == pytest.approx(mean, rel=1e-5)
    registers = record.pop("validation/loss/registers")
    off = replace(config, registers=RegisterConfig(), token_order=TokenOrderConfig())
    assert record == pytest.approx(validate(model, held_out, off, ALONE), rel=1e-5)  # nothing sees registers
    assert 5 < registers < 6 and registers != pytest.approx(record["validation/loss/head1"], rel=1e-5)


def test_a_dry_run_counts_them(tmp_path, shards) -> None:
    file, peaks = tmp_path / "run.yaml", []
    for more in ("", "token_order: {weight: 1}\n", "registers: {weight: 1}\n"):
        file.write_text(f"steps: 1\ndata: {{path: {shards}}}\nmodel: {{vocab_size: 9000}}\n{more}")
        peaks.append(estimate_run(load_config(file), "run")["peak_bytes"])
    # A matrix with gradient and two moments; activations of twice the rows.
    assert peaks[1] - peaks[0] >= 4 * 4 * 9000 * 256 and peaks[2] > 1.3 * peaks[0]


def test_the_vocabulary_has_a_row_for_each_token_of_a_method(tmp_path, shards) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"steps: 1\ndata: {{path: {shards}}}\nmasked_inputs: {{kind: random}}\n")
    config = load_config(file)
    assert config.model.vocab_size == 257 and config.token_of("masked_inputs") == 256
    assert load_config(file, ["--masked-inputs.token", "3"]).model.vocab_size == 256
