from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart import hardware
from headstart.data.batches import evaluation_batches
from headstart.data.prepare.pipeline import prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer
from headstart.objective.head_weights import HeadWeights
from headstart.training import checkpoints, step
from headstart.training.config import BatchConfig, CheckpointConfig, DataConfig, ValidationConfig, load_config
from headstart.training.loop import train
from headstart.training.new_model import build_model
from headstart.training.optimizer import OptimizerConfig, build_optimizers
from headstart.training.processes import Processes
from headstart.training.schedule import learning_rate
from headstart.training.step import Learner
from headstart.training.validation import validate


def test_a_run_leaves_what_it_promises(tiny, metrics, capsys) -> None:
    config = tiny()
    model = train(config)
    assert model == config.run_dir / "model"
    assert isinstance(load_model(model), Transformer)
    assert load_tokenizer(model).vocab_size == 256
    assert load_config(config.run_dir / "config.yaml") == config
    assert sorted(p.name for p in (config.run_dir / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    lines = metrics(config.run_dir)
    steps = [line for line in lines if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for i, line in enumerate(steps):
        assert line.keys() == {
            *("step", "tokens", "lr", "grad_norm", "clipped", "expected_tokens_per_pass"),
            *(f"{name}/head{k}" for name in ("loss", "top1") for k in (1, 2)),
        }
        assert line["tokens"] == (i + 1) * 4 * 24
        assert line["lr"] == learning_rate(i, 6, config.optimizer)
    assert steps[0]["loss/head1"] == pytest.approx(math.log(256), abs=0.1)
    validations = [line for line in lines if "lr" not in line]
    assert [line["step"] for line in validations] == [2, 4, 6]
    names = {f"validation/{what}/head{k}" for what in ("loss", "bits_per_byte", "top1") for k in (1, 2)}
    assert validations[0].keys() == {"step", "tokens"} | names
    said = capsys.readouterr()
    assert said.out == ""
    assert str(model) in said.err.splitlines()[-1] and "\r" not in said.err and "\x1b" not in said.err


def test_the_loss_goes_down(tmp_path, metrics, tiny) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 2000)
    prepare([str(tmp_path / "text")], tmp_path / "data", load_tokenizer("bytes"))
    config = tiny(steps=60, data=DataConfig(path=tmp_path / "data"), optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5))
    train(config)
    last = metrics(config.run_dir)[-1]
    assert last["loss/head1"] < 1.0 and last["loss/head2"] < 1.0  # from 5.5, that of a guess


ALONE = Processes(torch.device("cpu"))


def weights_after(config) -> dict[str, torch.Tensor]:
    """Full-precision weights: those of the model directory are rounded to bfloat16."""
    train(config)
    model = build_model(config, ALONE)[0]
    optimizers = build_optimizers(model, config.optimizer, torch.device("cpu"))
    checkpoints.restore_newest(config.run_dir / "checkpoints", model, optimizers, ALONE)
    return model.state_dict()


@pytest.mark.parametrize("wiring", ["parallel", "causal"])
def test_one_micro_batch_of_four_rows_is_four_of_one(tiny, metrics, wiring) -> None:
    # SGD-like epsilon: with Adam's own, a gradient of rounding errors alone would become a full step.
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-2)
    model = ModelConfig(dim=16, layers=3, attention_heads=2, context=24, heads=2, wiring=wiring)
    four = tiny("four", batch=BatchConfig(rows=4), optimizer=optimizer, model=model)
    ones = tiny("ones", batch=BatchConfig(rows=1, accumulate=4), optimizer=optimizer, model=model)
    a, b = weights_after(four), weights_after(ones)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6)
    start = build_model(four, ALONE)[0].state_dict()
    assert max((a[name] - start[name]).abs().max() for name in a) > 1e-3
    for x, y in zip(metrics(four.run_dir), metrics(ones.run_dir)):
        assert x["tokens"] == y["tokens"]
        assert x.get("loss/head2") == pytest.approx(y.get("loss/head2"), abs=1e-5)


def test_the_norm_is_clipped_over_all_parameters(tiny, monkeypatch) -> None:
    norms = []
    original = torch.optim.AdamW.step

    def spy(self, *args):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(tiny(optimizer=OptimizerConfig(lr=1e-2, clip=0.25)))
    assert norms and max(norms) == pytest.approx(0.25, rel=1e-3)


def test_head_weights_follow_their_schedule(tiny, monkeypatch) -> None:
    seen = []
    original = Learner.update

    def spy(self, batches, weights, lr):
        seen.append(list(weights))
        return original(self, batches, weights, lr)

    monkeypatch.setattr(Learner, "update", spy)
    train(tiny(head_weights=HeadWeights(initial=(1, 1), final=(1, 0), begin=0, end=0.5)))
    assert [w[1] for w in seen] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])


def poison(monkeypatch, steps: set[int]) -> None:
    original, calls = step.walk_step, [0]

    def walk(model, *args):
        calls[0] += 1
        result = original(model, *args)
        if calls[0] in steps:
            model.trunk.embedding.weight.grad[0, 0] = math.nan
        return result

    monkeypatch.setattr(step, "walk_step", walk)


def test_a_step_that_is_not_finite_is_skipped(tiny, metrics, monkeypatch, capsys) -> None:
    poison(monkeypatch, {3})
    config = tiny(checkpoints=CheckpointConfig(every=1, keep_last=0))
    after: list[dict[str, torch.Tensor]] = [{}]
    original = Learner.update

    def spy(self, *args):
        result = original(self, *args)
        after.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return result

    monkeypatch.setattr(Learner, "update", spy)
    train(config)
    third = [line for line in metrics(config.run_dir) if "lr" in line][2]
    assert third["grad_norm"] is None and third["skipped"] == 1 and third["loss/head1"] > 0
    err = capsys.readouterr().err
    assert "step 3: loss or gradient not finite, step skipped (1 so far)" in err and "1 steps were skipped" in err

    second, third_weights, fourth = after[2:5]
    assert all(torch.equal(second[name], third_weights[name]) for name in second)
    assert any(not torch.equal(second[name], fourth[name]) for name in second)
    assert all(tensor.isfinite().all() for tensor in fourth.values())
    saved = checkpoints.all_steps(config.run_dir / "checkpoints")
    assert list(saved) == [1, 2, 4, 5, 6]
    model = build_model(config, ALONE)[0]
    optimizers = build_optimizers(model, config.optimizer, torch.device("cpu"))
    position = checkpoints.restore(saved[4], model, optimizers, ALONE)
    assert position.skipped == 1 and position.skipped_in_a_row == 0
    assert all(torch.equal(fourth[name], tensor) for name, tensor in model.state_dict().items())


def test_twenty_in_a_row_end_the_run(tiny, monkeypatch) -> None:
    poison(monkeypatch, set(range(4, 100)))
    with pytest.raises(UsageError, match=r"20 steps in a row .* up to step 23: .* not finite; lower optimizer.lr"):
        train(tiny(steps=50, validation=ValidationConfig(every=0)))


def test_validation_equals_the_plain_sum(tiny) -> None:
    config = tiny(batch=BatchConfig(rows=3), validation=ValidationConfig(rows=8))
    shards = TokenShards.open(config.data.path, "validation")
    model = build_model(config, ALONE)[0]
    record = validate(model, shards, config, ALONE)
    (batch,) = evaluation_batches(shards, rows=100, length=24, heads=2, limit_rows=8)
    logits = model(batch.tokens, heads=2)
    for k in (1, 2):
        targets = batch.targets[..., k - 1].flatten()
        nats = torch.nn.functional.cross_entropy(logits[:, :, k - 1].flatten(0, 1), targets, ignore_index=-100).item()
        assert record[f"validation/loss/head{k}"] == pytest.approx(nats, rel=1e-5)
        expected = nats / math.log(2) / shards.bytes_per_token
        assert record[f"validation/bits_per_byte/head{k}"] == pytest.approx(expected, rel=1e-5)
        hits = (logits[:, :, k - 1].argmax(-1).flatten() == targets).sum() / (targets != -100).sum()
        assert record[f"validation/top1/head{k}"] == pytest.approx(hits.item())


def test_attention_within_documents_reaches_the_model(tiny, metrics) -> None:
    base = tiny("plain", steps=2, batch=BatchConfig(rows=64))
    train(base)
    within = tiny("within", steps=2, batch=base.batch, data=replace(base.data, attention_within_documents=True))
    train(within)
    (a, _, av), (b, _, bv) = metrics(base.run_dir), metrics(within.run_dir)
    assert a["loss/head1"] != b["loss/head1"] and av["validation/loss/head1"] != bv["validation/loss/head1"]


def test_it_prepares_its_own_data_once(tiny, corpus, tmp_path, metrics) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in corpus.iterdir():
        (sources / file.name).write_bytes(file.read_bytes())
    config = tiny(steps=2, data=DataConfig(sources=(str(sources),), validation_fraction=0.2))
    train(config)
    (sources / "00.txt").write_text("something else " * 1000)
    before = (config.run_dir / "data" / "train-00000.bin").read_bytes()
    train(replace(config, steps=4))
    assert (config.run_dir / "data" / "train-00000.bin").read_bytes() == before


def test_compiled_blocks_train_alike(tiny, metrics, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # whether it can
    train(tiny(steps=1, compile=True))
    assert len(compiled) == 3  # one block in the trunk, two heads


def test_short_and_foreign_data_are_refused(tiny, tmp_path) -> None:
    (tmp_path / "text").write_text("short")
    config = tiny(data=DataConfig(sources=(str(tmp_path / "text"),)))
    with pytest.raises(UsageError, match=r"its train split has 6 tokens and one row needs 26"):
        train(config)
    (tmp_path / "text").write_text("long enough " * 50)  # the same folder may be tried again with better data
    train(replace(config, data=DataConfig(sources=(str(tmp_path / "text"),), validation_fraction=0.5)))
    with pytest.raises(UsageError, match=r"no such"):
        train(tiny("b", data=DataConfig(path=tmp_path / "nothing")))
    with pytest.raises(UsageError, match=r"no such"):
        train(tiny("c", data=DataConfig(sources=(str(tmp_path / "nothing"),))))


def test_a_vocabulary_below_the_tokenizers_is_refused(tiny) -> None:
    config = tiny()
    with pytest.raises(UsageError, match=r"model.vocab_size 255 is smaller than the 256 of the tokenizer 'bytes'"):
        train(replace(config, model=replace(config.model, vocab_size=255)))
    padded = tiny("padded", model=replace(config.model, vocab_size=320))
    assert train(padded).is_dir()


def test_corpora_too_small_to_validate_still_train(tiny, tmp_path, metrics, capsys) -> None:
    (tmp_path / "text").write_text("one document alone " * 50)
    config = tiny(data=DataConfig(sources=(str(tmp_path / "text"),)))
    train(config)
    assert "nothing is validated" in capsys.readouterr().err
    assert all("lr" in line for line in metrics(config.run_dir))


def test_an_unusable_device_is_refused(tiny) -> None:
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{name}' is not usable here; take auto or cpu"):
            train(tiny(device=name))


def test_metrics_are_json_without_nan(tiny, monkeypatch) -> None:
    poison(monkeypatch, {1})
    config = tiny(steps=2)
    train(config)
    for line in Path(config.run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(("flags", "dtype"), [({"avx2"}, "float32"), ({"avx512_bf16"}, "bfloat16")])
def test_the_dtype_is_the_machines_and_written_down(flags, dtype, tiny, metrics, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "processor", lambda: ("", flags))
    chosen, given = tiny("chosen", steps=2, dtype="auto"), tiny("given", steps=2, dtype=dtype)
    train(chosen)
    train(given)
    assert load_config(chosen.run_dir / "config.yaml").dtype == dtype
    assert metrics(chosen.run_dir) == metrics(given.run_dir)


def test_blocks_of_another_family_are_trained_and_saved_as_that(tiny) -> None:
    """It resumes from a checkpoint too; a model that no family's directory can hold is refused at the start."""
    shape = {"qk_norm": "head", "window": 8, "window_layers": (0, 2), "rope_scaling": RopeScaling("linear", 2.0)}
    config = tiny(model=replace(tiny().model, **shape), steps=2)
    train(config)
    model = train(replace(config, steps=3))
    assert load_config(config.run_dir / "config.yaml") == replace(config, steps=3)
    loaded = load_model(model)
    assert loaded.config == config.model
    assert json.loads((model / "config.json").read_text())["model_type"] == "qwen3"
    refused = tiny("refused", model=replace(config.model, norm_placement="post"))
    with pytest.raises(UsageError, match="norm_placement"):
        train(refused)
    assert not refused.run_dir.exists()


def test_a_run_without_a_target_is_refused(tiny, tmp_path) -> None:
    """Head 2 has nothing to predict in documents of one byte and the end."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": chr(97 + i)}) + "\n" for i in range(26)))
    data = DataConfig(sources=(str(source),), validation_fraction=0)
    weights = HeadWeights(initial=(0, 1), final=(0, 1))
    config = tiny(data=data, head_weights=weights, validation=ValidationConfig(every=0))
    with pytest.raises(UsageError, match=r"6 steps had no target for any trained head; take longer documents"):
        train(config)
    assert not config.run_dir.joinpath("model").exists()
