"""Parameter counts, the paper's sizes, and the shapes that cannot be."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields, replace

import pytest
import torch

from headstart.errors import UsageError
from headstart.model.config import WRITTEN, WRITTEN_IF_SET, ModelConfig
from headstart.model.presets import PRESETS, preset
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer
from tests.cases import pairwise
from tests.models import WIRINGS, with_heads_of

SMALL = ModelConfig(vocab_size=61, dim=32, layers=6, attention_heads=4, context=64)
SHAPES = {
    "plain": SMALL,
    "tied": replace(SMALL, tied=True),
    "bias": replace(SMALL, attention_bias=True),
    "gqa": replace(SMALL, kv_heads=2),
    "wide": replace(SMALL, head_dim=16, hidden_dim=40, kv_heads=1, tied=True, attention_bias=True),
}


def real_parameters(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = Transformer(config)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    path = {name for k in model.path(1) for name, _ in model.head(k).named_parameters(prefix=f"{k}")}
    own = {name: p.numel() for k, head in enumerate(model.heads, 1) for name, p in head.named_parameters(prefix=f"{k}")}
    unembedding = count(model.unembedding) - (config.vocab_size * config.dim if config.tied else 0)
    others = sum(weight.numel() for weight in list(model.unembedding.weights)[1:])
    for module in (model.unembedding.residuals, model.unembedding.draft_norm):
        others += 0 if module is None else count(module)
    total = count(model)
    return {
        "embedding": count(model.trunk.embedding),
        "trunk": count(model.trunk.blocks),
        # What the unembedding holds of heads 2..n alone counts as heads.
        "heads": count(model.heads) + others,
        "unembedding": unembedding - others,
        "total": total,
        "non_embedding": total - config.vocab_size * config.dim * (1 if config.tied else 2),
        "next_token_path": total - count(model.heads) - others + sum(own[name] for name in path),
    }


@pairwise({"shape": list(SHAPES), "kind,wiring": WIRINGS, "n": [1, 2, 4]})
def test_counts_are_those_of_the_real_model(shape: str, kind: str, wiring: str, n: int) -> None:
    config = with_heads_of(SHAPES[shape], kind, wiring, heads=n)
    assert config.parameters() == real_parameters(config)


@pytest.mark.parametrize("wiring", ["parallel", "causal", "anticausal"])
def test_heads_are_taken_from_the_trunk_or_added(wiring: str) -> None:
    """Paper section 3.1: models with n heads have the parameters of the one without; "+layers" adds n - 1 blocks."""
    one = SMALL.parameters()["total"]
    block = (SMALL.parameters()["trunk"]) // SMALL.trunk_layers
    for n in (1, 2, 4):
        config = replace(SMALL, heads=n, wiring=wiring)
        assert config.parameters()["total"] == one
        for extra in range(n):
            more = replace(config, extra_layers=extra)
            assert more.trunk_layers == SMALL.layers - n + extra
            assert more.parameters()["total"] == real_parameters(more)["total"] == one + extra * block


def test_a_head_count_changes_what_decoding_reads() -> None:
    one = SMALL.parameters()["total"]
    block = (SMALL.parameters()["trunk"]) // SMALL.trunk_layers
    assert replace(SMALL, heads=4).parameters()["next_token_path"] == one - 3 * block
    assert replace(SMALL, heads=4, wiring="causal").parameters()["next_token_path"] == one - 3 * block
    assert replace(SMALL, heads=4, wiring="anticausal").parameters()["next_token_path"] == one


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_they_are_named_by(name: str) -> None:
    config = preset(name)
    number = float(re.match(r"[\d.]+", name).group()) * (1e9 if name.endswith("B") else 1e6)
    counts = config.parameters()
    rough = 12 * config.layers * config.dim**2
    # SwiGLU's width is rounded to a multiple of 32, and norms are not in the rule of thumb.
    assert abs(counts["non_embedding"] / rough - 1) < 0.03
    assert config.vocab_size == 32000 and config.context in (2048, 4096) and config.heads == 1
    # The last six are named by all parameters. The paper's names are rounded: its own "10M" has 6 * 12 * 384^2 = 10.6M.
    by_total = list(PRESETS).index(name) >= 7
    named = counts["total"] if by_total else counts["non_embedding"]
    assert abs(named / number - 1) < 0.07, f"{named:,}"


def test_presets_take_changes_and_unknown_names_are_refused() -> None:
    assert preset("100M", heads=4) == replace(PRESETS["100M"], heads=4)
    with pytest.raises(UsageError, match=r"5M.*100M"):
        preset("5M")


def test_the_schema_of_stored_configurations_names_every_field_once() -> None:
    assert sorted([*WRITTEN, *WRITTEN_IF_SET]) == sorted(field.name for field in fields(ModelConfig))


def test_stored_configurations_keep_their_bytes() -> None:
    """Checkpoints and runs compare digests of them."""
    plain = (
        '{"vocab_size": 61, "dim": 32, "layers": 6, "attention_heads": 4, "kv_heads": null, "head_dim": null, '
        '"hidden_dim": null, "context": 64, "heads": 1, "head_kind": "transformer", "shared": true, '
        '"wiring": "parallel", "extra_layers": 0, "tied": false, "attention_bias": false, "norm_eps": 1e-05, '
        '"rope_theta": 10000.0'
    )
    assert json.dumps(SMALL.to_dict()) == plain + "}"
    changed = replace(
        SMALL, offsets=(1,), nope_layers=(1,), window=16, window_layers=(0, 2), qk_norm="head", family="qwen3",
        rope_scaling=RopeScaling("llama3", 8.0, 32),
    )  # fmt: skip
    more = (
        ', "family": "qwen3", "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_context": 32, '
        '"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, '
        '"attention_factor": 1.0, "truncate": true}, "qk_norm": "head", "window": 16, "window_layers": [0, 2], '
        '"nope_layers": [1], "offsets": [1]}'
    )
    assert json.dumps(changed.to_dict()) == plain + more


IMPOSSIBLE = {
    "no trunk": ({"heads": 6}, "model.heads 6"),
    "more heads than layers": ({"heads": 9}, "model.heads 9"),
    "dim and attention heads": ({"dim": 30}, "model.dim 30"),
    "odd head_dim": ({"head_dim": 7}, "model.head_dim"),
    "odd dim per head": ({"dim": 36, "attention_heads": 4}, "model.head_dim"),
    "kv_heads": ({"kv_heads": 3}, "model.kv_heads 3"),
    "kv_heads more": ({"kv_heads": 8}, "model.kv_heads 8"),
    "kv_heads zero": ({"kv_heads": 0}, "model.kv_heads is 0"),
    "head_dim zero": ({"head_dim": 0}, "model.head_dim is 0"),
    "hidden_dim negative": ({"hidden_dim": -1}, "model.hidden_dim is -1"),
    "kind": ({"head_kind": "hydra"}, "hydra"),
    "medusa causal": ({"head_kind": "medusa", "heads": 2, "wiring": "causal"}, "model.wiring to parallel"),
    "stern anticausal": ({"head_kind": "stern", "heads": 2, "wiring": "anticausal"}, "model.wiring to parallel"),
    "sequential parallel": ({"head_kind": "sequential", "heads": 2}, "model.wiring to causal"),
    "stern of their own": ({"head_kind": "stern", "heads": 2, "shared": False}, "model.shared false"),
    "wiring": ({"wiring": "ring"}, "ring"),
    "extra layers high": ({"heads": 2, "extra_layers": 2}, "model.extra_layers is 2"),
    "extra layers low": ({"heads": 2, "extra_layers": -1}, "model.extra_layers is -1"),
    "extra layers linear": ({"head_kind": "linear", "heads": 2, "extra_layers": 1}, "model.extra_layers"),
    "replicated causal": ({"head_kind": "replicated", "heads": 2, "wiring": "causal"}, "model.wiring"),
    "replicated anticausal": ({"head_kind": "replicated", "heads": 2, "wiring": "anticausal"}, "model.wiring"),
    "vocab": ({"vocab_size": 0}, "model.vocab_size is 0"),
    "no heads": ({"heads": 0}, "model.heads is 0"),
    "context": ({"context": 0}, "model.context is 0"),
    "eps": ({"norm_eps": 0.0}, "model.norm_eps"),
    "theta": ({"rope_theta": -1.0}, "model.rope_theta"),
    "theta nan": ({"rope_theta": float("nan")}, "model.rope_theta"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_shapes_are_refused(name: str) -> None:
    changes, words = IMPOSSIBLE[name]
    with pytest.raises(UsageError) as caught:
        replace(SMALL, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("wiring", "n"), list(itertools.product(["parallel", "causal", "anticausal"], [1, 2, 5])))
def test_the_tree_of_heads(wiring: str, n: int) -> None:
    config = replace(SMALL, heads=n, wiring=wiring)
    expected = {
        "parallel": [0] * n,
        "causal": list(range(n)),
        "anticausal": [*range(2, n + 1), 0],
    }
    assert list(config.parents) == expected[wiring]
    for k in range(n + 1):
        assert all(config.parents[child - 1] == k for child in config.children(k))
    assert sorted(child for k in range(n + 1) for child in config.children(k)) == list(range(1, n + 1))
