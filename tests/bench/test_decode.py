from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

from bench import decode, decode_passes
from bench.decode_model import draw_figure
from bench.decode_passes import pass_bytes
from bench.decode_settings import DecodeSettings
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.kernels.pack import PackedUnembedding, pack
from headstart.decoding.kernels.torch_backend import PackedLinear
from headstart.decoding.policy.timing import Pass, first_difference, random_model
from headstart.decoding.policy.timing import decode as decode_all
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.evaluation.inputs import load_prompts
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig

SIZES = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)


def settings(**changes):
    return DecodeSettings(
        **{
            "sizes": SIZES,
            "threads": (1,),
            "repetitions": 1,
            "passes": 2,
            "prompt_tokens": 4,
            "new_tokens": 6,
            "stream_mebibytes": 1,
            **changes,
        }
    )


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


def test_parts_with_random_weights(in_process):
    result = decode.run(
        settings(parts=("bandwidth", "window", "deferred"), window=3, deferred_heads=(2,), deferred_batches=(1, 2))
    )
    bars = [(row["part"], row["bar"]["value"]) for row in result["measurements"] if row["bar"]]
    assert bars == [("bandwidth", 0.65), ("window", 1.3)]
    assert sum(row["part"] == "deferred" for row in result["measurements"]) == 2 * 3
    assert all(row["median"] > 0 for row in result["measurements"])
    json.dumps(result)


def test_model_part(in_process, model_directory, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(x):\n\nabcabcabc\nhello\n")
    result = decode.run(
        settings(parts=("model",), model=model_directory, prompts=prompts, new_tokens=12, batch=2, out=tmp_path)
    )
    rows = result["measurements"]
    identical = [row for row in rows if "differs from K = 1" in row["what"]]
    assert [row["median"] for row in identical] == [0, 0] and all(row["met"] for row in identical)
    assert len(result["tables"]) == 2
    # Plain, then K = 1, 2, 4: the model has no 8 heads.
    assert [line[0] for line in result["tables"][0]["rows"]][1:] == ["K = 1", "K = 2", "K = 4"]
    assert result["tables"][0]["rows"][2][6] == "1.94 / 1.98"
    by_name = {row["what"]: row for row in rows}
    assert by_name["greedy, K = 1"]["tokens_per_pass"] == 1
    assert len(by_name["greedy, K = 4"]["acceptance"]) == 3
    assert by_name["greedy, K = 4"]["tokens_per_pass"] == 12 / 4  # 1 + 4 + 4 + 3 tokens


def test_the_model_part_draws_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    greedy = [("1", 1.0, 1.0), ("2", 1.55, 1.9), ("policy", 2.5, 4.7)]
    draw_figure({"greedy": greedy, "temperature 0.8": greedy}, "a title", tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_counts_of_a_decoded_group(model_directory):
    model = pack(load_model(model_directory))
    decoded = decode_all(model, [Request((1, 2, 3), 10, heads=4), Request((5,), 10, heads=4)], batch=1)
    assert [len(tokens) for tokens in decoded.tokens] == [10, 10]
    passes = sum(g.stats.passes for g in decoded.generations)
    assert decoded.stats.tokens_per_pass == 20 / passes and decoded.seconds > 0
    assert all(0 <= share <= 1 for share in decoded.stats.acceptance) and len(decoded.stats.acceptance) == 3


def test_first_difference():
    assert first_difference([[1, 2], [3]], [[1, 2], [3]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1)
    assert first_difference([[1, 2]], [[1]]) == (0, 1)


def test_prompts_from_jsonl_and_from_the_data_of_the_run(model_directory, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "abc"}\n{"text": "de"}\n')
    found = load_prompts(model_directory, prompts=file, data=None, count=8, tokens=2, room=4)
    assert found == [(97, 98), (100, 101)]

    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i} " * 5)
    data = tmp_path / "shards"
    prepare([str(tmp_path / "texts")], data, ByteTokenizer(), Preparation(validation_fraction=0.5, seed=0))
    found = load_prompts(model_directory, prompts=None, data=data, count=3, tokens=11, room=8)
    assert [len(prompt) for prompt in found] == [11, 11, 11] and len(set(found)) > 1
    assert set(sum(found, ())) <= set(b"document 0123456789")
    (model_directory / "prompts.jsonl").write_text('{"prompt": "its own"}\n')
    found = load_prompts(model_directory, prompts=None, data=None, count=3, tokens=3, room=8)
    assert found == [tuple(b"its")]
    (model_directory / "prompts.jsonl").unlink()


def test_wrong_use_is_one_line(model_directory, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("not json\n")
    (tmp_path / "empty.txt").write_text("\n")
    prompts_of = partial(load_prompts, model_directory, data=None, count=1, tokens=2, room=1)
    cases = [
        lambda: decode.run(settings(heads=(2,))),
        lambda: prompts_of(prompts=file),
        lambda: prompts_of(prompts=tmp_path / "empty.txt"),
        lambda: prompts_of(prompts=tmp_path / "gone"),
        lambda: prompts_of(prompts=None),
    ]
    for case in cases:
        with pytest.raises(UsageError) as error:
            case()
        assert "\n" not in str(error.value)


def test_rows_of_both_kinds_are_timed(in_process):
    sizes = ModelConfig(vocab_size=300, dim=32, layers=2, attention_heads=2, context=128)
    settings = DecodeSettings(parts=("rows",), threads=(1,), dtype="float32", passes=6, sizes=sizes, new_tokens=16)
    rows = {row["what"]: row for row in decode.run(settings)["measurements"]}
    for kind in ("float32", "int8"):
        assert all(f"{kind}, {w} row{'s' * (w > 1)}, 1 thread" in rows for w in decode_passes.ROWS)
        assert f"{kind}, 8 rows, 1 thread / 1 row" in rows
    assert rows["int8, 8 rows, 1 thread / float32"]["unit"] == ""


def test_a_trained_model_decodes_in_int8(in_process, model_directory, tmp_path):
    settings = DecodeSettings(
        parts=(),
        threads=(1,),
        dtype="bfloat16",  # int8 goes before it
        quantize="int8",
        repetitions=1,
        new_tokens=8,
        temperatures=(0.0,),
        model=model_directory,
        prompts=tmp_path / "prompts.txt",
        out=tmp_path,
    )
    settings.prompts.write_text("abcabc\n")
    found = decode.run(settings)
    differing = next(row for row in found["measurements"] if "output differs" in row["what"])
    assert differing["median"] == 0 and any("parallel, int8, 1 thread" in note for note in found["notes"])
