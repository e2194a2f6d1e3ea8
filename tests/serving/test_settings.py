"""Check that wrong settings are refused in one line before anything runs."""

from __future__ import annotations

import socket
from typing import Any

import pytest

import headstart
from headstart.commands.serve import ServeCommandSettings, run
from headstart.errors import UsageError
from headstart.formats.bundled import boxed_model
from headstart.formats.registry import load_config
from headstart.serving import server
from headstart.serving.settings import ServeSettings

CONTEXT = load_config(boxed_model()).context


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"slots": 0}, "--slots is 0"),
        ({"queue": -1}, "--queue is -1"),
        ({"max_body_bytes": 0}, "--max-body-bytes is 0"),
        ({"port": -1}, "--port is -1"),
        ({"port": 65536}, "--port is 65536"),
        ({"request_timeout": 0.0}, "--request-timeout is 0"),
        ({"drain_seconds": float("inf")}, "--drain-seconds is inf"),
        ({"stream_interval": -0.1}, "--stream-interval is -0.1"),
        ({"context": 0}, "--context is 0"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"heads": 0}, "--heads is 0"),
        ({"api_key": ("x", "")}, "--api-key is empty"),
        ({"api_key": ("x ",)}, "--api-key begins or ends with a space"),
        ({"max_header_bytes": 1023}, "--max-header-bytes is 1023"),
        ({"header_timeout": 0.0}, "--header-timeout is 0"),
        ({"idle_timeout": float("nan")}, "--idle-timeout is nan"),
        ({"max_connections": 0}, "--max-connections is 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        ServeSettings(**wrong)


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, ("127.0.0.1",)),
        ({"host": "::1"}, ("::1",)),
        ({"host": "localhost", "allow_host": ("a.example",)}, ("a.example",)),
        ({"api_key": ("k",)}, None),
        ({"host": "0.0.0.0"}, None),
        ({"host": "0.0.0.0", "allow_host": ("a.example",)}, ("a.example",)),
        ({"allow_host": ("*",)}, None),
    ],
    ids=str,
)
def test_hosts_are_checked_without_keys(given: dict[str, Any], hosts: tuple[str, ...] | None) -> None:
    assert ServeSettings(**given).hosts == hosts


@pytest.mark.parametrize(("variable", "keys"), [(" a, b,", ("a", "b")), ("", ())])
def test_keys_of_the_environment(variable: str, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[ServeSettings] = []
    monkeypatch.setenv("HEADSTART_API_KEY", variable)
    monkeypatch.setattr(server, "serve", lambda _, settings, again: found.append(settings))
    run(ServeCommandSettings())
    run(ServeCommandSettings(server=ServeSettings(api_key=("c",))))
    assert [settings.api_key for settings in found] == [keys, ("c",)]


def test_an_empty_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_API_KEY", " , ")
    with pytest.raises(UsageError, match="HEADSTART_API_KEY holds no key"):
        run(ServeCommandSettings())


@pytest.mark.parametrize(
    ("wrong", "line"), [({"context": CONTEXT + 1}, f"this model's is {CONTEXT}"), ({"heads": 9}, "has 8")]
)
def test_settings_beyond_the_model_are_refused(
    wrong: dict[str, Any], line: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headstart.api, "load", lambda *_, **__: model)
    with pytest.raises(UsageError, match=line):
        server.make_service(boxed_model(), ServeSettings(**wrong))


def test_an_address_in_use_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "make_service", lambda *_: pytest.fail("the error comes before a model is loaded"))
        with pytest.raises(UsageError, match=f"{port}: Address already in use; name another --port or --host"):
            server.serve(boxed_model(), ServeSettings(port=port), pytest.fail)


def test_the_memory_of_caches_is_reported_and_bounded(monkeypatch, capsys) -> None:
    service = server.make_service(boxed_model(), ServeSettings(slots=3, threads=1))
    service.worker.stop()
    assert service.context == CONTEXT
    said = capsys.readouterr().err
    assert f"for 3 slots of {CONTEXT:,} tokens, taken as sequences grow; --slots and --context change it" in said
    monkeypatch.setattr(server, "fitting_context", lambda plan, most, device: 64)
    service = server.make_service(boxed_model(), ServeSettings(slots=3, threads=1))
    service.worker.stop()
    assert service.context == 64
    assert f"3 slots of 64 tokens (the model has {CONTEXT:,})" in capsys.readouterr().err
