"""Pipes, devices and directories where a regular file is meant are refused at once, and files have bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headstart import fileio
from headstart.data.byte_tokenizer import ByteTokenizer
from headstart.data.manifest import read_manifest
from headstart.data.prepare.write import read_names
from headstart.data.prompts import read_prompt_file
from headstart.data.shards import faults_of, read_starts
from headstart.data.tokenizer_source import TokenizerDirectory
from headstart.data.tokenizers import load_tokenizer
from headstart.decoding.policy.calibration import read_tuning
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.registry import load_config
from headstart.training.checkpoint_state import read_state
from headstart.training.yaml_settings import read_mapping

READERS: dict[str, Callable[[Path], object]] = {
    "settings.yaml": read_mapping,
    "config.json": read_json,
    "tuning.json": lambda file: read_tuning(file.parent, None),  # type: ignore[arg-type]
    "chat_template.jinja": lambda file: TokenizerDirectory(file.parent).chat_template(),
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": lambda file: load_tokenizer(file.parent),
    "special_tokens_map.json": lambda file: load_tokenizer(file.parent),
    "manifest.json": lambda file: read_manifest(file.parent),
    "train.documents.npy": lambda file: read_starts(file, 1, 1),
    "names.json": lambda file: read_names(file.parent),
    "state.json": lambda file: read_state(file.parent),
    "rng.pt": lambda file: read_state(file.parent),
    ".metadata": lambda file: read_state(file.parent),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    file = tmp_path / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=rf"{name}: .*not a regular file"):
        READERS[name](file)


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"rng.pt", ".metadata"}))
def test_a_directory_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe", "device", "deep"])
def test_a_model_with_such_a_config_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"config\.json"):
        load_config(tmp_path)


def test_what_is_sealed_may_be_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    manifest = {"dtype": "uint8", "splits": {"train": {"shards": [], "starts": {"file": "a.npy", "sha256": "0"}}}}
    assert ["not a regular file" in line for line in faults_of(tmp_path, "train", manifest)] == [True]


@pytest.mark.parametrize("line", ['{"prompt": "\\ud800"}', '{"messages": [{"role": "user", "content": "\\udfff"}]}'])
def test_a_prompt_that_is_no_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UsageError, match=r"a\.jsonl, prompt 2: holds half of a surrogate pair"):
        read_prompt_file(tmp_path / "a.jsonl")


def test_an_array_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"a\.npy: missing or damaged"):
        read_starts(tmp_path / "a.npy", 1, 1)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "manifest.json", "chat_template.jinja"])
def test_a_file_beyond_its_bound_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.fileio.MOST_JSON", 50)
    for limit in ("special_tokens.MAX_BYTES", "manifest.MAX_BYTES", "tokenizer_source.MAX_TEMPLATE"):
        monkeypatch.setattr(f"headstart.data.{limit}", 50)
    (tmp_path / name).write_text(json.dumps({"a": "x" * 42}))
    assert len(fileio.read_bounded(tmp_path / name, 51)) == 51
    with pytest.raises(UsageError, match=rf"{name}: larger than 50 bytes"):
        READERS[name](tmp_path / name)
