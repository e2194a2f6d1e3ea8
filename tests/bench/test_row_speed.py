from __future__ import annotations

from bench import decode
from bench.decode import DecodeSettings
from bench.row_speed import ROWS
from headstart.model.config import ModelConfig


def test_rows_of_both_kinds_are_timed(in_process):
    sizes = ModelConfig(vocab_size=300, dim=32, layers=2, attention_heads=2, context=128)
    settings = DecodeSettings(parts=("rows",), threads=(1,), dtype="float32", passes=6, sizes=sizes, new_tokens=16)
    rows = {row["what"]: row for row in decode.run(settings)["measurements"]}
    for kind in ("float32", "int8"):
        assert all(f"{kind}, {w} row{'s' * (w > 1)}, 1 thread" in rows for w in ROWS)
        assert f"{kind}, 8 rows, 1 thread / 1 row" in rows
    assert rows["int8, 8 rows, 1 thread / float32"]["unit"] == ""


def test_a_trained_model_decodes_in_int8(in_process, model_directory):
    settings = DecodeSettings(
        parts=(),
        threads=(1,),
        dtype="bfloat16",  # int8 goes before it
        quantize="int8",
        repetitions=1,
        new_tokens=8,
        temperatures=(0.0,),
        model=model_directory,
        prompts=model_directory.parent / "prompts.txt",
    )
    settings.prompts.write_text("abcabc\n")
    found = decode.run(settings)
    differing = next(row for row in found["measurements"] if "output differs" in row["what"])
    assert differing["median"] == 0 and any("parallel, int8, 1 thread" in note for note in found["notes"])
