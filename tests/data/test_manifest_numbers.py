"""Numbers of a manifest that no preparation writes are refused when the folder is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.data.manifest import FORMAT, read_manifest
from headstart.errors import UsageError


def manifest(**split: Any) -> dict[str, Any]:
    counts = {"tokens": 5, "documents": 1, "bytes": 4} | split
    files = {"shards": [{"file": "a.bin", "tokens": 5, "sha256": None}], "starts": {"file": "a.npy", "sha256": None}}
    return {"format": FORMAT, "version": 2, "dtype": "uint8", "splits": {"train": files | counts}}


def read(folder: Path, content: str) -> dict[str, Any]:
    (folder / "manifest.json").write_text(content)
    return read_manifest(folder)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, 10**30, True])
@pytest.mark.parametrize("name", ["tokens", "documents", "bytes"])
def test_a_count_that_is_none_is_refused(tmp_path: Path, name: str, value: object) -> None:
    assert read(tmp_path, json.dumps(manifest()))["splits"]["train"][name]
    with pytest.raises(UsageError, match="damaged"):
        read(tmp_path, json.dumps(manifest(**{name: value})))


@pytest.mark.parametrize("ids", [5, ["x"], [10**30], [-1]])
def test_start_ids_are_a_list_of_ids(tmp_path: Path, ids: object) -> None:
    with pytest.raises(UsageError, match="no usable start_ids"):
        read(tmp_path, json.dumps(manifest() | {"start_ids": ids}))


def test_no_bytes_for_tokens_and_deep_nesting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no usable bytes"):
        read(tmp_path, json.dumps(manifest(bytes=0)))
    with pytest.raises(UsageError, match="not JSON"):
        read(tmp_path, "[" * 100_000)
