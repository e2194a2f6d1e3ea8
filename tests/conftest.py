"""One thread per test process: the tests run side by side, and two threads on a busy core wait for each other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from forks import Forks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Name the folder in which processes that run tests share what takes long to make."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["TESTS_SHARE"] = str(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run measurements in this process, with cases and answers as JSON: starting a Python takes seconds."""
    from bench import processes

    def call(function: Any, case: Any, *, threads: int, environment: Any = None) -> Any:
        return json.loads(json.dumps(function(json.loads(json.dumps(case)))))

    monkeypatch.setattr(processes, "call", call)
