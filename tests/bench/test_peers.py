from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

import pytest

from bench import peer_environments, peer_speed, sizes
from bench.peer_environments import PeerError, interpreter
from bench.peer_process import PeerProcess
from headstart.model.config import ModelConfig

TINY = ModelConfig(vocab_size=300, dim=32, layers=5, attention_heads=2, context=128)
CASE = {
    "new_tokens": 6,
    "dtype": "float32",
    "compile": False,
    "gguf": "",
    "assistant": None,
    "rows": 1,
    "prompt_tokens": 4,
    "tokens_per_pass": None,
}


@pytest.fixture(autouse=True)
def no_cache_of_ones_own(monkeypatch, tmp_path):
    """Environments of the user must not decide what tests see. Compiled kernels are not needed either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HEADSTART_NATIVE", "0")


@pytest.fixture
def peers_in_process(monkeypatch):
    """Peers run here, what is said through JSON as ever: a Python with torch takes seconds to start."""

    class Peer:
        def __init__(self, python, script, case, *, threads, log):
            module = importlib.import_module(f"bench.peers.{script}")
            self.peer = module.Peer(json.loads(json.dumps({**case, "threads": threads})))
            self.version, self.variants = self.peer.version, list(self.peer.variants)

        def decode(self, variant, prompts):
            return json.loads(json.dumps(self.peer.variants[variant](prompts)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(peer_speed, "PeerProcess", Peer)


def peers_of_a_tiny_model(monkeypatch, peers, **more):
    monkeypatch.setitem(sizes.SIZES, "12M", TINY)
    settings = {
        "peers": peers,
        "install": False,
        "batches": (1,),
        "threads": 1,
        "dtype": "float32",
        "repetitions": 1,
        "prompt_tokens": 4,
        "new_tokens": 8,
        "compiled": False,
    }
    return peer_speed.run(["12M"], None, **{**settings, **more})


def test_peers_take_turns_and_one_that_is_missing_is_told(peers_in_process, monkeypatch):
    pytest.importorskip("transformers")
    missing = replace(peer_environments.KINDS["vllm"], module="no_such_module_here")
    monkeypatch.setitem(peer_environments.KINDS, "vllm", missing)
    rows, tables, notes = peers_of_a_tiny_model(monkeypatch, ("transformers", "vllm"))
    first = {row[0]: row[1:] for row in tables[0]["rows"]}
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
    bars = [row["what"] for row in rows if row["bar"]]
    assert bars == ["12M, batch 1: headstart, plain (K = 1, exact=False) / transformers, greedy"]
    assert "transformers" in notes[0]


def test_transformers_in_batches(model_directory):
    pytest.importorskip("transformers")
    from bench.peers.with_transformers import Peer

    peer = Peer({**CASE, "model": str(model_directory), "rows": 2, "threads": 1})
    assert list(peer.variants) == ["greedy"]  # neither lookup nor an assistant takes a batch
    answer = peer.variants["greedy"]([[1, 2, 3], [4, 5, 6]])
    assert [len(tokens) for tokens in answer["tokens"]] == [6, 6]
    assert [counts for _, counts in answer["stamps"]] == [[1, 1]] * 6


def test_llama_cpp_takes_its_turn(peers_in_process, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, tables, _ = peers_of_a_tiny_model(monkeypatch, ("llama.cpp",), batches=(2,))
    rows = {row[0]: row[1:] for row in tables[0]["rows"]}
    assert rows["llama.cpp, greedy, fp32 cache"][-1] == "8"


@pytest.mark.slow
def test_a_peer_that_fails_hinders_nothing(monkeypatch):
    broken = peer_environments.Kind("json", "with_nothing", ())
    monkeypatch.setitem(peer_environments.KINDS, "vllm", broken)
    _, tables, _ = peers_of_a_tiny_model(monkeypatch, ("vllm",))
    assert tables[0]["rows"][-1][:2] == ["vllm", "failed: ModuleNotFoundError: No module named 'with_nothing'"]
    assert len(tables[0]["rows"]) == 4


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
        assert process.decode("K = 1", prompts)["tokens"] == plain["tokens"]  # and goes on


def test_a_peer_that_dies_or_hangs_is_told(tmp_path):
    for code, limit, told in (
        ("import sys; sys.exit('out of luck')", 60, "ended with status 1; out of luck"),
        ("import time; time.sleep(60)", 0.2, "no answer in 0 s"),
    ):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
        python.chmod(0o755)
        with pytest.raises(PeerError, match=told):
            PeerProcess(str(python), "with_nothing", CASE, threads=1, log=tmp_path / "log", limit=limit)


def test_which_python_runs_a_peer(monkeypatch, tmp_path):
    kind = peer_environments.Kind("no_such_module_here", "with_vllm", ("one==1", "two"), ("three",))
    monkeypatch.setitem(peer_environments.KINDS, "vllm", kind)
    with pytest.raises(PeerError, match="--install-peers"):
        interpreter("vllm", install=False)

    ran = []
    monkeypatch.setattr(peer_environments.venv, "create", lambda folder, with_pip: folder.mkdir(parents=True))
    monkeypatch.setattr(peer_environments, "_pip", lambda python, folder, *arguments: ran.append(arguments))
    python = interpreter("vllm", install=True)
    assert python == str(tmp_path / "cache/headstart/peers/vllm/bin/python")
    assert ran == [("install", "one==1", "two"), ("uninstall", "--yes", "three")]
    assert interpreter("vllm", install=False) == python and len(ran) == 2
    # Other versions are another environment.
    monkeypatch.setitem(peer_environments.KINDS, "vllm", replace(kind, packages=("one==2",)))
    with pytest.raises(PeerError):
        interpreter("vllm", install=False)
    monkeypatch.setitem(peer_environments.KINDS, "vllm", replace(kind, module="json"))
    assert interpreter("vllm", install=False) == sys.executable


def test_a_failed_installation_is_one_line(monkeypatch, tmp_path):
    kind = peer_environments.Kind("no_such_module_here", "with_vllm", ("one",))
    monkeypatch.setitem(peer_environments.KINDS, "vllm", kind)

    def create(folder, with_pip):
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin" / "python"
        python.write_text("#!/bin/sh\necho collecting\necho 'ERROR: no such package: one'\necho 'a hint'\nexit 1\n")
        python.chmod(0o755)

    monkeypatch.setattr(peer_environments.venv, "create", create)
    with pytest.raises(PeerError) as error:
        interpreter("vllm", install=True)
    assert str(error.value).startswith("not installed: ERROR: no such package: one (all of it: ")
    with pytest.raises(PeerError, match="--install-peers"):  # what is half made is not taken
        interpreter("vllm", install=False)
