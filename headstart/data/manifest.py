"""The manifest of a shards folder: its content, with a SHA-256 of each file including the manifest, and target bits.

Version 2 lists a split's shards; version 1 had a single SPLIT.bin, which is read as a list of one shard. Version 3 has
target bits for each shard: one bit per token that says whether it is to be predicted. Only conversations use version 3,
so an older Headstart refuses nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headstart.errors import UsageError
from headstart.fileio import read_bounded, sha256_of

FORMAT, VERSION, WITH_TARGETS = "headstart-shards", 2, 3
MANIFEST = "manifest.json"
NAMES = "validation.names.json"
"""The names of the held-out documents."""
MAX_BYTES = 256 << 20
"""The largest manifest; an entry of a shard takes 200 bytes."""
MOST = 10**15
"""The largest number of tokens, documents or bytes."""
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


def dtype_for(vocab_size: int) -> str:
    """Return the smallest of DTYPES that holds all ids below `vocab_size`."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a manifest in the form of version 2 or 3. Raise UsageError if it is missing or damaged."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such folder; write it with: headstart prepare SOURCE --out {directory}")
    file = directory / MANIFEST
    try:
        manifest = json.loads(read_bounded(file, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{directory}: holds no {MANIFEST}, so it is not a shards folder; name one that headstart prepare wrote"
        ) from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); allow reading it") from error
    except (ValueError, RecursionError) as error:
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
        start_ids = manifest.get("start_ids", [])
        if not isinstance(start_ids, list) or any(type(i) is not int or not 0 <= i < 2**32 for i in start_ids):
            raise ValueError("start_ids")
        if manifest["version"] == 1:
            for split, content in manifest["splits"].items():
                digest = content.pop("sha256")
                content["shards"] = [{"file": f"{split}.bin", "tokens": content["tokens"], "sha256": digest}]
                content["starts"] = {"file": f"{split}.documents.npy", "sha256": None}
        for content in manifest["splits"].values():
            counts = [content[key] for key in ("tokens", "documents", "bytes")]
            if any(type(count) is not int or not 0 <= count <= MOST for count in counts):
                raise ValueError("tokens, documents or bytes")
            if manifest["version"] != WITH_TARGETS and counts[0] > counts[1] * (1 + len(start_ids)) and not counts[2]:
                raise ValueError("bytes")
            entries = [*content["shards"], content["starts"]]
            if manifest["version"] == WITH_TARGETS:
                entries += [shard["targets"] for shard in content["shards"]]
                [int(shard["targets"]["count"]) for shard in content["shards"]]
            names = [Path(entry["file"]).name == entry["file"] for entry in entries]
            if not all(names) or sum(int(shard["tokens"]) for shard in content["shards"]) != counts[0]:
                raise ValueError("shards")
            if not all(entry["sha256"] is None or isinstance(entry["sha256"], str) for entry in entries):
                raise ValueError("sha256")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{file}: damaged (no usable {error}); run prepare again") from error
    return manifest


def seal(manifest: dict[str, Any], folder: Path) -> None:
    """Add the SHA-256 of the names, the tokenizer's files and the manifest's own content to the manifest.

    All files of the folder but the manifest must have been written.
    """
    files = [folder / NAMES, *sorted((folder / "tokenizer").rglob("*"))]
    manifest["files"] = {str(file.relative_to(folder)): sha256_of(file) for file in files if file.is_file()}
    manifest["sha256"] = _content_digest(manifest)


def sealed(manifest: dict[str, Any]) -> bool:
    """Return whether the manifest has the digests of `seal`; those of an older Headstart do not."""
    return "sha256" in manifest or "files" in manifest


def faults_of_sealed(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Return a line for each sealed file that is missing or changed, including the manifest itself."""
    found = []
    if sealed(manifest) and not _is_unchanged(directory / MANIFEST, manifest):
        found.append(
            f"{directory / MANIFEST}: its content is not what prepare wrote; copy it again or run prepare again"
        )
    files = manifest.get("files", {})
    for name, digest in files.items() if isinstance(files, dict) else ():
        file = directory / name
        try:
            if sha256_of(file) != digest:
                found.append(f"{file}: its content is not what prepare wrote; copy the file again or run prepare again")
        except UsageError as error:
            found.append(str(error))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "its name in the manifest is damaged"
            found.append(f"{file}: cannot be read ({why}); copy the file again or run prepare again")
    return found


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the content of a manifest's file."""
    return json.dumps(manifest, indent=2, ensure_ascii=True) + "\n"


def _is_unchanged(file: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the file is, byte for byte, the manifest that prepare wrote."""
    form = file.read_bytes() == manifest_text(manifest).encode("utf-8")
    return form and manifest.get("sha256") == _content_digest(manifest)


def _content_digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def check_target(out: Path) -> None:
    """Raise UsageError unless `out` is new, empty or a shards folder, because it will be replaced as a whole."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; name a new folder")
    if any(out.iterdir()):
        try:
            read_manifest(out)
        except UsageError:
            raise UsageError(f"{out}: exists and is not a shards folder; name a new folder") from None


def bytes_for(tokens: int) -> int:
    """Return the number of bytes that the target bits of `tokens` tokens take."""
    return -(-tokens // 8)


def write_bits(flags: Iterable[np.ndarray], file: BinaryIO) -> int:
    """Write arrays of 0 and 1 in order, the first in the lowest bit, and return how many are 1."""
    rest = np.empty(0, dtype=np.uint8)
    count = 0
    for each in flags:
        count += int(np.count_nonzero(each))
        rest = np.concatenate([rest, each.astype(np.uint8)])
        whole = len(rest) // 8 * 8
        file.write(np.packbits(rest[:whole], bitorder="little").data)
        rest = rest[whole:]
    file.write(np.packbits(rest, bitorder="little").data)
    return count


class TargetBits:
    """Target bits that `write_bits` wrote; takes `len` and slices without a step, which give bool."""

    dtype = np.dtype(bool)

    def __init__(self, packed: np.ndarray, tokens: int) -> None:
        self._packed, self._tokens = packed, tokens

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, stop, step = where.indices(self._tokens)
        if step != 1:
            raise ValueError(f"step {step}: only whole runs can be taken")
        first = begin // 8
        flags = np.unpackbits(self._packed[first : bytes_for(max(begin, stop))], bitorder="little")
        return flags[begin - 8 * first : max(begin, stop) - 8 * first].view(bool)
