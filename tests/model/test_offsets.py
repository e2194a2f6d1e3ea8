"""Offsets of heads: what each is to predict, what of it drafts, and that directories keep them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headstart
from headstart.data.batches import IGNORE, targets_of
from headstart.decoding.engine import Engine, EngineConfig
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.evaluation.heads import score_documents
from headstart.formats.hf_code_export import save_hf_code
from headstart.formats.huggingface import save_model
from headstart.formats.medusa import save_medusa
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.walk import walk_step
from tests.models import random_model
from tests.reference import joint_step

SHAPE: dict[str, Any] = {"vocab_size": 31, "dim": 16, "layers": 5, "attention_heads": 2, "context": 64, "heads": 4}
GAPS = ModelConfig(**SHAPE, offsets=(1, 2, 4, 9))


def test_a_head_predicts_the_token_at_its_offset() -> None:
    tokens = torch.arange(20)[None]
    documents = (torch.arange(20) >= 14).long()[None]
    for array in (tokens.numpy(), tokens):
        targets = targets_of(array, documents if array is tokens else documents.numpy(), (1, 2, 4, 9))
        assert targets.shape == (1, 11, 4) and targets[0, 3].tolist() == [4, 5, 7, 12]
        assert targets[0, 8].tolist() == [9, 10, 12, IGNORE]  # 17 lies in the next document
    assert np.array_equal(
        targets_of(tokens.numpy(), documents.numpy(), (1, 2, 3)), targets_of(tokens.numpy(), documents.numpy(), 3)
    )


@pytest.mark.parametrize("wiring", ["parallel", "causal", "anticausal"])
def test_the_walk_is_joint_autograd(wiring: Any) -> None:
    model = random_model(replace(GAPS, wiring=wiring), dtype=torch.float64)
    tokens = torch.randint(0, 31, (3, 22))
    targets = targets_of(tokens, torch.zeros_like(tokens), GAPS.offset_of_heads)
    counts = count_targets(targets)
    joint_step(model, StepInputs(tokens[:, :13], targets), counts)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    walk_step(model, StepInputs(tokens[:, :13], targets), counts)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and theirs[name] is not None
        assert (parameter.grad - theirs[name]).norm() <= 1e-12 * theirs[name].norm(), name


@pytest.mark.parametrize("wiring", ["parallel", "causal", "anticausal"])
def test_heads_before_a_gap_draft_and_change_no_token(wiring: Any) -> None:
    model = pack(random_model(replace(GAPS, offsets=(1, 2, 3, 9), wiring=wiring)))
    prompt = tuple(torch.randint(0, 31, (7,)).tolist())
    written = {}
    for heads in (1, None):
        engine = Engine(model, EngineConfig(slots=1, exact=True))
        generation = engine.submit(Request(prompt, 24, heads=heads))
        assert generation.heads == (heads or 3)
        while engine.busy:
            engine.step()
        written[heads] = generation
    assert written[1].tokens == written[None].tokens
    assert len(written[None].stats.acceptance) == 2  # heads 2 and 3; head 4 drafts nothing
    with pytest.raises(UsageError, match=r"^heads is 4; this model has 3 before a gap in its offsets"):
        engine.submit(Request(prompt, 4, heads=4))


def test_a_right_draft_is_one_of_the_next_tokens() -> None:
    """A model that counts: with offsets 1, 2, 4 head 2 is right always, and two tokens are written in a pass."""
    config = ModelConfig(
        vocab_size=8, dim=8, layers=1, attention_heads=1, context=64, heads=3, head_kind="replicated", offsets=(1, 2, 4)
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.trunk.blocks.parameters():
            parameter.zero_() if parameter.ndim > 1 else parameter.fill_(1)
        model.trunk.embedding.weight.copy_(torch.eye(8))
        for k, offset in enumerate(config.offset_of_heads):
            model.unembedding.weights[k].copy_(torch.eye(8).roll(offset, 0))
    engine = Engine(pack(model), EngineConfig(slots=1, exact=False))
    generation = engine.submit(Request((3,), 20))
    while engine.busy:
        engine.step()
    assert generation.tokens == [(4 + i) % 8 for i in range(20)]
    assert generation.stats.tokens_per_pass == 20 / 11 and generation.stats.acceptance == [1.0]  # one by the prompt's
    scores = score_documents(model, [[i % 8 for i in range(40)]], bytes=40)
    assert scores.top1 == [1.0, 1.0, 1.0] and scores.tokens_per_pass[1] == scores.tokens_per_pass[2] == pytest.approx(
        2, abs=0.1
    )


def test_directories_keep_them_and_check_them(tmp_path: Path) -> None:
    model = random_model(GAPS)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == GAPS and loaded.config.offset_of_heads == (1, 2, 4, 9)
    tokens = torch.randint(0, 31, (1, 9))
    assert torch.equal(loaded(tokens, heads=4), model(tokens, heads=4))
    assert headstart.load(tmp_path / "model").generate([1, 2, 3], max_new_tokens=5).stats.tokens == 5
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content["headstart"]["model"]["offsets"] = [1, 4, 2, 9]
    file.write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match=r"config.json: model.offsets is \[1, 4, 2, 9\]; it must begin with 1 and ascend"
    ):
        load_model(tmp_path / "model")
    assert "offsets" not in ModelConfig(**SHAPE).to_dict()  # so files and digests of others stay what they are


def test_layouts_that_know_no_gaps_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="offsets"):
        save_hf_code(random_model(GAPS, dtype=torch.float64), tmp_path / "code")
    (tmp_path / "medusa").mkdir()
    with pytest.raises(UsageError, match=r"predict \[1, 2, 4, 9\] ahead; Medusa's layouts know no gaps"):
        save_medusa(random_model(replace(GAPS, head_kind="medusa"), dtype=torch.float64), tmp_path / "medusa")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offsets": (1, 2)}, "model.offsets has 2 entries for 4 heads; give one per head"),
        ({"offsets": (2, 3, 4, 5)}, "model.offsets is [2, 3, 4, 5]; it must begin with 1 and ascend"),
        ({"offsets": (1, 3, 3, 5)}, "model.offsets is [1, 3, 3, 5]; it must begin with 1 and ascend"),
        ({"offsets": (1, 2, 3, 5), "head_kind": "sequential", "wiring": "causal"}, "sequential heads read the token"),
    ],
)
def test_wrong_lists_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        ModelConfig(**SHAPE, **changes)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
