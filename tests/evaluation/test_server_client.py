"""The client of servers: what it reads of the answers of vLLM, llama.cpp and Headstart, and of broken ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from headstart.errors import UsageError
from headstart.evaluation.server_client import TooLong, answer_of, model_at, open_stream
from headstart.evaluation.settings import SuiteSettings
from headstart.evaluation.suite_run import ServerSubject, run_suite
from headstart.evaluation.suites import SUITES

USAGE = {"prompt_tokens": 7, "completion_tokens": 4}
VLLM = {
    "num_draft_tokens": 6,
    "num_accepted_draft_tokens": 2,
    "num_spec_tokens": 3,
    "num_spec_steps": 2,
    "acceptance_histogram": [1, 0, 1, 0],
    "acceptance_histogram_by_draft_length": {"3": [1, 0, 1, 0]},
}


@contextmanager
def serving(*events: Any, status: int = 200, pause: float = 0.0, done: bool = True) -> Iterator[tuple[str, list[Any]]]:
    """Serve a stream of `events`; yield its URL and the bodies of the requests."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._send(200, [json.dumps({"data": [{"id": "small"}]})])

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append((self.path, json.loads(content)))
            lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
            self._send(status, lines + (["data: [DONE]\n\n"] if done else []))

        def _send(self, code: int, lines: list[str]) -> None:
            self.send_response(code)
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode())
                self.wfile.flush()
                time.sleep(pause)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()


def chunk(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


CHUNKS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    chunk("a "),
    chunk("b c "),
    chunk("d", "stop"),
]


def test_times_and_tokens_of_a_stream() -> None:
    with serving(*CHUNKS, {"choices": [], "usage": USAGE}, pause=0.03) as (url, bodies):
        answer = answer_of(open_stream(url, "chat/completions", {"a": 1}))
        assert model_at(url) == "small"
    assert bodies == [("/v1/chat/completions", {"a": 1})]
    assert (answer.text, answer.prompt_tokens, answer.tokens, answer.finish_reason) == ("a b c d", 7, 4, "stop")
    assert answer.prompt_seconds >= 0.03 and answer.seconds >= 0.12 * 4 / 3  # the first token at the mean of the others
    assert answer.passes is None


@pytest.mark.parametrize(
    ("event", "passes", "drafted"),
    [
        ({"usage": USAGE, "metrics": {"speculative_decoding": VLLM}}, 2, [3, 3]),
        ({"usage": {**USAGE, "completion_tokens": 6}, "metrics": {"speculative_decoding": VLLM}}, 4, [0, 0, 3, 3]),
        ({"usage": USAGE, "timings": {"draft_n": 6, "draft_n_accepted": 2, "predicted_n": 4}}, 2, []),
        ({"usage": {**USAGE, "speculative": {"drafted": 6, "accepted": 2, "passes": 2}}}, 2, []),
    ],
)
def test_drafts_as_servers_report_them(event, passes, drafted) -> None:
    with serving(*CHUNKS, {"choices": [], **event}) as (url, _):
        answer = answer_of(open_stream(url, "chat/completions", {}))
    assert (answer.passes, answer.num_draft_tokens, answer.num_accepted_draft_tokens) == (passes, 6, 2)
    assert answer.per_step_drafted == drafted and sum(answer.per_step_accepted) == (2 if drafted else 0)


def test_passes_in_order_where_the_server_gives_them() -> None:
    detailed = VLLM | {"per_step_drafted": [3, 3], "per_step_accepted": [2, 0]}
    for tokens, ordered in ((4, True), (5, True), (6, False)):  # one pass without drafts reads the prompt
        event = {"usage": {**USAGE, "completion_tokens": tokens}, "metrics": {"speculative_decoding": detailed}}
        with serving(*CHUNKS, event) as (url, _):
            answer = answer_of(open_stream(url, "chat/completions", {}))
        assert answer.ordered is ordered and answer.per_step_accepted[-2:] == [2, 0]


def test_broken_answers_are_one_line() -> None:
    with serving(*CHUNKS[:2], done=False) as (url, _), pytest.raises(UsageError, match="ended before the answer did"):
        open_stream(url, "chat/completions", {})
    with serving({"error": {"message": "no such model"}}) as (url, _), pytest.raises(UsageError, match="no such model"):
        open_stream(url, "chat/completions", {})
    with serving("data: {broken\n\n") as (url, _), pytest.raises(UsageError, match="the answer broke off"):
        open_stream(url, "chat/completions", {})
    with serving('{"error": "bad"}', status=500) as (url, _), pytest.raises(UsageError, match=r"status 500.*bad"):
        open_stream(url, "chat/completions", {})
    full = '{"error": {"message": "the request exceeds the available context size"}}'
    with serving(full, status=400) as (url, _), pytest.raises(TooLong):
        open_stream(url, "chat/completions", {})
    for wrong in (url, "localhost:80", "ftp://a/v1", "http://"):  # the server has ended
        with pytest.raises(UsageError, match="name a server with OpenAI's API"):
            model_at(wrong)
    with pytest.raises(UsageError, match="broke off"):
        open_stream(url, "completions", {})


def test_a_suite_on_a_server(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n{"messages": [{"role": "user", "content": "a?"}]}\n')
    settings = SuiteSettings(file=tmp_path / "p.jsonl", temperatures=(0.5,))
    metrics = {"choices": [], "usage": USAGE, "metrics": {"speculative_decoding": VLLM}}
    with serving(*CHUNKS, metrics) as (url, bodies):
        subject = ServerSubject(url, None, 9)
        found = run_suite(SUITES["prompts"], subject, settings, None, tmp_path / "out", {})
    assert [path for path, _ in bodies] == ["/v1/completions", "/v1/chat/completions"]
    assert bodies[0][1]["prompt"] == "Once" and bodies[1][1]["messages"] == [{"role": "user", "content": "a?"}]
    asked = {"model": "small", "max_tokens": 9, "temperature": 0.5, "stream": True}
    assert all(asked.items() <= body.items() for _, body in bodies)
    assert [body["seed"] for _, body in bodies] == [0, 1]
    overall = found["temperatures"]["0.5"]["parts"][0]
    assert overall["tokens_per_pass"]["value"] == 2 and overall["answers"] == 2
    assert overall["speculative_decoding"]["acceptance_histogram"] == [2, 0, 2, 0]
