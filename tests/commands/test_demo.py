from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headstart.commands.demo_run import DecodingSizes, demo_config, run_demo
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path, capsys) -> None:
    """On this test's own files instead of the standard library, with ten steps."""
    (tmp_path / "code").mkdir()
    for i in range(6):
        (tmp_path / "code" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 30)

    def small(out: Path, minutes: float, seed: int):
        config = replace(demo_config(out, minutes, seed), steps=10)
        data = replace(config.data, sources=(str(tmp_path / "code"),), validation_fraction=0.4)
        return replace(config, data=data, validation=replace(config.validation, rows=4))

    sizes = DecodingSizes(prompts=2, new_bytes=24)
    box = tmp_path / "box"
    shape = ModelConfig(dim=16, layers=2, attention_heads=2, context=256, heads=8, head_kind="replicated")
    save_model(Transformer(shape), box, ByteTokenizer())
    (box / "prompts.jsonl").write_text(
        '{"prompt": "def f(x):\\n    "}\n{"prompt": "import os\\n"}\n{"prompt": "x = "}\n'
    )
    out = tmp_path / "demo"
    result = run_demo(out, minutes=1.0, make_config=small, sizes=sizes, find_boxed=lambda: box)
    assert all(row["identical"] for row in [*result["decoding"], *result["sampled"]])
    assert [row["heads"] for row in result["decoding"]] == [1, 2, 4, 8]
    assert all(row["identical"] for row in [*result["boxed"]["decoding"], *result["boxed"]["sampled"]])
    # Both models were given the box's prompts, which the demo's corpus does not hold.
    assert {s["prompt"] for model in (result, result["boxed"]) for s in model["samples"]} == {"import os\n"}
    assert json.loads((out / "results.json").read_text())["decoding"] == result["decoding"]
    assert "minutes: 1.0\n" in (out / "config.yaml").read_text()
    assert result["settings"]["steps"] == 10 and result["settings"]["bytes seen"] == 10 * 16 * 128
    assert "</html>" in (out / "report.html").read_text()
    assert (out / "model" / "model.safetensors").exists()
    said = capsys.readouterr().err
    assert "model in the box, greedy" in said and "just trained, sampled" in said

    def no_box() -> Path:
        raise UsageError("the model in the box is not here; name a model directory")

    sizes = replace(sizes, heads=(1, 8))
    again = run_demo(out, minutes=1.0, make_config=small, sizes=sizes, find_boxed=no_box)
    assert again["boxed"] is None
    assert "earlier demo, which is replaced" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        run_demo(tmp_path / "mine", minutes=0.01)
    assert (tmp_path / "mine" / "thesis.txt").exists()
