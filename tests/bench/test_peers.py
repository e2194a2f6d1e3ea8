"""Decoding next to peers: they take turns, and one that is missing or fails does not stop the others."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from bench import decode
from bench.decode import SIZES, Settings
from bench.peers import contest
from bench.processes import JsonProcess, ProcessError
from headstart.errors import UsageError
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from tests.models import random_model

TINY = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)
CASE = {
    "new_tokens": 6, "dtype": "float32", "quantize": None, "compile": False, "gguf": "", "rows": 1, "prompt_tokens": 4,
    "tokens_per_pass": None, "threads": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Tests do not need compiled kernels."""
    monkeypatch.setenv("HEADSTART_NATIVE", "0")
    monkeypatch.setitem(SIZES, "12M", TINY)


def measured(**changes):
    fields = {
        "parts": ("peers",), "sizes": ("12M",), "batches": (1,), "dtype": "float32", "repetitions": 1,
        "prompt_tokens": 4, "new_tokens": 8, **changes,
    }  # fmt: skip
    found = decode.run(Settings(**fields))
    return {row["what"]: row for row in found["measurements"]}, found["notes"]


@pytest.mark.slow  # processes that import transformers
def test_peers_take_turns_and_a_note_reports_one_that_is_missing(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(contest.PACKAGES, "vllm", "no_such_module_here")
    rows, notes = measured(peers=("transformers", "vllm"))
    speeds = {what: row["details"] for what, row in rows.items() if row["unit"]}
    assert list(speeds) == [
        f"12M, batch 1: {name}" for name in (
            "headstart, plain (K = 1, exact=False)", "headstart, K = 1", "headstart, K = 4, synthetic acceptance",
            "transformers, greedy", "transformers, prompt lookup",
        )
    ]  # fmt: skip
    assert notes[0].startswith("peers: 12M, batch 1: vllm: not installed: name a Python")
    # In fp32 all of them write the same 8 tokens.
    assert {details["first_tokens_like_our_plain"] for details in speeds.values()} == {8}
    assert speeds["12M, batch 1: headstart, K = 4, synthetic acceptance"]["tokens_per_pass"] > 2
    bars = [what for what, row in rows.items() if row["bar"]]
    assert bars == ["12M, batch 1: headstart, plain (K = 1, exact=False) / transformers, greedy"]
    assert "12M, batch 1: reading prompts, headstart / transformers, greedy" in rows


@pytest.mark.slow
def test_llama_cpp_writes_our_tokens():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    rows, _ = measured(peers=("llama-cpp",), batches=(2,))
    assert rows["12M, batch 2: llama-cpp, greedy, fp32 cache"]["details"]["first_tokens_like_our_plain"] == 8


@pytest.mark.slow
def test_a_peer_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.exit(\'out of luck\')"\n')
    python.chmod(0o755)
    rows, notes = measured(peers=("vllm",), peer_python=(f"vllm={python}",))
    assert notes[0] == "peers: 12M, batch 1: vllm: failed: it ended with status 1; out of luck"
    assert sum(row["unit"] == "tokens/s" for row in rows.values()) == 3


def test_transformers_in_batches(model_directory):
    pytest.importorskip("transformers")
    from bench.peers.with_transformers import Peer

    peer = Peer({**CASE, "model": str(model_directory), "rows": 2})
    assert list(peer.variants) == ["greedy"]  # prompt lookup takes no batch
    answer = peer.variants["greedy"]([[1, 2, 3], [4, 5, 6]])
    assert [len(tokens) for tokens in answer["tokens"]] == [6, 6]
    assert [counts for _, counts in answer["stamps"]] == [[1, 1]] * 6


def test_our_own_process_decodes_a_trained_model(model_directory, tmp_path):
    case = {**CASE, "model": str(model_directory), "rows": 2}
    with JsonProcess(sys.executable, "bench.peers.with_headstart:Peer", threads=1, log=tmp_path / "log") as process:
        assert process.ask(case)["variants"] == ["plain (K = 1, exact=False)", "K = 1", "K = 4"]
        question = {"variant": "K = 1", "prompts": [[1, 2, 3], [4, 5, 6]]}
        plain = process.ask(question)
        drafted = process.ask({**question, "variant": "K = 4"})
        assert drafted["tokens"] == plain["tokens"] and len(plain["tokens"][0]) == 6
        assert len(plain["stamps"]) == 6 and len(drafted["stamps"]) < 6
        assert plain["prompt_tokens"] == 6 and plain["prompt_seconds"] > 0
        with pytest.raises(ProcessError, match="KeyError"):
            process.ask({**question, "variant": "no such variant"})
        assert process.ask(question)["tokens"] == plain["tokens"]  # it still answers


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("import sys; sys.exit('out of luck')", 60, "ended with status 1; out of luck"),
        ("import time; time.sleep(60)", 0.2, "no answer in 0 s"),
    ],
)
def test_a_peer_that_dies_or_hangs_is_reported(tmp_path, code, timeout, message):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    python.chmod(0o755)
    process = JsonProcess(str(python), "with_x:Peer", threads=1, log=tmp_path / "log", timeout=timeout)
    with process, pytest.raises(ProcessError, match=message):
        process.ask(CASE)


def test_which_python_runs_a_peer(monkeypatch):
    monkeypatch.setitem(contest.PACKAGES, "vllm", "no_such_module_here")
    with pytest.raises(ProcessError, match="--peer-python vllm=PATH"):
        contest.find_python("vllm", {})
    assert contest.find_python("vllm", {"vllm": "/envs/python"}) == "/envs/python"
    monkeypatch.setitem(contest.PACKAGES, "vllm", "json")
    assert contest.find_python("vllm", {}) == sys.executable


def test_too_few_prompts_are_refused(model_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("abc\n")
    with pytest.raises(UsageError, match="1 prompts are too few for a batch of 2"):
        measured(model=model_directory, prompts=tmp_path / "prompts.txt", batches=(2,), peers=())


def test_a_gguf_file_gets_heads_whose_drafts_are_right_at_a_rate(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    from headstart.formats.gguf import save_gguf

    path = tmp_path / "m.gguf"
    save_gguf(random_model(replace(TINY, heads=1)), path)
    rows, _ = measured(model=path, peers=(), new_tokens=60, tokens_per_pass=3.0)
    details = rows["m.gguf, batch 1: headstart, K = 4, synthetic acceptance"]["details"]
    assert 2 < details["tokens_per_pass"] < 4 and details["first_tokens_like_our_plain"] == 60
    rows, _ = measured(model=path, peers=(), synthetic_heads=1)
    assert not any("K = 4" in what for what in rows)


def test_bars_of_a_gguf_file_are_those_of_its_bits(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    from tests.gguf_models import CONFIGS, gguf_metadata, gguf_tensors, write_gguf

    path, settings = tmp_path / "m.gguf", Settings(synthetic_heads=1)
    kinds = {"Q8_0": "8 bits", "Q4_0": "4 bits"}
    for kind, bits in kinds.items():
        tensors = gguf_tensors("llama", random_model(CONFIGS["llama"]))
        stored = {
            name: gguf.quants.quantize(value, gguf.GGMLQuantizationType[kind]) if value.ndim == 2 else value
            for name, value in tensors.items()
        }
        write_gguf(
            path,
            "llama",
            gguf_metadata("llama", CONFIGS["llama"]),
            stored,
            {name: kind for name in stored if stored[name].ndim == 2},
        )
        subject = decode.trained_subject(path, settings, tmp_path)
        assert subject.bars == {"llama-cpp": contest.GGUF_BARS[bits]}


def test_a_peer_without_a_reader_of_gguf_takes_the_same_weights_as_a_directory(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    from headstart.formats.gguf import save_gguf

    path = tmp_path / "m.gguf"
    save_gguf(random_model(replace(TINY, heads=1)), path)
    match = contest.Contest((), {}, 1, "float32", None, 8, 1, False, tmp_path)
    tokens = torch.arange(9)[None]
    assert torch.equal(load_model(match.directory_of(path))(tokens), load_model(path)(tokens))
