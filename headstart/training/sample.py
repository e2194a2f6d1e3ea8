"""A text written in the middle of training, by the weights as they are, with all heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.transformer import TRAINING_ALONE, Transformer
from headstart.training.config import RunConfig


def prompt_tokens(tokenizer: Tokenizer, config: RunConfig) -> tuple[int, ...]:
    """`watch.sample_prompt` as token ids. Raises UsageError for one that fills the context, so call it at the start."""
    prompt = tuple(prompt_ids(tokenizer, config.watch.sample_prompt)) or (tokenizer.end_id,)
    if len(prompt) >= config.model.context:
        raise UsageError(
            f"watch.sample_prompt has {len(prompt)} tokens, model.context is {config.model.context}; shorten the prompt"
        )
    return prompt


def decode_sample(model: Transformer, tokenizer: Tokenizer, config: RunConfig) -> dict[str, Any]:
    """Greedy decoding of `watch.sample_tokens` tokens with all heads, in the dtype of training, where `model` lies.

    `model` must be whole (not sharded). It is only read: what decodes is a second module over the same numbers, so its
    weights, gradients, mode and the random state stay as they are. In float32 on a GPU it shares the memory of the
    weights; elsewhere it costs one copy of them in the dtype of decoding.

    Returns text, tokens, passes, tokens_per_pass and acceptance (of heads 2..n), for the key `sample` of metrics.jsonl.
    """
    dtype = torch.bfloat16 if config.in_bfloat16 else torch.float32
    with torch.device("meta"):
        twin = Transformer(model.config)
    kept = {name: w for name, w in model.state_dict().items() if name not in TRAINING_ALONE}
    weights = {name: nn.Parameter(w.detach().to(dtype), requires_grad=False) for name, w in kept.items()}
    twin.load_state_dict(weights, assign=True)
    prompt = prompt_tokens(tokenizer, config)
    # A handful of tokens is not worth compiling kernels for, nor fixing the shapes of a pass.
    packed = pack(twin, compiled=False)
    context = min(config.model.context, len(prompt) + config.watch.sample_tokens)
    engine = Engine(packed, context=context, tokenizer=tokenizer, exact=False)
    generation = generate_all(engine, [Request(prompt, config.watch.sample_tokens)])[0]
    stats = generation.stats
    return {
        "text": generation.text,
        "tokens": stats.tokens,
        "passes": stats.passes,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance": stats.acceptance,
    }


def shown(sample: dict[str, Any]) -> str:
    """One line for the person watching: tokens per pass and how the text begins."""
    text = repr(sample["text"])[1:-1]
    text = text if len(text) <= 80 else text[:80] + "..."
    return f"sample, {sample['tokens_per_pass']:.2f} tokens per pass: {text}"
