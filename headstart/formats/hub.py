"""Models on the Hugging Face hub, by their names OWNER/NAME."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from headstart.data.tokenizers import HUB_ID
from headstart.errors import UsageError, first_line, needs_extra
from headstart.formats.packaged import packaged

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "heads.json",
    "heads/*",
    "acceptance.json",
    "tuning.json",
)
"""Files that are fetched: no pickles, no weights in other formats, no code."""


SUFFIX = ".gguf"
"""End of the names of GGUF files; no model on the hub is looked for under such a name."""


def local_path(named: str | Path) -> Path:
    """Return the path named; if it does not exist, the weights of a packaged model, or a copy of a model on the hub.

    The copy is fetched, or found in the hub's cache. Raises UsageError if the hub has none, or the package is missing.
    """
    if (model := packaged(named)) is not None:
        return model.path(str(named))
    path = Path(named)
    if path.exists() or path.suffix == SUFFIX or not re.fullmatch(HUB_ID, str(named)):
        return path
    return fetch_directory(str(named))


def name_of(path: Path) -> str:
    """Return the name of the model at `path`, which says nothing about this machine.

    OWNER/NAME of a copy in the hub's cache, and otherwise the name of the run, the directory or the file.
    """
    path = path.resolve()
    cached = [re.fullmatch(r"models--([^/]+?)--([^/]+)", part) for part in path.parts]
    hub = [f"{found[1]}/{found[2]}" for found in cached if found]
    return hub[-1] if hub else path.parent.name if path.name == "model" else path.name


@functools.cache
def fetch_directory(repository: str) -> Path:
    """Return a copy of a model on the hub, fetched once in a process. Raises UsageError if there is none."""
    with needs_extra(f"{repository}: no such directory, and asking the hub", "hf"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except Exception as error:  # of the hub, of the network, of the disk: many kinds
        reason = first_line(error)
        raise UsageError(
            f"{repository}: no such directory here, and the hub gives no such model ({reason}); check the name and the "
            "network, or name a directory that holds a model's config.json"
        ) from error
