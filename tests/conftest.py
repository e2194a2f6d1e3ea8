"""One thread per test process: the tests run side by side, and two threads on a busy core wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from forks import Forks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where processes that run tests side by side leave one another what takes long to make."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["TESTS_SHARE"] = str(tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()
