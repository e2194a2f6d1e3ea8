"""`headstart inspect`: show what a model holds: sizes, heads, wiring, files, measured acceptance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from headstart.commands.evaluate import ACCEPTANCE_FILE
from headstart.console import format_table, print_result
from headstart.errors import UsageError
from headstart.fileio import read_json

if TYPE_CHECKING:
    from headstart.model.config import ModelConfig


@dataclass(frozen=True)
class InspectSettings:
    """Show what a model directory holds: sizes, heads, wiring, acceptance."""

    model: Positional[str | None] = None
    """A model directory, a GGUF file, or one of the paper's sizes (1M, 3M, ... 13B) (None: the model in the box)."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md)."""
    json: bool = False
    """Print the result as JSON."""


def run(settings: InspectSettings) -> None:
    """Print what the model holds."""
    from headstart.formats.bundled import find_model

    path, heads = find_model(settings.model, settings.heads_from)
    found = inspect(path, heads)
    print_result(found, settings.json, format_inspection)


PRESET_HEADS = (1, 2, 4)
CACHE_DTYPES = ("bfloat16", "float32")
"""dtypes of cached keys and values; on CPUs float32, whatever the dtype of the weights (`decoding/cache.py`)."""
PARTS = ("embedding", "trunk", "heads", "unembedding", "total", "non_embedding", "next_token_path")


def inspect(path: str | Path, heads: str | Path | None = None) -> dict[str, Any]:
    """Return what the model at `path` holds, or the sizes of one of the paper's models ("100M").

    With a directory of draft heads, the model has them. No weights are read. Raises UsageError if `path` is neither, or
    the heads are for a model of other sizes.
    """
    import torch

    from headstart.decoding.memory import kv_bytes_per_token
    from headstart.formats.families import family_of
    from headstart.formats.hub import local_path
    from headstart.formats.registry import format_at, load_config, load_dtype, load_model_tokenizer
    from headstart.model.presets import PRESETS

    if str(path) in PRESETS and not Path(path).exists():
        return _inspect_preset(str(path))
    directory = local_path(path)
    if not directory.exists():
        raise UsageError(f"{path}: no such model; name a model directory, or one of the sizes {', '.join(PRESETS)}")
    config = load_config(directory, heads)
    tokenizer = load_model_tokenizer(directory)
    measured = directory if heads is None else local_path(heads)
    form = format_at(directory)
    files = _sizes_of(form.files(directory), directory)
    if heads is not None:
        kept = _sizes_of(format_at(measured).files(measured), measured)
        files |= {f"{measured.name}/{name}": size for name, size in kept.items()}
    found: dict[str, Any] = {
        "model": str(directory),
        **({} if heads is None else {"heads_from": str(measured)}),
        **_shape(config),
        "parameters": config.parameters(),
        "dtype": str(load_dtype(directory)).removeprefix("torch."),
        **form.details(directory),
        "files": files,
        "bytes": sum(files.values()),
        "tokenizer": None
        if tokenizer is None
        else {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end_id": tokenizer.end_id},
        "plain_decoder": config.kind.plain_decoder,
        "family": family_of(config).model_type,
        "kv_bytes_per_token": {name: kv_bytes_per_token(config, getattr(torch, name)) for name in CACHE_DTYPES},
    }
    if (measured / ACCEPTANCE_FILE).is_file():
        found["acceptance"] = read_json(measured / ACCEPTANCE_FILE)
    return found


def format_inspection(found: dict[str, Any]) -> str:
    """Format the result of `inspect` for people."""
    return _format_preset(found) if "preset" in found else _format_directory(found)


def head_tree(config: ModelConfig) -> str:
    """Return the tree of heads as text, rooted at the trunk, with a line for each head."""
    return "\n".join([f"trunk ({_blocks(config.trunk_layers)})", *_branches(config, 0, "")])


def _branches(config: ModelConfig, parent: int, indent: str) -> Iterator[str]:
    children = config.children(parent)
    for k in children:
        last = k == children[-1]
        description = "its parent's latent as it is" if config.kind.is_plain(k) else config.kind.describe(k)
        yield f"{indent}{'└─' if last else '├─'} head {k}: token t+{k}, {description}"
        yield from _branches(config, k, indent + ("   " if last else "│  "))


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "sizes": {
            **asdict(config),
            # The values of fields that a configuration leaves out.
            "kv_heads": config.key_value_heads,
            "head_dim": config.dim_per_head,
            "hidden_dim": config.hidden,
            "trunk_layers": config.trunk_layers,
        },
        "heads": config.heads,
        "head_kind": config.head_kind,
        "wiring": config.wiring,
        "context": config.context,
        "tree": head_tree(config),
    }


def _inspect_preset(name: str) -> dict[str, Any]:
    from headstart.model.presets import PRESETS, preset

    counts = {}
    for heads in PRESET_HEADS:
        if heads < PRESETS[name].layers:  # the trunk keeps a block
            counts[heads] = preset(name, heads=heads).parameters()
    return {
        "preset": name,
        **_shape(PRESETS[name]),
        "parameters_by_heads": counts,
        "totals_equal": len({parameters["total"] for parameters in counts.values()}) == 1,
    }


def _format_preset(found: dict[str, Any]) -> str:
    counts = found["parameters_by_heads"]
    rows = [[part, *(f"{parameters[part]:,}" for parameters in counts.values())] for part in PARTS]
    verdict = (
        "All have the same total: transformer heads are taken from the trunk."
        if found["totals_equal"]
        else "The totals differ."
    )
    return "\n".join(
        [
            f"{found['preset']}, a size of the paper (Table S14)",
            _sizes(found),
            "",
            format_table(["parameters", *(f"n = {n}" for n in counts)], rows),
            "",
            verdict,
        ]
    )


def _format_directory(found: dict[str, Any]) -> str:
    tokenizer = found["tokenizer"]
    lines = [
        found["model"] + (f", with the heads of {found['heads_from']}" if "heads_from" in found else ""),
        _sizes(found),
        f"weights: {'loaded as ' if 'tensor_types' in found else ''}{found['dtype']}, {_size(found['bytes'])} on disk",
        "tokenizer: "
        + (
            "none, prompts are token ids"
            if tokenizer is None
            else f"{tokenizer['name']}, {tokenizer['vocab_size']:,} ids, end {tokenizer['end_id']}"
        ),
        "other tools: "
        + (
            f"trunk and head 1 are an ordinary {found['family']} model, which transformers, vLLM and llama.cpp load"
            if found["plain_decoder"]
            else "only headstart reads this model: linear heads wired anticausally are no plain decoder"
        ),
        "keys and values: "
        + ", ".join(
            f"{_size(count)} a token ({_size(count * found['context'])} a full slot) in {name}"
            for name, count in found["kv_bytes_per_token"].items()
        ),
        "",
        f"{found['heads']} {found['head_kind']} {'head' if found['heads'] == 1 else 'heads'}, {found['wiring']}"
        f"{_drafted(found)}:",
        found["tree"],
        "",
        format_table(["parameters", ""], [[part, f"{found['parameters'][part]:,}"] for part in PARTS]),
        "",
        format_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in found["files"].items()]),
    ]
    if "tensor_types" in found:
        types = found["tensor_types"].items()
        rows = [[name, f"{counts['tensors']}", f"{counts['bytes']:,}"] for name, counts in types]
        template = "a chat template" if found["chat_template"] else "no chat template"
        lines += [
            "",
            f"GGUF of the architecture {found['architecture']}, with {template}",
            format_table(["stored as", "tensors", "bytes"], rows),
        ]
    if "acceptance" in found:
        lines += ["", "measured acceptance:", *_plain_lines(found["acceptance"], "  ")]
    return "\n".join(lines)


def _plain_lines(content: dict[str, Any], indent: str) -> Iterator[str]:
    """Format everything in the file: its writer decides what is worth showing."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _plain_lines(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{name}: {'  '.join(map(_plain, value))}"
        else:
            yield f"{indent}{name}: {_plain(value)}"


def _plain(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _sizes(found: dict[str, Any]) -> str:
    sizes = found["sizes"]
    unit = "SwiGLU" if sizes["activation"] == "silu" else "GeGLU"
    kv = "" if sizes["kv_heads"] == sizes["attention_heads"] else f" ({sizes['kv_heads']} for keys and values)"
    return (
        f"dim {sizes['dim']}, {_blocks(sizes['layers'])} in all, {sizes['attention_heads']} attention heads{kv}, "
        f"{unit} {sizes['hidden_dim']}, vocabulary {sizes['vocab_size']:,}{' (tied)' if sizes['tied'] else ''}, "
        f"context {sizes['context']:,}"
    )


def _drafted(found: dict[str, Any]) -> str:
    size = found["sizes"]["draft_vocab"]
    return "" if size is None else f", heads 2 and up over a draft vocabulary of {size:,} tokens"


def _blocks(number: int) -> str:
    return f"{number} {'block' if number == 1 else 'blocks'}"


def _sizes_of(files: Iterable[Path], model: Path) -> dict[str, int]:
    """Return the size of every file of a model by its path in the model's directory."""
    folder = model if model.is_dir() else model.parent
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
