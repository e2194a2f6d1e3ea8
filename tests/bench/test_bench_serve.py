"""Servers under load: ours next to one that writes an x for every token."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from bench import serve
from bench.clients import send
from bench.serve import Settings
from headstart.errors import UsageError
from headstart.evaluation.server_client import model_at


class Fake(BaseHTTPRequestHandler):
    """A server that says x."""

    seen: ClassVar[list[dict]] = []
    paths: ClassVar[set[str]] = set()

    def do_GET(self):
        self.paths.add(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "fake"}]}')

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(asked)
        self.paths.add(self.path)
        self.send_response(500 if asked["prompt"] == "fail" else 200)
        self.end_headers()
        for text in ["x"] * asked["max_tokens"] + [""]:
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@contextmanager
def fake_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def test_another_server_is_measured_alone():
    Fake.seen.clear()
    with fake_server() as url:
        rows = serve.run(Settings(url=(url + "/",), clients=(1, 2), new_tokens=3, repetitions=2))["measurements"]
    assert [row["what"] for row in rows] == [f"1 client: {url}/", f"2 clients: {url}/"]
    assert all(row["median"] > 0 and "ms_to_first_piece_p50_p95" in row["details"] for row in rows)
    assert len(Fake.seen) == (2 + 1) * 4 * 2  # two rounds and one of warm-up, of four streams, twice
    assert len({body["prompt"] for body in Fake.seen}) == len(Fake.seen)
    assert all(body["model"] == "fake" and body["max_tokens"] == 3 for body in Fake.seen)


def test_a_url_without_a_path_is_that_of_its_api():
    with fake_server() as url:
        rows = serve.run(Settings(url=(url.removesuffix("/v1"),), clients=(1,), new_tokens=1, repetitions=1))
    assert rows["measurements"][0]["median"] > 0 and Fake.paths == {"/v1/models", "/v1/completions"}


def test_answers_come_in_order_with_the_time_of_every_piece():
    with fake_server() as url:
        answers = send(url, [{"prompt": "a", "max_tokens": n} for n in (1, 5, 2)], 2)
        assert [answer.tokens for answer in answers] == [1, 5, 2]
        assert all(a.sent < a.pieces[0] <= a.pieces[-1] <= a.end for a in answers)
        with pytest.raises(UsageError, match="status 500"):
            send(url, [{"prompt": "fail", "max_tokens": 1}], 1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "localhost:8000", "http://[/v1"])
def test_a_url_where_nothing_answers_is_wrong_use(url):
    with pytest.raises(UsageError, match="name a server with OpenAI's API"):
        model_at(url)


@pytest.mark.parametrize("changes", [{"clients": ()}, {"clients": (0,)}, {"repetitions": 0}, {"new_tokens": 0}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(UsageError, match="must be at least 1"):
        serve.run(Settings(**changes))


@pytest.mark.slow  # starts two servers
def test_our_server_next_to_the_engine_alone(model_directory):
    result = serve.run(Settings(model=model_directory, clients=(1,), new_tokens=6, repetitions=1))
    rows = {row["what"]: row for row in result["measurements"]}
    assert list(rows) == [
        f"1 client: {what}" for what in (
            "engine alone", "headstart", "headstart, plain", "engine alone / headstart", "speculation / plain",
            "tokens per pass", "speculation / plain / tokens per pass",
        )
    ]  # fmt: skip
    assert rows["1 client: headstart"]["details"] and rows["1 client: tokens per pass"]["median"] >= 1
