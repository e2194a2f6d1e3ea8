"""`headstart convert`: a model from one format into another, read back and compared before it is called done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from headstart.console import print_result, say
from headstart.errors import UsageError
from headstart.fileio import replacing_directory, replacing_file

if TYPE_CHECKING:
    from headstart.data.tokenizers import Tokenizer
    from headstart.formats.format import Format
    from headstart.model.transformer import Transformer


@dataclass(frozen=True)
class ConvertSettings:
    """Write a model in another format, read it back and compare the two."""

    source: Positional[str]
    """A model directory, an ordinary Hugging Face model, a GGUF file, or Meta's multi-token release."""
    target: Positional[str]
    """Path of the result: a new one, or an earlier result of the same format."""
    to: str = "headstart"
    """headstart (an ordinary Hugging Face model, with further heads in heads/), hf-code (the same, with code by which
    transformers alone decodes with all heads), meta (Meta's multi-token release), medusa (heads for vLLM and TGI), mimo
    (sequential heads for vLLM and SGLang), eagle3 (EAGLE-3 heads for vLLM, SGLang and others, without the model),
    speculators (the same in the form that `vllm serve` runs alone), gguf (head 1 for llama.cpp), eagle3-gguf
    (EAGLE-3 heads for llama.cpp), heads (the others without it)."""
    heads_from: str | None = None
    """A directory of heads without their model, or its name on the hub, ours or published ones (docs/heads.md); the
    result has them too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype to store the weights in (default: that of the source)."""
    tokenizer: str | None = None
    """Tokenizer of the result: a directory, a tokenizer.json, or bytes (default: the source's)."""
    json: bool = False
    """Print what was compared as JSON."""


def run(settings: ConvertSettings) -> None:
    """Convert the model, and print what was compared."""
    found = convert(
        settings.source, settings.target, settings.to, settings.dtype, settings.tokenizer, settings.heads_from
    )
    print_result(found, settings.json, format_conversion)


DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "headstart",
    dtype: str | None = None,
    tokenizer: str | None = None,
    heads: str | Path | None = None,
) -> dict[str, Any]:
    """Write the model at `source` to `target` in the format `to`, a key of `FORMATS`; settings as in `ConvertSettings`.

    The result is written under a temporary name, read back and compared with the source, and only then renamed. The
    mapping returned has "path", "format", "left_out" (lines) and "checks".

    Raises UsageError for a source that cannot be read, a format that cannot express it, a target that holds something
    else, heads of another model, and a result that is not the same.
    """
    import torch

    from headstart.formats.registry import format_named, load_model

    form, path = format_named(to), Path(target).resolve()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: take one of {', '.join(DTYPES)}")
    _check_target(form, to, Path(source).resolve(), path)
    model = load_model(source, heads=heads)
    if heads is not None:
        _compare_all_values(model, source, heads)
    result_tokenizer = _result_tokenizer(source, tokenizer) if form.whole else None
    stored = model.trunk.embedding.weight.dtype
    left = []
    if dtype is not None and getattr(torch, dtype) != stored:
        model = model.to(getattr(torch, dtype))
        if dtype != "float32":
            left.append(f"weights: rounded from {str(stored).removeprefix('torch.')} to {dtype}")
    with replacing_file(path) if form.is_file else replacing_directory(path) as temporary:
        left += form.write(model, temporary, result_tokenizer)
        form.name_base(temporary, str(Path(source).resolve() if Path(source).exists() else source))
        if form.whole and not form.is_file:
            _keep_generation(source, model, temporary / form.folder, always=tokenizer is None)
        checks = form.check(model, temporary, result_tokenizer)
    return {"path": str(path), "format": to, "left_out": left, "checks": [check.as_json() for check in checks]}


def _compare_all_values(model: Transformer, source: str | Path, heads: str | Path) -> None:
    """Raise UsageError if any value of the source is another than when the heads were trained; loading samples some."""
    from headstart.formats.registry import read_heads

    read_heads(heads).compare_base(model, Path(source), all_values=True)


def _result_tokenizer(source: str | Path, named: str | None) -> Tokenizer | None:
    """Return the tokenizer that is named, or the source's; a line reports that there is none."""
    from headstart.formats.huggingface import TOKENIZER_FILE
    from headstart.formats.registry import load_data_tokenizer, load_model_tokenizer

    found = load_model_tokenizer(source) if named is None else load_data_tokenizer(named)
    if found is None:
        say(f"{source}: has no {TOKENIZER_FILE}, so the result takes ids; give one with --tokenizer")
    return found


def _keep_generation(source: str | Path, model: Transformer, folder: Path, always: bool) -> None:
    """Copy generation_config.json of the source into `folder`: always, or if it names end tokens of the model."""
    from headstart.formats.generation_config import keep_generation, named_ends
    from headstart.formats.hub import local_path
    from headstart.formats.registry import format_at

    directory = local_path(source)
    directory /= format_at(directory).folder
    if always or named_ends(directory, model.config.vocab_size):
        keep_generation(directory, folder)


def _check_target(form: Format, name: str, source: Path, target: Path) -> None:
    """Raise UsageError for a target that would replace the source, or anything but an earlier result of the format."""
    if source == target or target in source.parents:
        raise UsageError(f"{target}: is where the source lies; name another place")
    if not target.exists():
        return
    if form.is_file and target.is_dir():
        raise UsageError(f"{target}: is a directory; {name} is one file, name it {target.name}/model.{name}")
    if not form.is_file and not target.is_dir():
        raise UsageError(f"{target}: is a file; name a new directory")
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not form.detect(target):
        raise UsageError(f"{target}: holds something else, and converting would replace it; name a new place")


def format_conversion(found: dict[str, Any]) -> str:
    """Return the result of `convert` as text."""
    lines = [f"not carried: {line}" for line in found["left_out"]]
    lines += [f"{'read back' if c['passed'] else 'not checked'} by {c['by']}: {c['found']}" for c in found["checks"]]
    return "\n".join([*lines, f"{found['format']}: {found['path']}"])
