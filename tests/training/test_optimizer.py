from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training import muon
from headstart.training.muon import Muon
from headstart.training.optimizer import (
    OptimizerConfig,
    ParameterGroup,
    build_optimizers,
    parameter_groups,
    set_learning_rate,
)
from headstart.training.schedule import learning_rate


def curve(steps: int, **settings) -> list[float]:
    return [learning_rate(step, steps, OptimizerConfig(**settings)) for step in range(steps)]


def test_cosine_at_its_corners() -> None:
    rates = curve(110, lr=2.0, warmup_steps=10, final_lr_ratio=0.03)
    assert rates[0] == pytest.approx(0.2)  # never 0
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == 2.0 == max(rates)
    assert rates[59] == pytest.approx(2.0 * (1 + 0.03) / 2)  # half way down
    assert rates[34] == pytest.approx(0.06 + 1.94 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[109] == pytest.approx(0.06)
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_warmups_of_no_step_and_of_all_steps() -> None:
    rates = curve(4, lr=1.0, warmup_steps=0, final_lr_ratio=0.0)
    assert 0.5 < rates[0] < 1 and rates[-1] == 0
    assert curve(3, lr=1.0, warmup_steps=100) == pytest.approx([0.01, 0.02, 0.03])  # as SAMSum's in Table S13
    assert curve(2, lr=1.0, warmup_steps=2) == [0.5, 1.0]


def test_wsd_stays_and_falls() -> None:
    rates = curve(100, lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr_ratio=0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[89] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)


def test_wsd_after_a_long_warmup_does_not_jump() -> None:
    rates = curve(10, lr=1.0, warmup_steps=8, schedule="wsd", decay_fraction=0.5, final_lr_ratio=0.0)
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 0.5, 0.0])
    assert curve(2, lr=1.0, warmup_steps=5, schedule="wsd") == pytest.approx([0.2, 0.4])
    assert curve(1, lr=1.0, warmup_steps=0, schedule="wsd", final_lr_ratio=0.1) == pytest.approx([0.1])
    whole = curve(4, lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=1.0, final_lr_ratio=0.0)
    assert whole == pytest.approx([0.75, 0.5, 0.25, 0.0])


def decay_of(model: Transformer, config: OptimizerConfig) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, float] = {}
    for optimizer in build_optimizers(model, config, torch.device("cpu")):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found, "a parameter in two groups"
                found[names[parameter]] = group["weight_decay"]
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


SHAPES = {
    "untied": ModelConfig(dim=16, layers=4, attention_heads=2, heads=2, attention_bias=True),
    "tied": ModelConfig(dim=16, layers=4, attention_heads=2, heads=2, tied=True),
    "linear": ModelConfig(dim=16, layers=2, attention_heads=2, heads=3, head_kind="linear"),
    "replicated": ModelConfig(dim=16, layers=2, attention_heads=2, heads=3, head_kind="replicated"),
    "medusa": ModelConfig(dim=16, layers=2, attention_heads=2, heads=3, head_kind="medusa", shared=False),
    "stern": ModelConfig(dim=16, layers=2, attention_heads=2, heads=3, head_kind="stern"),
    "sequential": ModelConfig(dim=16, layers=2, attention_heads=2, heads=3, head_kind="sequential", wiring="causal"),
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_decayed_and_embeddings_norms_and_biases_are_not(kind, shape) -> None:
    decay = decay_of(Transformer(SHAPES[shape]), OptimizerConfig(kind=kind, weight_decay=0.1))
    for name, value in decay.items():
        plain = "norm" in name or "bias" in name or name == "trunk.embedding.weight"
        assert value == (0.0 if plain else 0.1), name
    assert ("unembedding.weights.0" in decay) == (shape != "tied")
    assert decay.get("unembedding.weights.2", 0.1) == 0.1


def by_name(groups: list[ParameterGroup], attribute: str) -> dict[str, object]:
    return {name: getattr(group, attribute) for group in groups for name in group.parameters}


INSIDE = ("trunk.blocks", "heads", "unembedding.residuals")


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_takes_the_matrices_inside_blocks_and_heads(shape) -> None:
    model = Transformer(SHAPES[shape])
    groups = parameter_groups(model, OptimizerConfig(kind="muon"))
    muon = by_name(groups, "muon")
    assert len(muon) == sum(len(group.parameters) for group in groups)
    assert muon.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert muon[name] == (parameter.ndim == 2 and name.startswith(INSIDE)), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_further_heads_have_their_own_rate(shape, kind) -> None:
    """Heads 2..n and what only they read; never head 1 or what the heads share."""
    model = Transformer(SHAPES[shape])
    scale = by_name(parameter_groups(model, OptimizerConfig(kind=kind, head_lr_ratio=4.0)), "lr_scale")
    assert scale.keys() == dict(model.named_parameters()).keys()
    own = ("heads.1.", "heads.2.", "unembedding.weights.1", "unembedding.weights.2", "unembedding.residuals.")
    for name, value in scale.items():
        assert value == (4.0 if name.startswith(own) else 1.0), name
    assert {"linear": 2, "replicated": 2}.get(shape, 1) <= list(scale.values()).count(4.0)


def test_the_state_is_whole_before_the_first_step() -> None:
    """A head that has had no gradient has state all the same, and it is that of a first step."""
    model, other = Transformer(SHAPES["untied"]), Transformer(SHAPES["untied"])
    other.load_state_dict(model.state_dict())
    made = build_optimizers(model, OptimizerConfig(kind="muon"), torch.device("cpu"))
    assert sum(len(optimizer.state) for optimizer in made) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    lazy = build_optimizers(other, OptimizerConfig(kind="muon"), torch.device("cpu"))
    for optimizer in lazy:
        optimizer.state.clear()
    for mine, theirs in zip(model.parameters(), other.parameters()):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    for optimizers in (made, lazy):
        set_learning_rate(optimizers, 1e-2)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def muon_steps(dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Some matrices after three steps of our Muon, or of torch's where `dtype` is None."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 12), (8, 12), (12, 8), (8, 12), (20, 6), (1, 4)]
    matrices = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    if dtype is None:
        optimizer: torch.optim.Optimizer = torch.optim.Muon(
            matrices, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
    else:
        optimizer = Muon([{"params": matrices, "weight_decay": 0.1, "lr": 0.1}], 0.9, dtype)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


@pytest.mark.parametrize("together", [10**6, 96, 1])
def test_muon_on_whole_matrices_is_torchs(together, monkeypatch) -> None:
    """Three of one shape at once, one after the other, or any number between."""
    monkeypatch.setattr(muon, "TOGETHER", together)
    for ours, theirs in zip(muon_steps(torch.bfloat16), muon_steps(None)):
        assert (ours - theirs).abs().max() < 1e-6
    narrow, wide = muon_steps(torch.bfloat16), muon_steps(torch.float32)
    assert all(0 < (a - b).abs().max() < 2e-2 for a, b in zip(narrow, wide))


def test_muons_products_run_in_the_dtype_asked_for(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(muon, "orthogonalize", lambda x, *_: seen.append(x.dtype) or x)
    for dtype in ("bfloat16", "float32"):
        build_optimizers(Transformer(SHAPES["tied"]), OptimizerConfig(kind="muon"), torch.device("cpu"), dtype)
    assert list(dict.fromkeys(seen)) == [torch.bfloat16, torch.float32]


def test_a_torch_without_muon_is_told(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UsageError, match=r"^optimizer.kind muon needs a torch with torch.optim.Muon, this is [^\n]*$"):
        build_optimizers(Transformer(SHAPES["tied"]), OptimizerConfig(kind="muon"), torch.device("cpu"))


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer(SHAPES["untied"])
    model.trunk.requires_grad_(False)
    groups = parameter_groups(model, OptimizerConfig())
    assert not any(name.startswith("trunk") for name in by_name(groups, "lr_scale"))


def test_muon_has_its_own_rate() -> None:
    model = Transformer(SHAPES["untied"])
    config = OptimizerConfig(kind="muon", lr=1e-3, muon_lr=2e-2, head_lr_ratio=2.0)
    muon, adamw = build_optimizers(model, config, torch.device("cpu"))
    set_learning_rate([muon, adamw], 5e-4)
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([1e-2, 2e-2])
    assert [group["lr"] for group in adamw.param_groups] == pytest.approx([5e-4, 5e-4, 1e-3])


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"lr": math.nan}, {"muon_lr": -1.0}, {"clip": 0.0}, {"warmup_steps": -1}, {"betas": (0.9, 1.0)},
     {"weight_decay": -0.1},
     {"head_lr_ratio": 0.0}, {"head_lr_ratio": -4.0}, {"head_lr_ratio": math.nan},
     {"decay_fraction": 0.0}, {"kind": "sgd"}, {"schedule": "step"}, {"momentum": 1.0}],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings) -> None:
    with pytest.raises(UsageError, match=f"^optimizer.{next(iter(settings))} [^\n]*$"):
        OptimizerConfig(**settings)
