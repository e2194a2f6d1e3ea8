"""What was written against what it was written from: logits of every head, tensors, greedy text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.gguf import gguf_tensors
from headstart.model.transformer import Transformer

TOKENS = (2, 32)
"""Rows and length of the random text whose logits are compared, shorter where the context is."""
NEW_TOKENS = 32
"""Of a greedy text."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of logits, relative to the largest logit, that another order of sums may make."""
COARSE = 5e-2
"""The same in dtypes of fewer bits."""


@dataclass(frozen=True)
class Check:
    """One comparison that was made, or could not be."""

    by: str
    """What has read the result back."""
    found: str
    """What came out, for people."""
    differences: list[float] | None = None
    """Of each head, the largest difference of logits."""
    largest: float | None = None
    """The largest logit of all."""
    passed: bool | None = True
    """None: the comparison could not be made here."""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None or key == "passed"}


def random_text(model: Transformer) -> Tensor:
    """(B, T) int64: the same for every model of the same vocabulary and context."""
    config = model.config
    length = min(TOKENS[1], config.context)
    return torch.randint(0, config.vocab_size, (TOKENS[0], length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare_logits(by: str, model: Transformer, again: Callable[[Tensor], Tensor], heads: int) -> Check:
    """Logits of heads 1..`heads` of `model`, in its dtype, against those of what was read back.

    Args:
        by: what has read it.
        again: (B, T) int64 -> (B, T, heads, V) in any dtype; NaN where sequential heads lack the tokens between.

    Raises:
        UsageError: they differ by more than rounding.
    """
    tokens_BT = random_text(model)
    mine = model(tokens_BT, heads=heads).float()
    theirs = again(tokens_BT).float()
    known = ~mine.isnan()
    if mine.shape != theirs.shape or not torch.equal(known, ~theirs.isnan()):
        raise UsageError(f"{by}: read back, the result has logits of another shape; nothing was kept, report this")
    gaps = (mine.nan_to_num() - theirs.nan_to_num()).abs()
    differences = [float(gaps[:, :, k].max()) for k in range(heads)]
    largest = float(mine[known].abs().max())
    allowed = ROUNDING.get(model.trunk.embedding.weight.dtype, COARSE) * max(largest, 1e-3)
    if not all(math.isfinite(gap) and gap <= allowed for gap in differences):
        raise UsageError(
            f"{by}: read back, logits differ by {max(differences):.3g} where the largest is {largest:.3g}; "
            "nothing was kept, report this"
        )
    shown = ", ".join(f"head {k} {gap:.2g}" for k, gap in enumerate(differences, start=1))
    return Check(by, f"largest difference of logits {shown} (largest logit {largest:.3g})", differences, largest)


def compare_texts(by: str, model: Transformer, plain: list[int], drafted: list[int], passes: int) -> Check:
    """The greedy text of all heads against that of head 1 alone, which took a pass a token.

    Raises UsageError in float32 and float64 where they differ; with fewer bits near ties part them, which is told."""
    if plain == drafted:
        found = f"the same greedy text with all heads as without, {len(plain)} tokens in {passes} passes"
        return Check(by, found)
    if model.trunk.embedding.weight.dtype in ROUNDING:
        raise UsageError(f"{by}: writes another greedy text with all heads; nothing was kept, report this")
    same = next(i for i, pair in enumerate(zip([*plain, -1], [*drafted, -2])) if pair[0] != pair[1])
    return Check(by, f"greedy texts with and without heads part after {same} tokens, by rounding", passed=None)


@torch.no_grad()
def compare_gguf_tensors(model: Transformer, file: Path) -> Check:
    """Every tensor of a GGUF file, dequantised by the package gguf, against the model's."""
    import gguf

    reader = gguf.GGUFReader(file)
    stored = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    expected = dict(gguf_tensors(model))
    same = stored.keys() == expected.keys() and all(
        torch.equal(stored[name].view(tensor.shape), tensor.float()) for name, tensor in expected.items()
    )
    if not same:
        raise UsageError("gguf: read back, its tensors differ from the model's; nothing was kept, report this")
    return Check("gguf", f"all {len(stored)} tensors equal")


def greedy_tokens(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """What head 1 writes greedily."""
    engine = Engine(pack(model), context=len(prompt) + count)
    return generate_all(engine, [Request(tuple(prompt), count, heads=1)])[0].tokens


def compare_with_llama_cpp(model: Transformer, file: Path, tokenizer: Tokenizer | None) -> Check:
    """The greedy text that llama.cpp writes with a GGUF file against ours; where it is not installed, that is told."""
    try:
        import llama_cpp
    except ImportError:
        return Check("llama.cpp", "llama-cpp-python is not installed: greedy text not compared", passed=None)
    if tokenizer is None:
        return Check("llama.cpp", "a model of bare ids: greedy text not compared", passed=None)
    if model.trunk.embedding.weight.dtype != torch.float32:
        # llama.cpp multiplies 16-bit weights with rounded activations: greedy texts may part at near ties.
        return Check("llama.cpp", "compared in float32 only: convert with --dtype float32 to see it", passed=None)
    new = min(NEW_TOKENS, model.config.context // 2)
    prompt = tokenizer.encode("def f(x):")[: model.config.context - new]
    theirs = llama_cpp.Llama(
        str(file), n_ctx=model.config.context, n_threads=1, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    end = theirs.token_eos()
    written: list[int] = []
    for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == end or len(written) == new:
            break
        written.append(token)
    mine = greedy_tokens(model, prompt, new)
    mine = mine[: mine.index(end)] if end in mine else mine
    if written != mine:
        raise UsageError("llama.cpp: writes another greedy text than the model; nothing was kept, report this")
    return Check("llama.cpp", f"the same greedy text, {len(mine)} tokens")
