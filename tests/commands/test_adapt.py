"""`headstart adapt`: heads on a model that has learned something, from the command to the model directory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from seeds import trained_seed

import headstart
from headstart.cli import run_command
from headstart.commands.adapt import AdaptSettings, adapt, estimate_adapt_run, format_adapted, run_config
from headstart.commands.convert import convert
from headstart.commands.dry_run import DryRunSettings
from headstart.commands.own_answers import OwnAnswers
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.decoding.kernels.pack import multiplies_blocks
from headstart.errors import UsageError
from headstart.formats.heads import StoredHeads
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer, Trunk
from headstart.training import loop
from headstart.training.adapt.draft_vocabulary import most_frequent
from headstart.training.adapt.run import flops_per_token
from headstart.training.adapt.stored_outputs import StoredOutputs
from headstart.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    RunConfig,
    ValidationConfig,
    load_config,
)
from headstart.training.estimate import estimate_run
from headstart.training.interruption import Interrupted
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.schedule import stage_of
from headstart.training.step import Learner
from headstart.training.trackers import WatchConfig

TEXT = "".join(f"the cat number {i % 10} sat on mat {i * i % 7}, and the dog looked on.\n" for i in range(600))
TOKENS = torch.tensor([list(TEXT[:60].encode())])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("headstart.commands.adapt.SCORED_TOKENS", 300)
    monkeypatch.setattr("headstart.training.metrics.peak_flops", lambda *_: (1e12, "assumed"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "files").mkdir()
    for i in range(10):
        (folder / "files" / f"{i}.txt").write_text(TEXT[i * 3000 : (i + 1) * 3000])
    prepare([str(folder / "files")], folder / "data", load_tokenizer("bytes"), Preparation(validation_fraction=0.2))
    return folder / "data"


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with one head that has learned the text a little, stored in bfloat16."""
    config = RunConfig(
        steps=60,
        seed=trained_seed(0),
        run_dir=tmp_path_factory.mktemp("old") / "run",
        device="cpu",
        dtype="float32",
        model=ModelConfig(dim=32, layers=2, attention_heads=2, context=64),
        data=DataConfig(path=shards),
        batch=BatchConfig(rows=8, length=32),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
        validation=ValidationConfig(every=0, rows=8),
        checkpoints=CheckpointConfig(every=0),
        watch=WatchConfig(sample_tokens=0),
    )
    return train(config)


@pytest.fixture
def settings(model: Path, shards: Path, tmp_path: Path) -> Any:
    def make(name: str = "run", **changes: Any) -> AdaptSettings:
        plain = AdaptSettings(
            model=model,
            data=(str(shards),),
            run_dir=tmp_path / name,
            heads=3,
            steps=8,
            length=32,
            lr=1e-2,
            dtype="float32",
            device="cpu",
            validation_every=0,
            checkpoints_every=4,
        )
        return replace(plain, **changes)

    return make


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["transformer", "medusa", "sequential", "eagle3"])
def test_heads_learn_and_the_model_stays_what_it_is(kind: str, settings: Any, model: Path) -> None:
    asked = settings(head_kind=kind, steps=40)
    found = adapt(asked)
    new = asked.run_dir / "model"
    before, after = load_file(model / "model.safetensors"), load_file(new / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    assert torch.equal(load_model(new)(TOKENS), load_model(model)(TOKENS))
    steps = [line for line in lines(asked.run_dir) if "lr" in line]
    for k in (2, 3):
        assert steps[-1][f"loss/head{k}"] < steps[0][f"loss/head{k}"] - 0.2
    assert steps[0]["loss/head1"] is None  # frozen, so not asked
    assert found["tokens_per_pass"][2] > 1.1 and len(found["acceptance"]) == 2
    assert json.loads((new / "acceptance.json").read_text())["on text, teacher-forced"]["acceptance"]


step = Learner.step


def test_a_stopped_run_goes_on_exactly(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the border between the two stages of a joint run; checkpoints of heads alone hold no frozen weight."""
    for more in ({"head_kind": "medusa"}, {"mode": "joint", "heads_first": 0.5, "self_distilled": True}):
        name = more.get("mode", "heads")
        whole, parts = settings(f"{name} whole", **more), settings(f"{name} parts", **more)
        adapt(whole)
        for stop in (3, 4, 6):

            def stopping(learner: Learner, batches: Any, at: int, stop: int = stop) -> Any:
                return replace(step(learner, batches, at), stop=at + 1 == stop)

            with monkeypatch.context() as patch:
                patch.setattr(Learner, "step", stopping)
                with pytest.raises(Interrupted):
                    adapt(parts)
        adapt(parts)
        for file in ("model.safetensors", "heads/heads.safetensors"):
            one, other = (load_file(run.run_dir / "model" / file) for run in (whole, parts))
            assert all(torch.equal(one[name], other[name]) for name in one), (name, file)
        newest = sorted((whole.run_dir / "checkpoints").iterdir())[-1]
        size = sum(file.stat().st_size for file in newest.glob("*.distcp"))
        heads = sum(p.numel() for n, p in load_model(whole.run_dir / "model").named_parameters() if "residuals" in n)
        if name == "heads":
            assert size < 4 * 3 * heads + 40_000  # weights and two moments


def test_a_joint_run_trains_everything_after_the_heads(settings: Any, model: Path) -> None:
    asked = settings(mode="joint", heads_first=0.5)
    config = run_config(asked)
    assert config.head_weights.at(0.5, 3) == pytest.approx([1, 0.2 * 0.8, 0.2 * 0.64])
    assert config.optimizer.head_lr_ratio == 4
    adapt(asked)
    assert not torch.equal(load_model(asked.run_dir / "model")(TOKENS), load_model(model)(TOKENS))
    steps = [line for line in lines(asked.run_dir) if "lr" in line]
    assert [line["loss/head1"] is None for line in steps] == [True] * 4 + [False] * 4
    assert [stage_of(step, config).begin for step in (0, 3, 4, 7)] == [0, 0, 4, 4]
    assert steps[0]["lr"] == steps[4]["lr"] and steps[3]["lr"] == steps[7]["lr"]  # a rise and a fall for each part
    adapt(replace(asked, steps=10))  # continues with everything, at the final rate
    added = [line for line in lines(asked.run_dir) if "lr" in line][8:]
    assert [line["loss/head1"] is None for line in added] == [False, False]
    assert [line["lr"] for line in added] == pytest.approx([steps[7]["lr"]] * 2)


def test_heads_take_layers_of_the_model_and_all_losses_count_alike(settings: Any, tmp_path: Path) -> None:
    """The arm "+0 layers" of the paper's Table S6."""
    shape = ModelConfig(dim=32, layers=4, attention_heads=2, context=64)
    save_model(Transformer(shape), tmp_path / "deep", load_tokenizer("bytes"))
    more = {"mode": "joint", "head_kind": "transformer", "take_layers": True, "heads_first": 0.0}
    asked = replace(settings("taken", **more, head_weight=1.0, head_decay=1.0), heads=2, model=tmp_path / "deep")
    assert run_config(asked).head_weights.at(0, 2) == [1.0, 1.0]
    adapt(asked)
    result = load_model(asked.run_dir / "model").config
    assert (result.layers, result.trunk_layers, result.heads) == (4, 2, 2)
    with pytest.raises(UsageError, match=r"adapt\.take_layers is for adapt\.mode joint"):
        adapt(replace(asked, mode="heads", head_weight=None, run_dir=tmp_path / "alone"))


def test_self_distillation_keeps_the_model_nearer_to_what_it_was(settings: Any, model: Path) -> None:
    before = load_model(model, torch.float32)(TOKENS).log_softmax(-1).detach()

    def distance(**more: Any) -> float:
        asked = settings(f"run{len(more)}", mode="joint", heads_first=0.0, steps=10, head_weight=0.01, **more)
        adapt(asked)
        with torch.no_grad():
            after = load_model(asked.run_dir / "model", torch.float32)(TOKENS).log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    assert 0 < distance(self_distilled=True) < 0.5 * distance()


def test_lora_trains_beside_the_weights(settings: Any, model: Path) -> None:
    """A stopped run resumes; the teacher is the model itself, without the products that LoRA adds."""
    more = {"mode": "joint", "lora": 4, "heads_first": 0.25, "lr": 3e-3, "self_distilled": True, "head_kind": "medusa"}
    whole, parts = settings("whole", **more), settings("parts", **more)
    adapt(whole)

    def stopping(learner: Learner, batches: Any, at: int) -> Any:
        return replace(step(learner, batches, at), stop=at + 1 == 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        with pytest.raises(Interrupted):
            adapt(parts)
    adapt(parts)
    for file in ("model/model.safetensors", "model/heads/heads.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(run.run_dir / file) for run in (whole, parts))
        assert all(torch.equal(one[name], other[name]) for name in one), file
    before, after = (load_file(path / "model.safetensors") for path in (model, whole.run_dir / "model"))
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(UsageError, match=r"adapt\.lora is for adapt\.mode joint"):
        adapt(settings("wrong", lora=4))
    with pytest.raises(UsageError, match="--lora-head needs --lora RANK"):
        adapt(settings("wrong", lora_head=True, mode="joint"))


def test_lora_on_the_output_matrix_leaves_the_embedding(settings: Any, model: Path) -> None:
    run = settings("head", mode="joint", lora=4, lora_head=True, heads_first=0.25, lr=3e-3, head_kind="medusa")
    adapt(run)
    before, after = (load_file(path / "model.safetensors") for path in (model, run.run_dir / "model"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    own = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    assert not torch.equal(own, after["lm_head.weight"])
    adapter = load_file(run.run_dir / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.lm_head.lora_{which}.weight"] for which in "AB")
    assert torch.allclose(after["lm_head.weight"].float(), own.float() + b @ a * (16 / 4), atol=1e-3)


def test_one_head_is_trained_in_each_step(settings: Any) -> None:
    """Every step reports the loss of one head; together they report all but head 1, which is frozen."""
    run = settings("sampled", sample_heads=True, heads=4, steps=16)
    adapt(run)
    steps = [line for line in lines(run.run_dir) if "loss/head1" in line]
    trained = [{k for k in range(1, 5) if line[f"loss/head{k}"] is not None} for line in steps]
    assert trained and all(len(heads) == 1 for heads in trained) and set().union(*trained) == {2, 3, 4}


@pytest.mark.parametrize("kind", ["sequential", "eagle3"])
def test_kept_hidden_states_train_the_same_heads(
    kind: str, settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = settings("plain", loss="kl", head_kind=kind, sample_tokens=0)
    monkeypatch.setattr("headstart.training.adapt.new_heads.size_of_latents", lambda _: 1.0)  # it runs the trunk
    kept = replace(plain, run_dir=plain.run_dir.with_name("kept"), cache_states="true", validation_fraction=0.0)
    adapt(plain)
    ran: list[int] = []
    forward = Trunk.forward

    def counted(trunk: Trunk, tokens: torch.Tensor, *rest: Any) -> Any:
        ran.append(len(tokens))
        return forward(trunk, tokens, *rest)

    monkeypatch.setattr(Trunk, "forward", counted)
    monkeypatch.setattr("headstart.commands.adapt.acceptance", lambda *_: {})
    monkeypatch.setattr("headstart.training.adapt.stored_outputs.LIKELY", 256)
    adapt(kept)
    rows = int(re.search(r"hidden states of (\d+) rows", capsys.readouterr().err)[1])  # type: ignore[index]
    assert sum(ran) == rows  # each once, none in a step
    for one, other in zip(lines(plain.run_dir), lines(kept.run_dir)):
        names = [name for name in one if name.endswith(("loss/head2", "loss/head3"))]
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)
    adapt(replace(kept, steps=10))  # resumes with the cached states
    assert sum(ran) == rows
    with pytest.raises(UsageError, match="more than --cache-gib"):
        adapt(replace(kept, run_dir=kept.run_dir.with_name("small"), cache_gib=1e-6))


def test_the_same_text_under_another_name_has_the_same_states(settings: Any, tmp_path: Path) -> None:
    states = tmp_path / "states"
    for name, animal in (("a", "cat"), ("b", "cat"), ("c", "dog")):
        (tmp_path / f"{name}.txt").write_text(f"the {animal} sat\n" * 40)
        asked = settings(name, data=(str(tmp_path / f"{name}.txt"),), steps=1, cache_states=str(states))
        adapt(replace(asked, validation_fraction=0.0, sample_documents=0))
    assert len(list(states.iterdir())) == 2


@pytest.mark.parametrize("kind", ["transformer", "medusa", "sequential", "eagle3"])
def test_held_out_rows_are_scored_alike_with_kept_states(kind: str, settings: Any) -> None:
    """Head 1, which never changes, is not scored."""
    plain = settings("plain", head_kind=kind, steps=2, draft_vocab=20)
    adapt(plain)
    adapt(replace(plain, run_dir=plain.run_dir.with_name("kept"), cache_states="true"))
    mine, theirs = (
        next(line for line in lines(folder) if "validation/loss/head2" in line)
        for folder in (plain.run_dir, plain.run_dir.with_name("kept"))
    )
    for name in ("validation/loss/head2", "validation/loss/head3", "validation/top1/head3"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    assert "validation/loss/head1" not in mine


@pytest.mark.parametrize(
    ("options", "features", "normed"),
    [
        ({}, (0, 1, 2), False),
        ({"features": "last", "norm_output": True}, (2,), True),
        ({"features": "0,2"}, (0, 2), False),
    ],
)
def test_the_layers_that_eagle3_heads_read(options: Any, features: Any, normed: bool, settings: Any) -> None:
    """They are stored, and what is wrong with them is said."""
    asked = settings(head_kind="eagle3", steps=2, **options)
    adapt(asked)
    config = load_model(asked.run_dir / "model").config
    assert (config.features, config.norm_output) == (features, normed)
    for wrong, message in (("x", "--features is 'x'; give layers"), ("3,2", "must ascend"), ("2,9", "up to 2")):
        with pytest.raises(UsageError, match=message):
            run_config(replace(asked, features=wrong))
    with pytest.raises(UsageError, match=r"model\.features is for eagle3 heads, not medusa"):
        run_config(replace(asked, head_kind="medusa", features="last"))


def test_the_rollout_trains_the_steps_that_are_asked_for(settings: Any) -> None:
    """Teacher forcing gives the first step alone a loss; all steps are evaluated."""
    forced = settings(head_kind="sequential", norm_output=True, heads=4, rollout=1, steps=2)
    found = adapt(forced)
    assert len(found["top1"]) == 4 and load_model(forced.run_dir / "model").config.norm_output
    step = next(line for line in lines(forced.run_dir) if "lr" in line)
    assert [k for k in range(1, 5) if step[f"loss/head{k}"] is not None] == [2]
    for wrong, message in (({"rollout": 4}, "4 heads have 1 to 3 steps"), ({"norm_output": False}, "--rollout is for")):
        with pytest.raises(UsageError, match=message):
            run_config(replace(forced, **wrong))


def test_heads_that_learn_from_the_model_agree_with_it_more(settings: Any) -> None:
    """The losses reach the walk: a run with kl is another one, and still lowers the cross-entropy."""
    plain, taught = settings("plain", head_kind="medusa"), settings("kl", head_kind="medusa", loss="kl", steps=40)
    adapt(plain)
    adapt(taught)
    first, last = ([line for line in lines(taught.run_dir) if "lr" in line][i]["loss/head2"] for i in (0, -1))
    assert last < first - 0.2
    assert first != lines(plain.run_dir)[0]["loss/head2"]


@pytest.mark.parametrize("kind", ["transformer", "medusa", "replicated", "sequential", "eagle3"])
def test_heads_with_a_draft_vocabulary(
    kind: str, settings: Any, shards: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The most frequent tokens of the data; a run that resumes has those of its checkpoint."""
    asked = settings(head_kind=kind, draft_vocab=12, steps=4, loss="kl")
    adapt(asked)
    tokens = TokenShards.open(shards, "train").tokens[:]
    counts = np.bincount(tokens, minlength=256)
    chosen = sorted(sorted(range(256), key=lambda token: (-counts[token], token))[:12])
    covered = counts[chosen].sum() / len(tokens)
    assert f"a draft vocabulary of 12 tokens covers {covered:.1%}" in capsys.readouterr().err
    made = load_model(asked.run_dir / "model")
    assert made.unembedding.d2t.tolist() == chosen and made.config.draft_vocab == 12
    found = adapt(replace(asked, steps=40))
    again = load_model(asked.run_dir / "model")
    assert again.unembedding.d2t.tolist() == chosen
    logits = again(TOKENS, heads=3)[:, :50]
    assert torch.equal(logits[:, :, 0], load_model(model)(TOKENS)[:, :50])
    assert bool((logits[:, :, 1:].isfinite().sum(-1) == 12).all())
    first, last = ([line for line in lines(asked.run_dir) if "lr" in line][i]["loss/head2"] for i in (0, -1))
    assert last < first and len(found["acceptance"]) == 2
    with pytest.raises(UsageError, match=r"holds a run with model\.draft_vocab 12, not 13"):
        adapt(replace(asked, draft_vocab=13))


def test_equally_frequent_tokens_are_taken_by_their_id(shards: Path) -> None:
    split = TokenShards.open(shards, "train")
    tokens = np.array([5, 5, 9, 9, 2, 2, 7, 1, 1, 1, 0, 8], dtype=np.uint8)
    every = replace(split, tokens=tokens, targets=None)
    assert most_frequent([every], 12, 3) == (Tokens([1, 2, 5]), pytest.approx(7 / 12))
    # Where some tokens are only read, those to be predicted come first.
    is_target = np.array([0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0], dtype=bool)
    some = replace(split, tokens=tokens, targets=is_target)  # type: ignore[arg-type]
    assert most_frequent([some], 12, 3) == (Tokens([0, 1, 9]), pytest.approx(4 / 5))
    assert most_frequent([some], 12, 5) == (Tokens([0, 1, 2, 7, 9]), 1.0)
    assert most_frequent([every, every], 12, 12) == (Tokens(range(12)), 1.0)


class Tokens(list[int]):
    """Token ids that are equal to a tensor of them."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Tensor) and other.tolist() == list(self)


def test_a_draft_vocabulary_must_fit(settings: Any, tmp_path: Path) -> None:
    for size, message in ((257, "draft_vocab is 257, and the vocabulary has 256 tokens"), (0, "must be at least 1")):
        asked = settings(f"run{size}", draft_vocab=size)
        arguments = ["adapt", asked.model, "--data", *asked.data, "--run-dir", asked.run_dir, "--draft-vocab", size]
        with pytest.raises(UsageError, match=message):
            run_command([str(argument) for argument in arguments])
    with pytest.raises(UsageError, match=r"model\.draft_vocab is for heads on an existing model"):
        RunConfig(steps=1, model=ModelConfig(heads=2, layers=3, draft_vocab=9), data=DataConfig(path=tmp_path))
    with pytest.raises(UsageError, match="the model has one head"):
        ModelConfig(draft_vocab=9)


def test_the_run_is_written_down_and_read_back(settings: Any) -> None:
    asked = settings(loss="total-variation", loss_share=0.5, steps=1)
    config = run_config(asked)
    adapt(asked)
    saved = load_config(asked.run_dir / "config.yaml")
    assert saved == replace(config, dtype="float32")
    assert estimate_run(saved, "saved")["steps"] == 1
    other = replace(asked, mode="joint", steps=2)
    for start in (adapt, estimate_adapt_run):
        with pytest.raises(UsageError, match=r"holds a run with adapt\.mode heads, not joint"):
            start(other)


def test_frozen_weights_cost_less_than_trained_ones(settings: Any) -> None:
    config = run_config(settings(heads=2, head_kind="medusa"))
    D, V, whole = 32, 256, config.model.flops_per_token(32)
    assert flops_per_token(replace(config, adapt=None)) == whole
    trunk = (replace(config.model, heads=1, head_kind="linear").flops_per_token(32) - 6 * V * D) // 3
    assert flops_per_token(config) == trunk + 6 * D * D + 4 * V * D


def test_a_dry_run_counts_frozen_weights_and_leaves_nothing(
    settings: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.hardware.peak_flops", lambda *_: (3.6e9, "assumed"))
    alone, joint = settings(head_kind="medusa"), settings(head_kind="medusa", mode="joint")
    one, other = map(estimate_adapt_run, (alone, joint))
    trained = 2 * (32 * 32 + 32)  # two heads of a matrix and a bias
    update = one["moments"]["the update of the weights"]
    assert update["optimizer state"] == 8 * trained and update["gradients (float32)"] == 4 * trained
    assert update["frozen weights (float32)"] == 4 * (one["parameters"] - trained)
    assert other["moments"]["the update of the weights"]["optimizer state"] == 8 * one["parameters"]
    assert one["peak_bytes"] < other["peak_bytes"]
    assert one["hours"] == {"this CPU": one["flops_per_token"] * 8 * 8 * 32 / 3.6e9 / 3600}
    with pytest.raises(UsageError, match="needs dtype bfloat16"):
        estimate_adapt_run(settings(frozen_dtype="bfloat16"))
    with pytest.raises(UsageError, match="take --mode joint --heads-first 0 without --lora, --self-distilled"):
        estimate_adapt_run(replace(alone, dry_run=DryRunSettings(processes=2)))
    whole = replace(joint, heads_first=0.0, dry_run=DryRunSettings(processes=2))
    assert estimate_adapt_run(whole)["processes"] == 2
    given = [str(alone.model), "--data", *alone.data, "--run-dir", str(alone.run_dir), "--head-kind", "medusa"]
    run_command(["adapt", *given, "--dry-run", "--device", "cpu", "--length", "32", "--json"])
    assert json.loads(capsys.readouterr().out)["heads"] == 4
    assert not alone.run_dir.exists()
    with pytest.raises(UsageError, match="--processes is for --dry-run"):
        run_command(["adapt", *given, "--processes", "2"])
    with pytest.raises(SystemExit):
        run_command(["adapt", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in ("dry-run", "processes", "device-memory", "mfu", "heads-first"))
    assert "torchrun" in shown  # what --processes says of itself


def test_what_cannot_be_adapted_is_told(settings: Any, model: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        adapt(settings(model=tmp_path / "nowhere"))
    adapt(settings(steps=1))
    with pytest.raises(UsageError, match="heads already"):
        adapt(settings("again", model=tmp_path / "run" / "model"))
    with pytest.raises(UsageError, match="tokens and one row needs"):
        adapt(settings("wide run", model=_wide(model, tmp_path), length=30_000))
    small = replace(load_model(model).config, vocab_size=100)
    save_model(loop.Transformer(small), tmp_path / "small")
    with pytest.raises(UsageError, match=r"its tokenizer has 256 ids, .* a vocabulary of 100"):
        adapt(settings("small run", model=tmp_path / "small"))
    with pytest.raises(UsageError, match="has no tokenizer to read text with"):
        adapt(settings("small run", model=tmp_path / "small", data=(str(model / "config.json"),)))
    with pytest.raises(UsageError, match="needs dtype bfloat16"):
        adapt(settings("half", frozen_dtype="bfloat16"))
    with pytest.raises(UsageError, match="head-weight is for --mode joint"):
        adapt(settings("weight", head_weight=1.0))


def _wide(model: Path, tmp_path: Path) -> Path:
    wide = load_model(model)
    wide.config = replace(wide.config, context=40_000)
    save_model(wide, tmp_path / "wide", load_tokenizer(model))
    return tmp_path / "wide"


def test_a_model_that_changed_is_not_gone_on_with(settings: Any, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    save_model(load_model(model), mine, load_tokenizer(model))
    (mine / "generation_config.json").write_text('{"eos_token_id": [10, 255]}')
    adapt(settings(model=mine))
    # Where it ends a text is the model's own.
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["eos_token_id"] == [10, 255]
    tokenizer = (mine / "tokenizer.json").read_text()
    (mine / "tokenizer.json").write_text(tokenizer + "\n")
    for start in (adapt, estimate_adapt_run):
        with pytest.raises(UsageError, match="is another than when"):
            start(settings(model=mine, steps=9))
    (mine / "tokenizer.json").write_text(tokenizer)
    changed = load_model(mine)
    with torch.no_grad():
        changed.trunk.embedding.weight[0] += 1
    save_model(changed, mine, load_tokenizer(model))
    with pytest.raises(UsageError, match="is another than when"):
        adapt(settings(model=mine, steps=9))


def test_frozen_weights_in_bfloat16(settings: Any, model: Path) -> None:
    asked = settings(frozen_dtype="bfloat16", dtype="bfloat16", head_kind="medusa", rows=2, length=16)
    adapt(asked)
    assert torch.equal(load_model(asked.run_dir / "model")(TOKENS), load_model(model)(TOKENS))
    assert load_file(asked.run_dir / "model" / "heads" / "heads.safetensors")["heads.2.residual.weight"].any()


def test_heads_alone_are_those_of_the_model_directory(settings: Any, model: Path, tmp_path: Path) -> None:
    """A finished run writes them from its checkpoint, and the model with them is what the run wrote without."""
    asked = settings(head_kind="medusa")
    adapt(asked)
    found = adapt(replace(asked, heads_only=True))
    assert found["model"] == str(model) and found["heads_from"] == str(asked.run_dir / "heads")
    assert len(found["acceptance"]) == 2 and (asked.run_dir / "heads/acceptance.json").is_file()
    assert format_adapted(found).startswith(f"heads: {asked.run_dir / 'heads'} (3 medusa heads, for {model})")
    convert(model, tmp_path / "merged", heads=asked.run_dir / "heads")
    written = asked.run_dir / "model"
    files = [file for file in written.rglob("*.*") if file.name != "acceptance.json"]
    assert {"config.json", "model.safetensors", "heads.safetensors"} <= {file.name for file in files}
    for file in files:
        assert file.read_bytes() == (tmp_path / "merged" / file.relative_to(written)).read_bytes(), file
    assert StoredHeads.read(asked.run_dir / "heads").base == model.parent.name


def test_heads_of_a_gguf_file_are_written_alone(settings: Any, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF files; install headstart[gguf]")
    file = tmp_path / "model.gguf"
    convert(model, file, "gguf")
    asked = settings(model=file, head_kind="medusa")
    adapt(asked)
    assert not (asked.run_dir / "model").exists()
    assert StoredHeads.read(asked.run_dir / "heads").base == "model.gguf"
    for base in (file, model):  # the same values
        attached = load_model(base, heads=asked.run_dir / "heads")
        assert attached.config.heads == 3 and torch.equal(attached(TOKENS), load_model(base)(TOKENS))
    with pytest.raises(UsageError, match=r"adapt.mode joint changes .*model.gguf too"):
        run_config(settings(model=file, mode="joint"))


@pytest.mark.skipif(not multiplies_blocks("cpu"), reason="states are made by compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["transformer", "medusa", "sequential", "eagle3"])
def test_stored_states_of_a_gguf_file_are_those_of_decoding_with_the_heads(
    kind: Any, dtype: str, settings: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is head 1 of an ordinary decoder and of transformer heads, and part of the trunk elsewhere."""
    pytest.importorskip("gguf", reason="reads GGUF files; install headstart[gguf]")
    file, made = tmp_path / "model.gguf", []
    convert(model, file, "gguf")
    compute = StoredOutputs._trunk_output

    def watched(self: StoredOutputs, inputs: Any) -> torch.Tensor:
        made.append((inputs.tokens, compute(self, inputs)))
        return made[-1][1]

    monkeypatch.setattr(StoredOutputs, "_trunk_output", watched)
    found = adapt(settings(model=file, head_kind=kind, steps=2, cache_states="true", dtype=dtype))
    assert made and StoredHeads.read(Path(found["heads_from"])).model.heads == 3
    decoding = headstart.load(file, dtype="float32", heads=found["heads_from"]).transformer
    for tokens, z_BTD in made:
        assert torch.equal(z_BTD, decoding.latents(tokens, [])[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [({"mode": "joint"}, "fit no other model"), ({"replace_heads": True}, "for a model with one head")],
)
def test_heads_alone_need_the_model_as_it_is(more: dict[str, Any], message: str, settings: Any) -> None:
    with pytest.raises(UsageError, match=message):
        run_config(settings(heads_only=True, **more))


def test_the_model_answers_prompts_before_its_heads_are_trained(settings: Any, model: Path, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat number {i}"}) + "\n" for i in range(8)))
    with pytest.raises(UsageError, match=r"prompts\.jsonl: holds prompts without answers.* with --prompts .*prompts"):
        run_config(settings(data=(str(prompts),)))
    own = OwnAnswers(prompts, answer_tokens=30)
    asked = settings(data=(), steps=2, length=16, head_kind="medusa", own_answers=own)
    with pytest.raises(UsageError, match="name what to train on"):
        adapt(replace(asked, data=("a.txt",)))
    estimate_adapt_run(asked)
    assert not asked.run_dir.exists()
    assert adapt(asked)["heads"] == 3
    command = ["distill-data", str(model), "--prompts", str(prompts), "--out", str(answers), "--max-new-tokens", "30"]
    run_command([*command, "--temperature", "0.7", "--seed", str(asked.seed)])
    assert (asked.run_dir / "answers.jsonl").read_bytes() == answers.read_bytes()
    adapt(replace(asked, steps=4))  # resumes, and answers nothing again
    assert (asked.run_dir / "answers.jsonl").read_bytes() == answers.read_bytes()
    (asked.run_dir / "answers.jsonl").unlink()
    with pytest.raises(UsageError, match=r"holds a run with model.heads 3, not 2"):
        adapt(replace(asked, heads=2))
    assert not (asked.run_dir / "answers.jsonl").exists()  # it is reported before anything is answered
