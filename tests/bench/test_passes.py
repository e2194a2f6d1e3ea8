"""Single passes: the bytes that they read, by rows, against the bandwidth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import passes
from bench.passes import Settings, pass_bytes
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.kernels.pack import PackedUnembedding, multiplies_blocks, pack
from headstart.decoding.kernels.torch_backend import PackedLinear
from headstart.decoding.policy.timing import Pass, decode, first_difference, random_model
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig

SIZES = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)


def test_bytes_of_a_pass_by_hand():
    config = ModelConfig(vocab_size=100, dim=8, layers=3, attention_heads=2, hidden_dim=32)
    block = 3 * 8 * 8 + 8 * 8 + 3 * 8 * 32 + 2 * 8
    weights = 3 * block + 8 + 100 * 8 + 8  # blocks, last norm, unembedding, one row of the embedding
    cache = 3 * 2 * 64 * 8  # layers, keys and values, positions, width
    assert pass_bytes(config, span=64, weight_bytes=2, cache_bytes=4) == 2 * weights + 4 * cache


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"heads": 3},
        {"heads": 3, "wiring": "anticausal"},
        {"heads": 3, "head_kind": "replicated"},
        {"heads": 3, "head_kind": "linear", "wiring": "anticausal"},
        {"kv_heads": 1},
    ],
)
def test_bytes_of_a_pass_are_those_of_the_modules_it_runs(changes):
    config = replace(SIZES, **changes)
    model = random_model(config, "float32", "cpu")
    on_path = [model.heads[k - 1] for k in model.path(1)]
    read = sum(p.numel() for part in (model.trunk.blocks, *on_path) for p in part.parameters())
    read += model.unembedding.weights[0].numel() + config.dim + config.dim
    blocks = config.trunk_layers + (len(on_path) if config.head_kind == "transformer" else 0)
    cache = blocks * 2 * config.key_value_heads * config.dim_per_head * 64
    assert pass_bytes(config, 64, 1, 1) == read + cache


def test_a_pass_stays_at_its_length_and_its_rows_may_exceed_the_heads():
    model = pack(random_model(SIZES, "float32", "cpu"), rows=8)
    wide = Pass(model, rows=8, length=20)
    for _ in range(3):
        assert len(wide()[0]) == 8
        assert wide.state.length_S.tolist() == [21]  # nothing is accepted: the window holds no drafts
    assert isinstance(model.unembedding, PackedUnembedding) and isinstance(
        model.unembedding.first, (PackedLinear, CompiledLinear)
    )
    assert len(Pass(model, rows=1, length=20)()[0]) == 1


def settings(**changes):
    return Settings(
        **{
            "size": SIZES,
            "threads": (1,),
            "dtype": "float32",
            "passes": 2,
            "cached": 20,
            "stream_mebibytes": 1,
            **changes,
        }
    )


def test_both_parts_with_random_weights(in_process):
    result = passes.run(settings(rows=(1, 8)))
    rows = {row["what"]: row for row in result["measurements"]}
    assert [row["bar"]["value"] for row in rows.values() if row["bar"]] == [0.65, 1.3]
    for kind in ("float32", "q4", "q8"):
        assert f"{kind}, 1 row, 1 thread" in rows and f"{kind}, 8 rows, 1 thread / 1 row" in rows
    assert rows["q8, 8 rows, 1 thread / float32"]["unit"] == ""
    assert all(row["median"] > 0 for row in rows.values())
    json.dumps(result)


def test_a_trained_model_is_timed_by_rows(in_process, model_directory):
    result = passes.run(settings(parts=("rows",), model=model_directory, rows=(1, 2), quantize=()))
    assert [row["what"] for row in result["measurements"]] == [
        "float32, 1 row, 1 thread", "float32, 2 rows, 1 thread", "float32, 2 rows, 1 thread / 1 row",
    ]  # fmt: skip
    assert str(model_directory) in result["notes"][0]


@pytest.mark.parametrize("changes", [{"threads": ()}, {"rows": (2,)}, {"passes": 0}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(UsageError, match="give such numbers"):
        passes.run(settings(**changes))


def test_counts_of_a_decoded_group(model_directory):
    model = pack(load_model(model_directory))
    decoded = decode(model, [Request((1, 2, 3), 10, heads=4), Request((5,), 10, heads=4)], batch=1)
    assert [len(tokens) for tokens in decoded.tokens] == [10, 10]
    passes = sum(g.stats.passes for g in decoded.generations)
    assert decoded.stats.tokens_per_pass == 20 / passes and decoded.seconds > 0
    assert all(0 <= share <= 1 for share in decoded.stats.acceptance) and len(decoded.stats.acceptance) == 3


def test_first_difference():
    assert first_difference([[1, 2], [3]], [[1, 2], [3]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1)
    assert first_difference([[1, 2]], [[1]]) == (0, 1)


@pytest.mark.skipif(not multiplies_blocks("cpu"), reason="no compiled kernels here")
def test_a_gguf_file_is_timed_in_its_blocks(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    from tests.formats.test_gguf_blocks import write_quantized
    from tests.gguf_models import CONFIGS

    config = CONFIGS["llama"]
    path = write_quantized(tmp_path / "m.gguf", "llama", random_model(config, "float32", "cpu"))
    model = pack(load_model(path, blocks=True))
    read = passes.packed_pass_bytes(model, span=64, cache_bytes=4)
    matrices = sum(each.packed.nbytes for each in model.modules() if isinstance(each, CompiledLinear))
    matrices -= model.trunk.embedding.linear.packed.nbytes  # untied: a row of it is looked up
    vectors = 4 * (2 * config.layers + 1) * config.dim
    assert read == matrices + vectors + 4 * 2 * config.layers * config.key_value_heads * config.dim_per_head * 64
    found = passes.run(Settings(model=path, threads=(1,), passes=6, cached=16, rows=(1, 4, 8), stream_mebibytes=1))
    bars = {row["what"]: row["bar"] for row in found["measurements"] if row["bar"]}
    assert {what.split(",")[0] for what in bars if "row" in what} == {"blocks"} and len(bars) == 3
    with pytest.raises(UsageError, match="--dtype blocks is for a GGUF file"):
        passes.run(Settings(dtype="blocks"))
