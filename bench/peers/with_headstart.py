"""Headstart: plain, exact, and with all heads, whose drafts are right at a given rate if weights are random."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import headstart
from bench import streams
from bench.streams import Synthetic, share_right
from headstart.data.prompts import encode_prompt, turn_ends
from headstart.decoding.settings import GenerationSettings, Request

PLAIN = "plain (K = 1, exact=False)"


class Peer:
    """Our decoder."""

    def __init__(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        self.version = f"headstart {headstart.__version__}, torch {torch.__version__}"
        # A GGUF file is decoded in its own types, a directory in the dtype of all.
        dtype = None if Path(case["model"]).is_file() or case["quantize"] else case["dtype"]
        heads = case.get("heads")
        self.model = headstart.load(case["model"], dtype=dtype, quantize=case["quantize"], heads=heads).transformer
        self.new_tokens = case["new_tokens"]
        self.variants: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
            PLAIN: partial(self.decode, heads=1, exact=False),
            "K = 1": partial(self.decode, heads=1),
        }
        heads, rate = self.model.config.heads, case["tokens_per_pass"]
        if heads > 1 and rate is None:
            self.variants[f"K = {heads}"] = partial(self.decode, heads=heads)
        elif heads > 1:
            share = share_right(rate, heads)
            self.variants[f"K = {heads}, synthetic acceptance"] = partial(self.decode, heads=heads, share=share)
        self._outputs: dict[str, list[list[int]]] = {}

    def decode(
        self, prompts: list[list[int]], *, heads: int, exact: bool = True, share: float | None = None
    ) -> dict[str, Any]:
        """Decode the prompts as one batch; `share`: see `Synthetic`."""
        requests = [Request(tuple(prompt), self.new_tokens, heads=heads) for prompt in prompts]
        synthetic = None if share is None else Synthetic(self.plain_outputs(requests), share)
        began = time.perf_counter()  # without the plain outputs, which right drafts need
        stream = streams.decode(self.model, requests, exact=exact, synthetic=synthetic)
        return {"stamps": stream.stamps, "tokens": stream.tokens, "prompt_seconds": stream.stamps[0][0] - began}

    def plain_outputs(self, requests: list[Request]) -> list[list[int]]:
        """Return what `streams.plain_outputs` does, decoded once."""
        key = str([request.prompt for request in requests])
        if key not in self._outputs:
            self._outputs[key] = streams.plain_outputs(self.model, requests)
        return self._outputs[key]


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Answer the prompts of `bench engines` greedily, with a chain of as many drafts as heads, for each of `heads`.

    The answers of a number of heads are those of an engine. "ends" are the tokens that end an answer.
    """
    torch.set_num_threads(case["threads"])
    model = headstart.load(case["model"], dtype=case["dtype"], heads=case["heads_from"])
    ends = frozenset(model.tokenizer.end_ids).union(*(turn_ends(model.tokenizer, each) for each in case["prompts"]))
    outputs: dict[int, list[dict[str, Any]]] = {heads: [] for heads in case["heads"]}
    for prompt in case["prompts"]:
        ids = encode_prompt(model.tokenizer, prompt)
        for heads, answers in outputs.items():
            settings = GenerationSettings(max_new_tokens=case["new_tokens"], heads=heads)
            stream = streams.decode(model.transformer, [settings.request(ids, ends=ends)])
            stats, first = stream.stats, stream.stamps[0][1][0]
            behind = stats.tokens + stats.ends - first
            answers.append({"prompt": ids, "tokens": stream.tokens[0], "behind": behind, "passes": stats.passes - 1})
    version = f"headstart {headstart.__version__}, torch {torch.__version__}"
    return {"version": version, "outputs": outputs, "ends": sorted(ends)}
