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
    from headstart.commands.convert import convert as convert_model
    from headstart.commands.convert import format_conversion

    found = convert_model(source, target, to, dtype, tokenizer)
    print_json(found) if json else print(format_conversion(found))


def push(
    model: Positional[str],
    *,
    to: str,
    licence: str | None = None,
    base_model: str | None = None,
    evaluation: str | None = None,
    private: bool = False,
    new_card: bool = False,
    json: bool = False,
) -> None:
    """Put a model with a card that tells what was measured of it into a folder, or onto the Hugging Face hub.

    Args:
        model: a model directory.
        to: a folder, or OWNER/NAME on the hub (hf:OWNER/NAME where a folder might be meant).
        licence: identifier of its licence, as the hub knows it: apache-2.0, mit, ...
        base_model: hub id of the model that heads were added to.
        evaluation: a folder that headstart evaluate --out wrote, whose numbers the card tells.
        private: make a new repository on the hub private.
        new_card: replace a README.md that someone else wrote.
        json: print what was sent as JSON.
    """
    from headstart.commands.push import format_push
    from headstart.commands.push import push as push_model

    found = push_model(model, to, licence, base_model, evaluation, private, new_card)
    print_json(found) if json else print(format_push(found))
