"""Check keys, hosts, origins, and the paths that are open to every client."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from serving.conftest import HTTP, raw, running

from headstart.serving import guard
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

BODY = {"prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    settings = ServeSettings(
        port=0, slots=1, api_key=("first", "second"), allow_origin=("https://there.example",), max_tokens=5
    )
    with running(settings) as started:
        yield started


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_key_is_accepted(key: str, locked: Server) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key) as client:
        assert client.completions.create(model="python-bytes-8", **BODY).choices


@pytest.mark.parametrize("header", ["", "Bearer third", "Bearer firs", "Basic first", "first", "Bearer é"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_other_credentials_are_refused(header: str, path: str, locked: Server) -> None:
    answer = HTTP.request(
        "POST" if "completions" in path else "GET",
        locked.url + path,
        headers={b"Authorization": header.encode()} if header else {},
        json=BODY,
    )
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_open_paths_need_no_key(locked: Server) -> None:
    assert HTTP.get(f"{locked.url}/health").json() == {"status": "ok", "engine_failures": 0}
    assert HTTP.get(f"{locked.url}/ready").json() == {"status": "ready"}
    page = HTTP.get(f"{locked.url}/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *((host, True) for host in ("localhost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "10.0.0.7", "my-box")),
        *((host, True) for host in ("a.localhost", "LOCALHOST.", "mine.example:8000", "MINE.example.", "")),
        *((host, False) for host in ("evil.example", "evil.example:8000", "evil.example.", "127.0.0.1.evil.example")),
        *((host, False) for host in ("localhost.evil.example", "notmine.example", "[mine.example]", "[::1].evil.net")),
    ],
)
def test_allowed_hosts(host: str, allowed: bool) -> None:
    assert guard.is_allowed_host(host, ("mine.example",)) is allowed


def test_other_host_names_are_refused_without_keys(server: Server, locked: Server) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    for path in ("/", "/health", "/metrics", "/v1/models"):
        answer = HTTP.get(server.url + path, headers={"Host": "evil.example"})
        assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"]
    status, answer = raw(server, body, Host="evil.example:8000")
    assert status == 403 and answer["error"]["code"] == "host_not_allowed"
    assert raw(server, body, Host="localhost:1")[0] == 200
    assert sent(server, "Host: evil.example").startswith(b"HTTP/1.1 403")  # a second one
    assert raw(locked, body, Host="evil.example", Authorization="Bearer first")[0] == 200  # no page has the key


@pytest.mark.parametrize("path", ["/metrics/", "/health/", "/v1/models/", "//metrics"])
def test_no_redirect_names_the_host_of_a_request(path: str, server: Server) -> None:
    answer = HTTP.get(server.url + path, headers={"Host": "somewhere"}, follow_redirects=False)
    assert answer.status_code == 404 and "location" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics", "/openapi.json"])
def test_head_is_get_without_its_body(path: str, server: Server) -> None:
    head, get = HTTP.head(server.url + path), HTTP.get(server.url + path)
    assert (head.status_code, head.content) == (200, b"") and get.content
    assert head.headers["content-type"] == get.headers["content-type"] and int(head.headers["content-length"])


def test_a_panic_is_a_json_error(caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException): ...

    async def app(*_: Any) -> None:
        raise Panic("secret")

    async def ask() -> tuple[int, Any]:
        transport = httpx.ASGITransport(guard.Guard(app, (), 1000, lambda *_: None))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.get("/v1/models")
            return answer.status_code, answer.json()["error"]

    status, error = asyncio.run(ask())
    assert status == 500 and error["type"] == "server_error" and "secret" not in error["message"]
    assert "secret" in caplog.text


def test_origins(locked: Server, server: Server) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (("https://there.example", "https://there.example"), ("https://other.example", None)):
        answer = HTTP.options(f"{locked.url}/v1/completions", headers={"Origin": origin, **asked})
        assert answer.headers.get("access-control-allow-origin") == allowed
    answer = HTTP.options(f"{server.url}/v1/completions", headers={"Origin": "https://there.example", **asked})
    assert "access-control-allow-origin" not in answer.headers and answer.status_code == 405


def test_the_servers_own_limit_of_tokens(locked: Server) -> None:
    key = {"Authorization": "Bearer first"}
    assert raw(locked, json.dumps({**BODY, "max_tokens": 6}).encode(), **key)[1]["error"]["param"] == "max_tokens"
    status, answer = raw(locked, b'{"prompt": "x", "temperature": 0}', **key)
    assert status == 200 and answer["usage"]["completion_tokens"] == 5


def sent(server: Server, head: str) -> bytes:
    """Send a head without its body, and return the answer."""
    with socket.create_connection(server.socket.getsockname()[:2], timeout=20) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        return connection.recv(1000)


def test_a_body_has_a_time_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent(server, "Content-Length: 100000000").startswith(b"HTTP/1.1 413")  # at once
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    for length in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        assert sent(server, length).startswith(b"HTTP/1.1 408")


def test_the_time_limit_of_a_body_does_not_limit_the_answer(
    server: Server, slow_steps: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    slow_steps(0.06)
    for stream in (False, True):
        body = {"prompt": "x", "max_tokens": 8, "temperature": 0, "stream": stream, "speculative": {"enabled": False}}
        answer = HTTP.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 200 and ('"length"' in answer.text) and "error" not in answer.text
