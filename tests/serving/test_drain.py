"""Run a server as a process: it reports its address, and a signal lets it finish."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving.conftest import HTTP, until

BODY = {
    "prompt": "def f(",
    "max_tokens": 300,
    "temperature": 0,
    "stream": True,
    "n": 3,
    "speculative": {"enabled": False},
}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HEADSTART_API_KEY": "k1,k2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "headstart", "serve", "--port", "0", "--slots", "2", "--drain-seconds", "60"],
        stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        while lines[-1] and "curl" not in lines[-1]:
            lines.append(process.stderr.readline())
        found = re.search(r"listening on (http://\S+);", lines[-2])
        assert found and "HEADSTART_API_KEY" in lines[-1] and "k1" not in "".join(lines), lines
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_a_signal_lets_requests_finish_and_refuses_new_ones(started: tuple[subprocess.Popen[str], str], model) -> None:
    process, url = started
    key = {"Authorization": "Bearer k2"}
    with (
        httpx.Client(base_url=url, headers=key, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=BODY) as answer,
    ):
        events = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        choices = [next(events)["choices"][0]]
        process.send_signal(signal.SIGTERM)
        until(lambda: HTTP.get(f"{url}/ready").status_code == 503)
        late = HTTP.post(f"{url}/v1/completions", json=BODY, headers=key)
        assert (
            late.status_code == 503 and late.json()["error"]["type"] == "server_error" and late.headers["retry-after"]
        )
        choices += [event["choices"][0] for event in events]
    outputs = ["".join(choice["text"] for choice in choices if choice["index"] == i) for i in range(3)]
    assert outputs == [model.generate("def f(", max_new_tokens=300).text] * 3  # the third one waited
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
