"""Check what operators use: the file of settings, the replacement of the model, ids, logs, traces and dashboards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import HTTP, metric, running, until

import headstart
from headstart.commands.serve import ServeCommandSettings
from headstart.decoding.engine import Engine
from headstart.errors import UsageError
from headstart.formats.bundled import boxed_model
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.serving import server as server_module
from headstart.serving.server import Server, make_service
from headstart.serving.settings import ServeSettings
from headstart.serving.traces import Traces

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "def f(", "max_tokens": 40, "temperature": 0}


# The file of settings


def test_a_file_holds_options_by_name_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: here\nslots: 3\nmax-body-bytes: 99\napi_key: [a, b]\nexact: false\nrequest_timeout: 7\n")
    read = ServeCommandSettings.parse(["--config", str(file), "--slots", "5"])
    assert read.model == "here" and read.server == ServeSettings(
        slots=5, max_body_bytes=99, api_key=("a", "b"), exact=False, request_timeout=7.0
    )
    assert ServeCommandSettings.parse(["other", "--config", str(file), "--exact"]).model == "other"
    assert ServeCommandSettings.parse([]).server == ServeSettings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("slot: 3", "there is no setting slot; did you mean slots?"),
        ("slots: many", "slots is 'many'; it must be a whole number"),
        ("slots: 0", "--slots is 0; it must be at least 1"),
        ("model: [a]", r"model is \['a'\]; it must be text"),
        ("quantize: q5", "quantize is 'q5'; it must be one of q4, q8"),
        ("- a", "holds no settings"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_by_name(text: str | None, line: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=rf"{re.escape(str(file))}: {line}"):
        ServeCommandSettings.parse(["--config", str(file)])


# Another model on the same port


@contextmanager
def reloading(directory: Path, **settings: Any) -> Iterator[Server]:
    """Run a server that loads what is in `directory` again when it is asked to."""
    wanted = ServeSettings(port=0, slots=1, **settings)
    server = Server(make_service(directory, wanted), lambda metrics: make_service(directory, wanted, metrics))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.drain()
        thread.join(20)
        assert not thread.is_alive()


def ask_to_reload(server: Server) -> None:
    assert server.reloads is not None and server._loop is not None
    server._loop.call_soon_threadsafe(server.reloads.ask)


@pytest.fixture
def directory(tmp_path: Path, model: headstart.api.LanguageModel) -> Path:
    save_model(load_model(boxed_model()), tmp_path / "m", model.tokenizer)
    return tmp_path / "m"


def put_other_weights(directory: Path) -> str:
    """Replace the model of a directory, and return what the new one writes."""
    changed = load_model(boxed_model())
    changed.trunk.blocks[0].attention.out.weight.data.zero_()
    save_model(changed, directory, headstart.load().tokenizer)
    return headstart.load(directory).generate("def f(", max_new_tokens=40).text


def write(server: Server, **changes: Any) -> str:
    return HTTP.post(f"{server.url}/v1/completions", json=BODY | changes).json()["choices"][0]["text"]


def test_running_requests_finish_on_the_old_weights(
    directory: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_text, new_text = model.generate("def f(", max_new_tokens=40).text, put_other_weights(directory)
    save_model(load_model(boxed_model()), directory, model.tokenizer)
    go, step = threading.Event(), Engine.step
    with reloading(directory) as server:
        old, before = weakref.ref(server.service.model.transformer), weakref.ref(server.service)

        def held(engine: Engine) -> Any:
            if engine.model is old():
                go.wait()
            return step(engine)

        monkeypatch.setattr(Engine, "step", held)
        outputs: list[str] = []
        thread = threading.Thread(target=lambda: outputs.append(write(server)))
        thread.start()
        until(lambda: metric(server, "headstart_live_slots") == 1)
        put_other_weights(directory)
        ask_to_reload(server)
        until(lambda: server.service is not before())
        assert write(server) == new_text and not outputs
        assert HTTP.get(f"{server.url}/ready").status_code == 200
        go.set()
        thread.join()
        assert outputs == [old_text] != [new_text]
        until(lambda: not server.reloads.replaced)  # type: ignore[union-attr]
        monkeypatch.undo()
        until(lambda: old() is None)  # its memory is free
        assert metric(server, "headstart_tokens_total") == 80  # the metrics continue
        assert metric(server, "headstart_live_slots") == 0


def test_a_model_that_does_not_load_changes_nothing(
    directory: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with reloading(directory) as server:
        service = server.service
        (directory / "model.safetensors").write_bytes(b"broken")
        ask_to_reload(server)
        said = ""

        def reported() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "reload failed" in said

        until(reported)
        line = next(line for line in said.splitlines() if "reload failed" in line)
        assert "model.safetensors" in line and line.endswith("; the present model stays") and "Traceback" not in said
        assert server.service is service and write(server) == model.generate("def f(", max_new_tokens=40).text


def test_a_signal_reads_the_file_of_settings_again(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    lines = f"model: {directory}\nport: 0\nslots: 1\nlog_format: json\nthreads: 1\n"
    file.write_text(lines)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | {"HEADSTART_API_KEY": ""}
    command = [sys.executable, "-m", "headstart", "serve", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    log: list[dict[str, Any]] = []

    def read() -> None:
        for line in process.stderr or ():
            log.append(json.loads(line))  # every line is JSON

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def read_until(part: str) -> str:
        until(lambda: any(part in each["message"] for each in log), 180)
        return next(each["message"] for each in log if part in each["message"])

    try:
        url = re.findall(r"http://\S+(?=;)", read_until("listening on"))[0]
        read_until("try: curl")
        file.write_text(lines + "slot: 3\n")
        process.send_signal(signal.SIGHUP)
        assert "there is no setting slot" in read_until("reload failed")
        file.write_text(lines + "name: other\n")
        process.send_signal(signal.SIGHUP)
        assert read_until("answers new requests") == "reload: other answers new requests"
        assert HTTP.get(f"{url}/v1/models").json()["data"][0]["id"] == "other"
        HTTP.get(f"{url}/health")
        asked = HTTP.post(f"{url}/v1/completions", json=BODY, headers={"X-Request-Id": "mine-1"})
        assert asked.headers["x-request-id"] == "mine-1"
        read_until("POST /v1/completions")
        answers = [each["message"] for each in log if "status" in each]
        assert answers == ["GET /v1/models 200", "POST /v1/completions 200"]  # no probe
        found = next(each for each in log if each.get("request_id") == "mine-1")
        assert (found["status"], found["request_id"], found["input_tokens"]) == (200, "mine-1", 6)
        assert (
            found["output_tokens"] == 40 and 0 < found["prompt_seconds"] + found["decode_seconds"] <= found["seconds"]
        )
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        thread.join()
    assert not any("traceback" in each for each in log)


# Ids, metrics, traces


@pytest.mark.parametrize("given", ["abc-123", "", "a b", "x" * 129, "é"])
def test_every_answer_has_the_id_of_its_request(given: str, server: Server) -> None:
    for path in ("/health", "/nowhere", "/v1/completions"):
        headers = {b"X-Request-Id": given.encode()} if given else {}
        found = HTTP.get(server.url + path, headers=headers).headers.get_list("x-request-id")
        assert found == [given] if given == "abc-123" else re.fullmatch("[0-9a-f]{32}", *found)


@pytest.mark.parametrize(("metrics", "without", "with_key"), [("key", 401, 200), ("open", 200, 200), ("off", 401, 404)])
def test_the_metrics_are_closed_open_or_off(metrics: Any, without: int, with_key: int) -> None:
    with running(ServeSettings(port=0, slots=1, api_key=("k",), metrics=metrics)) as server:
        refused = HTTP.get(f"{server.url}/metrics")
        assert (refused.status_code, refused.headers["x-request-id"] != "") == (without, True)
        assert HTTP.get(f"{server.url}/metrics", headers={"Authorization": "Bearer k"}).status_code == with_key
        assert HTTP.get(f"{server.url}/v1/models").status_code == 401


def test_a_trace_has_the_phases_of_each_output(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="no OpenTelemetry")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter = memory.InMemorySpanExporter()
    monkeypatch.setattr(server_module, "Traces", lambda: Traces(export.SimpleSpanProcessor(exporter)))
    above = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    with running(ServeSettings(port=0, slots=1, traces=True)) as server:
        HTTP.post(f"{server.url}/v1/completions", json=BODY | {"n": 2}, headers={**above, "X-Request-Id": "r"})
        until(lambda: len(exporter.get_finished_spans()) == 7)
        *phases, whole = exporter.get_finished_spans()
    assert whole.name == "POST /v1/completions" and f"{whole.context.trace_id:x}" == "a" * 32
    assert whole.attributes["headstart.request_id"] == "r" and whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["gen_ai.usage.output_tokens"] == 80
    assert [(span.attributes["headstart.choice"], span.name) for span in phases] == [
        (choice, name) for choice in (0, 1) for name in ("queue", "prompt", "decode")
    ]
    assert all(span.parent.span_id == whole.context.span_id for span in phases)
    times = [span.start_time for span in phases[:3]] + [phases[2].end_time, whole.end_time]
    assert times == sorted(times) and whole.start_time <= times[0]
    assert phases[3].end_time - phases[3].start_time >= phases[2].end_time - phases[2].start_time  # one slot


def test_the_dashboard_shows_existing_metrics(server: Server) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in shown for name in re.findall(r"\b(?:headstart|vllm:)\w+", text)}
    families = server.service.worker.metrics.registry.collect()
    existing = {
        family.name + suffix
        for family in families
        for suffix in {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[family.type]
    }
    assert len(names) > 10 and names <= existing
    for text in shown:
        assert text.count("(") == text.count(")") and "$model" in text
