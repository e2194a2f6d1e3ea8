"""Commands that take a model elsewhere: convert, push."""

from __future__ import annotations

from typing import Literal

from tyro.conf import Positional

from headstart.cli.common import print_json


def convert(
    source: Positional[str],
    target: Positional[str],
    *,
    to: str = "headstart",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    json: bool = False,
) -> None:
    """Write a model in another format; it is read back and compared before it is called done.

    Args:
        source: a model directory, an ordinary Hugging Face model, or Meta's multi-token release.
        target: where the result goes: a new place, or an earlier result of the same format.
        to: headstart (an ordinary Hugging Face model, further heads beside it), hf-code (the same, with code by which
            transformers alone decodes with all heads), meta (Meta's multi-token release), medusa (heads for vLLM and
            TGI), mimo (sequential heads for vLLM and SGLang), gguf (head 1 for llama.cpp).
        dtype: what the weights are stored as (default: what they are).
        tokenizer: a tokenizer to write along: a directory, a tokenizer.json, or bytes (default: the source's).
        json: print what was compared as JSON.
    """
    from headstart.exchange.convert import convert as convert_model
    from headstart.exchange.convert import format_conversion

    found = convert_model(source, target, to, dtype, tokenizer)
    print_json(found) if json else print(format_conversion(found))
