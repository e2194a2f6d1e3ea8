"""The formats that `headstart convert` writes: for each, how it is written, and who reads it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json, regular
from headstart.formats.assembly import refuse_other_blocks
from headstart.formats.checks import (
    NEW_TOKENS,
    Check,
    compare_gguf_tensors,
    compare_logits,
    compare_texts,
    compare_with_llama_cpp,
    random_text,
)
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.gguf import save_gguf
from headstart.formats.hf_code_export import GENERATE_FILE, MODELING_FILE, save_hf_code, written_code
from headstart.formats.huggingface import load_model, save_model
from headstart.formats.medusa import BASE, TGI, VLLM, is_medusa, load_medusa, save_medusa
from headstart.formats.meta import is_meta_release, load_meta_release, save_meta_release
from headstart.formats.mimo import drafts_as_engines_compute, is_mimo, load_mimo, save_mimo
from headstart.model.transformer import Transformer


@dataclass(frozen=True)
class Format:
    """One format."""

    what: str
    """A line for help."""
    write: Callable[[Transformer, Path, Tokenizer | None], list[str]]
    """Writes the model into an empty folder (or the file), and tells in lines what could not be carried. Raises
    UsageError for a model that the format cannot express."""
    check: Callable[[Transformer, Path, Tokenizer | None], list[Check]]
    """Reads it back and compares; raises UsageError where it is not the same."""
    holds: Callable[[Path], bool]
    """Whether a path holds a result of this format, which may be replaced."""
    is_file: bool = False
    folder: str = ""
    """Where in the result the ordinary model lies."""


def _drops_heads(model: Transformer) -> list[str]:
    return ["head 2: left out" if model.config.heads == 2 else f"heads 2..{model.config.heads}: left out"]


def _all_heads(model: Transformer, again: Transformer, by: str = "headstart") -> Check:
    heads = model.config.heads
    return compare_logits(by, model, lambda tokens: again(tokens, heads=heads), heads)


def _own(path: Path) -> dict[str, object]:
    """config.json of a directory, {} where there is none that can be read."""
    try:
        return read_json(path / CONFIG_FILE)
    except UsageError:
        return {}


def _write_headstart(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
    save_model(model, path, tokenizer)
    return []


def _check_headstart(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    return [_all_heads(model, load_model(path))]


def _write_meta(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
    left = save_meta_release(model, path)
    if tokenizer is not None:
        left.append("tokenizer: the format takes a SentencePiece tokenizer.model, which headstart does not write")
    return left


def _check_meta(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    return [_all_heads(model, load_meta_release(path))]


def _write_hf_code(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
    save_hf_code(model, path, tokenizer)
    return []


def _check_hf_code(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    checks, heads = [_all_heads(model, load_model(path))], model.config.heads
    try:
        import transformers
    except ImportError:
        return [*checks, Check("transformers", "transformers is not installed: not compared", passed=None)]
    transformers.logging.disable_progress_bar()
    # As `trust_remote_code=True` does, without leaving the code in transformers' cache of modules.
    modeling, generating = written_code(path, MODELING_FILE), written_code(path, GENERATE_FILE)
    again = modeling.HeadstartForCausalLM.from_pretrained(path, dtype=model.trunk.embedding.weight.dtype)
    checks.append(compare_logits("transformers with the code", model, again.head_logits, heads))
    prompt = random_text(model)[:1, : model.config.context // 2]
    count = min(NEW_TOKENS, model.config.context // 2)
    settings: dict[str, Any] = {"max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    plain = transformers.LlamaForCausalLM.generate(again, prompt, **settings)[0, prompt.shape[1] :].tolist()
    found = generating.generate(prompt, model=again, return_dict_in_generate=True, **settings)
    drafted = found.sequences[0, prompt.shape[1] :].tolist()
    return [*checks, compare_texts("transformers with the code", model, plain, drafted, found.passes)]


def _check_medusa(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    return [
        _all_heads(model, load_medusa(path, heads_of=engine), f"headstart, as {engine} names them")
        for engine in (VLLM, TGI)
    ]


def _check_mimo(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    again = load_mimo(path)
    tokens_BT = random_text(model)
    ours = again(tokens_BT, heads=2)[:, :-1, 1].argmax(-1)
    same = drafts_as_engines_compute(again, tokens_BT).argmax(-1) == ours
    share = f"head 2 proposes the same token at {int(same.sum())} of {same.numel()} positions"
    return [
        compare_logits("headstart", model, lambda tokens: again(tokens, heads=2), 2),
        Check("headstart, position 0 zeroed as the engines do", share),
    ]


def _write_gguf(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
    refuse_other_blocks(model.config, "a GGUF file")
    left = _drops_heads(model) if model.config.heads > 1 else []
    left += save_gguf(model, path, tokenizer)
    if tokenizer is None:
        left.append("tokenizer: the source has none, so the file takes and gives ids")
    return left


def _check_gguf(model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
    checks = [compare_gguf_tensors(model, path), _check_gguf_in_transformers(model, path)]
    return [*checks, compare_with_llama_cpp(model, path, tokenizer)]


def _check_gguf_in_transformers(model: Transformer, path: Path) -> Check:
    try:
        import transformers
    except ImportError:
        return Check("transformers", "transformers is not installed: logits not compared", passed=None)
    if model.config.attention_bias:
        return Check("transformers", "its GGUF loader leaves out biases of attention: not compared", passed=None)
    transformers.logging.disable_progress_bar()
    again = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def logits(tokens: Tensor) -> Tensor:
        return again(tokens).logits[:, :, None]

    return compare_logits("transformers", model.float(), logits, 1)


def _is_gguf(path: Path) -> bool:
    with regular(path).open("rb") as file:
        return file.read(4) == b"GGUF"


FORMATS: dict[str, Format] = {
    "headstart": Format(
        "a model directory: an ordinary Hugging Face model with its further heads beside it",
        _write_headstart,
        _check_headstart,
        lambda path: "headstart" in _own(path),
    ),
    "hf-code": Format(
        "the same, with code by which transformers alone decodes with all heads",
        _write_hf_code,
        _check_hf_code,
        lambda path: (path / MODELING_FILE).is_file() and "headstart" in _own(path),
    ),
    "meta": Format(
        "Meta's multi-token release: consolidated.pth and params.json",
        _write_meta,
        _check_meta,
        is_meta_release,
    ),
    "medusa": Format(
        "medusa heads for vLLM and TGI, and the model below them",
        save_medusa,
        _check_medusa,
        is_medusa,
        folder=BASE,
    ),
    "mimo": Format(
        "sequential heads for vLLM and SGLang, in MiMo's layout",
        save_mimo,
        _check_mimo,
        is_mimo,
    ),
    "gguf": Format(
        "a GGUF file of trunk and head 1, for llama.cpp",
        _write_gguf,
        _check_gguf,
        _is_gguf,
        is_file=True,
    ),
}


def known_format(name: str) -> Format:
    """Raises UsageError for an unknown one."""
    if name not in FORMATS:
        raise UsageError(f"--to {name}: there is no such format; take one of {', '.join(FORMATS)}")
    return FORMATS[name]
