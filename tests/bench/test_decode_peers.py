"""Decoding next to peers: they take turns, and one that is missing or fails does not stop the others."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from bench import decode_peers, decode_settings, peer_processes
from bench.decode_settings import DecodeSettings
from bench.peer_processes import Package, PeerError, PeerProcess, find_python
from headstart.errors import UsageError
from headstart.model.config import ModelConfig

TINY = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)
CASE = {
    "new_tokens": 6,
    "dtype": "float32",
    "device": "cpu",
    "compile": False,
    "gguf": "",
    "assistant": None,
    "rows": 1,
    "prompt_tokens": 4,
    "tokens_per_pass": None,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Environments of the user must not decide what tests see. Tests do not need compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HEADSTART_NATIVE", "0")


def settings(**changes):
    return DecodeSettings(
        **{
            "model_sizes": ("12M",), "sizes": TINY, "peer_batches": (1,), "threads": (1,), "dtype": "float32",
            "repetitions": 1, "prompt_tokens": 4, "new_tokens": 8, "compile_peers": False, **changes,
        }
    )  # fmt: skip


@pytest.mark.slow  # processes that import transformers
def test_peers_take_turns_and_the_table_reports_one_that_is_missing(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(decode_settings.SIZES, "12M", TINY)
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", Package("no_such_module_here", "with_vllm", ("one",)))
    monkeypatch.setitem(peer_processes.PACKAGES, "llama.cpp", Package("json", "with_nothing", ()))
    found = decode_peers.peers(settings(peers=("transformers", "vllm")))
    first = {row[0]: row[1:] for row in found.tables[0]["rows"]}
    assert list(first) == [
        "headstart, plain (K = 1, exact=False)",
        "headstart, K = 1",
        "headstart, K = 4, synthetic acceptance",
        "transformers, greedy",
        "transformers, prompt lookup",
        "transformers, assisted",
        "vllm",
    ]
    assert first["vllm"][0].startswith("not installed")
    # In fp32 all of them write the same 8 tokens.
    assert {cells[-1] for name, cells in first.items() if name != "vllm"} == {"8"}
    assert float(first["headstart, K = 4, synthetic acceptance"][2]) > 2
    bars = [row["what"] for row in found.rows if row["bar"]]
    assert bars == ["12M, batch 1: headstart, plain (K = 1, exact=False) / transformers, greedy"]


@pytest.mark.slow
def test_the_plain_part_decodes_what_transformers_does():
    pytest.importorskip("transformers")
    found = decode_peers.plain(settings())
    assert [row["what"] for row in found.rows] == [
        "headstart, 1 thread", "transformers, 1 thread", "headstart / transformers, 1 thread",
    ]  # fmt: skip
    assert "The first 8 tokens were the same" in found.notes[0]  # in fp32, to the end


def test_the_plain_part_without_its_peer_is_wrong_use(monkeypatch):
    monkeypatch.setitem(peer_processes.PACKAGES, "transformers", Package("no_such_module_here", "with_x", ()))
    with pytest.raises(UsageError, match="plain needs transformers: not installed"):
        decode_peers.plain(settings(repetitions=1, new_tokens=2))


def test_transformers_in_batches(model_directory):
    pytest.importorskip("transformers")
    from bench.peers.with_transformers import Peer

    peer = Peer({**CASE, "model": str(model_directory), "rows": 2, "threads": 1})
    assert list(peer.variants) == ["greedy"]  # neither lookup nor an assistant takes a batch
    answer = peer.variants["greedy"]([[1, 2, 3], [4, 5, 6]])
    assert [len(tokens) for tokens in answer["tokens"]] == [6, 6]
    assert [counts for _, counts in answer["stamps"]] == [[1, 1]] * 6


@pytest.mark.slow
def test_llama_cpp_writes_our_tokens(monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setitem(decode_settings.SIZES, "12M", TINY)
    found = decode_peers.peers(settings(peers=("llama.cpp",), peer_batches=(2,)))
    rows = {row[0]: row[1:] for row in found.tables[0]["rows"]}
    assert rows["llama.cpp, greedy, fp32 cache"][-1] == "8"


@pytest.mark.slow
def test_a_peer_that_fails_does_not_stop_the_others(monkeypatch):
    monkeypatch.setitem(decode_settings.SIZES, "12M", TINY)
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", Package("json", "with_nothing", ()))
    found = decode_peers.peers(settings(peers=("vllm",)))
    lines = found.tables[0]["rows"]
    assert lines[-1][:2] == ["vllm", "failed: ModuleNotFoundError: No module named 'with_nothing'"]
    assert len(lines) == 4


def test_our_own_process_decodes_a_trained_model(model_directory, tmp_path):
    case = {**CASE, "model": str(model_directory), "rows": 2}
    with PeerProcess(sys.executable, "with_headstart", case, threads=1, log=tmp_path / "log") as process:
        assert process.variants == ["plain (K = 1, exact=False)", "K = 1", "K = 4"]
        prompts = [[1, 2, 3], [4, 5, 6]]
        plain = process.decode("K = 1", prompts)
        drafted = process.decode("K = 4", prompts)
        assert drafted["tokens"] == plain["tokens"] and len(plain["tokens"][0]) == 6
        assert len(plain["stamps"]) == 6 and len(drafted["stamps"]) < 6
        with pytest.raises(PeerError, match="KeyError"):
            process.decode("no such variant", prompts)
        assert process.decode("K = 1", prompts)["tokens"] == plain["tokens"]  # it still answers


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
    with pytest.raises(PeerError, match=message):
        PeerProcess(str(python), "with_nothing", CASE, threads=1, log=tmp_path / "log", timeout=timeout)


def fake_python(monkeypatch, script):
    """Let new environments hold a Python that is a shell script."""

    def create(folder, with_pip):
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{script}")
        python.chmod(0o755)

    monkeypatch.setattr(peer_processes.venv, "create", create)


def test_which_python_runs_a_peer(monkeypatch, tmp_path):
    package = Package("no_such_module_here", "with_vllm", ("one==1", "two"), ("three",))
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", package)
    with pytest.raises(PeerError, match="--install-peers"):
        find_python("vllm", install=False)
    fake_python(monkeypatch, f'echo "$@" >> {tmp_path}/ran\n')
    python = find_python("vllm", install=True)
    assert python == str(tmp_path / "cache/headstart/peers/vllm/bin/python")
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == ["-m pip install one==1 two", "-m pip uninstall --yes three"]
    assert find_python("vllm", install=False) == python and len((tmp_path / "ran").read_text().splitlines()) == 2
    # Other versions are another environment.
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", replace(package, requirements=("one==2",)))
    with pytest.raises(PeerError):
        find_python("vllm", install=False)
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", replace(package, module="json"))
    assert find_python("vllm", install=False) == sys.executable


def test_a_failed_installation_is_one_line(monkeypatch):
    monkeypatch.setitem(peer_processes.PACKAGES, "vllm", Package("no_such_module_here", "with_vllm", ("one",)))
    fake_python(monkeypatch, "echo collecting\necho 'ERROR: no such package: one'\necho 'a hint'\nexit 1\n")
    with pytest.raises(PeerError) as error:
        find_python("vllm", install=True)
    assert str(error.value).startswith("not installed: ERROR: no such package: one (all of it: ")
    with pytest.raises(PeerError, match="--install-peers"):  # an unfinished environment is not used
        find_python("vllm", install=False)
