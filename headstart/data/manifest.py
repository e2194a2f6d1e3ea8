"""The manifest of a shards folder: what the folder holds, with a SHA-256 for each file of tokens.

Version 2 lists a split's shards; version 1 had a single SPLIT.bin, and is read as a list of one. Version 3 says of each
shard which of its tokens are targets; only conversations have it, so that an older Headstart refuses those alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import UsageError

FORMAT, VERSION, WITH_TARGETS = "headstart-shards", 2, 3
MANIFEST = "manifest.json"
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


def dtype_for(vocab_size: int) -> str:
    """The smallest of DTYPES that holds the ids."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest in the form of version 2 or 3. Raises UsageError where there is none, or none that can be read."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such folder; write it with: headstart prepare SOURCE --out {directory}")
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{directory}: holds no {MANIFEST}, so it is no shards folder; name one that headstart prepare wrote"
        ) from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); allow reading it") from error
    except ValueError as error:
        raise UsageError(f"{file}: damaged (not JSON); run prepare again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{file}: not a manifest of token shards; name a folder that headstart prepare wrote")
    if manifest.get("version") not in (1, VERSION, WITH_TARGETS):
        raise UsageError(
            f"{file}: has version {manifest.get('version')}, this Headstart reads 1 to {WITH_TARGETS}; "
            "run prepare again"
        )
    try:
        np.dtype(DTYPES[manifest["dtype"]])
        if manifest["version"] == 1:
            for split, content in manifest["splits"].items():
                digest = content.pop("sha256")
                content["shards"] = [{"file": f"{split}.bin", "tokens": content["tokens"], "sha256": digest}]
                content["starts"] = {"file": f"{split}.documents.npy", "sha256": None}
        for content in manifest["splits"].values():
            counts = [int(content[key]) for key in ("tokens", "documents", "bytes")]
            entries = [*content["shards"], content["starts"]]
            if manifest["version"] == WITH_TARGETS:
                entries += [shard["targets"] for shard in content["shards"]]
                [int(shard["targets"]["count"]) for shard in content["shards"]]
            names = [Path(entry["file"]).name == entry["file"] for entry in entries]
            if not all(names) or sum(int(shard["tokens"]) for shard in content["shards"]) != counts[0]:
                raise ValueError("shards")
            [entry["sha256"] for entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: damaged (no usable {error}); run prepare again") from error
    return manifest


def check_target(out: Path) -> None:
    """Raises UsageError unless `out` is new, empty or a shards folder: it is replaced as a whole."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder that is new")
    if any(out.iterdir()):
        try:
            read_manifest(out)
        except UsageError:
            raise UsageError(f"{out}: exists and is no shards folder; name a folder that is new") from None
