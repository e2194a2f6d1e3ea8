from __future__ import annotations

import pytest

from bench import decode, decode_settings
from bench.decode_settings import DecodeSettings
from bench.decode_sweep import points
from headstart.errors import UsageError
from headstart.model.config import ModelConfig

TINY = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)


def test_one_thing_changes_at_a_time():
    at = points((1, 4), ((8, 9), (16, 9)), (0.0, 0.8))
    assert list(map(str, at)) == [
        "batch 1, 8 + 9 tokens",
        "batch 4, 8 + 9 tokens",
        "batch 1, 16 + 9 tokens",
        "batch 1, 8 + 9 tokens, temperature 0.8",
    ]


def test_shapes_are_those_the_bars_speak_of():
    for name, least, most in (("12M", 11e6, 13e6), ("105M", 100e6, 110e6), ("235M", 225e6, 245e6)):
        assert least < decode_settings.SIZES[name].parameters()["total"] < most
    four = decode_settings.four_heads(decode_settings.SIZES["105M"])
    assert (four.trunk_layers, four.heads) == (28, 4)
    assert decode_settings.byte_heads(decode_settings.SIZES["105M"]).vocab_size == 256


def test_sweep(in_process, monkeypatch):
    monkeypatch.setitem(decode_settings.SIZES, "12M", TINY)
    settings = DecodeSettings(
        parts=("sweep",),
        threads=(1,),
        dtype="float32",
        repetitions=1,
        sweep_tune_seconds=0.0,
        sweep_sizes=("12M",),
        sweep_batches=(1, 16),
        sweep_lengths=((6, 12),),
        temperatures=(0.0, 0.8),
    )
    result = decode.run(settings)
    rows = {row["what"]: row for row in result["measurements"]}
    identical = [row for what, row in rows.items() if "differs from K = 1" in what]
    assert len(identical) == 2 * 3 and all(row["met"] for row in identical)
    base = "12M, 4 parallel transformer heads (Table S2), batch 1, 6 + 12 tokens"
    assert rows[f"{base}: K = 4 / plain over its tokens per pass"]["bar"]["value"] == 0.85
    assert rows[f"{base}: K = 4, between tokens as streamed, p50"]["unit"] == "ms"
    assert 2 < rows[f"{base}: K = 4"]["tokens_per_pass"] <= 4
    assert rows[f"{base}: K = 1"]["tokens_per_pass"] == 1
    bars = [row["bar"]["value"] for what, row in rows.items() if "batch 16" in what and "ragged / equal rows" in what]
    assert bars == [0.9, 0.9]
    policies = [row for what, row in rows.items() if "policy" in what and row["bar"]]
    assert all(row["bar"]["value"] == 0.97 for row in policies)  # none where shapes are fixed
    by_costs = [row for what, row in rows.items() if "policy, low / plain, by the costs" in what]
    assert len(by_costs) in (0, 6) and all(row["median"] > 0 and 0 <= row["passes_that_draft"] <= 1 for row in by_costs)
    assert result["tables"][0]["headers"][1:] == [
        "batch 1, 6 + 12 tokens",
        "batch 16, 6 + 12 tokens",
        "batch 1, 6 + 12 tokens, temperature 0.8",
        "paper, code",
    ]
    assert [row[0] for row in result["tables"][1]["rows"]] == ["1", "2", "4", "8"]
    assert result["tables"][1]["rows"][-1][-1] == "6.39 / 7.04"


def test_wrong_use_of_sweeps_and_peers_is_one_line():
    for changes in ({"sweep_batches": ()}, {"parts": ("peers",), "device": "cuda", "dtype": "float32"}):
        with pytest.raises(UsageError) as error:
            decode.run(DecodeSettings(**{"parts": ("sweep",), **changes}))
        assert "\n" not in str(error.value)
