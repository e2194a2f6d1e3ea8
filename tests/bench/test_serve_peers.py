"""Our server next to those of peers, here one that writes an x for every token."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from serving.conftest import running

import headstart
from bench import decode_settings, peer_processes, serve_peers
from bench.peer_processes import Package, PeerError, package_version
from bench.serve_peers import COMMANDS, PeerContest, PeerPlan, PeerServer, Weights, find_examples
from bench.serve_processes import ClientProcess
from headstart.decoding.policy import timing
from headstart.formats.bundled import boxed_model
from headstart.serving.settings import ServeSettings

FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(500 if "ignore_eos" in asked else 200)
        self.end_headers()
        for text in ["x"] * asked["max_tokens"] + [""]:
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\\n\\n")
            self.wfile.flush()
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1].split("=")[1])), Handler).serve_forever()
"""


def test_servers_take_turns_and_one_that_fails_or_is_missing_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "QUICK_SECONDS", 0.01)
    here = Package("json", "", ("pip",))
    missing = replace(here, module="no_such_module_here")
    monkeypatch.setattr(peer_processes, "PACKAGES", {"llama.cpp": here, "vllm": here, "missing": missing})
    monkeypatch.setitem(COMMANDS, "llama.cpp", lambda weights, slots, threads: ["-c", FAKE])
    monkeypatch.setitem(COMMANDS, "vllm", lambda weights, slots, threads: ["-c", FAKE])
    monkeypatch.setattr(serve_peers, "write_gguf", lambda *_: None)

    class InThisProcess:
        def __init__(self, directory, threads, *flags):
            assert flags == ("--slots", "2", "--context", "212")
            self.server = running(ServeSettings(port=0, slots=2, context=212, threads=threads))

        def __enter__(self):
            self.port = self.server.__enter__().socket.getsockname()[1]
            return self

        def __exit__(self, *failed):
            self.server.__exit__(*failed)

    plan = PeerPlan(
        ("llama.cpp", "vllm", "missing"), install=False, clients=(1, 2), threads=1, new_tokens=12, repetitions=1
    )
    with ClientProcess() as client:
        contest = PeerContest(plan, client, lambda number: f"# {number}\ndef f(", InThisProcess, least_streams=2)
        found = contest.measure(boxed_model())
    assert found.notes[0].startswith("peers: pip 2") and len(found.tables) == 2
    for table in found.tables:
        rows = {row[0]: row[1:] for row in table["rows"]}
        assert list(rows) == ["headstart, speculation", "headstart, plain", "llama.cpp", "vllm", "missing"]
        assert rows["vllm"][0].startswith("failed: status 500") and rows["missing"][0].startswith("not installed")
        assert [rows[name][-1] for name in list(rows)[:3]] == ["2 of 2", "2 of 2", "0 of 2"]
        assert all(" / " in cell for cell in rows["llama.cpp"][2:5])
    what = [row["what"] for row in found.rows]
    assert "python-bytes-8, 2 clients: headstart, plain / llama.cpp" in what and len(what) == 2 * (3 + 2)


def test_a_server_that_does_not_start_is_reported(tmp_path):
    with pytest.raises(PeerError, match="did not start; out of luck"):
        PeerServer(sys.executable, ["-c", "import sys; sys.exit('out of luck')"], threads=1, log=tmp_path / "log")


def test_what_peers_are_started_with(tmp_path):
    weights = Weights(tmp_path / "model", tmp_path / "model.gguf", 300, "float32")
    assert "--interrupt_requests=false" in COMMANDS["llama.cpp"](weights, 4, 2)
    assert {"--max-num-seqs=4", "--dtype=float32"} <= set(COMMANDS["vllm"](weights, 4, 2))
    assert package_version("llama.cpp", sys.executable).startswith("llama-cpp-python ")


def test_random_weights_write_what_can_be_printed(monkeypatch):
    monkeypatch.setitem(decode_settings.SIZES, "12M", replace(decode_settings.SIZES["12M"], dim=32, layers=9))
    model = headstart.api.LanguageModel(serve_peers.printable_model("12M"), headstart.data.tokenizers.ByteTokenizer())
    (example,) = find_examples(model, lambda number: f"{number}", 1, 40)
    assert example.output.isprintable() and len(example.output) == 40
