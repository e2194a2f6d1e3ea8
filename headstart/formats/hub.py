"""Models by their names: paths, and OWNER/NAME on the Hugging Face hub; directories that hold GGUF files alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
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
HEADS_FILES = (*FILES, "medusa_lm_head.safetensors", "medusa_lm_head.pt", "pytorch_model.bin")
"""The same of heads, which are published as pickles too. They are read with weights_only."""


OTHER_WEIGHTS = ("*.safetensors", "*.pth", "*.bin", "heads.json")
"""Files that make a directory more than a place of GGUF files."""
PART = re.compile(r"-\d{5}-of-")
"""The number in the name of each file of a split GGUF model."""
SUFFIX = ".gguf"
"""End of the names of GGUF files; no model on the hub is looked for under such a name."""


def local_path(named: str | Path, files: Sequence[str] = FILES) -> Path:
    """Return the path named; if it does not exist, the weights of a packaged model, or a copy of a model on the hub.

    The copy is fetched, or found in the hub's cache. A directory or a repository that holds weights in a GGUF file
    alone stands for that file; if it holds several, OWNER/NAME:PART names one on the hub by a part of its name.
    `files` are the patterns of the names to fetch.

    Raises:
        UsageError: the hub has no such model, the package is missing, or the GGUF file to take is not clear.
    """
    if (model := packaged(named)) is not None:
        return model.path(str(named))
    path = Path(named)
    if path.exists():
        return _file_within(path) if path.is_dir() else path
    repository, _, part = str(named).partition(":")
    if not re.fullmatch(HUB_ID, repository) or (path.suffix == SUFFIX and not part):
        return path
    return fetch(repository, part, tuple(files))


def _file_within(directory: Path) -> Path:
    """Return the GGUF file that a directory holds in place of other weights, or the directory."""
    found = sorted(file.name for file in directory.glob(f"*{SUFFIX}"))
    if not found or _has_other_weights(directory):
        return directory
    return directory / _only(found, str(directory), f"{directory}/NAME")


def _has_other_weights(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in OTHER_WEIGHTS)


def _only(names: Sequence[str], place: str, how: str) -> str:
    """Return the only GGUF file of a list of names, the first part of a split one. Raises UsageError for any other."""
    whole = [name for name in names if not PART.search(name) or "-00001-of-" in name]
    if len(whole) == 1:
        return whole[0]
    some = ", ".join(whole[:8]) + (f" and {len(whole) - 8} more" if len(whole) > 8 else "")
    found = f"holds {len(whole)} GGUF files, {some}" if whole else "is in the name of no GGUF file"
    raise UsageError(f"{place}: {found}; name one, as {how}")


def name_of(path: Path) -> str:
    """Return the name of the model at `path`, which says nothing about this machine.

    OWNER/NAME of a copy in the hub's cache, and otherwise the name of the run, the directory or the file.
    """
    path = path.resolve()
    cached = [re.fullmatch(r"models--([^/]+?)--([^/]+)", part) for part in path.parts]
    hub = [f"{found[1]}/{found[2]}" for found in cached if found]
    return hub[-1] if hub else path.parent.name if path.name == "model" else path.name


@functools.cache
def fetch(repository: str, part: str = "", files: tuple[str, ...] = FILES) -> Path:
    """Return a copy of a model on the hub, fetched once in a process: its directory, or its GGUF file.

    A GGUF file is taken if the repository has no other weights, or if `part` of its name is given.

    Raises:
        UsageError: there is no such model, or the GGUF file to take is not clear.
    """
    with needs_extra(f"{repository}: no such directory, and asking the hub", "hf"):
        from huggingface_hub import snapshot_download
    try:
        copy = Path(snapshot_download(repository, allow_patterns=list(files)))
        if not part and _has_other_weights(copy):
            return copy
        names = [name for name in _gguf_names(repository, copy) if part.lower() in name.lower()]
        if not names and not part:
            return copy
        file = _only(names, f"{repository}:{part}" if part else repository, f"{repository}:PART, by a part of its name")
        pattern = PART.sub("-*-of-", file)
        return Path(snapshot_download(repository, allow_patterns=[pattern])) / file
    except UsageError:
        raise
    except Exception as error:  # of the hub, of the network, of the disk: many kinds
        reason = first_line(error)
        raise UsageError(
            f"{repository}: no such directory here, and the hub gives no such model ({reason}); check the name and the "
            "network, or name a directory that holds a model's config.json"
        ) from error


def _gguf_names(repository: str, copy: Path) -> list[str]:
    """Return the names of the GGUF files of a repository; without network those of its copy."""
    from huggingface_hub import list_repo_files

    try:
        listed = list_repo_files(repository)
    except Exception:
        listed = [file.name for file in copy.glob(f"*{SUFFIX}")]
        if not listed:
            raise
    return sorted(name for name in listed if name.endswith(SUFFIX) and "/" not in name)
