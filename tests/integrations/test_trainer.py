"""transformers' Trainer with our step: the same weights as our step and a plain AdamW; its logs, files and resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart
from headstart.data.batches import IGNORE
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.integrations.multi_token import collate_rows, multi_token_step, step_counts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.adapt.new_heads import config_with_heads, freeze, with_heads

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from headstart.integrations.trainer import MultiTokenTrainer  # noqa: E402

WEIGHTS = [1.0, 0.5, 0.25]


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(dim=32, layers=4, attention_heads=2, heads=3, context=64))


def make_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows of different lengths, some tokens not to be predicted: each row and head has another count of targets."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(0, 250, (6 + 3 * i % 17,), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < i / count, IGNORE, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "name": f"row {i}"})
    return rows


def arguments(folder: Path, **more: Any) -> Any:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.5,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    return transformers.TrainingArguments(**given | more)


def our_loop(model: Transformer, steps: int) -> list[list[float]]:
    """Every row of `make_rows` at once, clipped, plain AdamW; the mean loss of each head in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batch, losses = collate_rows(make_rows()), []
    for _ in range(steps):
        seen = multi_token_step(model, **batch, weights=WEIGHTS)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((seen.sums / seen.counts).tolist())
    return losses


@pytest.mark.parametrize(("rows", "accumulated"), [(8, 1), (2, 4)])
def test_a_step_is_ours_and_plain_adamw(tmp_path, rows: int, accumulated: int) -> None:
    reference, model = make_model().double(), make_model().double()  # Adam makes much of little
    losses = our_loop(reference, 2)
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    trainer = MultiTokenTrainer(model, arguments(tmp_path, **sizes), head_weights=WEIGHTS, train_dataset=make_rows())
    trainer.train()
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters()):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10), name
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 2
    for line, expected in zip(logs, losses):
        assert [line[f"loss_head{k}"] for k in (1, 2, 3)] == pytest.approx(expected, rel=1e-4)
        assert line["loss"] == pytest.approx(sum(w * loss for w, loss in zip(WEIGHTS, expected)), rel=1e-3)


def test_evaluation_divides_each_head_by_its_own_targets(tmp_path) -> None:
    model, rows = make_model(), make_rows()
    trainer = MultiTokenTrainer(
        model, arguments(tmp_path, per_device_eval_batch_size=3), head_weights=WEIGHTS, eval_dataset=rows
    )
    found = trainer.evaluate()
    expected = multi_token_step(model, **collate_rows(rows))
    assert expected.counts.tolist() == step_counts([collate_rows(rows)], 3).tolist()
    means = (expected.sums / expected.counts).tolist()
    assert [found[f"eval_loss_head{k}"] for k in (1, 2, 3)] == pytest.approx(means, rel=1e-5)
    assert found["eval_loss"] == pytest.approx(sum(w * loss for w, loss in zip(WEIGHTS, means)), rel=1e-5)
    shares = (expected.correct / expected.counts).tolist()
    assert [found[f"eval_accuracy_head{k}"] for k in (1, 2, 3)] == pytest.approx(shares)
    loss = trainer.compute_loss(trainer.model, collate_rows(rows))
    assert not loss.requires_grad and loss.item() == pytest.approx(found["eval_loss"], rel=1e-5)


def test_a_hugging_face_model_trains_as_under_trainer_itself(tmp_path) -> None:
    """One head, windows of 5 positions, grouped keys: loss and gradient norm of two steps are those of transformers."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config)
    theirs.save_pretrained(tmp_path / "model")
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours = MultiTokenTrainer(tmp_path / "model", arguments(tmp_path / "ours", **more), train_dataset=make_rows())
    peer = transformers.Trainer(
        theirs, arguments(tmp_path / "theirs", **more), data_collator=collate_rows, train_dataset=make_rows()
    )
    for trainer in (ours, peer):
        trainer.train()
    for mine, line in zip(ours.state.log_history[:2], peer.state.log_history[:2]):
        assert [mine["loss"], mine["loss_head1"]] == pytest.approx([line["loss"]] * 2, rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)


def test_new_heads_are_trained_alone_on_a_frozen_trunk(tmp_path) -> None:
    """Train as the docs show; the trunk in bf16, the heads in float32, and both as they were in what is saved."""
    save_model(make_model(), tmp_path / "model", ByteTokenizer())
    first = load_model(tmp_path / "model", dtype=torch.bfloat16)
    shape = config_with_heads(first.config, heads=3, kind="medusa", replace_heads=True)
    model = with_heads(first, shape)
    freeze(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    given = arguments(tmp_path / "out", per_device_train_batch_size=8, max_steps=6, bf16=True)
    trainer = MultiTokenTrainer(model, given, train_dataset=make_rows(), head_weights=[0, 1, 1])
    trainer.train()
    after = dict(model.named_parameters())
    new = {name for name in after if not torch.equal(after[name], before[name])}
    assert new == {name for name in after if ".residuals." in name} and {after[name].dtype for name in new} == {
        torch.float32
    }
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert logs[-1]["loss_head2"] < logs[0]["loss_head2"] and "loss_head1" not in logs[0]
    trainer.save_model()
    kept = {name: parameter.clone() for name, parameter in after.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "out"))
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_checkpoints_are_model_directories_and_gone_on_from(tmp_path) -> None:
    save_model(make_model(), tmp_path / "first", ByteTokenizer())
    sizes = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = MultiTokenTrainer(
        str(tmp_path / "first"), arguments(tmp_path / "whole", **sizes), train_dataset=make_rows()
    )
    whole.train()
    for kept in (tmp_path / "whole" / "checkpoint-2", tmp_path / "whole" / "checkpoint-4"):
        assert headstart.load(kept).config.heads == 3
        assert transformers.AutoModelForCausalLM.from_pretrained(kept).config.num_hidden_layers == 2
    other = MultiTokenTrainer(make_model(), arguments(tmp_path / "whole", **sizes), train_dataset=make_rows())
    with torch.no_grad():
        other.transformer.trunk.embedding.weight.zero_()
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, theirs in zip(other.transformer.parameters(), whole.transformer.parameters()):
        assert torch.equal(mine, theirs)
    whole.save_model()  # into the folder of its checkpoints, which stay
    assert (tmp_path / "whole" / "checkpoint-4").is_dir()
    saved = load_model(tmp_path / "whole")
    assert all(map(torch.equal, saved.parameters(), whole.transformer.parameters()))
    assert headstart.load(tmp_path / "whole").generate("ab", max_new_tokens=3).stats.tokens <= 3
    assert not list((tmp_path / "whole").glob(".*"))


def test_what_it_does_not_know_is_refused(tmp_path) -> None:
    for more, said in (({"fp16": True}, "fp16; take bf16"), ({"label_smoothing_factor": 0.1}, "label_smoothing")):
        with pytest.raises(UsageError, match=said):
            MultiTokenTrainer(make_model(), arguments(tmp_path, **more))
    for name in ("neftune_noise_alpha", "use_liger_kernel"):
        with pytest.raises(UsageError, match=name):
            wrong = arguments(tmp_path)
            setattr(wrong, name, 5.0)
            MultiTokenTrainer(make_model(), wrong)
    with pytest.raises(UsageError, match="2 head_weights for 3 heads"):
        MultiTokenTrainer(make_model(), arguments(tmp_path), head_weights=[1, 1])
    with pytest.raises(UsageError, match="compute_metrics"):
        MultiTokenTrainer(make_model(), arguments(tmp_path), compute_metrics=math.sqrt)
