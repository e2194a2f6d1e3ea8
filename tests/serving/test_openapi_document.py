"""Check the OpenAPI document, and send valid and invalid requests that schemathesis derives from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving.conftest import HTTP, raw

from headstart.serving.server import Server

WRITING = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]


def test_the_document_lists_routes_and_errors(server: Server) -> None:
    paths = json.loads(HTTP.get(f"{server.url}/openapi.json").content)["paths"]
    assert set(paths) == {
        *WRITING,
        "/tokenize",
        "/detokenize",
        "/version",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/ready",
        "/metrics",
    }
    for path in WRITING:
        answers = paths[path]["post"]["responses"]
        assert "422" not in answers and {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(answers)


def stand(server: Server, examples: int, folder: Path) -> None:
    """Check that no answer has a status of 500 or more, and that the server continues."""
    # A process of its own: compiled kernels round subnormal numbers to 0, and Hypothesis then refuses to work.
    program = Path(sys.executable).with_name("schemathesis")
    if not program.is_file():
        pytest.skip("schemathesis is not installed")
    command = [program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--phases", "fuzzing"]
    command += ["--max-examples", str(examples), "--seed", "1", "--request-timeout", "60", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found and found[1] == found[2] and int(found[1]) > examples
    assert raw(server, b'{"prompt": "x", "max_tokens": 1}')[0] == 200


def test_schemathesis_finds_no_server_error(server: Server, tmp_path: Path) -> None:
    stand(server, 8, tmp_path)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_thousands_of_requests(server: Server, tmp_path: Path) -> None:
    stand(server, 5000, tmp_path)
