"""`headstart convert`: a model from one format into another, read back and compared before it is called done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from headstart.console import print_result, say
from headstart.data.tokenizers import PretrainedTokenizer, Tokenizer, load_tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json, replacing_directory, replacing_file
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.generation_config import keep_generation, named_ends
from headstart.formats.hub import local_directory
from headstart.formats.huggingface import (
    TOKENIZER_FILE,
    known_start,
    load_data_tokenizer,
    load_model,
    load_model_tokenizer,
)
from headstart.formats.medusa import BASE, is_medusa, load_medusa
from headstart.formats.mimo import is_mimo, load_mimo
from headstart.formats.registry import Format, known_format
from headstart.model.transformer import Transformer


@dataclass(frozen=True)
class ConvertSettings:
    """Write a model in another format, read it back and compare the two."""

    source: Positional[str]
    """A model directory, an ordinary Hugging Face model, or Meta's multi-token release."""
    target: Positional[str]
    """Where the result goes: a new place, or an earlier result of the same format."""
    to: str = "headstart"
    """headstart (an ordinary Hugging Face model, with further heads in heads/), hf-code (the same, with code by which
    transformers alone decodes with all heads), meta (Meta's multi-token release), medusa (heads for vLLM and TGI), mimo
    (sequential heads for vLLM and SGLang), gguf (head 1 for llama.cpp)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype to store the weights in (default: that of the source)."""
    tokenizer: str | None = None
    """Tokenizer of the result: a directory, a tokenizer.json, or bytes (default: the source's)."""
    json: bool = False
    """Print what was compared as JSON."""


def run(settings: ConvertSettings) -> None:
    """Convert the model, and print what was compared."""
    found = convert(settings.source, settings.target, settings.to, settings.dtype, settings.tokenizer)
    print_result(found, settings.json, format_conversion)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "headstart",
    dtype: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Writes the model at `source` to `target` in the format `to`.

    The result is written beside and renamed, after it has been read back and compared with the source: what cannot be
    read back as it was is not kept.

    Args:
        source: anything that headstart reads.
        target: what does not exist yet, or holds an earlier result of the same format.
        dtype: what the weights are stored as: float32, bfloat16 or float16 (None: what they are).
        tokenizer: a tokenizer to write along (a directory, a tokenizer.json, or "bytes"; None: the source's).

    Returns:
        "path", "format", "left_out" (lines) and "checks".

    Raises:
        UsageError: a source that cannot be read, a format that cannot express it, a target that holds something else,
            a result that is not the same.
    """
    form, path = known_format(to), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: take one of {', '.join(DTYPES)}")
    path = path.resolve()
    _check_target(form, to, Path(source).resolve(), path)
    model, words = read_source(source)
    if tokenizer is not None:
        words = load_data_tokenizer(tokenizer)
    if words is None:
        say(f"{source}: has no {TOKENIZER_FILE}, so the result takes ids; give one with --tokenizer")
    stored = model.trunk.embedding.weight.dtype
    left = []
    if dtype is not None and DTYPES[dtype] != stored:
        model = model.to(DTYPES[dtype])
        if DTYPES[dtype] != torch.float32:
            left.append(f"weights: rounded from {str(stored).removeprefix('torch.')} to {dtype}")
    if form.is_file:
        with replacing_file(path) as temporary:
            left += form.write(model, temporary, words)
            checks = form.check(model, temporary, words)
    else:
        with replacing_directory(path) as temporary:
            left += form.write(model, temporary, words)
            folder = source_folder(source)
            if tokenizer is None or named_ends(folder, model.config.vocab_size):
                keep_generation(folder, temporary / form.folder)
            checks = form.check(model, temporary, words)
    return {"path": str(path), "format": to, "left_out": left, "checks": [check.as_json() for check in checks]}


def read_source(source: str | Path) -> tuple[Transformer, Tokenizer | None]:
    """The model at `source`, in the dtype in which it is stored, and its tokenizer if it has one.

    Raises UsageError for what headstart does not read.
    """
    path = Path(source)
    if is_mimo(path):
        model = load_mimo(path)
        words = load_tokenizer(path) if (path / TOKENIZER_FILE).is_file() else None
        if words is not None:
            words.end_ids |= named_ends(path, model.config.vocab_size)
        if isinstance(words, PretrainedTokenizer):
            words.fit(model.config.vocab_size)
            # As of a model of ours: texts begin with what bos_token_id names.
            words.start_ids = known_start(words, read_json(path / CONFIG_FILE) | {"headstart": {}})
        return model, words
    if is_medusa(path):
        return load_medusa(path), load_model_tokenizer(path / BASE)
    return load_model(source), load_model_tokenizer(source)


def source_folder(source: str | Path) -> Path:
    """Return the folder that holds config.json and generation_config.json of the model at `source`."""
    return Path(source) / BASE if is_medusa(source) else local_directory(source)


def _check_target(form: Format, name: str, source: Path, target: Path) -> None:
    """Nothing is replaced but an earlier result of the same format, and never the source."""
    if source == target or target in source.parents:
        raise UsageError(f"{target}: is where the source lies; name another place")
    if not target.exists():
        return
    if form.is_file and target.is_dir():
        raise UsageError(f"{target}: is a directory; {name} is one file, name it {target.name}/model.{name}")
    if not form.is_file and not target.is_dir():
        raise UsageError(f"{target}: is a file; name a new directory")
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not form.holds(target):
        raise UsageError(f"{target}: holds something else, and converting would replace it; name a new place")


def format_conversion(found: dict[str, Any]) -> str:
    """`convert`'s result for people."""
    lines = [f"not carried: {line}" for line in found["left_out"]]
    lines += [f"{'read back' if c['passed'] else 'not checked'} by {c['by']}: {c['found']}" for c in found["checks"]]
    return "\n".join([*lines, f"{found['format']}: {found['path']}"])
